"""The admin listener: is the daemon alive, would it admit an upload, what is it doing.

Reads other modules' state and changes nothing. Its address is separate from the upload port's.
"""

from collections.abc import Callable, Iterable, Mapping

import trio
from prometheus_client import Metric

from relay.config import HttpConfig
from relay.errors import RelayError, ShuttingDown
from relay.server.pages import MetricsPage, Page, Pages, health_page, json_page
from relay.server.responses import Response, problem
from relay.server.status import status_page
from relay.server.uploads import Uploads


class AdminHandler:
    """Serves admin connections."""

    def __init__(
        self,
        config: HttpConfig,
        uploads: Uploads,
        refusal: Callable[[], RelayError | None],
        *,
        metrics: Callable[[], Iterable[Metric]],
        status: Callable[[], Mapping[str, object]],
    ) -> None:
        """Each is called for each look.

        Args:
            config: for the deadlines and limits of connections.
            uploads: those in progress.
            refusal: why the broker would refuse an upload.
            metrics: for Prometheus.
            status: figures and last errors, for the status page.
        """
        self._uploads = uploads
        self._refusal = refusal
        self._figures = status
        pages: dict[str, Page] = {
            "/": self._page,
            "/status": lambda: json_page(200, self._status()),
            "/healthz": health_page,
            "/readyz": self._ready,
            "/metrics": MetricsPage(metrics),
            "/transfers": lambda: json_page(200, {"transfers": self._transfers()}),
        }
        self.serve = Pages(config, pages).serve

    def _ready(self) -> Response:
        reason = self._reason()
        if reason is None:
            return json_page(200, {"status": "ready"})
        return problem(reason)

    def _reason(self) -> RelayError | None:
        """Why uploads should not be sent here now, or None."""
        if self._uploads.draining:
            # What is connected may still upload; whoever chooses a daemon is to choose another.
            return ShuttingDown("the daemon is stopping")
        try:
            self._uploads.check()
        except RelayError as exc:
            return exc
        return self._refusal()

    def _status(self) -> dict[str, object]:
        reason = self._reason()
        return {
            "ready": reason is None,
            "reason": None if reason is None else reason.detail,
            **self._figures(),
        }

    def _page(self) -> Response:
        return status_page(self._status(), self._transfers())

    def _transfers(self) -> list[dict[str, object]]:
        now = trio.current_time()
        return [
            {
                "transfer": record.transfer.id,
                "route": record.transfer.route,
                "client": record.transfer.client,
                "peer": record.peer,
                "bytes": record.bytes_received,
                "frames": record.frames,
                "age_seconds": round(now - record.began, 3),
                "bytes_per_second": round(record.bytes_received / max(now - record.began, 1e-3)),
                "waits_for": record.waits.now,
            }
            for record in sorted(self._uploads, key=lambda record: record.began)
        ]
