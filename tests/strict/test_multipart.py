"""multipart/form-data: what clients send is taken, what parsers differ on is refused.

The table in relay/README.md ("What a form may look like") is this file in few words. Attacks are in
``test_multipart_attacks.py``, the parser's own promises in ``tests/protocol/test_form_data.py``.
"""

import json

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from pika.spec import BasicProperties

from relay.config import HttpConfig
from relay.errors import BadMultipart, BadRequest, ClientError, UnsupportedMediaType
from relay.model import PartHead
from relay.protocol.wire import encode_frame
from relay.server.handler import UploadHandler
from relay.server.uploads import Uploads
from tests.form_reading import BOUNDARY, DELIMITER, form
from tests.memory_broker import PEER, MemoryBroker
from tests.observed_receiver import properties_of
from tests.scripted_client import ScriptedClient, responses
from tests.strict.form_upload import PLAIN_TYPE, ROUTE, outcome
from tests.uploading import request

DISPOSITION = b'Content-Disposition: form-data; name="f"'


def part(*lines: bytes) -> bytes:
    """A form of one part with those header lines."""
    return form(b"content", head=b"\r\n".join([*lines, b"", b""]))


def disposition(parameters: bytes) -> bytes:
    """A form of one part with that Content-Disposition."""
    return part(b"Content-Disposition: form-data" + parameters)


# What clients send besides those in test_form_data.py: Content-Type of the request, headers of the
# part without the last line break, and what the client's program meant.
CLIENTS: dict[str, tuple[str, bytes, PartHead]] = {
    ".NET's HttpClient: quoted boundary, tokens, both names of a file": (
        f'multipart/form-data; boundary="{BOUNDARY}"',
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b'Content-Disposition: form-data; name=f; filename="=?utf-8?B?4oKs?="; '
        b"filename*=utf-8''%E2%82%AC",
        PartHead(name="f", filename="\u20ac", content_type="text/plain; charset=utf-8"),
    ),
    ".NET with quotes of its user's own": (
        f'multipart/form-data; boundary="{BOUNDARY}"',
        b'Content-Disposition: form-data; name="f"; filename="t.csv"; '
        b"filename*=utf-8''%22t.csv%22",
        PartHead(name="f", filename='"t.csv"'),
    ),
    "Apache HttpClient 5: a charset, the extended name in quotes": (
        f"multipart/form-data; charset=UTF-8; boundary={BOUNDARY}",
        b'Content-Disposition: form-data; name="f"; filename="%E2%82%AC"; '
        b"filename*=\"UTF-8''%E2%82%AC\"\r\nContent-Type: application/octet-stream",
        PartHead(name="f", filename="\u20ac", content_type="application/octet-stream"),
    ),
    "Apache HttpClient 4: 8bit and binary": (
        PLAIN_TYPE,
        b'Content-Disposition: form-data; name="f"; filename="x.bin"\r\n'
        b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary",
        PartHead(name="f", filename="x.bin", content_type="application/octet-stream"),
    ),
    "OkHttp: a length, raw UTF-8": (
        PLAIN_TYPE,
        'Content-Disposition: form-data; name="f"; filename="\u20ac%22.txt"\r\n'
        "Content-Type: text/plain\r\nContent-Length: 7".encode(),
        PartHead(name="f", filename='\u20ac".txt', content_type="text/plain"),
    ),
    "Node's form-data": (
        PLAIN_TYPE,
        b'Content-Disposition: form-data; name="f"; filename="x.js"\r\n'
        b"Content-Type: application/javascript",
        PartHead(name="f", filename="x.js", content_type="application/javascript"),
    ),
    "urllib3 1: an extended name only": (
        PLAIN_TYPE,
        b"Content-Disposition: form-data; name=\"f\"; filename*=utf-8''%E2%82%AC",
        PartHead(name="f", filename="\u20ac"),
    ),
    "akka-http: tokens, the name last; a comma": (
        f"multipart/form-data; boundary={BOUNDARY}; charset=UTF-8",
        b"Content-Type: image/jpeg\r\nContent-Disposition: form-data; filename=a.jpeg; name=f",
        PartHead(name="f", filename="a.jpeg", content_type="image/jpeg"),
    ),
    "Internet Explorer: a path": (
        PLAIN_TYPE,
        b'Content-Disposition: form-data; name="f"; filename="C:\\Users\\x\\new.txt"',
        PartHead(name="f", filename="C:\\Users\\x\\new.txt"),
    ),
    "browsers: no file chosen": (
        PLAIN_TYPE,
        DISPOSITION + b'; filename=""\r\nContent-Type: application/octet-stream',
        PartHead(name="f", filename="", content_type="application/octet-stream"),
    ),
}


