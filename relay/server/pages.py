"""Pages for operators over HTTP: one answer per path, made afresh, which only reads.

What the pages say is their maker's business: the daemon's admin listener, and the receiver's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final

import trio
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from relay.config import HttpConfig
from relay.errors import BUG, ClientError, ClientGone, MethodNotAllowed, NotFound, RelayError
from relay.server.connection import HttpConnection
from relay.server.identity import Peer
from relay.server.responses import Response, problem

CONNECTIONS_MAX: Final = 32
"""Connections at once: scrapers and probes, never clients."""

Page = Callable[[], Response]


def json_page(status: int, document: Mapping[str, object]) -> Response:
    """A page for programs."""
    return Response(status=status, body=json.dumps(document).encode() + b"\n")


def health_page() -> Response:
    """The process lives."""
    return json_page(200, {"status": "alive"})


class MetricsPage:
    """What Prometheus scrapes."""

    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        """``metrics`` is called for each scrape."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(metrics))

    def __call__(self) -> Response:
        """The metrics as they are now."""
        return Response(
            status=200, body=generate_latest(self._registry), content_type=CONTENT_TYPE_LATEST
        )


class _Collector(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()


class Pages:
    """Serves connections with pages by their paths."""

    def __init__(self, config: HttpConfig, pages: Mapping[str, Page]) -> None:
        """``config``: for the deadlines and limits of connections."""
        self._config = config
        self._pages = {path.encode(): page for path, page in pages.items()}
        self._known = ", ".join(pages)

    async def serve(self, stream: trio.abc.HalfCloseableStream, _peer: Peer) -> None:
        """Answer requests until the connection ends.

        What is raised is a bug; whoever asked has been told so, if that could be.
        """
        connection = HttpConnection(stream, self._config)
        try:
            while await self._serve_request(connection):
                pass
        except ClientGone:
            return
        except Exception:
            if connection.awaits_response:
                with suppress(ClientGone):
                    await connection.respond(problem(RelayError(BUG)), close=True)
            raise  # to be logged where it stops

    async def _serve_request(self, connection: HttpConnection) -> bool:
        """Answer one request. Returns whether another can follow."""
        try:
            raw = await connection.next_head()
            if raw is None:
                return False
            response = self._respond(raw.method, raw.target)
        except ClientError as exc:
            await connection.respond(problem(exc), close=True)
            return False
        # Nobody sends a body here; whoever does is not read to its end.
        framing = {b"content-length", b"transfer-encoding", b"connection"}
        keep = raw.http_version != b"1.0" and not any(name in framing for name, _ in raw.headers)
        await connection.respond(response, close=not keep)
        return keep

    def _respond(self, method: bytes, target: bytes) -> Response:
        page = self._pages.get(target.partition(b"?")[0])
        if page is None:
            raise NotFound(f"what there is: {self._known}")
        if method not in {b"GET", b"HEAD"}:
            raise MethodNotAllowed("this listener only reads", allow="GET, HEAD")
        return page()
