"""The admin listener: is the daemon alive, would it admit an upload, what is it doing.

Reads other modules' state and changes nothing. Its address is separate from the upload port's.
"""

from collections.abc import Callable, Iterable

import trio
from prometheus_client import Metric

from relay.config import HttpConfig
from relay.errors import RelayError, ShuttingDown
from relay.server.pages import MetricsPage, Page, Pages, health_page, json_page
from relay.server.responses import Response, problem
from relay.server.uploads import Uploads


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
        self._uploads = uploads
        self._refusal = refusal
        pages: dict[str, Page] = {
            "/healthz": health_page,
            "/readyz": self._ready,
            "/metrics": MetricsPage(metrics),
            "/transfers": self._transfers,
        }
        self.serve = Pages(config, pages).serve

    def _ready(self) -> Response:
        reason: RelayError | None
        try:
            self._uploads.check()
        except RelayError as exc:
            reason = exc
        else:
            reason = self._refusal()
        if self._uploads.draining:
            # What is connected may still upload; whoever chooses a daemon is to choose another.
            reason = ShuttingDown("the daemon is stopping")
        if reason is None:
            return json_page(200, {"status": "ready"})
        return problem(reason)

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
        return json_page(200, {"transfers": transfers})
