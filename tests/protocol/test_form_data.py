"""What the body parsers promise: the same answer however the bytes are cut, and nothing lost."""

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.errors import BadMultipart, HeadersTooLarge, TooLarge
from relay.model import PartHead
from relay.protocol.form_data import EPILOGUE_LIMIT, PART_END, FormData, RawBody
from tests.form_reading import (
    BOUNDARY,
    DELIMITER,
    HEAD,
    HEADER_LIMIT,
    MAX_PARTS,
    Parsed,
    cut,
    every_byte,
    form,
    new_parser,
    parse,
    read,
)

# --- bodies that real clients made -------------------------------------------------------------

CLIENTS = {
    "curl 7.88": (
        "------------------------48a7da92840466b0",
        b"--------------------------48a7da92840466b0\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"--------------------------48a7da92840466b0\r\n"
        b'Content-Disposition: form-data; name="f"; filename="n%22\xc3\xa4me.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"--------------------------48a7da92840466b0--\r\n",
        PartHead(name="f", filename='n"äme.txt', content_type="text/plain"),
    ),
    "Chrome and Safari": (
        BOUNDARY,
        b"------WebKitFormBoundary7MA4YWxkTrZu0gW9\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"------WebKitFormBoundary7MA4YWxkTrZu0gW9\r\n"
        b'Content-Disposition: form-data; name="a%22b%0D%0Ac"; filename="n\xc3\xa4me.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"------WebKitFormBoundary7MA4YWxkTrZu0gW9--\r\n",
        PartHead(name='a"b\r\nc', filename="näme.txt", content_type="text/plain"),
    ),
    "Firefox": (
        "---------------------------9051914041544843365972754266",
        b"-----------------------------9051914041544843365972754266\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"-----------------------------9051914041544843365972754266\r\n"
        b'Content-Disposition: form-data; name="f"; filename="C:\\dir\\new.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"-----------------------------9051914041544843365972754266--\r\n",
        PartHead(name="f", filename="C:\\dir\\new.txt", content_type="text/plain"),
    ),
    "Python requests 2.34": (
        "8b4a9fb9985f9355127c42dfa831469e",
        b"--8b4a9fb9985f9355127c42dfa831469e\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"--8b4a9fb9985f9355127c42dfa831469e\r\n"
        b'Content-Disposition: form-data; name="f\xc3\xa4"; filename="n\xc3\xa4me.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"--8b4a9fb9985f9355127c42dfa831469e--\r\n",
        PartHead(name="fä", filename="näme.txt", content_type="text/plain"),
    ),
    "httpx 0.28": (
        "e85648e6e0032aec7ab97b16a204a8e6",
        b"--e85648e6e0032aec7ab97b16a204a8e6\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"--e85648e6e0032aec7ab97b16a204a8e6\r\n"
        b'Content-Disposition: form-data; name="f\xc3\xa4"; filename="n%22\xc3\xa4me.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"--e85648e6e0032aec7ab97b16a204a8e6--\r\n",
        PartHead(name="fä", filename='n"äme.txt', content_type="text/plain"),
    ),
    # name* and no name; what it does to filename is its own, and stays as sent.
    "aiohttp 3.14": (
        "81281e7378064510b37624fb75ce940a",
        b"--81281e7378064510b37624fb75ce940a\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"--81281e7378064510b37624fb75ce940a\r\n"
        b"Content-Type: text/plain\r\n"
        b"Content-Disposition: form-data; name*=utf-8''f%C3%A4; filename=\"n%C3%A4me.txt\"\r\n"
        b"\r\nfile\r\ncontent\r\n"
        b"--81281e7378064510b37624fb75ce940a--\r\n",
        PartHead(name="fä", filename="n%C3%A4me.txt", content_type="text/plain"),
    ),
    "Go 1.19": (
        "d404d7027e3d2f4537a9833d53d2381dfb5621df8ba046ca0d79a4ac92dc",
        b"--d404d7027e3d2f4537a9833d53d2381dfb5621df8ba046ca0d79a4ac92dc\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"--d404d7027e3d2f4537a9833d53d2381dfb5621df8ba046ca0d79a4ac92dc\r\n"
        b'Content-Disposition: form-data; name="f\xc3\xa4"; filename="n\\"\xc3\xa4me.txt"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\nfile\r\ncontent\r\n"
        b"--d404d7027e3d2f4537a9833d53d2381dfb5621df8ba046ca0d79a4ac92dc--\r\n",
        PartHead(name="fä", filename='n"äme.txt', content_type="application/octet-stream"),
    ),
    "Node's fetch": (
        "----formdata-undici-001614034176",
        b"------formdata-undici-001614034176\r\n"
        b'Content-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b"------formdata-undici-001614034176\r\n"
        b'Content-Disposition: form-data; name="f\xc3\xa4"; filename="n%22\xc3\xa4me.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"------formdata-undici-001614034176--\r\n",
        PartHead(name="fä", filename='n"äme.txt', content_type="text/plain"),
    ),
    # More headers than RFC 7578 knows, in their own order and case; no line break at the end.
    "Java, C# and old curl": (
        "=_Part.1:2'(3)+,/?",
        b"--=_Part.1:2'(3)+,/?\r\n"
        b'content-disposition: form-data;name="field"\r\nContent-Length: 5\r\n\r\nvalue\r\n'
        b"--=_Part.1:2'(3)+,/?\r\n"
        b"Content-Transfer-Encoding: binary\r\nExpires: 0\r\n"
        b"Content-Disposition: form-data; name=f; filename=x.txt; filename*=utf-8''%E2%82%AC\r\n"
        b"CONTENT-TYPE:text/plain\r\n\r\nfile\r\ncontent\r\n"
        b"--=_Part.1:2'(3)+,/?--",
        PartHead(name="f", filename="\u20ac", content_type="text/plain"),
    ),
}