@pytest.mark.parametrize(("content_type", "head", "expected"), CLIENTS.values(), ids=CLIENTS)
def test_what_clients_send_is_taken(content_type: str, head: bytes, expected: PartHead) -> None:
    body = form(b"content", head=head + b"\r\n\r\n")
    assert outcome(body, content_type) == [(expected, b"content")]


F = PartHead(name="f")

# Taken although some parsers do otherwise: the body, and its only part.
TAKEN: dict[str, tuple[bytes, PartHead]] = {
    "RFC 7578, 4.3: a name may be empty": (disposition(b'; name=""'), PartHead(name="")),
    "RFC 7578, 4.2: a name may look like a path": (
        disposition(b'; name="../f"; filename="/etc/passwd"'),
        PartHead(name="../f", filename="/etc/passwd"),
    ),
    "a name may have brackets": (
        disposition(b'; name="a[b][__proto__]"'),
        PartHead(name="a[b][__proto__]"),
    ),
    "RFC 7578, 4.6: _charset_ is a field like any other": (
        disposition(b'; name="_charset_"'),
        PartHead(name="_charset_"),
    ),
    "RFC 7578, 4.7: a transfer encoding is not undone": (
        part(DISPOSITION, b"Content-Transfer-Encoding: base64"),
        F,
    ),
    "RFC 7578, 4.8: further headers are ignored": (part(DISPOSITION, b"X: y", b"X: z"), F),
    "RFC 2046, 5.1.2: a multipart in a part is its content": (
        part(DISPOSITION, b"Content-Type: multipart/mixed; boundary=inner"),
        PartHead(name="f", content_type="multipart/mixed; boundary=inner"),
    ),
    "RFC 6266, 4.3: filename* wins": (
        disposition(b"; name=f; filename=a; filename*=utf-8''b"),
        PartHead(name="f", filename="b"),
    ),
    "unknown parameters are ignored": (disposition(b'; x=y; name="f"; size=7'), F),
    "what looks like a parameter in quotes is none (multer 72)": (
        disposition(b'; note="x; filename=evil "; name="f"; filename="safe"'),
        PartHead(name="f", filename="safe"),
    ),
    "RFC 2045: white space around =": (disposition(b'; name = "f"'), F),
    "RFC 2047: encoded words are text": (
        disposition(b'; name="=?utf-8?Q?f?="'),
        PartHead(name="=?utf-8?Q?f?="),
    ),
    "percent signs other than the browsers' own are text": (
        disposition(b'; name="f"; filename="a%41%00%2F"'),
        PartHead(name="f", filename="a%41%00%2F"),
    ),
    "a charset is the consumer's business": (
        part(DISPOSITION, b"Content-Type: text/plain; charset=utf-7"),
        PartHead(name="f", content_type="text/plain; charset=utf-7"),
    ),
}


@pytest.mark.parametrize(("body", "head"), TAKEN.values(), ids=TAKEN)
def test_forms_that_are_taken(body: bytes, head: PartHead) -> None:
    assert outcome(body) == [(head, b"content")]


