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


def _parameter(quoted: str) -> re.Pattern[str]:
    # Recipients agree on white space around ";" and "=" and on empty parameters.
    return re.compile(rf"[ \t]*;[ \t]*(?:({TCHARS})[ \t]*=[ \t]*({TCHARS}|{quoted}))?")


_STANDARD = _parameter(r'"[^"\\]*(?:\\.[^"\\]*)*"')
# Browsers percent-encode quotes and leave backslashes alone: "C:\" is complete.
_BROWSER = _parameter(r'"[^"]*"')
_EXTENDED = re.compile(r"(?i:utf-8)'[0-9A-Za-z-]*'((?:[!#$&+\-.^_`|~0-9A-Za-z]|%[0-9A-Fa-f]{2})*)")


class Disposition(NamedTuple):
    """What a Content-Disposition says; the type is in lower case."""

    type: str
    name: str | None
    filename: str | None


def disposition_params(value: str) -> Disposition:
    """Parse a Content-Disposition value, of a request or of a part.

    ``name*`` and ``filename*`` (RFC 8187, UTF-8 only) win over ``name`` and ``filename``.

    Raises:
        ValueError: malformed, a parameter given twice, another charset, or a NUL in a name.
    """
    type_, parameters = split_parameters(value)
    return Disposition(type_, _name(parameters, "name"), _name(parameters, "filename"))


def split_parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split ``value; key=value…`` into the lower-case value, and lower-case keys with their values.

    The values are as sent: with their quotes, if any.

    Raises:
        ValueError: malformed, or a key given twice.
    """
    main = _VALUE.match(value)
    if main is None:
        raise ValueError("no value before the parameters")
    try:
        parameters = _split(_STANDARD, value, main.end())
    except ValueError:
        parameters = _split(_BROWSER, value, main.end())
    return main[1].lower(), parameters


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
    return unquote_to_bytes(match[1]).decode("utf-8")
