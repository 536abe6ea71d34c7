"""A request body's bytes to parts: multipart/form-data, or one raw part.

Wraps multipart's push parser in strict mode and adds what a relay needs: the same answer however
the bytes are cut, limits with relay's own errors, names as clients sent them. Pure: knows neither
HTTP nor I/O, and never keeps more than one delimiter or one part's headers.
"""

import re
from collections.abc import Iterator
from enum import Enum
from typing import Final, Protocol

import multipart

from relay.errors import BadMultipart, HeadersTooLarge, TooLarge
from relay.model import PartHead
from relay.protocol.disposition import disposition_params
from relay.protocol.head import TCHARS

EPILOGUE_LIMIT: Final = 16
"""Bytes of white space allowed after the closing delimiter; browsers and curl send CRLF."""

_CONTROL = re.compile(rb"[\r\n\0]")
# The library strips all that Unicode calls white space from a name; other parsers do not.
_FIELD_NAME = re.compile(rb"%b(?=:)" % TCHARS.encode("ascii"))
_NO_CONTROLS = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f-\x9f]*")

_USED_HEADERS = frozenset({"Content-Disposition", "Content-Type"})


class PartEnd(Enum):
    """The event that ends a part."""

    PART_END = "part end"


PART_END: Final = PartEnd.PART_END
Event = PartHead | bytes | PartEnd
"""A part begins; bytes of its content; it ends. Always in this order."""


class BodyParser(Protocol):
    """What turns body bytes into part events. Iterators must be consumed before the next call."""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Add bytes of the body."""

    def finish(self) -> Iterator[Event]:
        """The body is complete."""


class RawBody:
    """The whole body is the content of one part."""

    def __init__(self, head: PartHead, *, max_part_bytes: int = 0) -> None:
        """``max_part_bytes`` 0: no limit."""
        self._head: PartHead | None = head
        self._room = _Room(max_part_bytes)

    def feed(self, data: bytes) -> Iterator[Event]:
        """Add bytes.

        Raises:
            TooLarge: the part is over its limit.
        """
        yield from self._start()
        self._room.take(len(data))
        yield data

    def finish(self) -> Iterator[Event]:
        """End the part, which may be empty."""
        yield from self._start()
        yield PART_END

    def _start(self) -> Iterator[Event]:
        if self._head is not None:
            head, self._head = self._head, None
            yield head


class FormData:
    """multipart/form-data (RFC 7578)."""

    def __init__(
        self, boundary: str, *, max_parts: int, max_part_bytes: int, max_part_header_bytes: int
    ) -> None:
        """``boundary`` as in Content-Type, validated; ``max_part_bytes`` 0: no limit."""
        self._parser = _Parser(boundary, max_parts, max_part_header_bytes)
        self._opening = b"--" + boundary.encode("ascii")
        self._start: bytes | None = b""
        self._room = _Room(max_part_bytes)
        self._epilogue = 0
        self._complete = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """Add bytes.

        Raises:
            BadMultipart: not valid multipart/form-data.
            TooLarge: a part, or the number of parts, is over its limit.
            HeadersTooLarge: a part's headers are over their limit.
        """
        if self._complete:
            self._check_epilogue(data)
            return
        if self._start is not None:
            self._start += data
            if len(self._start) < len(self._opening) + 2:
                return
            data, self._start = self._start, None
            # The library finds a boundary behind a preamble only if both are in one read.
            if not data.startswith((self._opening, b"\r\n" + self._opening)):
                raise BadMultipart("the body does not begin with the boundary of its Content-Type")
        carry = self._parser.carry
        try:
            yield from self._parse(data)
        except multipart.MultipartError as exc:
            self._parser.check_unfinished_line(carry + data)
            raise BadMultipart(f"malformed multipart body: {exc}") from exc
        if self._parser.complete:
            self._complete = True
            self._check_epilogue(self._parser.carry)

    def finish(self) -> Iterator[Event]:
        """Check that the body is complete and has a part. Yields nothing.

        Raises:
            BadMultipart: otherwise.
        """
        if not self._complete:
            raise BadMultipart("the body ends before its closing boundary")
        if not self._parser.parts:
            raise BadMultipart("the body has no part")
        yield from ()

    def _parse(self, data: bytes) -> Iterator[Event]:
        for event in self._parser.parse(data):
            if event is None:
                yield PART_END
            elif isinstance(event, multipart.MultipartSegment):
                self._room.refill()
                yield PartHead(
                    name=event.name, filename=event.filename, content_type=event.content_type
                )
            else:
                self._room.take(len(event))
                yield bytes(event)

    def _check_epilogue(self, data: bytes) -> None:
        # RFC 2046 lets anything follow the closing delimiter. Bytes that are in no part would be
        # lost under a 201, so only the line break that clients really send is let through.
        self._epilogue += len(data)
        if self._epilogue > EPILOGUE_LIMIT or data.strip(b" \t\r\n"):
            raise BadMultipart("unexpected data after the closing boundary")


class _Room:
    """What is left of a part's size limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def refill(self) -> None:
        self._left = self._limit

    def take(self, size: int) -> None:
        self._left -= size
        if self._limit and self._left < 0:
            raise TooLarge(f"a part is larger than {self._limit} bytes")