@pytest.mark.parametrize(("boundary", "body", "head"), CLIENTS.values(), ids=CLIENTS)
def test_bodies_of_real_clients_come_apart_wherever_they_are_cut(
    boundary: str, body: bytes, head: PartHead
) -> None:
    (first, value), second = read(body, lambda: new_parser(boundary)).parts
    assert (first.name, first.filename, value) == ("field", None, b"value")
    assert second == (head, b"file\r\ncontent")


# --- contents ----------------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=MAX_PARTS),
    st.lists(st.integers(0, 1500), max_size=12),
)
def test_any_split_gives_the_same_parts(contents: list[bytes], points: list[int]) -> None:
    body = form(*contents)
    parsed = parse(new_parser(), cut(body, points))
    assert [data for _, data in parsed.parts] == contents
    assert parsed == parse(new_parser(), every_byte(body))


@pytest.mark.parametrize("size", [1, 2, 3, len(DELIMITER), 64])
def test_line_breaks_survive_at_every_alignment(size: int) -> None:
    for pad in range(size + len(DELIMITER) + 4):
        content = b"x" * pad + b"\r\n" + b"y" * (pad % 3) + b"\r\n\r\n" + b"\r" * (pad % 2)
        body = form(content, content)
        pieces = cut(body, range(0, len(body), size))
        assert [data for _, data in parse(new_parser(), pieces).parts] == [content] * 2


NEAR_DELIMITER = [DELIMITER[:length] for length in range(len(DELIMITER))]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"\r\n--",
        b"\r\n--\r\n",
        b"--" + BOUNDARY.encode(),
        b"--" + BOUNDARY.encode() + b"--\r\n",
        b"x--" + BOUNDARY.encode() + b"--",
        b"\n--" + BOUNDARY.encode(),
        b"\r--" + BOUNDARY.encode() + b"\r\n",
        b"\r\n-" + BOUNDARY.encode(),
        b"\r\n--" + BOUNDARY.lower().encode() + b"\r\n",
        b"\r\n --" + BOUNDARY.encode(),
        b"\r\r\n-",
        *NEAR_DELIMITER[3::5],
        NEAR_DELIMITER[-1] * 3,
        NEAR_DELIMITER[-1] + b"x\r\n--",
    ],
)
def test_what_looks_like_a_boundary_is_content(content: bytes) -> None:
    assert [data for _, data in read(form(content, content)).parts] == [content] * 2


LOOK_ALIKES = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"x", BOUNDARY.encode(), *NEAR_DELIMITER]),
    max_size=8,
).map(b"".join)


@given(LOOK_ALIKES, st.lists(st.integers(0, 500), max_size=8))
def test_contents_made_of_pieces_of_boundaries_survive(content: bytes, points: list[int]) -> None:
    if (content + DELIMITER).find(DELIMITER) < len(content):
        return  # a sender may not use a boundary that its content contains
    body = form(content)
    ((_, data),) = parse(new_parser(), cut(body, points)).parts
    assert data == content
    assert parse(new_parser(), every_byte(body)).parts[0][1] == content


@pytest.mark.parametrize("tail", [b"x", b" \r\n", b"-x", b"\n", b"\rx", b"-\r\n"])
def test_a_boundary_with_something_behind_it_is_neither_boundary_nor_content(tail: bytes) -> None:
    assert read(form(b"a" + DELIMITER + tail + b"b")).error is BadMultipart


