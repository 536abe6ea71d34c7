"""What an upload request asks for: the meaning of its head, or why it is refused.

Holds requests to RFC 9110 and 9112 where h11 is lenient and two recipients could read them
differently; accepts what real clients send. Its input is what ``check_head`` made of the head's
bytes. Which routes exist, who may use them and what limits apply is the handler's to know. Pure:
knows neither h11 nor I/O.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import http_sf

from relay.errors import (
    BadMultipart,
    BadRequest,
    ExpectationFailed,
    Unimplemented,
    UnsupportedMediaType,
)
from relay.model import PartHead
from relay.protocol.digest_fields import given_digests, wanted_digests
from relay.protocol.disposition import disposition_params, media_type_params
from relay.protocol.framing import ALGORITHMS
from relay.protocol.head import TCHARS, Field
from relay.protocol.target import destination, is_authority
from relay.protocol.trace_context import NO_TRACE, TraceContext, trace_context

MAX_CONTENT_LENGTH: Final = 2**63 - 1
"""Sizes are signed 64-bit integers in frames."""

_CONTENT_LENGTH = re.compile(rb"[0-9]{1,19}")
_TRANSFER_CODING = re.compile(TCHARS.encode("ascii"))
_MEDIA_TYPE = re.compile(rf"{TCHARS}/{TCHARS}[ \t]*(?:;[^\x80-\x9f]*)?")
_BCHARS = r"0-9A-Za-z'()+_,\-./:=?"  # RFC 2046, section 5.1.1
_BOUNDARY = re.compile(rf'"([{_BCHARS} ]{{0,69}}[{_BCHARS}])"|([{_BCHARS}]{{1,70}})')
_BARE_KEY = re.compile(rb"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """An upload that may be admitted, as far as its head tells.

    Attributes:
        method: ``POST`` or ``PUT``.
        route: the route's name, whether or not there is such a route.
        boundary: of multipart/form-data; None if the body is one raw part.
        part: describes the raw part; empty if there is a boundary.
        content_length: bytes of the body, 0 if the request has none; None if it is chunked.
        expect_continue: the client waits for 100 before it sends the body.
        keep_alive: the connection may be used again. HTTP/1.0 connections may not, as in h11.
        idempotency_key: without its quotes; None if the client sent none.
        given_digests: of the raw part, algorithm to lower-case hex; empty if there is a boundary,
            for the digest of a form is that of its encoding.
        wanted_digests: algorithms that the client asks for, keys of ``ALGORITHMS``.
        trace: the trace that it belongs to.
        authorization: the Authorization field as it came; a secret, and no part of the repr.
    """

    method: str
    route: str
    boundary: str | None
    part: PartHead
    content_length: int | None
    expect_continue: bool
    keep_alive: bool
    idempotency_key: str | None
    given_digests: Mapping[str, str]
    wanted_digests: tuple[str, ...]
    trace: TraceContext = NO_TRACE
    authorization: bytes | None = field(default=None, repr=False)

    @property
    def chunked(self) -> bool:
        """Whether the body has the chunked transfer coding."""
        return self.content_length is None

    @property
    def digests(self) -> tuple[str, ...]:
        """Algorithms to compute for this request, beside crc32c and those of the route."""
        asked = (*self.wanted_digests, *self.given_digests)
        return tuple(dict.fromkeys(name for name in asked if name in ALGORITHMS))


def parse_request(
    method: bytes, target: bytes, headers: Sequence[Field], http_version: bytes
) -> RequestHead:
    """Understand a request's head.

    Takes the items of a ``RawHead``. Not h11's: it merges equal Content-Length fields into one.
    Errors of framing come first, so that after any other the body's end is known.

    Raises:
        ClientError: BadRequest, BadMultipart, NotFound, MethodNotAllowed, UnsupportedMediaType,
            ExpectationFailed or Unimplemented.
    """
    fields = _Fields(headers)
    is_http_10 = http_version == b"1.0"
    _check_host(fields, is_http_10=is_http_10)
    content_length = _content_length(fields, is_http_10=is_http_10)
    route, filename = destination(method, target)
    content_type = _content_type(fields)
    boundary = None
    # PUT stores the body as it is, whatever it is, under the name in the path.
    if method == b"POST" and content_type is not None:
        boundary = _boundary(content_type)
    _check_content(fields)
    part, given = PartHead(), given_digests(headers)
    if boundary is None:
        filename = _filename(fields) if filename is None else filename
        part = PartHead(filename=filename, content_type=content_type)
    else:
        given = {}
    return RequestHead(
        method=method.decode("ascii"),
        route=route,
        boundary=boundary,
        part=part,
        content_length=content_length,
        expect_continue=not is_http_10 and _expects_continue(fields) and content_length != 0,
        keep_alive=not is_http_10 and b"close" not in fields.members(b"connection"),
        idempotency_key=_idempotency_key(fields),
        given_digests=given,
        wanted_digests=wanted_digests(headers),
        trace=trace_context(fields.all(b"traceparent"), fields.all(b"tracestate")),
        authorization=fields.single(b"authorization"),
    )


class _Fields:
    """Access to header fields by name."""

    def __init__(self, headers: Sequence[Field]) -> None:
        self._values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            self._values.setdefault(name, []).append(value)

    def all(self, name: bytes) -> Sequence[bytes]:
        """The values of every field of that name."""
        return self._values.get(name, ())

    def single(self, name: bytes) -> bytes | None:
        """The value of a field that a message has at most once."""
        values = self.all(name)
        if len(values) > 1:
            raise BadRequest(f"more than one {name.decode('ascii').title()} field")
        return values[0] if values else None

    def text(self, name: bytes) -> str | None:
        """A single field that may hold more than ASCII."""
        value = self.single(name)
        try:
            return None if value is None else value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest(f"{name.decode('ascii').title()} is not UTF-8") from None

    def members(self, name: bytes) -> list[bytes]:
        """The lower-case members of a list field, without empty ones (RFC 9110, 5.6.1)."""
        values = self._values.get(name)
        if values is None:
            return []
        members = b",".join(values).lower().split(b",")
        return [member for raw in members if (member := raw.strip(b" \t"))]


def _check_host(fields: _Fields, *, is_http_10: bool) -> None:
    """RFC 9112, section 3.2. An empty host is invalid for http (RFC 9110, section 4.2.1)."""
    host = fields.single(b"host")
    if host is None and not is_http_10:
        raise BadRequest("there is no Host field")
    if host is not None and not is_authority(host):
        raise BadRequest("the Host field is invalid")


def _content_length(fields: _Fields, *, is_http_10: bool) -> int | None:
    """The body's size, None if chunked (RFC 9112, sections 6.1 to 6.3)."""
    lengths = fields.all(b"content-length")
    codings = fields.all(b"transfer-encoding")
    if codings:
        if lengths:
            raise BadRequest("both Content-Length and Transfer-Encoding")
        if is_http_10:
            raise BadRequest("Transfer-Encoding in HTTP/1.0")
        _check_chunked(codings)
        return None
    if not lengths:
        return 0
    # RFC 9110, section 8.6 lets a recipient take equal values for one; no client sends them.
    length = fields.single(b"content-length") or b""
    if not _CONTENT_LENGTH.fullmatch(length) or int(length) > MAX_CONTENT_LENGTH:
        raise BadRequest("Content-Length is not a valid number of bytes")
    return int(length)


