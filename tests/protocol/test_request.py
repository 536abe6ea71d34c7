"""What requests ask for and which are refused; h11 is the witness for what is let through."""

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import (
    BadMultipart,
    BadRequest,
    ClientError,
    ExpectationFailed,
    NotFound,
    Unimplemented,
    UnsupportedMediaType,
)
from relay.model import PartHead
from relay.protocol.head import Field, check_head
from relay.protocol.request import RequestHead, parse_request

HOST = (b"host", b"relay.example")
FORM = (b"content-type", b"multipart/form-data; boundary=xyz")


def request(
    *fields: Field,
    method: bytes = b"POST",
    target: bytes = b"/upload",
    version: bytes = b"1.1",
    host: bool = True,
) -> RequestHead:
    headers = [HOST, *fields] if host else list(fields)
    return parse_request(method, target, headers, version)


def test_a_plain_upload_is_one_raw_part() -> None:
    head = request((b"content-length", b"5"), target=b"/upload/photos")
    assert head == RequestHead(
        method="POST",
        route="photos",
        boundary=None,
        part=PartHead(),
        content_length=5,
        expect_continue=False,
        keep_alive=True,
        idempotency_key=None,
        given_digests={},
        wanted_digests=(),
    )


def test_a_raw_part_is_described_by_the_fields_of_its_request() -> None:
    head = request(
        (b"content-type", b"Text/Plain; charset=UTF-8"),
        (b"content-disposition", b'attachment; filename="\xe2\x82\xac.txt"'),
        (b"content-length", b"5"),
    )
    assert head.part == PartHead(filename="\u20ac.txt", content_type="Text/Plain; charset=UTF-8")
    assert head.boundary is None


def test_a_put_is_named_by_its_path() -> None:
    disposition = (b"content-disposition", b"attachment; filename=other")
    head = request(disposition, method=b"PUT", target=b"/upload/r/name")
    assert (head.method, head.route, head.part.filename) == ("PUT", "r", "name")
    assert request(disposition, method=b"PUT", target=b"/upload/r/").part.filename == "other"


def test_a_put_is_raw_whatever_its_media_type() -> None:
    head = request(FORM, method=b"PUT", target=b"/upload/mail.mime")
    assert head.boundary is None
    assert head.part.content_type == "multipart/form-data; boundary=xyz"


def test_a_form_has_its_boundary_and_no_part_of_its_own() -> None:
    head = request(FORM, (b"content-disposition", b"malformed=; but meaningless"))
    assert (head.boundary, head.part) == ("xyz", PartHead())


# Framing: RFC 9112, section 6.


def test_a_request_without_framing_has_an_empty_body() -> None:
    head = request()
    assert (head.content_length, head.chunked) == (0, False)


@pytest.mark.parametrize(
    ("value", "length"), [(b"0", 0), (b"007", 7), (b"9223372036854775807", 2**63 - 1)]
)
def test_a_content_length_is_taken(value: bytes, length: int) -> None:
    assert request((b"content-length", value)).content_length == length


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"+5"],
        [b"-5"],
        [b"5 5"],
        [b"5,5"],
        [b"5, 5"],
        [b"5", b"5"],
        [b"5", b"6"],
        [b"0x5"],
        [b"5.0"],
        [b"1_0"],
        [b"\xb2"],
        [b"9223372036854775808"],
        [b"00000000000000000005"],
    ],
)
def test_a_doubtful_content_length_is_refused(values: list[bytes]) -> None:
    with pytest.raises(BadRequest):
        request(*((b"content-length", value) for value in values))


@pytest.mark.parametrize("value", [b"chunked", b"Chunked", b"CHUNKED"])
def test_a_chunked_body_has_no_length(value: bytes) -> None:
    head = request((b"transfer-encoding", value))
    assert (head.content_length, head.chunked) == (None, True)


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b","],
        [b"chunked,"],
        [b",chunked"],
        [b"chunked, chunked"],
        [b"chunked", b"chunked"],
        [b"chunked", b"identity"],
        [b"chunked, gzip"],
        [b"chunked;q=1"],
        [b'"chunked"'],
        [b"chun ked"],
        [b"chunked\xff"],
    ],
)
def test_a_malformed_transfer_encoding_is_refused(values: list[bytes]) -> None:
    with pytest.raises(BadRequest):
        request(*((b"transfer-encoding", value) for value in values))


