"""The admin listener: is the daemon alive, would it admit an upload, what is it doing.

Reads other modules' state and changes nothing. Its address is separate from the upload port's.
"""

import json
from collections.abc import Callable, Iterable, Iterator

import trio
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from relay.config import HttpConfig
from relay.errors import ClientError, ClientGone, MethodNotAllowed, NotFound, RelayError
from relay.server.connection import HttpConnection
from relay.server.responses import Response, problem
from relay.server.uploads import Uploads


class _Collector(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()


class AdminHandler:
    """Serves admin connections."""

    def __init__(
        self,
        config: HttpConfig,
        uploads: Uploads,
        refusal: Callable[[], RelayError | None],
        metrics: Callable[[], Iterable[Metric]],
    ) -> None:
        """``refusal``: why the broker would refuse an upload; ``metrics``: called per scrape."""
        self._config = config
        self._uploads = uploads
        self._refusal = refusal
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(metrics))

    async def serve(self, stream: trio.abc.HalfCloseableStream, _peer: str) -> None:
        """Answer requests until the connection ends."""
        connection = HttpConnection(stream, self._config)
        try:
            while await self._serve_request(connection):
                pass
        except ClientGone:
            return

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
        pages = {
            b"/healthz": self._health,
            b"/readyz": self._ready,
            b"/metrics": self._metrics,
            b"/transfers": self._transfers,
        }
        page = pages.get(target.partition(b"?")[0])
        if page is None:
            raise NotFound("there are /healthz, /readyz, /metrics and /transfers")
        if method not in {b"GET", b"HEAD"}:
            raise MethodNotAllowed("this listener only reads", allow="GET, HEAD")
        return page()

    def _health(self) -> Response:
        return _json(200, {"status": "alive"})

    def _ready(self) -> Response:
        try:
            self._uploads.check()
        except RelayError as exc:
            reason: RelayError | None = exc
        else:
            reason = self._refusal()
        if reason is None:
            return _json(200, {"status": "ready"})
        return problem(reason)

    def _metrics(self) -> Response:
        return Response(
            status=200, body=generate_latest(self._registry), content_type=CONTENT_TYPE_LATEST
        )

    def _transfers(self) -> Response:
        now = trio.current_time()
        transfers = [
            {
                "transfer": record.transfer.id,
                "route": record.transfer.route,
                "client": record.transfer.client,
                "peer": record.peer,
                "bytes": record.bytes_received,
                "frames": record.frames,
                "age_seconds": round(now - record.began, 3),
                "bytes_per_second": round(record.bytes_received / max(now - record.began, 1e-3)),
                "waits_for": record.waits_for,
            }
            for record in sorted(self._uploads, key=lambda record: record.began)
        ]
        return _json(200, {"transfers": transfers})


def _json(status: int, document: dict[str, object]) -> Response:
    return Response(status=status, body=json.dumps(document).encode() + b"\n")
