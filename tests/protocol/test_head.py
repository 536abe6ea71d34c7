"""Where heads end and which are well-formed; h11 is the witness for what is let through."""

from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest, ClientError, HeadersTooLarge, HttpVersion
from relay.protocol.head import HeadReader, RawHead, check_head, parse_field

HEAD = (
    b"POST /upload/photos HTTP/1.1\r\nHost: relay.example:8480\r\nUser-Agent: curl/8.5.0\r\n"
    b"Content-Type: multipart/form-data; boundary=xyz\r\nContent-Length: 10\r\nX-Empty:\r\n\r\n"
)
LIMIT = 512
MAX_HEADERS = 20
PIECES = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"\x7f", b"\x0b", b"\xff", b"a"]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good head with up to three places spoilt, between empty lines and a body."""
    data = bytearray(HEAD)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(PIECES | st.binary(max_size=3))
    before = draw(st.sampled_from([b"", b"\r\n", b"\r\n\r\n", b"\r\n\r\n\r\n", b"\r", b"\n"]))
    return before + bytes(data) + draw(st.sampled_from([b"", b"0123456789", b"\n\0\r\n\r\n"]))


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(point, len(data)) for point in points), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def outcome(pieces: list[bytes], limit: int = LIMIT) -> tuple[object, ...]:
    """All that can be seen from outside: the head and what it consumed, or the error."""
    reader = HeadReader(max_bytes=limit)
    consumed = 0
    for piece in pieces:
        try:
            size = reader.feed(piece)
        except ClientError as exc:
            return type(exc), exc.detail
        consumed += size
        if reader.done:
            return reader.head, consumed
        assert size == len(piece)
    return reader.started, consumed


def read(data: bytes, limit: int = LIMIT) -> tuple[object, ...]:
    whole = outcome([data], limit)
    assert outcome([data[i : i + 1] for i in range(len(data))], limit) == whole
    return whole


@settings(max_examples=300, deadline=None)
@given(mutated(), st.lists(st.integers(0, 400), max_size=5), st.integers(200, 260))
def test_any_split_gives_the_same_head_or_the_same_error(
    data: bytes, points: list[int], limit: int
) -> None:
    assert outcome(cut(data, points), limit) == read(data, limit)


def test_a_head_ends_at_its_empty_line_and_takes_no_byte_more() -> None:
    assert read(HEAD + b"body\n") == (HEAD, len(HEAD))


@pytest.mark.parametrize("tail", [b"", b"x" * 100_000])
def test_a_head_of_exactly_the_limit_is_read_and_of_one_byte_more_refused(tail: bytes) -> None:
    assert outcome([HEAD + tail], len(HEAD)) == (HEAD, len(HEAD))
    assert read(HEAD, len(HEAD)) == (HEAD, len(HEAD))
    assert outcome([HEAD + tail], len(HEAD) - 1)[0] is HeadersTooLarge
    assert read(HEAD, len(HEAD) - 1)[0] is HeadersTooLarge


def test_a_head_without_end_is_refused_at_the_limit() -> None:
    assert read(b"GET /" + b"a" * (LIMIT - 5)) == (True, LIMIT)
    assert read(b"GET /" + b"a" * (LIMIT - 4))[0] is HeadersTooLarge


def test_two_empty_lines_before_a_request_are_skipped_and_not_counted() -> None:
    """RFC 9112, section 2.2."""
    assert read(b"\r\n\r\n" + HEAD, len(HEAD)) == (HEAD, len(HEAD) + 4)
    assert read(b"\r\n\r\n\r\n" + HEAD)[0] is BadRequest


def test_a_reader_has_not_started_before_the_request_line() -> None:
    reader = HeadReader(max_bytes=LIMIT)
    assert reader.feed(b"\r\n") == 2
    before = reader.started
    reader.feed(b"P")
    assert (before, reader.started, reader.done) == (False, True, False)


@pytest.mark.parametrize(
    "data",
    [
        b"\nGET",  # bare line breaks: RFC 9112, section 2.2
        b"\rGET",
        b"GET / HTTP/1.1\n",
        b"GET / HTTP/1.1\r\nHost: a\n",
        b"GET / HTTP/1.1\r\nHost: a\rb",
        b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\0",  # RFC 9110, section 5.5
        b"GET / HTTP/1.1\r\nHost: a\x7f",
        b" GET",
        b"\x80",
    ],
)
def test_control_characters_are_refused_without_waiting_for_the_end(data: bytes) -> None:
    assert read(data)[0] is BadRequest


def test_tls_on_a_plain_port_is_told_so() -> None:
    error, detail = read(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
    assert error is BadRequest
    assert "TLS" in str(detail)


def test_a_head_is_taken_apart() -> None:
    head = check_head(
        b"PUT /upload/x HTTP/1.0\r\nHost:a\r\nX-One: \t b\xffc \t\r\nx-one:\r\n\r\n", max_headers=3
    )
    fields = [(b"host", b"a"), (b"x-one", b"b\xffc"), (b"x-one", b"")]
    assert head == RawHead(b"PUT", b"/upload/x", fields, b"1.0")


REFUSED_LINES = [
    b"",
    b"GET",
    b"GET /",  # HTTP/0.9
    b"GET  / HTTP/1.1",  # RFC 9112, section 3
    b"GET / HTTP/1.1 ",
    b" GET / HTTP/1.1",
    b"GET /a b HTTP/1.1",
    b"GET\t/\tHTTP/1.1",
    b"G(T / HTTP/1.1",
    b"GET /\xc3\xa9 HTTP/1.1",
    b"GET / http/1.1",  # RFC 9112, section 2.3
    b"GET / HTTP/1",
    b"GET / HTTP/1.10",
    b"GET / HTTP/11",
    b"GET / HTTP/1.1x",
    b"GET / HTTPS/1.1",
    b"GET / ICY/1.1",
]


@pytest.mark.parametrize("line", REFUSED_LINES)
def test_a_malformed_request_line_is_refused(line: bytes) -> None:
    with pytest.raises(BadRequest):
        check_head(line + b"\r\nHost: a\r\n\r\n", max_headers=MAX_HEADERS)


@pytest.mark.parametrize("version", [b"0.9", b"2.0", b"3.0", b"9.9"])
def test_another_major_version_is_refused_as_such(version: bytes) -> None:
    with pytest.raises(HttpVersion):
        check_head(b"GET / HTTP/" + version + b"\r\n\r\n", max_headers=MAX_HEADERS)


def test_an_http2_preface_is_refused_as_another_version() -> None:
    """RFC 9113, section 3.4."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    head, _ = read(preface)
    assert isinstance(head, bytes)
    with pytest.raises(HttpVersion):
        check_head(head, max_headers=MAX_HEADERS)


