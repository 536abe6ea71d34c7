"""Content-Disposition, and the parameters that it and Content-Type carry.

Names come out as the user's program knew them, whatever its way of quoting: RFC 6266 and 8187,
what browsers do (WHATWG), what older clients do. Names are opaque text, never paths: nothing is
stripped from them. Whose error a malformed value is, the caller knows: here it is ValueError.
Pure.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from multipart import content_disposition_unquote

from relay.protocol.head import TCHARS

_VALUE = re.compile(rf"[ \t]*({TCHARS}(?:/{TCHARS})?)")


def _parameter(quoted: str, space: str = r"[ \t]*") -> re.Pattern[str]:
    # Recipients agree on white space around ";" and on empty parameters.
    return re.compile(rf"[ \t]*;[ \t]*(?:({TCHARS}){space}={space}({TCHARS}|{quoted}))?")


_QUOTED = r'"[^"\\]*(?:\\.[^"\\]*)*"'
# MIME allows white space around "=", HTTP does not (RFC 9110, section 5.6.6).
_HTTP = _parameter(_QUOTED, space="")
_MIME = _parameter(_QUOTED)
# Browsers percent-encode quotes and leave backslashes alone: "C:\" is complete. No value can be
# split by both patterns in two ways: each needs the other's escaped quotes to be delimiters.
_BROWSER = _parameter(r'"[^"]*"')
# In quotes, as Apache HttpClient 5 sends it, it is the same and cannot be anything else.
_EXTENDED = re.compile(
    r"(\"?)(?i:utf-8)'[0-9A-Za-z-]*'((?:[!#$&+\-.^_`|~0-9A-Za-z]|%[0-9A-Fa-f]{2})*)\1"
)
_CONTINUED = re.compile(r"[^*]*\*[0-9].*")
# What nearly all parts are sent with, where nothing can be quoted, escaped or extended: what
# follows would read it the same, at four times the cost, which many small forms pay for.
_COMMON = re.compile(r'form-data; name="([^"\\%\0]*)"(?:; filename="([^"\\%\0]*)")?')


class Disposition(NamedTuple):
    """What a Content-Disposition says; the type is in lower case."""

    type: str
    name: str | None
    filename: str | None


def disposition_params(value: str) -> Disposition:
    """Parse a Content-Disposition value, of a request or of a part.

    ``filename*`` (RFC 8187, UTF-8 only) wins over ``filename``: .NET and Apache HttpClient send
    both. ``name*`` may stand in the place of ``name``.

    Raises:
        ValueError: malformed, a parameter given twice or in pieces, another charset, or a NUL in a
            name.
    """
    if common := _COMMON.fullmatch(value):
        return Disposition("form-data", common[1], common[2])
    main = _start(value)
    try:
        parameters = _split(_MIME, value, main.end())
    except ValueError:
        parameters = _split(_BROWSER, value, main.end())
    # Some recipients put them together (RFC 2231, section 3), others ignore them.
    if any(map(_CONTINUED.fullmatch, parameters)):
        raise ValueError("a parameter in pieces")
    # aiohttp sends name* alone, and no client both: who reads one of them would see another field.
    if "name" in parameters and "name*" in parameters:
        raise ValueError("both name and name*")
    return Disposition(main[1].lower(), _name(parameters, "name"), _name(parameters, "filename"))


def media_type_params(value: str) -> dict[str, str]:
    """The parameters of a request's Content-Type: lower-case keys, values with their quotes.

    Raises:
        ValueError: malformed, a key given twice, or one in the extended notation of RFC 2231.
    """
    parameters = _split(_HTTP, value, _start(value).end())
    if any("*" in key for key in parameters):
        raise ValueError("an extended parameter")
    return parameters


def _start(value: str) -> re.Match[str]:
    main = _VALUE.match(value)
    if main is None:
        raise ValueError("no value before the parameters")
    return main


def _split(pattern: re.Pattern[str], value: str, position: int) -> dict[str, str]:
    parameters: dict[str, str] = {}
    while match := pattern.match(value, position):
        position = match.end()
        if match[1] is None:
            continue
        key = match[1].lower()
        if key in parameters:
            raise ValueError("a parameter is given twice")
        parameters[key] = match[2]
    if value[position:].strip(" \t"):
        raise ValueError("malformed parameters")
    return parameters


def _name(parameters: dict[str, str], key: str) -> str | None:
    sent = parameters.get(key)
    # The library's own parsers strip directories from Windows paths; its unquoting alone,
    # without filename=True, does not.
    name = None if sent is None else str(content_disposition_unquote(sent))
    extended = parameters.get(f"{key}*")
    if extended is not None:
        name = _decode_extended(extended)
    if name is not None and "\0" in name:
        raise ValueError("a NUL in a name")
    return name


def _decode_extended(value: str) -> str:
    match = _EXTENDED.fullmatch(value)
    if match is None:
        raise ValueError("not an extended value of RFC 8187 in UTF-8")
    return unquote_to_bytes(match[2]).decode("utf-8")