def _check_chunked(values: Sequence[bytes]) -> None:
    """Allow "chunked" and nothing else, in one field, without parameters or empty members."""
    codings = [coding.strip(b" \t") for coding in b",".join(values).lower().split(b",")]
    if codings == [b"chunked"]:
        return
    if not all(map(_TRANSFER_CODING.fullmatch, codings)) or b"chunked" in codings[:-1]:
        raise BadRequest("Transfer-Encoding is malformed, or chunked is not its last coding")
    raise Unimplemented("no transfer coding other than chunked is supported")


def _expects_continue(fields: _Fields) -> bool:
    expectations = fields.members(b"expect")
    if any(expectation != b"100-continue" for expectation in expectations):
        raise ExpectationFailed("no expectation other than 100-continue is supported")
    return bool(expectations)


def _check_content(fields: _Fields) -> None:
    if any(coding != b"identity" for coding in fields.members(b"content-encoding")):
        raise UnsupportedMediaType("no content coding is supported")
    # A fragment must not pass for the whole (RFC 9110, section 14.5).
    if fields.all(b"content-range"):
        raise BadRequest("partial uploads (Content-Range) are not supported")


def _content_type(fields: _Fields) -> str | None:
    content_type = fields.text(b"content-type")
    if content_type is not None and not _MEDIA_TYPE.fullmatch(content_type):
        raise BadRequest("Content-Type is not a media type")
    return content_type


def _boundary(content_type: str) -> str | None:
    """The boundary of multipart/form-data; None if the type is not multipart at all."""
    media_type = content_type.partition(";")[0].strip(" \t").lower()
    if not media_type.startswith("multipart/"):
        return None
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType("no multipart type other than form-data is supported")
    try:
        parameters = media_type_params(content_type)
    except ValueError:
        raise BadMultipart("the parameters of Content-Type are malformed") from None
    match = _BOUNDARY.fullmatch(parameters.get("boundary", ""))
    if match is None:
        raise BadMultipart("the boundary parameter of Content-Type is missing or invalid")
    return match[1] or match[2]


def _filename(fields: _Fields) -> str | None:
    value = fields.text(b"content-disposition")
    if value is None:
        return None
    try:
        return disposition_params(value).filename
    except ValueError:
        raise BadRequest("Content-Disposition is malformed") from None


def _idempotency_key(fields: _Fields) -> str | None:
    """The key: a String (draft-ietf-httpapi-idempotency-key-header), or bare as many send it.

    ``"abc"`` and ``abc`` are the same key: 1 to 255 visible ASCII characters, bare ones without
    quote, backslash, comma and semicolon; a quoted one may also have spaces.
    """
    value = fields.single(b"idempotency-key")
    if value is None:
        return None
    if _BARE_KEY.fullmatch(value):
        return value.decode("ascii")
    try:
        parsed = http_sf.parse(value, tltype="item")
    except http_sf.StructuredFieldError:
        parsed = None
    key = parsed[0] if isinstance(parsed, tuple) else None
    if not isinstance(key, str) or not 1 <= len(key) <= 255:
        raise BadRequest("Idempotency-Key is not a string of 1 to 255 characters")
    return key
