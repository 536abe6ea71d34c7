"""Chunked bodies: whether their bytes are unambiguous, and where they end.

h11 decodes them, but lets pass what RFC 9112 forbids (a bare CR in an extension, sizes that
overflow) and limits neither extensions nor the number of trailers. So the bytes pass here first;
chunk data is skipped by arithmetic. "Chunk" is HTTP's word and means nothing else in relay. Pure:
knows neither h11 nor I/O.
"""

import re
from enum import Enum, auto
from typing import Final

from relay.errors import BadRequest, HeadersTooLarge
from relay.protocol.head import TCHARS, Field, SectionReader, parse_field

MAX_SIZE_LINE: Final = 256
"""Bytes of a chunk's size and extensions."""

MAX_OVERHEAD: Final = 16 * 1024
"""Bytes of size lines that a body may have beyond ``_FREE_PER_CHUNK`` plus twice its data.

Go's net/http counts likewise: a stream of any length may have an extension on each chunk, but
not consist of them (RFC 9112, section 7.1.1 asks for a limit).
"""

MAX_CHUNKS: Final = 256
"""Chunks taken at once. A read has room for 100,000 of one byte, which take 20 us each."""

_FREE_PER_CHUNK = 16
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_TOKEN = TCHARS.encode("ascii")
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
# RFC 9112, section 7.1, without white space: no sender may make it, and recipients differ on it.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;%b(?:=(?:%b|%b))?)*" % (_TOKEN, _TOKEN, _QUOTED))
# Fields that frame, route, authenticate or describe the content must not come after it
# (RFC 9110, section 6.5.1).
_FORBIDDEN_TRAILERS: Final = frozenset(
    {
        b"authorization",
        b"connection",
        b"content-disposition",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"expect",
        b"host",
        b"idempotency-key",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class _State(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILERS = auto()
    DONE = auto()


class ChunkedValidator:
    """Follows one chunked body.

    What it answers depends on the bytes only, never on how they were cut. After an exception it
    is of no more use.
    """

    def __init__(self, *, max_trailer_bytes: int, max_trailers: int) -> None:
        """``max_trailer_bytes`` includes the empty line that ends the body."""
        self._state = _State.SIZE
        self._carry = bytearray()
        self._left = 0
        self._chunks = 0
        self._overhead = 0
        self._max_trailers = max_trailers
        # The last chunk's own line break stands before it, so that the end of the body is an
        # empty line whether or not there are trailers.
        self._section = SectionReader(max_bytes=max_trailer_bytes, before=b"\r\n")
        self.trailers: list[Field] = []

    @property
    def done(self) -> bool:
        """Whether the body is complete; ``trailers`` are known then."""
        return self._state is _State.DONE

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Take the body's share of ``data``, or its first ``MAX_CHUNKS`` chunks; returns its size.

        What is left while not ``done`` is to be fed again, when others have had their turn.

        Raises:
            BadRequest: malformed, or a trailer that must not be one.
            HeadersTooLarge: a size line, the extensions together or the trailers over a limit.
        """
        view = memoryview(data)
        position = 0
        begun = self._chunks
        while position < len(view) and self._state is not _State.DONE:
            match self._state:
                case _State.DATA:
                    position += self._skip_data(len(view) - position)
                case _State.SIZE:
                    if self._chunks - begun == MAX_CHUNKS:
                        break
                    position += self._read_size(view[position:])
                case _State.DATA_END:
                    position += self._read_data_end(view[position:])
                case _:
                    position += self._read_trailers(view[position:])
        return position

    def _skip_data(self, available: int) -> int:
        size = min(self._left, available)
        self._left -= size
        if self._left == 0:
            self._state = _State.DATA_END
        return size

    def _read_data_end(self, data: memoryview) -> int:
        before = len(self._carry)
        self._carry += data[: 2 - before]
        if not b"\r\n".startswith(self._carry):
            raise BadRequest("a chunk is not followed by a line break")
        size = len(self._carry) - before
        if len(self._carry) == 2:
            self._carry.clear()
            self._state = _State.SIZE
        return size

    def _read_size(self, data: memoryview) -> int:
        before = len(self._carry)
        self._carry += data[: MAX_SIZE_LINE + 2 - before]
        control = _CONTROL.search(self._carry)
        end = control.start() if control else len(self._carry)
        if end > MAX_SIZE_LINE:
            raise HeadersTooLarge(f"a chunk's size line is longer than {MAX_SIZE_LINE} bytes")
        line_break = self._carry[end : end + 2]
        if not b"\r\n".startswith(line_break):
            raise BadRequest("a chunk's size line has a control character or a bare line break")
        if len(line_break) < 2:
            return len(self._carry) - before
        self._start_chunk(self._carry[:end])
        self._carry.clear()
        return end + 2 - before

    def _start_chunk(self, line: bytearray) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None or (size := int(match[1], 16)) >= 2**63:
            raise BadRequest("a chunk's size line is malformed")
        overhead = len(line) + 2 - _FREE_PER_CHUNK - 2 * size
        self._overhead = max(0, self._overhead + overhead)
        if self._overhead > MAX_OVERHEAD:
            raise HeadersTooLarge("too many bytes in chunk extensions")
        self._chunks += 1
        self._left = size
        self._state = _State.DATA if size else _State.TRAILERS

    def _read_trailers(self, data: memoryview) -> int:
        size = self._section.feed(data)
        if self._section.done:
            lines = bytes(self._section.buffer).split(b"\r\n")[1:-2]
            if len(lines) > self._max_trailers:
                raise HeadersTooLarge(f"more than {self._max_trailers} trailer fields")
            self.trailers = [parse_field(line) for line in lines]
            if any(name in _FORBIDDEN_TRAILERS for name, _ in self.trailers):
                raise BadRequest("a trailer field that must not be one")
            self._state = _State.DONE
        return size
