"""What the daemon has done and is doing, in figures: for Prometheus and for the status page.

Others count; here it is read, once for each look, and nothing is decided. Labels have few values,
all of them ours: routes and connections of the configuration, outcomes and states of the code.
Clients are never one.
"""

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import trio
from prometheus_client import Metric, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from relay import __version__, logs, memory
from relay.broker.pool import Pool
from relay.broker.publisher import Publisher
from relay.config import Config
from relay.errors import BrokerBlocked, RelayError, codes
from relay.protocol.confirms import Outcome
from relay.pulse import Pulse
from relay.server.idempotency import KeyMemory
from relay.server.overflow import Overflow
from relay.server.tls import Handshakes
from relay.server.uploads import Uploads

STATES: Final = ("up", "blocked", "down")
"""Of a connection to the broker: it takes messages, an alarm keeps it from that, it is away."""


class Figures:
    """Reads what there is to be read."""

    def __init__(
        self,
        config: Config,
        uploads: Uploads,
        broker: Pool,
        keys: KeyMemory,
        pulse: Pulse,
        overflow: Overflow,
        handshakes: Handshakes,
    ) -> None:
        self._overflow = overflow
        self._handshakes = handshakes
        self.configure(config)
        self._uploads = uploads
        self._broker = broker
        self._keys = keys
        self._pulse = pulse
        self._process = _Process(registry=None)
        self._began = time.monotonic()

    def configure(self, config: Config) -> None:
        """Have the limits and routes of another configuration from now on."""
        self._config = config
        self._ceiling = memory.ceiling(config)

    # --- Prometheus ----------------------------------------------------------------------------

    def metrics(self) -> Iterator[Metric]:
        """All of it, for one scrape."""
        yield _info({"version": __version__, "python": platform.python_version()})
        yield from _gauges(self._gauges())
        yield from self._upload_counters()
        yield from self._broker_metrics()
        yield from self._broker.figures.confirm_seconds.collect()
        yield from self._pulse.lag_seconds.collect()
        yield from self._process.collect()

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        windows = [publisher.window for publisher in self._broker.publishers]
        tasks = trio.lowlevel.current_statistics().tasks_living
        yield "uploads_in_progress", "Uploads in progress.", len(self._uploads)
        yield "uploads_limit", "Uploads that may be in progress.", self._uploads.limit
        yield "connections", "Connections of clients.", self._uploads.connections
        yield "connections_limit", "Connections that clients may have.", self._overflow.limit
        yield (
            "window_bytes",
            "Bytes published and unconfirmed.",
            sum(window.taken for window in windows),
        )
        yield (
            "window_limit_bytes",
            "Bytes that may be unconfirmed.",
            sum(window.size for window in windows),
        )
        yield (
            "window_waiting",
            "Uploads waiting for room in the shared window.",
            sum(window.waiting for window in windows),
        )
        yield "memory_limit_bytes", "Resident memory at the very worst.", self._ceiling
        yield "tasks", "Tasks of the event loop.", tasks
        yield "idempotency_keys", "Keys whose receipt is remembered.", len(self._keys)
        yield "idempotency_bytes", "Bytes they take, about.", self._keys.bytes

    def _upload_counters(self) -> Iterator[Metric]:
        uploads, totals = self._uploads, self._uploads.totals
        # From the start on: a counter that appears with its first event hides that from any rate.
        outcomes = {"committed", "replayed", *codes()}
        ended = {(route, outcome): 0 for route in self._config.routes for outcome in outcomes}
        ended |= uploads.ended
        yield _counter(
            "uploads",
            "Requests that ended, by route and outcome: committed, replayed, or an error's code.",
            ended.items(),
            labels=("route", "outcome"),
        )
        for name, text, by_route in (
            ("upload_bytes", "Bytes of bodies received, whatever became of them.", totals.bytes),
            ("upload_frames", "Frames cut, whatever became of them.", totals.frames),
            ("committed_bytes", "Bytes in committed uploads.", uploads.committed_bytes),
        ):
            values = (((route,), by_route[route]) for route in self._config.routes)
            yield _counter(name, text, values, labels=("route",))
        for name, text, number in (
            ("connections_refused", "Connections too many.", self._overflow.refused),
            ("tls_handshakes_failed", "Clients without TLS.", self._handshakes.failed),
        ):
            yield _counter(name, text, [((), number)])
        yield _counter(
            "upload_wait_seconds",
            "Seconds that uploads have waited, by what for: client, window or broker.",
            (((wait.value,), seconds) for wait, seconds in totals.seconds.items()),
            labels=("reason",),
        )

    def _broker_metrics(self) -> Iterator[Metric]:
        publishers, figures = self._broker.publishers, self._broker.figures
        states = [_state(publisher) for publisher in publishers]
        queued = sum(publisher.queued for publisher in publishers)
        yield from _gauges(
            (
                ("broker_up", "1 if the broker takes uploads.", self._broker.refusal() is None),
                ("broker_connections", "Connections that take uploads now.", states.count("up")),
                ("write_queue_bytes", "Bytes not yet written to the broker.", queued),
            )
        )
        family = GaugeMetricFamily(
            "relay_broker_connection_state",
            "1 for the state that the connection is in: up, blocked or down.",
            labels=["connection", "state"],
        )
        for number, now in enumerate(states):
            for state in STATES:
                family.add_metric([str(number), state], state == now)
        yield family
        for name, text, value in (
            ("broker_connects", "Connections made.", figures.connects),
            (
                "broker_failures",
                "Connections that were lost, and attempts that failed.",
                figures.failures,
            ),
            ("frames_republished", "Frames published once more.", figures.republished),
            ("frames_nacked", "Frames that a queue rejected.", figures.unacked[Outcome.NACKED]),
            (
                "frames_returned",
                "Frames that no queue was bound for.",
                figures.unacked[Outcome.RETURNED],
            ),
        ):
            yield _counter(name, text, [((), value)])

    # --- the status page -----------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """The same for people, in short. Sizes in bytes, times in seconds."""
        windows = [publisher.window for publisher in self._broker.publishers]
        return {
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._began),
            "uploads": {"in_progress": len(self._uploads), "limit": self._uploads.limit},
            "connections": {
                "open": self._uploads.connections,
                "limit": self._overflow.limit,
            },
            "bytes_received": self._uploads.bytes_received,
            "bytes_per_second": round(self._pulse.rate),
            "memory": {"resident": memory.resident(), "ceiling": self._ceiling},
            "window": {
                "used": sum(window.taken for window in windows),
                "size": sum(window.size for window in windows),
                "waiting": sum(window.waiting for window in windows),
            },
            "broker": [
                _connection(number, publisher)
                for number, publisher in enumerate(self._broker.publishers)
            ],
            "event_loop_lag_seconds": round(self._pulse.lag, 4),
            "outcomes": dict(self._uploads.finished),
            "errors": list(logs.recent),
        }


class _Process(ProcessCollector):
    """The process, also where there is no /proc/stat (ProcSubset=pid, as in relay's units).

    The library, which reads the time of the machine's boot there, would show nothing at all.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _state(publisher: Publisher) -> str:
    fault = publisher.fault()
    if fault is None:
        return "up"
    return "blocked" if isinstance(fault, BrokerBlocked) else "down"


def _connection(number: int, publisher: Publisher) -> dict[str, object]:
    fault: RelayError | None = publisher.fault()
    return {
        "connection": number,
        "state": _state(publisher),
        "broker": publisher.broker,
        "detail": None if fault is None else fault.detail,
    }


def _info(labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily("relay_build_info", "What runs; always 1.", labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _gauges(figures: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    for name, text, value in figures:
        yield GaugeMetricFamily(f"relay_{name}", text, value)


def _counter(
    name: str,
    text: str,
    values: Iterable[tuple[tuple[str, ...], float]],
    *,
    labels: tuple[str, ...] = (),
) -> Metric:
    family = CounterMetricFamily(f"relay_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family