@pytest.mark.parametrize(
    "values", [[b"gzip, chunked"], [b"gzip", b"chunked"], [b"gzip"], [b"identity"], [b"xchunked"]]
)
def test_another_transfer_coding_is_not_implemented(values: list[bytes]) -> None:
    with pytest.raises(Unimplemented):
        request(*((b"transfer-encoding", value) for value in values))


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_two_ways_of_framing_are_refused(version: bytes) -> None:
    fields = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    for both in (fields, fields[::-1]):
        with pytest.raises(BadRequest):
            request(*both, version=version)


def test_http_1_0_has_no_transfer_encoding() -> None:
    with pytest.raises(BadRequest):
        request((b"transfer-encoding", b"chunked"), version=b"1.0")


def test_doubtful_framing_is_reported_before_anything_else() -> None:
    bad = (b"content-length", b"x")
    with pytest.raises(BadRequest):
        request(bad, target=b"/nowhere")
    with pytest.raises(BadRequest):
        request(bad, method=b"GET")
    with pytest.raises(NotFound):
        request((b"expect", b"a miracle"), target=b"/nowhere")


# Host: RFC 9112, section 3.2. Which values are valid is tested with targets.


@pytest.mark.parametrize("target", [b"/upload", b"http://relay.example/upload"])
@pytest.mark.parametrize(
    "values", [[], [b""], [b"a", b"a"], [b"a", b"b"], [b"a, b"], [b"u@a"], [b"a b"]]
)
def test_a_request_needs_one_valid_host(values: list[bytes], target: bytes) -> None:
    fields = [(b"host", value) for value in values]
    with pytest.raises(BadRequest):
        request(*fields, host=False, target=target)


def test_http_1_0_may_lack_a_host_but_not_have_an_invalid_one() -> None:
    assert request(host=False, version=b"1.0").route == "default"
    with pytest.raises(BadRequest):
        request((b"host", b""), host=False, version=b"1.0")


# Expect and Connection: RFC 9110, sections 10.1.1 and 7.6.1.


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue", b", 100-continue,"])
def test_a_client_that_waits_is_noticed(value: bytes) -> None:
    body = (b"content-length", b"5")
    assert request((b"expect", value), body).expect_continue
    assert request((b"expect", value), (b"transfer-encoding", b"chunked")).expect_continue
    assert not request((b"expect", value)).expect_continue
    assert not request((b"expect", value), body, version=b"1.0").expect_continue


@pytest.mark.parametrize("value", [b"a miracle", b"100-continue, x", b"100-continue=1"])
def test_other_expectations_fail(value: bytes) -> None:
    with pytest.raises(ExpectationFailed):
        request((b"expect", value))
    assert request((b"expect", value), version=b"1.0").expect_continue is False


@pytest.mark.parametrize("value", [b"close", b"Close", b"keep-alive, close", b"close,te"])
def test_close_is_heard(value: bytes) -> None:
    assert not request((b"connection", value)).keep_alive


def test_connections_stay_open_otherwise() -> None:
    assert request().keep_alive
    assert request((b"connection", b"Upgrade, HTTP2-Settings"), (b"upgrade", b"h2c")).keep_alive
    assert not request((b"connection", b"keep-alive"), version=b"1.0").keep_alive


# Content.


@pytest.mark.parametrize(
    ("value", "boundary"),
    [
        (b"multipart/form-data; boundary=xyz", "xyz"),
        (b"Multipart/Form-Data;charset=UTF-8;BOUNDARY=XyZ", "XyZ"),
        (b"multipart/form-data ; boundary=xyz ;", "xyz"),
        (b'multipart/form-data; boundary="a b:c?"', "a b:c?"),
        (b"multipart/form-data; boundary=" + b"x" * 70, "x" * 70),
        (b"multipart/form-data; boundary=----WebKitFormBoundaryAbC", "----WebKitFormBoundaryAbC"),
        (
            b"multipart/form-data; boundary=------------------------d74496d66958873e",
            "-" * 24 + "d74496d66958873e",
        ),
    ],
)
def test_a_boundary_is_found(value: bytes, boundary: str) -> None:
    assert request((b"content-type", value)).boundary == boundary