# --- beginnings and ends -----------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"--", b"--\r\n", b"--\r\n\r\n", b"-- \t\r\n", b"--\n"])
def test_white_space_behind_the_end_is_ignored_wherever_it_is_cut(end: bytes) -> None:
    assert [data for _, data in read(form(b"a", end=end)).parts] == [b"a"]


@pytest.mark.parametrize("end", [b"--x", b"--\r\nx", b"--\r\n--", b"--\r\n\0", b"--\r\nHost: x"])
def test_anything_else_behind_the_end_is_refused_and_not_lost_in_silence(end: bytes) -> None:
    assert read(form(b"a", end=end)).error is BadMultipart


def test_no_more_than_a_little_white_space_is_ignored() -> None:
    assert read(form(b"a", end=b"--" + b"\n" * EPILOGUE_LIMIT)).error is None
    assert read(form(b"a", end=b"--" + b"\n" * (EPILOGUE_LIMIT + 1))).error is BadMultipart


def test_a_second_form_behind_the_first_is_refused() -> None:
    assert read(form(b"a") + form(b"b")).error is BadMultipart


def test_a_line_break_before_the_first_boundary_is_ignored() -> None:
    assert [data for _, data in read(b"\r\n" + form(b"a")).parts] == [b"a"]


@pytest.mark.parametrize(
    "preamble", [b"x", b"\n", b"\r", b"\r\n\r\n", b" ", b"preamble\r\n", b"\r\nx\r\n", b"--\r\n"]
)
def test_any_other_preamble_is_refused(preamble: bytes) -> None:
    assert read(preamble + form(b"a")).error is BadMultipart


@pytest.mark.parametrize("body", [b"", b"\r\n", b"hello", b"--", DELIMITER, DELIMITER[2:], b"\0"])
def test_a_body_without_any_part_is_refused(body: bytes) -> None:
    assert read(body) == Parsed([], BadMultipart)


def test_a_form_of_no_parts_is_refused() -> None:
    for end in (b"--", b"--\r\n"):
        assert read(form(end=end)) == Parsed([], BadMultipart)
        assert read(b"\r\n" + form(end=end)) == Parsed([], BadMultipart)


def test_a_body_that_ends_anywhere_before_its_closing_boundary_is_incomplete() -> None:
    body = form(b"content\r\n", b"", end=b"--")
    for size in range(len(body)):
        assert read_short(body[:size]).error is BadMultipart


def read_short(data: bytes) -> Parsed:
    whole = parse(new_parser(), cut(data, []))
    assert parse(new_parser(), every_byte(data)) == whole
    return whole


@pytest.mark.parametrize("boundary", ["a", "-", "--", "x" * 70, "with space in", "a'()+_,-./:=?b"])
def test_any_boundary_that_rfc_2046_allows_works(boundary: str) -> None:
    body = form(b"a\r\n--", b"").replace(BOUNDARY.encode(), boundary.encode())
    assert [data for _, data in read(body, lambda: new_parser(boundary)).parts] == [b"a\r\n--", b""]


def test_another_boundary_than_the_one_announced_is_refused() -> None:
    assert read(form(b"a"), lambda: new_parser(BOUNDARY[:-1])).error is BadMultipart
    assert read(form(b"a"), lambda: new_parser(BOUNDARY + "x")).error is BadMultipart


# --- headers of parts --------------------------------------------------------------------------


def of_headers(*lines: bytes) -> Parsed:
    return read(form(b"content", head=b"\r\n".join([*lines, b"", b""])))


DISPOSITION = b'Content-Disposition: form-data; name="f"'


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Length: 7",
        b"Content-Length: 3",
        b"Content-Length: 99999999999999999999",
        b"content-length:-1",
        b"CONTENT-LENGTH: many",
        b"Content-Length:",
        b"X-Content-Length: 3",
        b"Content-Transfer-Encoding: base64",
        b"Content-Encoding: gzip",
    ],
)
def test_headers_that_mean_nothing_in_a_part_are_ignored(line: bytes) -> None:
    for lines in ([DISPOSITION, line], [line, DISPOSITION], [line, DISPOSITION, line]):
        assert of_headers(*lines).parts == [(PartHead(name="f"), b"content")]


