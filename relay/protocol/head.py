"""The bytes of a request head: where it ends, and whether they are HTTP/1 message syntax.

h11 parses heads too, but more leniently than RFC 9112 allows, and its size limit depends on how
the bytes were cut. So every head passes here first. What the fields mean is ``request.py``'s
business. Pure: knows neither h11 nor I/O.
"""

import re
from typing import Final, NamedTuple

from relay.errors import BadRequest, HeadersTooLarge, HttpVersion

MAX_EMPTY_LINES: Final = 2
"""Empty lines skipped before a request line. RFC 9112, section 2.2 asks for at least one."""

Field = tuple[bytes, bytes]
"""A field's lower-case name and its value without surrounding white space."""

TCHARS: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
"""Regular expression for one or more tchar: a token (RFC 9110, section 5.6.2)."""

_TOKEN = re.compile(TCHARS.encode("ascii"))
_FIELD_LINE = re.compile(rb"(%b):[ \t]*([\t\x20-\x7e\x80-\xff]*)" % TCHARS.encode("ascii"))
_VISIBLE = re.compile(rb"[\x21-\x7e]+")
_VERSION = re.compile(rb"HTTP/([0-9]\.[0-9])")
# A bare CR or LF is a line end to some recipients and data to others: the root of request
# smuggling. Other control characters are refused with them (RFC 9110, section 5.5).
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\n(?<!\r\n)|\r[^\n]")
_TLS_HANDSHAKE = 0x16
_CR = 0x0D
_LF = 0x0A


class RawHead(NamedTuple):
    """A well-formed head, taken apart but not yet understood. Versions are like ``b"1.1"``."""

    method: bytes
    target: bytes
    headers: list[Field]
    http_version: bytes


class SectionReader:
    """Gathers bytes up to and with the first empty line.

    What it answers depends on the bytes only, never on how they were cut. After an exception it
    is of no more use.
    """

    def __init__(self, *, max_bytes: int, before: bytes = b"") -> None:
        """At most ``max_bytes``, the empty line included; ``before`` was read already."""
        self.buffer = bytearray(before)
        self.done = False
        self._max_bytes = max_bytes
        self._max = max_bytes + len(before)
        self._scanned = 0

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Take the section's share of ``data``; returns its size in bytes.

        Raises:
            BadRequest: a control character, or CR and LF other than as a pair.
            HeadersTooLarge: the section is over its limit.
        """
        buffer = self.buffer
        before = len(buffer)
        # One byte over the limit is enough to know; the rest of a large read is not copied.
        buffer += data[: self._max + 1 - before]
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        end = len(buffer) if end < 0 else end + 4
        if _FORBIDDEN.search(buffer, max(0, self._scanned - 1), end):
            raise BadRequest("control characters or bare line breaks in the headers")
        if end > self._max:
            raise HeadersTooLarge(f"headers of more than {self._max_bytes} bytes")
        self._scanned = end
        self.done = buffer.endswith(b"\r\n\r\n", 0, end)
        del buffer[end:]
        return end - before


class HeadReader:
    """Finds the next request head in the bytes of a connection."""

    def __init__(self, *, max_bytes: int) -> None:
        """``max_bytes``: of the request line, the fields and the final empty line together."""
        self._section = SectionReader(max_bytes=max_bytes)
        self._empty_lines = 0
        self._after_cr = False

    @property
    def started(self) -> bool:
        """Whether a request line has begun; empty lines before it do not count."""
        return bool(self._section.buffer)

    @property
    def done(self) -> bool:
        """Whether the head is complete."""
        return self._section.done

    @property
    def head(self) -> bytes:
        """The head with its final empty line, without empty lines before it; once ``done``."""
        return bytes(self._section.buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Take the head's share of ``data``; returns its size, ``len(data)`` while not ``done``.

        Raises:
            BadRequest: not HTTP/1, or control characters or bare CR or LF in it.
            HeadersTooLarge: the head is over its limit.
        """
        start = 0 if self.started else self._skip_empty_lines(data)
        if start == len(data):
            return start
        if not self.started:
            _check_first_byte(data[start])
        return start + self._section.feed(memoryview(data)[start:] if start else data)

    def _skip_empty_lines(self, data: bytes | bytearray | memoryview) -> int:
        for index, byte in enumerate(data):
            if self._after_cr:
                if byte != _LF:
                    raise BadRequest("a bare CR before the request line")
                self._after_cr = False
                self._empty_lines += 1
                if self._empty_lines > MAX_EMPTY_LINES:
                    raise BadRequest("too many empty lines before the request line")
            elif byte == _CR:
                self._after_cr = True
            else:
                return index
        return len(data)


def _check_first_byte(byte: int) -> None:
    if byte == _TLS_HANDSHAKE:
        raise BadRequest("this looks like TLS, but this port speaks plain HTTP")
    if not _TOKEN.fullmatch(bytes((byte,))):
        raise BadRequest("not an HTTP request")


def check_head(head: bytes, *, max_headers: int) -> RawHead:
    """Take a head (with its final empty line) apart, strictly by RFC 9112, sections 2 to 5.

    Raises:
        BadRequest: it breaks the grammar, or uses obsolete line folding.
        HttpVersion: a major version other than 1.
        HeadersTooLarge: more than ``max_headers`` fields.
    """
    lines = head.split(b"\r\n")
    if lines[-2:] != [b"", b""] or len(lines) < 3:
        raise BadRequest("the request head is incomplete")
    method, target, version = _parse_request_line(lines[0])
    # The request line and two empty strings behind the last two line breaks are not fields.
    if len(lines) - 3 > max_headers:
        raise HeadersTooLarge(f"more than {max_headers} header fields")
    return RawHead(method, target, [parse_field(line) for line in lines[1:-2]], version)


def _parse_request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    words = line.split(b" ")
    if len(words) != 3:
        raise BadRequest("the request line is not method, target and version, one space between")
    method, target, protocol = words
    version = _VERSION.fullmatch(protocol)
    if not _TOKEN.fullmatch(method) or not _VISIBLE.fullmatch(target) or version is None:
        raise BadRequest("the request line is malformed")
    number = version[1]
    # Any 1.x is to be read as the highest 1.x that one knows (RFC 9110, section 2.5).
    if not number.startswith(b"1."):
        raise HttpVersion("this server speaks HTTP/1.1 only")
    return method, target, number


def parse_field(line: bytes) -> Field:
    """A field line, without its line break, as lower-case name and value.

    Raises:
        BadRequest: it is malformed (RFC 9112, section 5), or the continuation of another line.
    """
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(_what_is_wrong(line))
    return match[1].lower(), match[2].rstrip(b" \t")


def _what_is_wrong(line: bytes) -> str:
    name, colon, _ = line.partition(b":")
    if line.startswith((b" ", b"\t")):
        return "a header field is folded over several lines"
    if not colon:
        return "a header field has no colon"
    if name != name.rstrip(b" \t"):
        return "there is white space between a header field's name and its colon"
    if not _TOKEN.fullmatch(name):
        return "a header field's name is not a token"
    return "a header field's value has control characters"
