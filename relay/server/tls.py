"""TLS on the upload port: the handshake, under a deadline, before anything else is read.

Unix sockets have none: their files' permissions guard them. Whoever does not get through gets a
clear end: an alert, or an answer in plain HTTP if that is what it speaks. What certificates say
and who may upload is decided elsewhere.
"""

import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import trio

from relay.config import HttpConfig
from relay.errors import BadRequest, ClientGone
from relay.logs import fields
from relay.server.connection import HttpConnection, linger
from relay.server.identity import Peer, name_in
from relay.server.responses import problem
from relay.server.tls_stream import TlsStream
from relay.tls import explain, server_context

log = logging.getLogger(__name__)

Serve = Callable[[trio.abc.HalfCloseableStream, Peer], Awaitable[None]]

GOODBYE: Final = 1.0
"""Seconds to send TLS's own: the client may not be reading."""

_HANDSHAKE: Final = b"\x16"


@dataclass
class Handshakes:
    """Outlives the ``TlsServer`` of one configuration.

    Attributes:
        failed: connections that sent something and came to no end of a handshake, since the start.
    """

    failed: int = 0


class TlsServer:
    """Serves connections behind TLS."""

    def __init__(
        self, config: HttpConfig, serve: Serve, handshakes: Handshakes | None = None
    ) -> None:
        """``serve`` gets each connection, decrypted, and its peer with the certificate's name.

        ``handshakes`` is where those that fail are counted.

        Raises:
            ConfigError: a file cannot be used.
        """
        self._config = config
        self._serve = serve
        self._context = _context(config)
        self._handshakes = handshakes or Handshakes()

    async def serve(self, stream: trio.SocketStream, peer: Peer) -> None:
        """Serve one connection to its end."""
        if stream.socket.family == socket.AF_UNIX:
            await self._serve(stream, peer)
            return
        deadline = trio.current_time() + self._config.header_timeout
        with trio.move_on_at(deadline) as scope:
            first = await _peek(stream)
        if scope.cancelled_caught or not first:
            return
        if first != _HANDSHAKE:
            await self._refuse(stream, peer)
            return
        secured = TlsStream(stream, self._context)
        if await self._handshake(secured, peer, deadline):
            await self._serve(secured, replace(peer, client=_name(secured)))
            with suppress(trio.BrokenResourceError), trio.move_on_after(GOODBYE):
                await secured.send_eof()

    async def _refuse(self, stream: trio.SocketStream, peer: Peer) -> None:
        """Answer what is not TLS, as if it were HTTP, which it probably is."""
        self._tell("it sends something else", peer)
        answer = problem(BadRequest("this port speaks TLS: use https"))
        with suppress(ClientGone):
            await HttpConnection(stream, self._config).respond(answer, close=True)

    async def _handshake(self, secured: TlsStream, peer: Peer, deadline: float) -> bool:
        """Returns whether it was successful; if not, the client knows."""
        reason = "no end of the handshake in time"
        with trio.move_on_at(deadline) as scope:
            try:
                await secured.do_handshake()
                return True
            except trio.BrokenResourceError as exc:
                cause = exc.__cause__ if isinstance(exc.__cause__, Exception) else exc
                reason = explain(cause, "the client")
        self._tell(reason, peer)
        if not scope.cancelled_caught:
            # The alert must not be overtaken by a reset, for what the client sent meanwhile.
            await linger(secured.transport)
        return False

    def _tell(self, reason: str, peer: Peer) -> None:
        self._handshakes.failed += 1
        # With an outcome, so that a crowd of them is told once in a while (logs.Unrepeated).
        extra = fields(peer=peer.address, outcome="no-tls")
        log.info("no TLS with a client: %s", reason, extra=extra)


def _context(config: HttpConfig) -> ssl.SSLContext:
    return server_context(config.tls, lambda key: f"http.tls.{key}")


async def _peek(stream: trio.SocketStream) -> bytes:
    """The client's first byte, left where it is; empty if it is gone."""
    try:
        return bytes(await stream.socket.recv(1, socket.MSG_PEEK))
    except OSError:
        return b""


def _name(secured: TlsStream) -> str | None:
    try:
        return name_in(secured.ssl_object.getpeercert())
    except ValueError:
        # ssl decodes names as UTF-8, whatever the CA let into them.
        return None
