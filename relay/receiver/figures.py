"""What the receiver has done and is doing, in figures: for Prometheus, systemd and a terminal.

Others count here, and nothing is decided here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Histogram, Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

_SETTLE_BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Seconds: a disk with a cache of its own at one end, one that is dying at the other."""

# From the start on: a counter that appears with its first event hides that from any rate.
_FAULTS: Final = (
    *("not-a-frame", "stray", "gap", "position", "checksum", "size", "digest", "totals"),
    "refused",
)
_ENDS: Final = ("aborted", "expired", "repeated")


def _none_of(kinds: tuple[str, ...]) -> Counter[str]:
    return Counter(dict.fromkeys(kinds, 0))


@dataclass(kw_only=True)
class CommandFigures:
    """What became of the commands, one for each transfer, perhaps with several tries.

    Attributes:
        results: tries by result: ``succeeded``, ``failed``.
        given_up: transfers whose command failed for the last time.
        due: transfers whose command has yet to succeed.
        running: commands that run now.
    """

    results: Counter[str] = field(default_factory=lambda: Counter(succeeded=0, failed=0))
    given_up: int = 0
    due: int = 0
    running: int = 0


@dataclass(kw_only=True)
class Figures:
    """Attributes of one process's work since its start, and of what it holds now.

    Attributes:
        idle_because: why nothing is consumed now; None while consuming.
        transfers: delivered.
        frames: deliveries settled.
        bytes: in their bodies.
        rejected: deliveries by kind of problem.
        problems: by kind.
        reconnects: attempts to connect but the first.
        open_transfers: begun and not complete.
        unsettled: deliveries taken from the broker, but not yet acked or rejected.
        last_delivery: when a transfer was delivered last, in seconds of Unix time; 0: never.
        commands: None without commands.
    """

    idle_because: str | None = "no connection to the broker yet"
    transfers: int = 0
    frames: int = 0
    bytes: int = 0
    rejected: Counter[str] = field(default_factory=lambda: _none_of((*_FAULTS, "late")))
    problems: Counter[str] = field(default_factory=lambda: _none_of((*_FAULTS, *_ENDS)))
    reconnects: int = 0
    open_transfers: int = 0
    unsettled: int = 0
    last_delivery: float = 0
    commands: CommandFigures | None = None
    settle_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "relay_receive_settle_seconds",
            "Seconds until a batch of deliveries was safe on disk.",
            registry=None,
            buckets=_SETTLE_BUCKETS,
        )
    )

    def metrics(self) -> Iterator[Metric]:
        """All of it, for one scrape."""
        yield from self._counters()
        yield from self._gauges()
        yield from self.settle_seconds.collect()
        if self.commands is not None:
            yield from _command_metrics(self.commands)

    def _counters(self) -> Iterator[Metric]:
        for name, text, value in (
            ("transfers", "Transfers delivered.", self.transfers),
            ("frames", "Deliveries settled: acked or rejected.", self.frames),
            ("bytes", "Bytes in the bodies of settled deliveries.", self.bytes),
            ("reconnects", "Attempts to connect to the broker again.", self.reconnects),
        ):
            yield CounterMetricFamily(f"relay_receive_{name}", text, value)
        for name, text, counter in (
            ("rejected", "Deliveries rejected, by kind of problem.", self.rejected),
            ("problems", "Problems told on standard error, by kind.", self.problems),
        ):
            family = CounterMetricFamily(f"relay_receive_{name}", text, labels=["kind"])
            for kind, number in counter.items():
                family.add_metric([kind], number)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        for name, text, value in (
            ("up", "1 while it consumes.", self.idle_because is None),
            ("open_transfers", "Transfers begun and not complete.", self.open_transfers),
            ("unsettled", "Deliveries neither acked nor rejected yet.", self.unsettled),
            (
                "last_delivery_timestamp_seconds",
                "When a transfer was delivered last; 0 for never.",
                self.last_delivery,
            ),
        ):
            yield GaugeMetricFamily(f"relay_receive_{name}", text, value)


def _command_metrics(commands: CommandFigures) -> Iterator[Metric]:
    tries = CounterMetricFamily(
        "relay_receive_commands", "Commands that ended, by result.", labels=["result"]
    )
    for result, number in commands.results.items():
        tries.add_metric([result], number)
    yield tries
    yield CounterMetricFamily(
        "relay_receive_commands_given_up",
        "Transfers put into quarantine, because their command failed again and again.",
        commands.given_up,
    )
    yield GaugeMetricFamily(
        "relay_receive_commands_due", "Transfers whose command has yet to succeed.", commands.due
    )
    yield GaugeMetricFamily(
        "relay_receive_commands_running", "Commands that run now.", commands.running
    )