def test_white_space_around_a_media_type_is_no_part_of_it() -> None:
    ((head, _),) = of_headers(DISPOSITION, b"Content-Type: \t text/plain;\ta=b \t ").parts
    assert head.content_type == "text/plain;\ta=b"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"Content-Type: text/plain"],
        [DISPOSITION, DISPOSITION],
        [DISPOSITION, b"Content-Type: a/b", b"Content-Type: a/b"],
        [DISPOSITION, b"content-type: a/b", b"Content-Type: c/d"],
        [b"Content-Disposition: form-data"],
        [b"Content-Disposition: form-data; filename=x"],
        [b"Content-Disposition: attachment; name=f"],
        [b'Content-Disposition: form-data; name="f'],
        [b'Content-Disposition: form-data; name="f"; name="g"'],
        [b"Content-Disposition: form-data; name*=latin-1''f"],
        [b'Content-Disposition: form-data; name="\xff"'],
        [b"Content-Disposition:"],
        [b"Content-Disposition"],
        [DISPOSITION, b"no colon"],
        [DISPOSITION, b": no name"],
        [DISPOSITION, b"white space: x"],
        [DISPOSITION, b"X : y"],
        [DISPOSITION, b"Content-Length\t: 3"],
        [DISPOSITION.replace(b":", b" :")],
        [b"\xc2\xa0" + DISPOSITION],
        [b"\x0b" + DISPOSITION],
        [DISPOSITION, b"Content-Type: a/\x1b"],
        [DISPOSITION, "Content-Type: a/\x9b".encode()],
        [DISPOSITION, b" folded: x"],
        [b" " + DISPOSITION],
        [DISPOSITION, b"X: a\nY: b"],
        [DISPOSITION, b"X: a\rY: b"],
        [DISPOSITION, b"X: a\0b"],
        [DISPOSITION, b"\n"],
        [DISPOSITION, b"\r"],
        [DISPOSITION, b"\xff: x"],
    ],
)
def test_malformed_headers_are_the_clients_error(lines: list[bytes]) -> None:
    assert of_headers(*lines).error is BadMultipart


# --- limits ------------------------------------------------------------------------------------


def test_as_many_parts_as_allowed_and_not_one_more() -> None:
    assert len(read(form(*[b"x"] * MAX_PARTS)).parts) == MAX_PARTS
    too_many = read(form(*[b"x"] * (MAX_PARTS + 1)))
    assert too_many.error is TooLarge
    assert too_many.events.count(PART_END) == MAX_PARTS


@pytest.mark.parametrize("size", [0, 9, 10])
def test_parts_up_to_the_limit_are_taken_each_for_itself(size: int) -> None:
    parsed = read(form(*[b"x" * size] * 3), lambda: new_parser(max_part_bytes=10))
    assert [len(data) for _, data in parsed.parts] == [size] * 3


@pytest.mark.parametrize("content", [b"x" * 11, b"x" * 200, b"\r\n--------\r\n", b"x" * 10 + b"\r"])
def test_a_part_over_the_limit_is_too_large_however_it_is_cut(content: bytes) -> None:
    body = form(b"0123456789", content)
    for pieces in (cut(body, []), every_byte(body), cut(body, range(0, len(body), 7))):
        parsed = parse(new_parser(max_part_bytes=10), pieces)
        assert parsed.error is TooLarge
        assert parsed.events[:3] == [PartHead(name="f"), b"0123456789", PART_END]


def padded(size: int, lines: int = 1, filler: bytes = b"x") -> bytes:
    """A part's headers of exactly ``size`` bytes with their line breaks, without the empty line."""
    head = DISPOSITION + b"\r\n" + b"Y: z\r\n" * (lines - 1) + b"X:"
    room = size - len(head) - len(b"\r\n")
    return head + (filler * room)[:room] + b"\r\n"


@pytest.mark.parametrize("lines", [1, 2, 10])
def test_headers_of_exactly_the_limit_are_taken_and_of_one_byte_more_refused(lines: int) -> None:
    assert len(padded(HEADER_LIMIT, lines)) == HEADER_LIMIT
    assert read(form(b"a", head=padded(HEADER_LIMIT, lines) + b"\r\n")).error is None
    over = read(form(b"a", head=padded(HEADER_LIMIT + 1, lines) + b"\r\n"))
    assert over == Parsed([], HeadersTooLarge)


@pytest.mark.parametrize("limit", [1, 41, 42, 43, 44])
def test_the_limit_holds_for_the_only_header_too(limit: int) -> None:
    parsed = read(form(b"a"), lambda: new_parser(max_part_header_bytes=limit))
    assert parsed.error is (None if limit >= len(DISPOSITION) + 2 else HeadersTooLarge)


