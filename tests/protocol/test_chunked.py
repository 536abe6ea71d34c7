"""Chunked bodies; h11 is the witness for what is let through."""

from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest, ClientError, HeadersTooLarge
from relay.protocol.chunked import MAX_CHUNKS, MAX_OVERHEAD, MAX_SIZE_LINE, ChunkedValidator

MAX_TRAILER_BYTES = 100
MAX_TRAILERS = 3
NEXT = b"POST /upload HTTP/1.1\r\n"
EXTENSIONS = st.sampled_from([b"", b"", b";a", b";a=b", b';a="b;c\\"d \xff"', b';a;b=c;d=""'])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A good body: its chunked form and its data."""
    data = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    coded = b""
    for chunk in data:
        size = draw(st.sampled_from([b"%x", b"%X", b"000%x", b"%016X"])) % len(chunk)
        coded += size + draw(EXTENSIONS) + b"\r\n" + chunk + b"\r\n"
    coded += draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSIONS) + b"\r\n"
    coded += draw(st.sampled_from([b"", b"A: b\r\n", b"Repr-Digest:x\r\nB:\r\n"])) + b"\r\n"
    return coded, b"".join(data)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good body spoilt in one or two places."""
    coded = bytearray(draw(bodies())[0])
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(coded)))
        pieces = [b"\r", b"\n", b"\r\n", b"0", b"f", b";", b'"', b"\\", b" ", b"\0", b":", b"0\r\n"]
        piece = draw(st.sampled_from(pieces) | st.binary(max_size=3))
        coded[at : at + draw(st.integers(0, 3))] = piece
    return bytes(coded)


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(point, len(data)) for point in points), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def outcome(pieces: list[bytes]) -> tuple[object, ...]:
    """All that can be seen from outside: where the body ends and its trailers, or the error."""
    validator = ChunkedValidator(max_trailer_bytes=MAX_TRAILER_BYTES, max_trailers=MAX_TRAILERS)
    consumed = 0
    for piece in pieces:
        try:
            size = validator.feed(piece)
        except ClientError as exc:
            return type(exc), exc.detail
        consumed += size
        if validator.done:
            return consumed, validator.trailers
        assert size == len(piece)
    return "incomplete", consumed


def read(data: bytes) -> tuple[object, ...]:
    whole = outcome([data])
    assert outcome([data[i : i + 1] for i in range(len(data))]) == whole
    return whole


