"""Request targets: their forms, their paths, and what upload each method and path stands for.

Strict where recipients differ (RFC 9112, section 3 and RFC 3986): one reading or none. Whether a
route exists is the handler's to know. Pure.
"""

import re
from ipaddress import IPv6Address
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from relay.errors import BadRequest, MethodNotAllowed, NotFound, Unimplemented

DEFAULT_ROUTE: Final = "default"
"""The route of an upload whose path names none."""

_METHODS: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"}
)
"""Those that are known, though not allowed: RFC 9110, section 9.3 and RFC 5789."""

_ENCODED = rb"%[0-9A-Fa-f]{2}"
_UNRESERVED = rb"A-Za-z0-9\-._~"
# RFC 3986 does not allow [ ] and | in a path; browsers send them as they are, and they are read
# the same everywhere. The query is ignored: any visible character may be in it. No fragments.
_PATH = rb"/(?:[%b!$&'()*+,;=:@/|\[\]]|%b)*" % (_UNRESERVED, _ENCODED)
_QUERY = rb"(?:\?(?:[\x21\x22\x24\x26-\x7e]|%b)*)?" % _ENCODED
_ORIGIN_FORM = re.compile(rb"(%b)%b" % (_PATH, _QUERY))
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)(%b)?%b" % (_PATH, _QUERY))
# Without the comma of RFC 3986's reg-name: a list of hosts is what merging two fields makes.
_AUTHORITY = re.compile(
    rb"(?:\[([0-9A-Fa-f:.]+)\]|(?:[%b!$&'()*+;=]|%b)+)(?::([0-9]{0,5}))?" % (_UNRESERVED, _ENCODED)
)


class Destination(NamedTuple):
    """Where an upload goes: a route's name, and the file's name if the path has one."""

    route: str
    filename: str | None


def is_authority(value: bytes) -> bool:
    """Whether ``value`` is ``host[:port]``: as Host must be (RFC 9110, section 7.2)."""
    match = _AUTHORITY.fullmatch(value)
    if match is None or int(match[2] or b"0") > 65535:
        return False
    if match[1] is not None:
        try:
            IPv6Address(match[1].decode("ascii"))
        except ValueError:
            return False
    return True


def destination(method: bytes, target: bytes) -> Destination:
    """The upload that a request line asks for.

    Beside the paths of the contract: a trailing slash is ignored by POST, and means a PUT without
    a file name, as ``curl -T - URL/upload/`` sends it.

    Raises:
        BadRequest: the target is malformed, or of a form that the method does not allow.
        NotFound: no such path.
        MethodNotAllowed: another method than POST or PUT, or not for this path.
        Unimplemented: a method that nobody knows; methods have a case.
    """
    path = _path(method, target)
    upload, *names = [_decode(segment) for segment in path.split(b"/")[1:]]
    if upload != "upload" or len(names) > 2 or (len(names) == 2 and not names[0]):
        raise NotFound("uploads go to /upload")
    if method not in _METHODS:
        raise Unimplemented("there is no such method")
    allow = _allowed(names)
    if method.decode("latin-1") not in allow.split(", "):
        raise MethodNotAllowed("the method does not apply to this path", allow=allow)
    if method == b"POST":
        return Destination(names[0] if names and names[0] else DEFAULT_ROUTE, None)
    route = names[0] if len(names) == 2 else DEFAULT_ROUTE
    return Destination(route, names[-1] or None)


def _allowed(names: list[str]) -> str:
    if not names:
        return "POST"
    return "PUT" if len(names) == 2 and names[1] else "POST, PUT"


def _path(method: bytes, target: bytes) -> bytes:
    """The target's path, by the form of the target (RFC 9112, section 3.2)."""
    if method == b"CONNECT":
        raise MethodNotAllowed("this is no proxy", allow="POST, PUT")
    if match := _ORIGIN_FORM.fullmatch(target):
        return match[1]
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is not None and not is_authority(absolute[1]):
        raise BadRequest("the request target's authority is invalid")
    # OPTIONS with an absolute URI without path asks about the whole server, as * does.
    if method == b"OPTIONS" and (target == b"*" or (absolute and absolute[2] is None)):
        raise MethodNotAllowed("the method does not apply to this server", allow="POST, PUT")
    if absolute is None:
        raise BadRequest("the request target is malformed")
    return absolute[2] or b"/"


def _decode(segment: bytes) -> str:
    try:
        text = unquote_to_bytes(segment).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("the path is not percent-encoded UTF-8") from None
    if "\0" in text:
        raise BadRequest("the path has an encoded NUL")
    # Clients and proxies resolve these before or after us, by rules of their own (RFC 3986,
    # section 6.2.2.3), so that they and relay may not mean the same upload.
    if text in {".", ".."}:
        raise BadRequest("the path has a dot segment")
    return text