@pytest.mark.parametrize(
    "parameters",
    [
        b"",
        b"; charset=UTF-8",
        b"; boundary",
        b"; boundary=",
        b'; boundary=""',
        b'; boundary="a "',
        b"; boundary=a; boundary=a",
        b"; boundary=a; Boundary=b",
        b"; boundary=a b",
        b"; boundary=a, b",
        b"; boundary=" + b"x" * 71,
        b'; boundary="a\\b"',
        b'; boundary="a\\"b"',
        b'; boundary="a;b"',
        b'; boundary="\xc3\xa4"',
        b"; boundary*=utf-8''a",
        b"; boundary=a; boundary*0=b",
        b"; boundary =a",
        b"; boundary=a garbage",
    ],
)
def test_a_form_needs_one_valid_boundary(parameters: bytes) -> None:
    """RFC 2046, section 5.1.1."""
    with pytest.raises(BadMultipart):
        request((b"content-type", b"multipart/form-data" + parameters))


@pytest.mark.parametrize("value", [b"multipart/mixed; boundary=a", b"Multipart/x", b"multipart/*"])
def test_other_multipart_types_are_not_supported(value: bytes) -> None:
    with pytest.raises(UnsupportedMediaType):
        request((b"content-type", value))


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"text"],
        [b"text/"],
        [b"/plain"],
        [b"text / plain"],
        [b"multipart /form-data; boundary=a"],
        [b"text/plain, multipart/form-data; boundary=a"],
        [b"text/plain x"],
        [b"text/plain; a=\xff"],
        [b"text/plain; a=\xc2\x9b"],
        [b"text/plain", b"text/plain"],
        [b"text/plain", b"multipart/form-data; boundary=a"],
    ],
)
def test_a_doubtful_content_type_is_refused(values: list[bytes]) -> None:
    """RFC 9110, section 8.3."""
    with pytest.raises(BadRequest):
        request(*((b"content-type", value) for value in values))


@pytest.mark.parametrize("value", [b"gzip", b"identity, br", b"aws-chunked"])
def test_no_content_coding_is_undone(value: bytes) -> None:
    with pytest.raises(UnsupportedMediaType):
        request((b"content-encoding", value))


@pytest.mark.parametrize("value", [b"", b"identity", b"Identity, identity"])
def test_identity_is_no_content_coding(value: bytes) -> None:
    assert request((b"content-encoding", value)).boundary is None


def test_a_fragment_does_not_pass_for_the_whole() -> None:
    """RFC 9110, section 14.5."""
    with pytest.raises(BadRequest):
        request((b"content-range", b"bytes 0-4/10"), method=b"PUT", target=b"/upload/x")


@pytest.mark.parametrize(
    "values",
    [
        [b"filename=x"],
        [b"attachment; filename=a; filename=b"],
        [b"attachment; filename=\xff"],
        [b"attachment; filename=a", b"attachment; filename=a"],
    ],
)
def test_a_malformed_content_disposition_is_refused(values: list[bytes]) -> None:
    with pytest.raises(BadRequest):
        request(*((b"content-disposition", value) for value in values))


# Idempotency-Key and digests.


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b"8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b'"a b,c;d\\"e\\\\"', 'a b,c;d"e\\'),
        (b'"a";p=1', "a"),
        (b"QUJD+/=", "QUJD+/="),
        (b":AAAA:", ":AAAA:"),
        (b"x" * 255, "x" * 255),
    ],
)
def test_an_idempotency_key_may_be_quoted_or_bare(value: bytes, key: str) -> None:
    assert request((b"idempotency-key", value)).idempotency_key == key


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b'""'],
        [b'"a'],
        [b'"a", "b"'],
        [b"a, b"],
        [b"a b"],
        [b"a;b"],
        [b"a\\b"],
        [b'"\xc3\xa4"'],
        [b"x" * 256],
        [b'"' + b"x" * 256 + b'"'],
        [b"a", b"a"],
    ],
)
def test_a_malformed_idempotency_key_is_refused(values: list[bytes]) -> None:
    with pytest.raises(BadRequest):
        request(*((b"idempotency-key", value) for value in values))


