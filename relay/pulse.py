"""The event loop's pulse: how late it turns, and how fast a figure grows meanwhile.

A task that does next to nothing, twice a second. What keeps it waiting keeps every upload waiting.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

import trio
from prometheus_client import Histogram

INTERVAL: Final = 0.5
"""Seconds between two beats."""

_KEPT: Final = 20
"""Beats that ``lag`` and ``rate`` are about: the last 10 s."""

_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Pulse:
    """Measures while ``run`` does."""

    def __init__(self, figure: Callable[[], int]) -> None:
        """``figure`` only grows; it is asked for at each beat."""
        self.lag_seconds = Histogram(
            "relay_event_loop_lag_seconds",
            "Seconds by which the event loop came late to a task that was due.",
            registry=None,
            buckets=_BUCKETS,
        )
        self._figure = figure
        self._lags: deque[float] = deque(maxlen=_KEPT)
        self._seen: deque[tuple[float, int]] = deque(maxlen=_KEPT)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            now = trio.current_time()
            self._seen.append((now, self._figure()))
            await trio.sleep_until(now + INTERVAL)
            lag = trio.current_time() - now - INTERVAL
            self._lags.append(lag)
            self.lag_seconds.observe(lag)

    @property
    def lag(self) -> float:
        """The longest that a task was late, in the last 10 s."""
        return max(self._lags, default=0.0)

    @property
    def rate(self) -> float:
        """By what the figure has grown, per second, in the last 10 s."""
        if not self._seen:
            return 0.0
        since, before = self._seen[0]
        # The clock may not have moved.
        return (self._figure() - before) / max(trio.current_time() - since, 1e-3)
