"""What all connections to the broker have done, in figures. Others count here."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Histogram

from relay.protocol.confirms import Outcome

_CONFIRM_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
"""Seconds: a broker on the same machine at one end, ``confirm_timeout`` at the other."""


@dataclass(kw_only=True)
class Figures:
    """Since the start of the process.

    Attributes:
        connects: connections made.
        failures: connections lost, and attempts that failed.
        confirm_seconds: from publishing a frame to its confirm; of one frame in 16.
        republished: frames published once more, after a lost connection or a nack.
        unacked: frames that were nacked or returned.
    """

    connects: int = 0
    failures: int = 0
    confirm_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "relay_confirm_seconds",
            "Seconds from publishing a frame to its confirm; of one frame in 16.",
            registry=None,
            buckets=_CONFIRM_BUCKETS,
        )
    )
    republished: int = 0
    unacked: Counter[Outcome] = field(
        default_factory=lambda: Counter({Outcome.NACKED: 0, Outcome.RETURNED: 0})
    )
