"""Connections beyond the limit: each gets the same short answer, made once, and an end.

That must stay cheap, for those who come in their thousands must not slow those who are inside: no
request is read, and of those refused only some are kept long enough to be sure that they see it.
"""

import logging
import math
from typing import Final

import trio

from relay.errors import TooManyUploads
from relay.logs import fields
from relay.server.connection import LINGER_IDLE, linger
from relay.server.identity import Peer
from relay.server.responses import problem

log = logging.getLogger(__name__)

LINGERING_MAX: Final = 256
"""Refused connections at a time that are waited for, unless file descriptors are scarce."""

TELL_PAUSE: Final = 10.0
"""Seconds between two lines in the log, at least."""


class Overflow:
    """Refuses connections.

    Attributes:
        limit: the connections that there may be.
        refused: how many, since the start.
        has_tls: whether TCP clients speak TLS.
    """

    def __init__(
        self, limit: int, *, lingering: int = LINGERING_MAX, has_tls: bool = False
    ) -> None:
        """Say that there are ``limit`` connections; wait for at most ``lingering`` clients."""
        self.refused = 0
        self._answer = _answer(limit)
        self.limit = limit
        self._slots = trio.Semaphore(lingering)
        self.has_tls = has_tls
        self._tell_at = -math.inf

    async def refuse(self, stream: trio.abc.HalfCloseableStream, peer: Peer) -> None:
        """Tell one client. Its user closes the connection."""
        self.refused += 1
        self._tell(peer)
        try:
            # Plain words are no answer in TLS; a handshake for each would be the dearest of all.
            if not self.has_tls or peer.address == "unix":
                await stream.send_all(self._answer)
        except trio.BrokenResourceError:
            return
        if self._slots.value:
            async with self._slots:
                with trio.move_on_after(LINGER_IDLE):
                    await linger(stream)

    def _tell(self, peer: Peer) -> None:
        now = trio.current_time()
        if now >= self._tell_at:
            self._tell_at = now + TELL_PAUSE
            log.warning(
                "connections are refused: there are %d already (%d refused since the start)",
                self.limit,
                self.refused,
                extra=fields(peer=peer.address),
            )


def _answer(limit: int) -> bytes:
    """The whole response; no Date, which a 5xx may leave out (RFC 9110, section 6.6.1)."""
    response = problem(TooManyUploads(f"{limit} connections are open, and no more are served"))
    headers = {
        "Server": "relay",
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        **response.headers,
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {response.status} Service Unavailable"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + response.body