REFUSED: dict[str, bytes] = {
    "RFC 2046, 5.1.1: a preamble": b"preamble\r\n" + form(b"a"),
    "RFC 2046, 5.1.1: an epilogue": form(b"a") + b"epilogue",
    "RFC 2046, 5.1.1: white space behind a boundary": form(b"a").replace(b"9\r\n", b"9 \r\n"),
    "RFC 2046, 5.1.1: line feeds alone": form(b"a").replace(b"\r\n", b"\n"),
    "RFC 2046, 5.1.1: a boundary that another begins with": form(b"a" + DELIMITER + b"x\r\n"),
    "RFC 2046, 5.1.1: dashes behind a boundary": form(b"a" + DELIMITER + b"-\r\n"),
    "RFC 2046, 5.1: a part without headers": form(b"a", head=b"\r\n"),
    "RFC 7578, 4.2: a part without a disposition": part(b"Content-Type: text/plain"),
    "RFC 7578, 4.2: a part without a name": disposition(b'; filename="x"'),
    "RFC 7578, 4.2: another disposition": part(b'Content-Disposition: attachment; name="f"'),
    "two dispositions": part(DISPOSITION, DISPOSITION),
    "two types": part(DISPOSITION, b"Content-Type: a/b", b"content-type: c/d"),
    "two names": disposition(b"; name=f; name=g"),
    "two names, one extended (CVE-2026-53537, python-multipart)": disposition(
        b"; name=f; name*=utf-8''g"
    ),
    "two file names": disposition(b"; name=f; filename=a; FILENAME=b"),
    "RFC 2231, 3: a file name in pieces": disposition(b"; name=f; filename*0=a; filename*1=b"),
    "RFC 8187: another charset": disposition(b"; name=f; filename*=iso-8859-1''%E4"),
    "RFC 8187: not UTF-8": disposition(b"; name=f; filename*=utf-8''%E4"),
    "a name that is not UTF-8": disposition(b'; name="\xe4"'),
    "an unclosed quote": disposition(b'; name="f'),
    "something behind a quote": disposition(b'; name="f"x'),
    "a comma for a semicolon": disposition(b', name="f"'),
    "NUL in a name": disposition(b'; name="f\0"'),
    "NUL in an extended name": disposition(b"; name=f; filename*=utf-8''a%00.txt"),
    "RFC 5322: a folded header": part(b"Content-Disposition: form-data;\r\n name=f"),
    "white space before a colon": part(b'Content-Disposition : form-data; name="f"'),
    "no-break space before a header": part(b"\xc2\xa0" + DISPOSITION),
    "a line feed in a header": part(DISPOSITION, b"X: y\nContent-Type: a/b"),
    "a carriage return in a header": part(DISPOSITION, b"X: y\rContent-Type: a/b"),
    "an escape character in a type": part(DISPOSITION, b"Content-Type: a/b\x1b[2J"),
    "a header without a colon": part(DISPOSITION, b"X"),
    "RFC 7578, 4.2: no part at all": form(),
    "the end without the beginning": DELIMITER[2:] + b"--",
    "no end": form(b"a", end=b"\r\n"),
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_forms_that_are_refused(body: bytes) -> None:
    assert outcome(body) is BadMultipart


REFUSED_TYPES: dict[str, tuple[bytes, type[ClientError]]] = {
    "no boundary": (b"multipart/form-data", BadMultipart),
    "an empty boundary": (b'multipart/form-data; boundary=""', BadMultipart),
    "two boundaries (CVE-2026-26961, Rack; multer 66)": (
        PLAIN_TYPE.encode() + b"; boundary=b",
        BadMultipart,
    ),
    "two boundaries, one extended": (
        PLAIN_TYPE.encode() + b"; boundary*=utf-8''b",
        BadMultipart,
    ),
    "a boundary in pieces": (b"multipart/form-data; boundary*0=a; boundary*1=b", BadMultipart),
    "white space around =": (
        PLAIN_TYPE.replace("=", " = ").encode(),
        BadMultipart,
    ),
    "a comma for a semicolon": (PLAIN_TYPE.replace(";", ",").encode(), BadRequest),
    "white space for a semicolon": (PLAIN_TYPE.replace(";", "").encode(), BadRequest),
    "another multipart": (b"multipart/mixed; boundary=a", UnsupportedMediaType),
    "a boundary of 71 bytes": (b"multipart/form-data; boundary=" + b"a" * 71, BadMultipart),
    "a boundary with a line break": (b'multipart/form-data; boundary="a\\\nb"', BadMultipart),
    "a boundary with a semicolon": (b'multipart/form-data; boundary="a;b"', BadMultipart),
}


@pytest.mark.parametrize(("content_type", "error"), REFUSED_TYPES.values(), ids=list(REFUSED_TYPES))
def test_content_types_that_are_refused(content_type: bytes, error: type[ClientError]) -> None:
    assert outcome(form(b"a"), content_type) is error


def test_fields_of_one_name_are_parts_in_their_order() -> None:
    """RFC 7578, sections 4.3 and 5.2."""
    assert outcome(form(b"1", b"2", b"1")) == [(F, b"1"), (F, b"2"), (F, b"1")]


def test_a_transfer_encoding_is_not_undone() -> None:
    """RFC 7578, section 4.7: deprecated, and no browser sends it."""
    head = DISPOSITION + b"\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    assert outcome(form(b"aGVsbG8=", head=head)) == [(F, b"aGVsbG8=")]


# --- injection ---------------------------------------------------------------------------------

INJECTIONS = [
    "\r\nX-Injected: 1",
    '", "injected": "',
    '"; filename="evil',
    "\u2028\u2029\x85\x9b2J\x1b[2J\x7f\u202e",
    "x" * 2000,
    "{transfer}{route}%s%(a)s${a}",
]
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
NAMES |= st.lists(st.sampled_from(INJECTIONS[:4]), max_size=3).map("".join)
TYPES = st.from_regex(r"\A[a-z]{1,5}/[a-z]{1,5}(; a=\"[^\"\\\x00-\x1f\x7f-\x9f]{0,9}\")?\Z")


def extended(text: str) -> bytes:
    """RFC 8187: any text can be sent, whatever is in it."""
    return b"utf-8''" + b"".join(b"%%%02X" % byte for byte in text.encode())


def upload(name: str, filename: str, content_type: str) -> tuple[MemoryBroker, ScriptedClient]:
    """A form of one part through the daemon's handler."""
    head = b"Content-Disposition: form-data; name*=" + extended(name)
    head += b"; filename*=" + extended(filename)
    head += b"\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n"
    client = ScriptedClient([request("/upload", form(b"content", head=head), PLAIN_TYPE)])
    broker = MemoryBroker()
    handler = UploadHandler(HttpConfig(), {"default": ROUTE}, broker, Uploads(1))
    trio.run(handler.serve, client, PEER)
    return broker, client


@given(NAMES, NAMES, TYPES)
@example(INJECTIONS[0], INJECTIONS[1], "text/plain")
@example(INJECTIONS[3], INJECTIONS[4], "text/plain; a=\u20ac")
@example(INJECTIONS[5], INJECTIONS[2], "text/plain")
def test_names_cannot_leave_their_place_in_a_response_or_a_message(
    name: str, filename: str, content_type: str
) -> None:
    broker, client = upload(name, filename, content_type)
    assert responses(client.sent) == (["201"], False)
    head, _, body = client.sent.partition(b"\r\n\r\n")
    assert head.count(b"\r\n") == 4
    assert (body.count(b"\n"), body[-1:]) == (1, b"\n")
    receipt = json.loads(body)
    assert receipt.keys() == {"transfer", "route", "frames", "bytes", "parts"}
    assert receipt["parts"][0].keys() == {
        *("part", "name", "filename", "content_type", "bytes", "frames", "digest")
    }
    shown = receipt["parts"][0]
    if max(len(name), len(filename)) < 100:
        assert (shown["name"], shown["filename"]) == (name, filename)
    message = encode_frame(broker.sink.frames[0])
    properties = BasicProperties()
    properties.decode(b"".join(properties_of(message, delivery_mode=2).encode()))
    assert properties.headers == message.headers
    assert [properties.headers[key] for key in ("name", "filename", "content-type")] == [
        name,
        filename,
        content_type,
    ]
