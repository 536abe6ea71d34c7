"""Uploads as clients make them, and what an upload may cost.

The clients here speak HTTP by hand over a socket, where tests must decide which bytes leave when.
What knows RabbitMQ is in ``queue_reader.py``.
"""

import json
import random
import re
import select
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import parse_headers
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

from relay.demo.daemon import Daemon
from relay.protocol.framing import RECEIPT_TEXT
from relay.server.uploads import READ_BUDGET, READ_SIZE_MIN

FRAME_SIZE: Final = 131064
"""Bytes of a full frame, unless a route says otherwise."""

WEBKIT_BOUNDARY: Final = "----WebKitFormBoundary7MA4YWxkTrZu0gW9"
ANSWER_TIMEOUT: Final = 60.0
"""Seconds for the daemon to take or give bytes; a test that waits longer has failed."""


CONNECTION_COST: Final = 64 * 1024
"""Bytes of memory for a connection: its task, and a head of 16 KiB as read, whole and parsed."""

READ_COPIES: Final = 3
"""Copies of what was read, at worst: as read, as the form parser joined it to what it had carried
over, and as the parser cut it where it ends in what may be a delimiter."""

RECEIPT_COST: Final = 100 * 1024 + 4 * RECEIPT_TEXT
"""Bytes of memory for a receipt: 1 KiB for each of the 100 parts it lists, and their names."""


def memory_ceiling(
    base: int,
    *,
    connections: int,
    uploads: int,
    window: int = 64 << 20,
    frame_size: int = FRAME_SIZE,
) -> int:
    """The most resident memory, in bytes, that the daemon may ever have.

    This is the formula that the README states. ``base`` is what the daemon has when it is idle;
    ``connections`` counts all, those of uploads included; ``window`` is ``amqp.window``.
    """
    upload = READ_COPIES * READ_SIZE_MIN + 2 * frame_size + RECEIPT_COST
    reads = READ_COPIES * READ_BUDGET
    return base + connections * CONNECTION_COST + reads + uploads * upload + 2 * window


@dataclass(frozen=True)
class Part:
    """A part as the client's program knows it; ``name`` None for a raw body."""

    data: bytes
    name: str | None = None
    filename: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class Answer:
    """A final response, whoever received it."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def content(size: int) -> bytes:
    """Bytes without structure, the same for the same size."""
    return random.Random(size).randbytes(size)


def browser_form(parts: Iterable[Part]) -> tuple[str, bytes]:
    """Content-Type and body of a form as WebKit, Blink and Gecko send it.

    Names are UTF-8 with quotes and line breaks percent-encoded and nothing else (WHATWG HTML,
    "multipart/form-data encoding algorithm").
    """
    body = bytearray()
    for part in parts:
        assert part.name is not None
        body += f'--{WEBKIT_BOUNDARY}\r\nContent-Disposition: form-data; name="'.encode()
        body += _browser_name(part.name) + b'"'
        if part.filename is not None:
            body += b'; filename="' + _browser_name(part.filename) + b'"'
        if part.content_type is not None:
            body += f"\r\nContent-Type: {part.content_type}".encode()
        body += b"\r\n\r\n" + part.data + b"\r\n"
    body += f"--{WEBKIT_BOUNDARY}--\r\n".encode()
    return f"multipart/form-data; boundary={WEBKIT_BOUNDARY}", bytes(body)


def _browser_name(name: str) -> bytes:
    name = re.sub(r"\r\n|\r|\n", "\r\n", name)
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode()


def request(
    path: str, body: bytes, content_type: str | None = None, *headers: str, method: str = "POST"
) -> bytes:
    """A whole request with Content-Length; ``headers`` are lines such as ``"Expect: x"``."""
    return request_head(path, len(body), content_type, *headers, method=method) + body


def request_head(
    path: str, size: int, content_type: str | None = None, *headers: str, method: str = "POST"
) -> bytes:
    """The head of a request whose body has ``size`` bytes."""
    lines = [f"{method} {quote(path)} HTTP/1.1", "Host: relay.test", f"Content-Length: {size}"]
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def chunked(body: bytes, sizes: Sequence[int]) -> bytes:
    """``body`` in the chunked coding: chunks of ``sizes`` in turn, as often as it takes."""
    coded = bytearray()
    position = turn = 0
    while position < len(body):
        piece = body[position : position + sizes[turn % len(sizes)]]
        coded += b"%x\r\n%b\r\n" % (len(piece), piece)
        position += len(piece)
        turn += 1
    return bytes(coded + b"0\r\n\r\n")


class RawConnection:
    """A client's connection of which every byte is the test's own; a context manager."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=ANSWER_TIMEOUT)
        self._reader = self._socket.makefile("rb")

    def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``."""
        self._socket.sendall(data)

    def interim(self) -> int:
        """Receive one interim response, and nothing after it. Returns its status."""
        status, _ = self._head()
        assert 100 <= status < 200
        return status

    def answer(self) -> Answer:
        """Receive one final response; its Content-Length says where it ends."""
        status, length = self._head()
        assert status >= 200
        return Answer(status, self._reader.read(length))

    def has_answer(self) -> bool:
        """Whether there is anything to receive, without waiting for it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def at_end(self) -> bool:
        """Whether the daemon has ended the connection, with nothing left to read."""
        return self._reader.read(1) == b""

    def _head(self) -> tuple[int, int]:
        line = self._reader.readline()
        assert line.startswith(b"HTTP/1.1 "), f"not a response: {line!r}"
        headers = parse_headers(self._reader)
        return int(line.split()[1]), int(headers.get("Content-Length", "0"))

    def close(self) -> None:
        """Close it."""
        self._reader.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def upload(daemon: Daemon, route: str = "plain", body: bytes = b"hello") -> Answer:
    """A raw upload on a connection of its own."""
    with RawConnection(daemon.address) as connection:
        connection.send(request(f"/upload/{route}", body))
        return connection.answer()


def check_problem(answer: Answer, status: int, code: str) -> str:
    """The answer is that problem; returns its detail."""
    assert (answer.status, answer.json()["code"]) == (status, code)
    return str(answer.json()["detail"])
