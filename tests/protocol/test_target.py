"""Request targets: forms, paths, and the uploads they stand for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest, ClientError, MethodNotAllowed, NotFound, Unimplemented
from relay.protocol.target import destination, is_authority


@pytest.mark.parametrize(
    ("method", "target", "route", "filename"),
    [
        (b"POST", b"/upload", "default", None),
        (b"POST", b"/upload/", "default", None),
        (b"POST", b"/upload?a=b&c[]=/?|{}", "default", None),
        (b"POST", b"/upload/photos", "photos", None),
        (b"POST", b"/upload/photos/", "photos", None),
        (b"POST", b"/%75pload/ph%6ftos", "photos", None),
        (b"POST", b"http://relay.example:8480/upload/photos?x", "photos", None),
        (b"POST", b"HTTPS://[::1]/upload", "default", None),
        (b"PUT", b"/upload/", "default", None),
        (b"PUT", b"/upload/x.bin", "default", "x.bin"),
        (b"PUT", b"/upload/photos/", "photos", None),
        (b"PUT", b"/upload/photos/x.bin", "photos", "x.bin"),
        (b"PUT", b"/upload/a%20b%2Fc%5C..%E2%82%AC", "default", "a b/c\\..\u20ac"),
        (b"PUT", b"/upload/...", "default", "..."),
        (b"PUT", b"/upload/a[1]|b;c=d,e@f:g'h", "default", "a[1]|b;c=d,e@f:g'h"),
        (b"PUT", b"/upload/%0D%0A", "default", "\r\n"),
    ],
)
def test_paths_stand_for_routes_and_file_names(
    method: bytes, target: bytes, route: str, filename: str | None
) -> None:
    assert destination(method, target) == (route, filename)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/uploads",
        b"/Upload",
        b"/upload/a/b/c",
        b"/upload/a/b/",
        b"/upload//",
        b"/upload//b",
        b"//upload",
        b"/metrics",
        b"http://relay.example",
        b"http://relay.example?upload",
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"PUT", b"GET"])
def test_other_paths_are_not_found(method: bytes, target: bytes) -> None:
    with pytest.raises(NotFound):
        destination(method, target)


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        (b"GET", b"/upload", "POST"),
        (b"PUT", b"/upload", "POST"),
        (b"GET", b"/upload/", "POST, PUT"),
        (b"HEAD", b"/upload/x", "POST, PUT"),
        (b"PATCH", b"/upload/x", "POST, PUT"),
        (b"DELETE", b"/upload/x/y", "PUT"),
        (b"POST", b"/upload/x/y", "PUT"),
        (b"OPTIONS", b"/upload", "POST"),
        (b"OPTIONS", b"*", "POST, PUT"),
        (b"OPTIONS", b"http://relay.example:80", "POST, PUT"),
        (b"CONNECT", b"relay.example:443", "POST, PUT"),
        (b"CONNECT", b"/upload", "POST, PUT"),
    ],
)
def test_other_methods_are_told_which_are_allowed(method: bytes, target: bytes, allow: str) -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        destination(method, target)
    assert caught.value.allow == allow


@pytest.mark.parametrize("method", [b"post", b"BREW", b"PROPFIND", b"*"])
def test_unknown_methods_are_not_implemented(method: bytes) -> None:
    """RFC 9110, section 9.1."""
    with pytest.raises(Unimplemented):
        destination(method, b"/upload")
    with pytest.raises(NotFound):
        destination(method, b"/elsewhere")


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"*",  # RFC 9112, section 3.2.4: with OPTIONS only
        b"upload",
        b"relay.example:80",  # authority-form, section 3.2.3
        b"ftp://relay.example/upload",  # section 3.2.2, and RFC 9110, section 4.2
        b"http:/upload",
        b"http:///upload",  # RFC 9110, section 4.2.1
        b"http://user@relay.example/upload",  # RFC 9110, section 4.2.4
        b"http://a,b/upload",
        b"http://relay.example:99999/upload",
        b"/upload#x",  # RFC 9112, section 3.2: no fragment
        b"/upload?x#y",
        b"/upload/%",  # RFC 3986, section 2.1
        b"/upload/%4",
        b"/upload/%zz",
        b"/upload?%",
        b"/upload/%00",
        b"/upload/%ff",  # not UTF-8
        b"/upload/%ed%a0%80",  # a surrogate
        b"/upload/%c0%af",  # overlong
        b"/upload/\xc3\xa9",
        b"/upload/a b",
        b'/upload/a"b',
        b"/upload/a\\b",
        b"/upload/a{b}",
        b"/upload/..",  # dot segments: RFC 3986, section 5.2.4
        b"/upload/.",
        b"/upload/%2e%2E",
        b"/upload/../metrics",
        b"/upload/photos/..",
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"PUT"])
def test_a_malformed_or_ambiguous_target_is_refused(method: bytes, target: bytes) -> None:
    with pytest.raises(BadRequest):
        destination(method, target)


HOSTS = b"""a relay.example a:80 a: 127.0.0.1:8480 [::1] [::ffff:1.2.3.4]:1 a_b-c~d b%C3%BCcher
xn--bcher-kva.example.""".split()


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_accepted(host: bytes) -> None:
    assert is_authority(host)


BAD_HOSTS = rb""":80 user@a user:pw@a a,b a/b a?b a#b a:b a:65536 a:000080 a:-1 a:1:2 ::1 [::1 []
[::1]x [fe80::1%25eth0] [12345::] [v1.a] a%2 a\b "a" """.split()


@pytest.mark.parametrize("host", [b"", b"a, b", b"a b", b"b\xfccher", *BAD_HOSTS])
def test_other_hosts_are_refused(host: bytes) -> None:
    """RFC 9110, section 7.2; RFC 9112, section 3.2."""
    assert not is_authority(host)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"POST", b"PUT", b"GET", b"OPTIONS", b"CONNECT"]) | st.binary(max_size=5),
    st.binary(max_size=20)
    | st.lists(
        st.sampled_from([b"/", b"upload", b"%2e", b".", b"%", b"a", b"http://", b"?", b"%80"])
    ).map(b"".join),
)
def test_any_target_is_an_upload_or_the_clients_error(method: bytes, target: bytes) -> None:
    try:
        route, filename = destination(method, target)
    except ClientError:
        return
    assert route
    assert filename is None or filename not in {"", ".", ".."}
    assert method in {b"POST", b"PUT"}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_name_arrives_as_it_was_percent_encoded(name: str) -> None:
    if name in {".", ".."}:
        return
    encoded = "".join(f"%{byte:02X}" for byte in name.encode()).encode("ascii")
    assert destination(b"PUT", b"/upload/r/" + encoded) == ("r", name)
