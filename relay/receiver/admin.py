"""The receiver's admin listener: is it alive, does it consume, and its figures for Prometheus.

The HTTP is the server's, whose generic pages it uses; of uploads it knows nothing.
"""

import trio

from relay.config import HttpConfig
from relay.receiver.figures import Figures
from relay.server.listeners import address_of, open_listeners, serve
from relay.server.pages import CONNECTIONS_MAX, MetricsPage, Pages, health_page, json_page
from relay.server.responses import Response


class Admin:
    """Listens from ``open`` on, serves while ``run`` does."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._listeners: list[trio.SocketListener] = []

    async def open(self, address: str) -> list[str]:
        """Listen on ``host:port`` or ``unix:PATH``. Returns the addresses with real ports.

        Raises:
            ListenError: it cannot be listened on.
        """
        self._listeners = await open_listeners([address])
        return [address_of(listener) for listener in self._listeners]

    async def run(self) -> None:
        """Serve until cancelled."""
        pages = Pages(
            HttpConfig(),
            {
                "/healthz": health_page,
                "/readyz": self._ready,
                "/metrics": MetricsPage(self._figures.metrics),
            },
        )
        async with trio.open_nursery() as nursery:
            await serve(self._listeners, pages.serve, limit=CONNECTIONS_MAX, nursery=nursery)

    def _ready(self) -> Response:
        reason = self._figures.idle_because
        if reason is None:
            return json_page(200, {"status": "consuming"})
        return json_page(503, {"status": "not consuming", "detail": reason})
