"""What a stretch of time cost: its system, the broker, the clients, and whoever else was busy."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.bench.measure import Column
from tests.bench.systems import cpu_of

GIB: Final = 1 << 30
MIB: Final = 1 << 20

CORES: Final = [
    Column("cores", "system_cores", brief=True),
    Column("broker's", "broker_cores", brief=True),
    Column("clients'", "client_cores", brief=True),
    Column("others'", "others_cores", brief=True),
]
"""Columns of what ``cores`` returns."""

_IDLE: Final = (3, 4)
"""Fields of /proc/stat that are no work: idle, iowait (proc(5)); guests are counted twice there."""


def machine_seconds() -> float:
    """CPU seconds that the machine has worked so far, all cores."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    ticks = sum(int(value) for number, value in enumerate(fields) if number not in _IDLE)
    return ticks / os.sysconf("SC_CLK_TCK")


class Meter:
    """Measures a block; a context manager. All in seconds, and known after the block."""

    def __init__(self, pids: Sequence[int], broker: int | None) -> None:
        """``pids`` is the system's, ``broker`` the broker's."""
        self._pids = pids
        self._broker = [broker] if broker else []
        self.wall = self.cpu = self.broker = self.machine = 0.0

    def __enter__(self) -> Self:
        self._before = self._now()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        after = self._now()
        self.wall, self.cpu, self.broker, self.machine = (
            now - then for now, then in zip(after, self._before, strict=True)
        )

    def _now(self) -> tuple[float, float, float, float]:
        return time.perf_counter(), cpu_of(self._pids), cpu_of(self._broker), machine_seconds()

    def cores(self, client: float, wall: float | None = None) -> dict[str, float]:
        """How many cores each kept busy; ``client`` is its CPU seconds. Shows what is the limit.

        ``others`` is what ran on the machine besides, this program included: figures of a run in
        which it is large are worth less. It is counted in steps of 10 ms.
        """
        wall = wall or self.wall
        others = max(self.machine - self.cpu - self.broker - client, 0.0)
        parts = {"system": self.cpu, "broker": self.broker, "client": client, "others": others}
        return {f"{name}_cores": seconds / wall for name, seconds in parts.items()}
