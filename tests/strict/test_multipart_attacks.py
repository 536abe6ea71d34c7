"""Attacks that other multipart parsers fell for, by number, and what they cost here.

A row's body grows with a number. Each gets its answer however it is cut, and the parser's work for
four times the bytes is at most four times the work: counted in calls, not in seconds. What one call
can do is bounded by what the parser carries from one read to the next, which is checked after each.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from relay.errors import BadMultipart, ClientError, HeadersTooLarge, MethodNotAllowed, TooLarge
from relay.protocol.form_data import FormData
from relay.protocol.request import parse_request
from tests.form_reading import BOUNDARY, DELIMITER, cut, form, parse
from tests.strict.form_upload import PLAIN_TYPE, ROUTE, form_parser, in_pieces, outcome

DISPOSITION = b'Content-Disposition: form-data; name="f"\r\n'
OPENING = DELIMITER[2:] + b"\r\n"
Body = Callable[[int], bytes]


def content(unit: bytes, before: bytes = b"", after: bytes = b"") -> Body:
    """A part that consists of ``unit`` again and again."""
    return lambda n: form(before + unit * n + after)


def headers(unit: bytes, end: bytes = b"\r\n") -> Body:
    """A part whose headers go on and on."""
    return lambda n: OPENING + DISPOSITION + unit * n + end + b"x" + DELIMITER + b"--"


def parameters(unit: bytes) -> Body:
    """A Content-Disposition that goes on and on."""
    return lambda n: OPENING + b"Content-Disposition: form-data; name=f" + unit * n + b"\r\n\r\n"


# What comes of the attack at full size, None if it is an upload like any other.
ATTACKS: dict[str, tuple[Body, type[ClientError] | None]] = {
    "CVE-2023-46136, Werkzeug: a line break, then none": (content(b"x", b"\r\n"), None),
    "CVE-2023-46136, Werkzeug: a carriage return, then none": (content(b"x", b"\r"), None),
    "CVE-2023-25577, Werkzeug: parts": (lambda n: form(*[b""] * n), TooLarge),
    "CVE-2024-49767, Werkzeug: a field without a file name": (content(b"xyz"), None),
    "CVE-2022-23833, Django: base64 that never ends": (
        lambda n: form(b" \n" * n, head=DISPOSITION + b"Content-Transfer-Encoding: base64\r\n\r\n"),
        None,
    ),
    "CVE-2021-28658 and CVE-2021-31542, Django: names that are paths": (
        lambda n: form(b"x" * n, head=DISPOSITION[:-2] + b'; filename="../../x"\r\n\r\n'),
        None,
    ),
    "CVE-2023-24580, Django: files": (
        lambda n: form(*[b"x"] * n, head=DISPOSITION[:-2] + b"; filename=x\r\n\r\n"),
        TooLarge,
    ),
    "python-multipart 67: line breaks": (content(b"\r\n"), None),
    "python-multipart 67: carriage returns": (content(b"\r"), None),
    "CVE-2024-53981, python-multipart: line breaks before the form": (
        lambda n: b"\r\n" * n + form(b"x"),
        BadMultipart,
    ),
    "CVE-2024-53981, python-multipart: bytes behind the form": (
        lambda n: form(b"x") + b"x" * n,
        BadMultipart,
    ),
    "CVE-2026-40347, python-multipart: a preamble": (lambda n: b"x" * n + form(b"x"), BadMultipart),
    "CVE-2026-40347, python-multipart: an epilogue of line breaks": (
        lambda n: form(b"x") + b"\r\n" * n,
        BadMultipart,
    ),
    "CVE-2026-42561, python-multipart: headers": (headers(b"X: y\r\n"), HeadersTooLarge),
    "CVE-2026-42561, python-multipart: a header": (headers(b"X", b": y\r\n\r\n"), HeadersTooLarge),
    "CVE-2026-34516, aiohttp: short headers": (headers(b"a:\r\n"), HeadersTooLarge),
    "CVE-2026-34517, aiohttp: a large field": (content(b"x" * 10), None),
    "CVE-2025-69228, aiohttp: a large form": (content(b"x" * 50), None),
    "CVE-2025-69227, aiohttp: a boundary, and nothing behind it": (
        lambda n: OPENING * n,
        BadMultipart,
    ),
    "CVE-2024-30251, aiohttp: no boundary at all": (lambda n: b"x" * n, BadMultipart),
    "CVE-2023-30798, Starlette: fields": (lambda n: form(*[b"x"] * n), TooLarge),
    "CVE-2024-47874, Starlette: a field": (content(b"a\n"), None),
    "CVE-2025-54121, Starlette: a large file": (
        lambda n: form(b"x" * 50 * n, head=DISPOSITION[:-2] + b'; filename="x"\r\n\r\n'),
        None,
    ),
    "CVE-2023-25578, Starlite: fields and files": (
        lambda n: form(*[b"x"] * n, head=DISPOSITION[:-2] + b'; filename="x"\r\n\r\n'),
        TooLarge,
    ),
    "CVE-2017-1000098, Go: many files": (
        lambda n: form(*[b"x" * 20] * n, head=DISPOSITION[:-2] + b'; filename="x"\r\n\r\n'),
        TooLarge,
    ),
    "CVE-2023-24534, Go: empty headers": (headers(b":\r\n"), BadMultipart),
    "CVE-2022-41725, Go: many small files": (
        lambda n: form(*[b""] * n, head=DISPOSITION[:-2] + b'; filename=""\r\n\r\n'),
        TooLarge,
    ),
    "CVE-2023-24536, Go: headers of many parts": (
        lambda n: form(*[b""] * n, head=DISPOSITION + b"X: y\r\n" * 50 + b"\r\n"),
        TooLarge,
    ),
    "CVE-2023-45290, Go: a line of the headers": (
        lambda n: OPENING + b"x" * n,
        HeadersTooLarge,
    ),
    "CVE-2014-0050, Commons FileUpload: what is nearly the boundary": (
        content(DELIMITER[:-1]),
        None,
    ),
    "CVE-2016-3092, Commons FileUpload: dashes": (content(b"\r\n--"), None),
    "CVE-2023-24998, Commons FileUpload: parts": (lambda n: form(*[b"\r\n"] * n), TooLarge),
    "CVE-2025-48976, Commons FileUpload: part headers": (
        headers(b"X-Some-Header: some value\r\n"),
        HeadersTooLarge,
    ),
    "CVE-2024-4027, Undertow: a large name": (parameters(b"x"), HeadersTooLarge),
    "CVE-2015-4024, PHP: headers without a colon": (headers(b"x\r\n"), BadMultipart),
    "CVE-2015-4024, PHP: a header folded often": (headers(b" x\r\n"), BadMultipart),
    "CVE-2023-0662, PHP: parts": (lambda n: form(*[b"1"] * n), TooLarge),
    "CVE-2012-6109, Rack: a disposition of words": (parameters(b" x"), HeadersTooLarge),
    "CVE-2013-0183, Rack: a line of the headers": (lambda n: OPENING + b"x" * n, HeadersTooLarge),
    "CVE-2025-61771, Rack: a field": (content(b"field\n"), None),
    "CVE-2022-30122, Rack: carriage returns and dashes": (content(b"\r\n-\r-"), None),
    "CVE-2022-44572, Rack: quotes": (parameters(b'";'), HeadersTooLarge),
    "CVE-2023-27530, Rack: parts": (lambda n: form(*[b"x" * 9] * n), TooLarge),
    "CVE-2025-49007, Rack: backslashes in a disposition": (
        parameters(b';a="\\\\'),
        HeadersTooLarge,
    ),
    "CVE-2025-61770, Rack: a preamble of lines": (
        lambda n: b"x\r\n" * n + form(b"x"),
        BadMultipart,
    ),
    "CVE-2025-61772, Rack: headers without an end": (
        lambda n: OPENING + DISPOSITION * n,
        HeadersTooLarge,
    ),
    "CVE-2026-34827, Rack: escaped quotes": (parameters(b'; a="\\"\\""'), HeadersTooLarge),
    "CVE-2026-28356, multipart: an ambiguous quoted string": (
        parameters(b'; a="\\a\\b\\'),
        HeadersTooLarge,
    ),
    "CVE-2026-5079, Multer: a name nested deeply": (
        lambda n: OPENING + b'Content-Disposition: form-data; name="a' + b"[a]" * n + b'"\r\n\r\n',
        HeadersTooLarge,
    ),
    "actix-multipart 2810: boundaries that are garbage": (content(b"\r\n--garbage\r\n"), None),
    "semicolons": (parameters(b";"), HeadersTooLarge),
    "stars": (parameters(b"; a*0=b"), HeadersTooLarge),
    "the boundary without its line break": (content(DELIMITER[2:]), None),
    "a form in a form": (
        content(b"--inner\r\nContent-Disposition: form-data; name=g\r\n\r\nx\r\n"),
        None,
    ),
}
SMALL = 300
LARGE = 20_000


@pytest.mark.parametrize(("body", "error"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_gets_its_answer_however_it_is_cut(
    body: Body, error: type[ClientError] | None
) -> None:
    small = body(SMALL)
    answers = [parse(form_parser(), pieces) for pieces in ([small], *in_pieces(small))]
    assert all(answer == answers[0] for answer in answers)
    large = body(LARGE)
    assert parse(form_parser(), cut(large, range(0, len(large), 65536))).error is error


def work(body: bytes, size: int) -> int:
    """Calls, of Python and of C, that it takes to parse a body read in pieces of that size."""
    parser = form_parser()
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += 1

    pieces = cut(body, range(0, len(body), size))
    sys.setprofile(count)
    try:
        for piece in pieces:
            for _ in parser.feed(piece):
                pass
            assert len(carry(parser)) <= ROUTE.max_part_header_bytes + len(DELIMITER) + 2
    except ClientError:
        pass
    finally:
        sys.setprofile(None)
    return calls


def carry(parser: FormData) -> bytes:
    return parser._parser.carry


@pytest.mark.parametrize("size", [512, 65536])
@pytest.mark.parametrize("body", [body for body, _ in ATTACKS.values()], ids=ATTACKS)
def test_four_times_the_bytes_are_at_most_four_times_the_work(body: Body, size: int) -> None:
    assert work(body(4 * LARGE), size) <= 4 * work(body(LARGE), size) + 1000


# Attacks of one size: the body, and what it comes to.
MALFORMED: dict[str, tuple[bytes, Any]] = {
    "CVE-2022-24434, dicer: a header that begins with a space": (
        form(b"x", head=b" " + DISPOSITION + b"\r\n"),
        BadMultipart,
    ),
    "CVE-2025-47944 and CVE-2025-7338, Multer: a part that ends in its headers": (
        OPENING + DISPOSITION + DELIMITER[2:] + b"--\r\n",
        BadMultipart,
    ),
    "CVE-2018-16789, shellinabox: a part without an end": (
        OPENING + DISPOSITION + b"\r\n",
        BadMultipart,
    ),
    "CVE-2024-8925, PHP: the boundary is the beginning of another": (
        form(b"x" + DELIMITER + b"x\r\n" + DISPOSITION + b"\r\ny"),
        BadMultipart,
    ),
    "CVE-2026-26962, Rack: a folded file name": (
        form(b"x", head=DISPOSITION[:-2] + b';\r\n filename="a\r\n b"\r\n\r\n'),
        BadMultipart,
    ),
    "CVE-2012-4528, ModSecurity: a part without a name before the one that counts": (
        form(b"x", head=b"Content-Disposition: form-data\r\n\r\n"),
        BadMultipart,
    ),
    "CVE-2022-48279, ModSecurity: a header's name with white space": (
        form(b"x", head=b"\x0bContent-Disposition: form-data; name=f\r\n\r\n"),
        BadMultipart,
    ),
    "civetweb 1404: a preamble that is nearly the boundary": (
        DELIMITER[2:-1] * 3 + form(b"x"),
        BadMultipart,
    ),
}


@pytest.mark.parametrize(("body", "error"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_forms_are_refused(body: bytes, error: type[ClientError]) -> None:
    assert outcome(body) is error


def test_names_that_broke_other_servers_are_text() -> None:
    """CVE-2025-48997 and CVE-2026-77078 (Multer), CVE-2026-24486 (python-multipart, paths)."""
    for name in (b"", b"a[4294967294]", b"__proto__", b"/etc/passwd", b"../../x", b"a" * 4000):
        head = b'Content-Disposition: form-data; name="' + name + b'"; filename="'
        ((part, data),) = outcome(form(b"x", head=head + name + b'"\r\n\r\n'))  # type: ignore[misc]
        assert (part.name, part.filename, data) == (name.decode(), name.decode(), b"x")


def test_a_length_in_a_part_means_nothing() -> None:
    """RFC 7578, section 4.8: it is neither believed nor a reason to refuse the part."""
    for length in (b"-1", b"0", b"99999999999999999999"):
        head = DISPOSITION + b"Content-Length: " + length + b"\r\n\r\n"
        ((_, data),) = outcome(form(b"hello", head=head))  # type: ignore[misc]
        assert data == b"hello"


@pytest.mark.parametrize("size", [70, 71, 256, 4096, 16000])
def test_a_boundary_has_at_most_70_bytes(size: int) -> None:
    """CVE-2014-0050, CVE-2016-3092 (Commons FileUpload)."""
    boundary = "b" * size
    body = form(b"x").replace(BOUNDARY.encode(), boundary.encode())
    answer = outcome(body, f"multipart/form-data; boundary={boundary}")
    assert (answer is BadMultipart) is (size > 70)


@pytest.mark.parametrize("unit", [b"\\", b'\\"', b"; a=", b'; a="\\', b";", b" ", b'"'])
def test_a_hostile_content_type_is_refused_at_once(unit: bytes) -> None:
    """CVE-2024-24762 (python-multipart), CVE-2022-44571 (Rack): it would take for ever."""
    value = PLAIN_TYPE.encode() + b'; x="' + unit * (8000 // len(unit)) + b"!"
    assert outcome(form(b"x"), value) is BadMultipart


def test_a_form_in_a_get_is_not_read() -> None:
    """CVE-2026-3260 (Undertow)."""
    fields = [(b"host", b"a"), (b"content-type", PLAIN_TYPE.encode()), (b"content-length", b"9")]
    with pytest.raises(MethodNotAllowed):
        parse_request(b"GET", b"/upload", fields, b"1.1")