@pytest.mark.parametrize("version", [b"1.0", b"1.1", b"1.2", b"1.9"])
def test_any_minor_version_is_accepted(version: bytes) -> None:
    """RFC 9110, section 2.5."""
    head = check_head(b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n", max_headers=MAX_HEADERS)
    assert head.http_version == version


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"no colon",
        b": no name",
        b"Host : a",  # RFC 9112, section 5.1
        b"Host\t: a",
        b" folded",  # RFC 9112, section 5.2
        b"\tfolded: yes",
        b"Ho st: a",
        b"H\xc3\xb6st: a",
        b"Host(: a",
        b"X: a\x01b",
        b"X: a\0",
        b"X: a\rb",
        b"X: a\x7f",
        b"X: a\x0b",
        b"X: \x0c",
    ],
)
def test_a_malformed_field_is_refused(line: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_field(line)


def test_the_number_of_fields_is_limited() -> None:
    head = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3 + b"\r\n"
    assert len(check_head(head, max_headers=3).headers) == 3
    with pytest.raises(HeadersTooLarge):
        check_head(head, max_headers=2)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | mutated())
def test_any_bytes_are_a_head_or_the_clients_error(data: bytes) -> None:
    try:
        check_head(data, max_headers=MAX_HEADERS)
    except ClientError as exc:
        assert exc.detail  # noqa: PT017  there need be no error


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_h11_reads_what_is_let_through_the_same_way(data: bytes) -> None:
    head = outcome([data])[0]
    if not isinstance(head, bytes):
        return
    try:
        ours = check_head(head, max_headers=MAX_HEADERS)
    except ClientError:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        # It looks at two fields' meaning as well, which is request.py's business here.
        names = [name for name, _ in ours.headers]
        length = dict(ours.headers).get(b"content-length", b"0")
        assert names.count(b"host") != 1 or not length.isdigit()
        return
    assert isinstance(event, h11.Request)
    theirs = (event.method, event.target, list(event.headers), event.http_version)
    assert theirs == tuple(ours)
    assert connection.trailing_data == (b"", False)
