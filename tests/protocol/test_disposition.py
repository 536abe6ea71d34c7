"""Content-Disposition as real clients send it, and what is refused."""

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multipart import content_disposition_quote

from relay.protocol.disposition import Disposition, disposition_params, media_type_params

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("value", "name", "filename"),
    [
        ("form-data; name=a", "a", None),
        ('form-data; name="a"; filename="b.txt"', "a", "b.txt"),
        ('Form-Data;NAME="a";FileName="b.txt"', "a", "b.txt"),
        ('form-data ;\tname = "a" ; filename\t=b.txt ;', "a", "b.txt"),
        ('form-data; name=""; filename=""', "", ""),
        ("attachment", None, None),
        ('attachment; size=10; creation-date="Sat, 1 Jan"; filename=x', None, "x"),
        # Browsers: WHATWG, "multipart/form-data encoding algorithm"
        ('form-data; name="a%22b%0D%0Ac"; filename="d%22e"', 'a"b\r\nc', 'd"e'),
        ('form-data; name="100%25 %41"', "100%25 %41", None),
        ('form-data; name="f"; filename="\u65e5\u672c.txt"', "f", "\u65e5\u672c.txt"),
        ('form-data; name="f"; filename="C:\\dir\\new.txt"', "f", "C:\\dir\\new.txt"),
        ('form-data; name="f"; filename="\\\\host\\share\\x"', "f", "\\\\host\\share\\x"),
        ('form-data; name="a\\"; filename="C:\\"', "a\\", "C:\\"),
        ('form-data; name="; filename=evil"', "; filename=evil", None),
        # Older clients: quoted pairs (RFC 9110, section 5.6.4)
        ('form-data; name="a\\"b"; filename="c\\\\d\\"e"', 'a"b', 'c\\d"e'),
        # aiohttp: RFC 8187 in the place of the plain parameter
        ("form-data; name*=utf-8''n%C3%A4me", "n\u00e4me", None),
        ("form-data; name=\"f\"; filename*=UTF-8'en'%e2%82%ac", "f", "\u20ac"),
        # RFC 6266, section 4.3: the extended one wins, in either order
        ("attachment; filename=plain; filename*=utf-8''ext", None, "ext"),
        ("attachment; filename*=utf-8''ext; filename=plain", None, "ext"),
        # Apache HttpClient 5: in quotes
        ("form-data; name=f; filename*=\"UTF-8''%e2%82%ac\"", "f", "\u20ac"),
    ],
)
def test_names_come_out_as_they_were_meant(
    value: str, name: str | None, filename: str | None
) -> None:
    disposition = disposition_params(value)
    assert (disposition.name, disposition.filename) == (name, filename)


def test_the_type_is_in_lower_case() -> None:
    assert disposition_params("Form-Data; name=a").type == "form-data"


@pytest.mark.parametrize(
    "value",
    [
        "",
        ";",
        "; name=a",
        '"form-data"; name=a',
        "form-data name=a",
        "form-data; name",
        "form-data; name=",
        "form-data; name=a b",
        "form-data; =a",
        'form-data; name="a',
        'form-data; name="a" b',
        'form-data; name="a"; filename="b" garbage; x=y',
        "form-data, form-data; name=a",
        "form-data; name=\u00e4",
        'form-data; name="a\0"',
        "form-data; name*=utf-8''%00",
        # given twice: RFC 6266, section 4.1
        "form-data; name=a; name=a",
        "form-data; name=a; NAME=b",
        "form-data; name*=utf-8''a; name*=utf-8''b",
        "form-data; name=a; x=1; x=2",
        "form-data; name=a; name*=utf-8''a",
        "form-data; name*=utf-8''a; name=b",
        # in pieces: RFC 2231, section 3
        "attachment; filename*0=a; filename*1=b",
        "form-data; name=f; filename=a; filename*0*=utf-8''b",
        "form-data; name*0=f",
        # RFC 8187, section 3.2
        "form-data; name*=a",
        "form-data; name*=iso-8859-1''%e4",
        "form-data; name*=utf-8''%ff",
        "form-data; name*=utf-8''%e2%82",
        "form-data; name*=utf-8''%4",
        "form-data; name*=utf-8'a b'c",
        "form-data; name*=\"utf-8''a",
        "form-data; name*=utf-8''a\"",
        "form-data; name*=''a",
    ],
)
def test_malformed_or_ambiguous_values_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        disposition_params(value)


def test_parameters_are_split_but_left_in_their_quotes() -> None:
    value = 'Multipart/Form-Data; Boundary="a b"; charset=UTF-8'
    assert media_type_params(value) == {"boundary": '"a b"', "charset": "UTF-8"}


@pytest.mark.parametrize(
    "parameters",
    [
        "; boundary =a",
        "; boundary= a",
        "; boundary*=utf-8''a",
        "; boundary=a; boundary*0=b",
        '; boundary="a\\"',
        "; boundary=a; x",
    ],
)
def test_parameters_of_media_types_are_those_of_http_only(parameters: str) -> None:
    """RFC 9110, section 5.6.6."""
    with pytest.raises(ValueError, match=r"."):
        media_type_params(f"multipart/form-data{parameters}")


@settings(max_examples=200, deadline=None)
@given(NAMES, NAMES)
def test_what_a_browser_quotes_comes_out_the_same(name: str, filename: str) -> None:
    # A browser's own encoding is ambiguous where a name has these; see the next test.
    if any(mark in name + filename for mark in ("%22", "%0D", "%0A", '\\"', "\\")):
        return
    value = f"form-data; name={content_disposition_quote(name)}"
    value += f"; filename={content_disposition_quote(filename)}"
    assert disposition_params(value) == ("form-data", name, filename)


@settings(max_examples=200, deadline=None)
@given(NAMES, NAMES)
def test_what_rfc_8187_encodes_comes_out_the_same(name: str, filename: str) -> None:
    value = f"form-data; name*=utf-8''{quote(name, safe='')}"
    value += f"; filename*=UTF-8'de'{quote(filename, safe='')}"
    assert disposition_params(value) == ("form-data", name, filename)


@settings(max_examples=300, deadline=None)
@given(*[st.text(st.characters() | st.sampled_from('\\"%;\0*=\r\n'), max_size=8)] * 2)
def test_the_common_form_is_read_as_any_other_is(name: str, filename: str) -> None:
    for value in (f'form-data; name="{name}"', f'form-data; name="{name}"; filename="{filename}"'):
        # White space says nothing, and makes it no longer the common form.
        assert outcome(value) == outcome(value.replace("; name", " ; name", 1))


def outcome(value: str) -> Disposition | None:
    try:
        return disposition_params(value)
    except ValueError:
        return None


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=20)
    | st.lists(
        st.sampled_from(["form-data", ";", "name", "*", "=", '"', "\\", "utf-8''", "%e2", "a", " "])
    ).map("".join)
)
def test_any_text_is_a_disposition_or_a_value_error(value: str) -> None:
    try:
        disposition_params(value)
    except ValueError as exc:
        assert str(exc)  # noqa: PT017  there need be no error


def test_a_hostile_value_costs_no_more_than_its_length() -> None:
    # Ambiguous quoting must not be tried in every combination: these would take for ever.
    for hostile in (';a="\\"' * 2000, ';a="\\' * 2000, ";" * 8000, ' ;a="' * 2000, "\\" * 8000):
        with pytest.raises(ValueError, match=r"."):
            disposition_params(f"form-data{hostile}!")
