"""Who a request is from, and whether that client may upload: all of it is decided here.

The first of these that there is: the bearer token sent with the request; the client certificate
that the connection came with; the user at the other end of a Unix socket. A token that is sent and
not valid is refused, whatever else there is. Whoever is nobody by these is anonymous. Pure: what
the connection tells comes in as a ``Peer``; this module knows no socket and no file.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from relay.config import RouteConfig
from relay.errors import Forbidden, Unauthorized
from relay.server.tokens import Tokens
from relay.values import is_client_name

# RFC 6750, section 2.1; schemes are case-insensitive (RFC 9110, section 11.1).
_BEARER: Final = re.compile(rb"bearer +([-._~+/0-9a-z]+=*)", re.IGNORECASE)
_INVALID: Final = 'Bearer realm="relay", error="invalid_token"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The other end of a connection, as far as the connection itself tells.

    Attributes:
        address: for the log and the operator.
        client: its name, by its certificate or its user; None if it did not have to have one.
    """

    address: str
    client: str | None = None


class Access:
    """Who may upload.

    Attributes:
        tokens: those that are valid; None if no request needs to have one.
    """

    def __init__(self, *, tokens: Tokens | None = None, anonymous: bool = True) -> None:
        """``anonymous``: those who are nobody may upload, too, where a route takes everybody."""
        self.configure(tokens=tokens, anonymous=anonymous)

    def configure(self, *, tokens: Tokens | None, anonymous: bool) -> None:
        """Have others in, or out, from now on."""
        self.tokens = tokens
        self._anonymous = anonymous

    def identify(self, authorization: bytes | None, peer: Peer) -> str | None:
        """The client's name; None if it is anonymous, and may be.

        Args:
            authorization: the request's field of that name.
            peer: whom the connection is with.

        Raises:
            Unauthorized: it has a wrong token, or none where it must have one.
            Forbidden: it has a certificate that does not say who it is.
        """
        if self.tokens is not None and authorization is not None:
            return _bearer(self.tokens, authorization)
        if peer.client is None and not self._anonymous:
            if self.tokens is None:
                raise Forbidden("the client certificate has no name that relay can use")
            raise Unauthorized("uploads need a bearer token")
        return peer.client

    def check(self, client: str | None, route: RouteConfig) -> None:
        """Let pass whoever may use the route.

        Raises:
            Unauthorized: it is anonymous, and could have sent a token.
            Forbidden: it may not.
        """
        if not route.clients or client in route.clients:
            return
        if client is None and self.tokens is not None:
            raise Unauthorized("the route needs a bearer token")
        raise Forbidden("this client may not use the route")

    def describe(self, *, certificates: bool, unix_sockets: bool) -> str:
        """Who may upload, in words for the log.

        Args:
            certificates: clients must have one, but for those on Unix sockets.
            unix_sockets: there are any.
        """
        who = []
        if self.tokens is not None:
            number = len(self.tokens.clients)
            who.append(f"bearers of a token ({number} client{'' if number == 1 else 's'})")
        if certificates:
            who.append("holders of a client certificate")
        if not who:
            return "anybody who can connect"
        if unix_sockets:
            who.append("users on Unix sockets")
        if self._anonymous and not certificates:
            who.append("anonymous clients")
        return ", ".join(who)


def _bearer(tokens: Tokens, authorization: bytes) -> str:
    match = _BEARER.fullmatch(authorization)
    if match is None:
        raise Unauthorized("the Authorization field holds no bearer token")
    client = tokens.client_of(match[1])
    if client is None:
        raise Unauthorized("the bearer token is not valid", challenge=_INVALID)
    return client


def name_in(certificate: Mapping[str, Any] | None) -> str | None:
    """The client's name: of what ``SSLSocket.getpeercert`` returns, the first that is there.

    The first URI, DNS name or email address, in this order, of the subject's alternative names;
    without any of them, the common name. None if that is no name that relay can use: it is never
    cut or changed, for two clients must not become one.
    """
    name = next(_names(certificate or {}), "")
    return name if is_client_name(name) else None


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    for wanted in ("URI", "DNS", "email"):
        for kind, value in certificate.get("subjectAltName", ()):
            if kind == wanted:
                yield value
    for relative_name in certificate.get("subject", ()):
        for kind, value in relative_name:
            if kind == "commonName":
                yield value
