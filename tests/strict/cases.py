"""What a row of the strict HTTP tables says: bytes of a request, and what must come of them."""

from collections.abc import Mapping
from dataclasses import dataclass

HOST = b"Host: relay.test"
LENGTH = b"Content-Length: 5"
CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
"""The body ``hello`` in the chunked coding."""


@dataclass(frozen=True)
class Case:
    """One or more requests, complete so that what follows them is another request.

    Attributes:
        data: their bytes.
        answers: status and code of each final response, in order: ``"201"``, ``"404 not-found"``.
        bodies: the bytes of each transfer that is committed.
        closes: whether the connection ends after the last response.
    """

    data: bytes
    answers: tuple[str, ...]
    bodies: tuple[bytes, ...] = ()
    closes: bool = False


Table = Mapping[str, Mapping[str, Case]]
"""Cases by section of the RFC, then by what is tried."""


def head(*fields: bytes, line: bytes = b"PUT /upload/x HTTP/1.1", host: bytes = HOST) -> bytes:
    """A request's head, up to and with its empty line."""
    return b"\r\n".join([line, *([host] if host else []), *fields, b"", b""])


def taken(data: bytes, body: bytes = b"hello", *, closes: bool = False) -> Case:
    """An upload like any other."""
    return Case(data, ("201",), (body,), closes)


def refused(data: bytes, answer: str = "400 bad-request") -> Case:
    """Answered with an error, and the connection ended."""
    return Case(data, (answer,), closes=True)