class _Parser(multipart.PushMultipartParser):
    """The library's parser, through the hooks it has for subclasses."""

    def __init__(self, boundary: str, max_parts: int, max_part_header_bytes: int) -> None:
        # The library's limit only keeps a line without end from filling the memory: whether it sees
        # one that is too long depends on how the bytes were cut.
        super().__init__(
            boundary,
            max_header_size=max_part_header_bytes,
            max_header_count=max_part_header_bytes,
            strict=True,
        )
        self.parts = 0
        self._max_parts = max_parts
        self._max_part_header_bytes = max_part_header_bytes
        self._header_bytes = 0

    @property
    def complete(self) -> bool:
        return self._state is multipart._COMPLETE

    @property
    def carry(self) -> bytes:
        """What has been fed and not yet been used; once complete, what came after the end."""
        return bytes(self._buffer)

    def _on_segment_start(self) -> None:
        if self.parts >= self._max_parts:
            raise TooLarge(f"more than {self._max_parts} parts")
        self.parts += 1
        self._header_bytes = 0
        super()._on_segment_start()  # type: ignore[no-untyped-call]  # a hook of theirs

    def check_unfinished_line(self, data: bytes) -> None:
        """Raise our own error if the library has refused a header line before its end.

        ``data`` is all that the parser had to go by. Which of a line's faults the library meets
        first depends on where the bytes were cut; ours is always the first one in the line.
        """
        if self._state is multipart._HEADER:
            self._check_line(data.rpartition(b"\r\n")[2])

    def _check_line(self, line: bytes) -> None:
        room = self._max_part_header_bytes - self._header_bytes - len(b"\r\n")
        # Bare CR and LF would be refused or taken depending on where the bytes were cut.
        control = _CONTROL.search(line)
        if control is not None and control.start() < room:
            raise BadMultipart("control characters in a part's headers")
        if len(line) > room:
            raise HeadersTooLarge("a part's headers are over the limit")

    def _on_segment_headerline(self, line: bytes) -> None:
        self._check_line(line)
        self._header_bytes += len(line) + len(b"\r\n")
        name = _FIELD_NAME.match(line)
        if name is None:
            raise BadMultipart("a part's header is not a name, a colon and a value")
        # RFC 7578, section 4.8: headers other than the three it names must be ignored. The
        # library would believe a Content-Length and refuse parts whose sender got it wrong.
        if name[0].lower() == b"content-length":
            return
        try:
            super()._on_segment_headerline(line)
        except multipart.MultipartError as exc:
            raise BadMultipart(f"malformed multipart body: {exc}") from exc
        # Thousands of headers fit into the limit, and each would cost far more than its bytes.
        if self._segment_headerlist[-1][0] not in _USED_HEADERS:
            self._segment_headerlist.pop()

    def _create_segment(self, headerlist: list[tuple[str, str]]) -> multipart.MultipartSegment:
        segment = multipart.MultipartSegment([])
        segment.headerlist = headerlist
        values = [value for name, value in headerlist if name == "Content-Disposition"]
        types = [value.rstrip(" \t") for name, value in headerlist if name == "Content-Type"]
        if len(values) != 1 or len(types) > 1:
            raise BadMultipart("a part needs one Content-Disposition and at most one Content-Type")
        try:
            kind, segment.name, segment.filename = disposition_params(values[0])
        except ValueError as exc:
            raise BadMultipart("a part's Content-Disposition is malformed") from exc
        if kind != "form-data" or segment.name is None:
            raise BadMultipart("a part's Content-Disposition is not form-data with a name")
        segment.content_type = types[0] if types else None
        if types and not _NO_CONTROLS.fullmatch(types[0]):
            raise BadMultipart("control characters in a part's Content-Type")
        return segment