def test_digests_of_a_raw_part_are_known_before_its_body() -> None:
    head = request(
        (b"repr-digest", b"sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:, md5=:AAAA:"),
        (b"content-digest", b"crc32c=:Q3lHIA==:"),
        (b"want-repr-digest", b"sha-512=1, sha-256=1"),
    )
    assert head.given_digests["crc32c"] == "43794720"
    assert head.given_digests.keys() == {"sha-256", "crc32c"}
    assert head.wanted_digests == ("sha-512", "sha-256")
    assert head.digests == ("sha-512", "sha-256")


def test_a_given_digest_is_computed_even_if_nobody_wants_it() -> None:
    value = b"sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"
    assert request((b"content-digest", value)).digests == ("sha-256",)


def test_the_digest_of_a_forms_encoding_is_not_that_of_a_part() -> None:
    head = request(
        FORM, (b"repr-digest", b"crc32c=:Q3lHIA==:"), (b"want-repr-digest", b"sha-512=1")
    )
    assert (head.given_digests, head.digests) == ({}, ("sha-512",))
    with pytest.raises(BadRequest):
        request(FORM, (b"repr-digest", b"crc32c=43794720"))


# Whatever comes.

NAMES = st.sampled_from(
    b"""host content-length transfer-encoding content-type content-disposition content-encoding
    expect connection idempotency-key repr-digest want-repr-digest x-other""".split()
)
GOOD = {
    b"content-length": b"5",
    b"transfer-encoding": b"chunked",
    b"content-type": b"multipart/form-data; boundary=xyz",
    b"expect": b"100-continue",
    b"connection": b"close",
}
PLAIN = b"a 5 0 chunked close identity text/plain sha-256=1 crc32c=:Q3lHIA==: a:80 u@a ,".split()
VALUES = st.sampled_from(
    [b"", b"5, 5", b"a b", b'"key"', b"attachment; filename*=utf-8''%80", b"\xff", *PLAIN]
)
FIELDS = st.sampled_from(sorted(GOOD.items())) | st.tuples(NAMES, VALUES)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"POST", b"PUT", b"GET"]),
    st.lists(FIELDS | st.tuples(NAMES, st.binary(max_size=8)), max_size=4),
    st.sampled_from([b"1.0", b"1.1"]),
)
def test_any_fields_are_an_upload_or_the_clients_error(
    method: bytes, fields: list[Field], version: bytes
) -> None:
    try:
        head = parse_request(method, b"/upload/x", [HOST, *fields], version)
    except ClientError as exc:
        assert exc.detail  # noqa: PT017  there need be no error
    else:
        assert head.method in {"POST", "PUT"}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"POST /upload", b"PUT /upload/x%20y", b"POST http://a/upload/r?q"]),
    st.lists(FIELDS, max_size=3),
    st.booleans(),
    st.sampled_from([b"1.0", b"1.1", b"1.2"]),
)
def test_h11_frames_what_is_let_through_the_same_way(
    line: bytes, fields: list[Field], host: bool, version: bytes
) -> None:
    fields = [HOST, *fields] if host else fields
    lines = [line + b" HTTP/" + version, *(name.title() + b": " + value for name, value in fields)]
    data = b"\r\n".join([*lines, b"", b""])
    try:
        ours = parse_request(*check_head(data, max_headers=100))
    except ClientError:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    if ours.expect_continue:
        assert connection.they_are_waiting_for_100_continue
    body = b"5\r\nhello\r\n0\r\n\r\n" if ours.chunked else b"hello"[: ours.content_length or 0]
    connection.receive_data(body + b"next")
    received = b""
    while isinstance(event := connection.next_event(), h11.Data):
        received += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert received == (b"" if ours.content_length == 0 else b"hello")
    assert connection.trailing_data == (b"next", False)
    assert (connection.their_state is h11.DONE) == ours.keep_alive