def test_headers_without_end_are_refused_before_they_fill_the_memory() -> None:
    parser = new_parser()
    pieces = [form(end=b"\r\n"), *[b"x" * 64] * 1000]
    fed = 0

    def feed() -> Iterable[bytes]:
        nonlocal fed
        for piece in pieces:
            fed += len(piece)
            yield piece

    assert parse(parser, feed()).error is HeadersTooLarge
    assert fed <= HEADER_LIMIT + 3 * 64


def test_every_part_has_the_whole_limit_for_its_headers() -> None:
    head = padded(HEADER_LIMIT) + b"\r\n"
    assert len(read(form(*[b"x"] * MAX_PARTS, head=head)).parts) == MAX_PARTS


@pytest.mark.parametrize("bad", [b"\n", b"\r", b"\0", b"\nx", b"x\n\r"])
@pytest.mark.parametrize("at", [-3, -2, -1, 0, 1, 2, 3, 4, 40])
def test_a_lines_first_fault_decides_however_it_is_cut(bad: bytes, at: int) -> None:
    line = padded(HEADER_LIMIT + at)[: -len(b"\r\n")] + bad
    opening = b"--" + BOUNDARY.encode() + b"\r\n"
    is_within_limit = at + bad.startswith(b"x") < 0
    for rest in (b"\r\n", b"\r\n\r\n", b"x" * 50 + b"\r\n\r\n"):
        expected = BadMultipart if is_within_limit else HeadersTooLarge
        assert read(opening + line + rest).error is expected
    # Without an end it may be incomplete rather than too long, but not sometimes.
    assert read(opening + line).error is not None


# --- the invariant -----------------------------------------------------------------------------

GOOD = form(b"content\r\n--x", b"", b"\r\n", head=HEAD[:-2] + b"Content-Type: text/plain\r\n\r\n")
SPOILERS = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\0",
        b"-",
        b"--",
        b":",
        b";",
        b'"',
        b" ",
        b"\xff",
        DELIMITER,
        DELIMITER + b"\r\n",
        DELIMITER + b"--",
        b"x" * HEADER_LIMIT,
        DISPOSITION,
        b"Content-Length: 1\r\n",
    ]
)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good body with up to three places spoilt."""
    data = bytearray(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 40))] = draw(SPOILERS | st.binary(max_size=4))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@settings(max_examples=400)
@given(spoilt() | st.binary(max_size=200), st.lists(st.integers(0, 600), max_size=6))
def test_any_body_is_events_or_the_clients_error_and_the_same_however_it_is_cut(
    body: bytes, points: Sequence[int]
) -> None:
    whole = parse(new_parser(), cut(body, []))
    assert parse(new_parser(), cut(body, points)) == whole
    assert parse(new_parser(), every_byte(body)) == whole
    # Every part that begins also ends, unless the body is refused.
    starts = sum(isinstance(event, PartHead) for event in whole.events)
    open_parts = starts - whole.events.count(PART_END)
    assert open_parts == 0 if whole.error is None else open_parts in {0, 1}


@given(spoilt(), st.lists(st.integers(0, 600), max_size=6), st.integers(0, 30))
@example(GOOD, [], 0)
def test_limits_are_enforced_alike_however_a_body_is_cut(
    body: bytes, points: Sequence[int], limit: int
) -> None:
    def new() -> FormData:
        return new_parser(max_part_bytes=limit, max_parts=2, max_part_header_bytes=2 * limit)

    whole = parse(new(), cut(body, []))
    assert parse(new(), cut(body, points)).error is whole.error
    assert parse(new(), every_byte(body)).error is whole.error


# --- raw bodies --------------------------------------------------------------------------------

RAW_HEAD = PartHead(filename="x.bin", content_type="image/png")


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5))
def test_a_raw_body_is_one_part_whatever_is_in_it(pieces: list[bytes]) -> None:
    parsed = parse(RawBody(RAW_HEAD), pieces)
    assert parsed.parts == [(RAW_HEAD, b"".join(pieces))]


def test_a_raw_parts_head_comes_with_its_first_byte() -> None:
    assert list(RawBody(RAW_HEAD).feed(b"x")) == [RAW_HEAD, b"x"]


@pytest.mark.parametrize("size", [0, 1, 10])
def test_a_raw_body_up_to_the_limit_is_taken(size: int) -> None:
    new = lambda: RawBody(RAW_HEAD, max_part_bytes=10)  # noqa: E731
    assert read(b"x" * size, new).parts == [(RAW_HEAD, b"x" * size)]


@pytest.mark.parametrize("size", [11, 100])
def test_a_raw_body_over_the_limit_is_too_large(size: int) -> None:
    for pieces in ([b"x" * size], every_byte(b"x" * size)):
        assert parse(RawBody(RAW_HEAD, max_part_bytes=10), pieces).error is TooLarge