def h11_reads(coded: bytes) -> tuple[bytes, int, list[tuple[bytes, bytes]]] | None:
    """Data, size of the coded form and trailers, as h11 has them; None if it wants more."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.receive_data(head + coded)
    connection.next_event()
    data = b""
    while isinstance(event := connection.next_event(), h11.Data):
        data += event.data
    if event is h11.NEED_DATA:
        return None
    assert isinstance(event, h11.EndOfMessage)
    return data, len(coded) - len(connection.trailing_data[0]), list(event.headers)


@settings(max_examples=150, deadline=None)
@given(bodies(), st.lists(st.integers(0, 200), max_size=5))
def test_good_bodies_end_where_they_end_however_they_are_cut(
    body: tuple[bytes, bytes], points: list[int]
) -> None:
    coded, data = body
    answer = read(coded + NEXT)
    assert outcome(cut(coded + NEXT, points)) == answer
    assert answer[0] == len(coded)
    assert h11_reads(coded + NEXT) == (data, *answer)


@settings(max_examples=300, deadline=None)
@given(spoilt() | st.binary(max_size=30), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_get_one_answer_however_they_are_cut(data: bytes, points: list[int]) -> None:
    assert outcome(cut(data, points)) == read(data)


@settings(max_examples=300, deadline=None)
@given(spoilt())
def test_h11_decodes_what_is_let_through_to_the_same_end(coded: bytes) -> None:
    answer = outcome([coded])
    if answer[0] == "incomplete":
        assert h11_reads(coded) is None
    elif isinstance(answer[0], int):
        theirs = h11_reads(coded)
        assert theirs is not None
        assert theirs[1:] == answer


@pytest.mark.parametrize(
    "coded",
    [
        b"\r\n",
        b"x\r\n",
        b" 5\r\n",  # RFC 9112, section 7.1: no white space
        b"5 \r\n",
        b"5\t;a\r\n",
        b"5; a\r\n",
        b"5;a =b\r\n",
        b"+5\r\n",
        b"-5\r\n",
        b"0x5\r\n",
        b"5_0\r\n",
        b"5,5\r\n",
        b"\xb2\r\n",
        b"00000000000000005\r\n",  # more than 16 digits
        b"8000000000000000\r\n",  # 2**63
        b"FFFFFFFFFFFFFFFF\r\n",
        b"5;\r\n",  # section 7.1.1
        b"5;=b\r\n",
        b"5;a=\r\n",
        b'5;a="b\r\n',
        b'5;a="b"c\r\n',
        b'5;a="b\\"\r\n',
        b"5;a\xff\r\n",
        b"5\n",  # bare line breaks and control characters: section 2.2
        b"5;a\n",
        b"5\rx",
        b"5;a\rb",
        b"5;a\r\r\n",
        b'5;a="\0',
        b"5\r\nhelloX",
        b"5\r\nhello\n",
        b"5\r\nhello\rX",
        b"5\r\nhello5\r\n",
        b"0\n",
        b"0\r\nA: b\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n: b\r\n\r\n",
        b"0\r\nA\r\n\r\n",
        b"0\r\nA: b\r\n folded\r\n\r\n",  # section 5.2
        b"0\r\n\rX",
        b"0\r\nContent-Length: 5\r\n\r\n",  # RFC 9110, section 6.5.1
        b"0\r\ntransfer-encoding: chunked\r\n\r\n",
        b"0\r\nHost: a\r\n\r\n",
        b"0\r\nAuthorization: Bearer x\r\n\r\n",
        b"0\r\nContent-Type: text/plain\r\n\r\n",
    ],
)
def test_malformed_bodies_are_refused(coded: bytes) -> None:
    assert read(coded)[0] is BadRequest


@pytest.mark.parametrize("size", [b"5", b"0005", b"0000000000000005"])
def test_sizes_may_have_leading_zeros(size: bytes) -> None:
    coded = size + b"\r\nhello\r\n0\r\n\r\n"
    assert read(coded + NEXT) == (len(coded), [])


def test_trailers_are_known_at_the_end() -> None:
    coded = b"0\r\nRepr-Digest: crc32c=:Q3lHIA==:\r\nX:\r\n\r\n"
    trailers = [(b"repr-digest", b"crc32c=:Q3lHIA==:"), (b"x", b"")]
    assert read(coded + NEXT) == (len(coded), trailers)


def test_trailers_are_limited_in_bytes_and_number() -> None:
    longest = b"A: " + b"x" * (MAX_TRAILER_BYTES - 7) + b"\r\n\r\n"
    assert len(longest) == MAX_TRAILER_BYTES
    assert read(b"0\r\n" + longest)[0] == 3 + MAX_TRAILER_BYTES
    assert read(b"0\r\nA" + longest)[0] is HeadersTooLarge
    assert read(b"0\r\n" + b"A" * (MAX_TRAILER_BYTES + 1))[0] is HeadersTooLarge
    assert read(b"0\r\n" + b"a:\r\n" * MAX_TRAILERS + b"\r\n")[0] == 5 + 4 * MAX_TRAILERS
    assert read(b"0\r\n" + b"a:\r\n" * (MAX_TRAILERS + 1) + b"\r\n")[0] is HeadersTooLarge


def test_size_lines_are_limited() -> None:
    line = b"5;" + b"a" * (MAX_SIZE_LINE - 2)
    assert read(line + b"\r\nhello\r\n")[0] == "incomplete"
    assert read(line + b"a\r\nhello\r\n")[0] is HeadersTooLarge
    assert read(line + b"aaaaaa")[0] is HeadersTooLarge


def test_a_long_stream_may_have_extensions_but_not_consist_of_them() -> None:
    chunk = b"64;signature=" + b"a" * 150 + b"\r\n" + b"x" * 100 + b"\r\n"
    assert outcome([chunk] * 1000)[0] == "incomplete"
    idle = b"1;" + b"a" * 200 + b"\r\nx\r\n"
    allowed = MAX_OVERHEAD // (204 - 16 - 2)
    assert outcome([idle] * allowed)[0] == "incomplete"
    assert outcome([idle] * (allowed + 1))[0] is HeadersTooLarge


def test_one_byte_chunks_may_go_on_for_ever() -> None:
    """RFC 9112 sets no smallest chunk, and slow producers send what they have."""
    assert outcome([b"1\r\nx\r\n"] * 20_000)[0] == "incomplete"


def test_only_so_many_chunks_are_taken_at_once() -> None:
    """However many one read brings: their work must not keep everybody else waiting."""
    chunk = b"1\r\nx\r\n"
    validator = ChunkedValidator(max_trailer_bytes=100, max_trailers=0)
    rest = chunk * (2 * MAX_CHUNKS + 5) + b"0\r\n\r\n"
    taken = []
    while not validator.done:
        taken.append(validator.feed(rest))
        rest = rest[taken[-1] :]
    # The next one's size line is where it stops.
    assert [size // len(chunk) for size in taken] == [MAX_CHUNKS, MAX_CHUNKS, 5]
    assert rest == b""


def test_data_is_skipped_whatever_it_is_and_in_any_kind_of_buffer() -> None:
    data = bytes(range(256)) * 1024
    coded = b"40000\r\n" + data + b"\r\n0\r\n\r\n"
    for kind in (bytes, bytearray, memoryview):
        validator = ChunkedValidator(max_trailer_bytes=100, max_trailers=0)
        assert validator.feed(kind(coded + NEXT)) == len(coded)
        assert validator.done
