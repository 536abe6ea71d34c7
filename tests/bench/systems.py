"""What is measured: relay in one or several processes, and the others beside it.

A system takes uploads at an address and a path, publishes what comes to one exchange with one
routing key, and says which processes are to be charged for that. What is uploaded, and how it is
judged, is for others to know.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from relay import __version__
from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import free_ports
from tests.bench import handover
from tests.bench.pump import cpu_seconds
from tests.incident.observe import peak_resident_bytes, resident_bytes

RELAY: Final = "relay"
RELAY_TWICE: Final = "relay, 2 processes"

FRAME_SIZE: Final = 131064
"""Bytes, relay's default."""

CONFIG: Final = """
[http]
max_connections = 4096
max_uploads = 2048
[routes.bench]
exchange = "{exchange}"
routing_key = "{routing_key}"
mandatory = {mandatory}
frame_size = {frame_size}
"""


class System(Protocol):
    """A program, in one or several processes, that takes uploads."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""

    @property
    def path(self) -> str:
        """Where uploads are POSTed."""

    @property
    def pids(self) -> Sequence[int]:
        """All processes that count."""

    @property
    def version(self) -> str:
        """Of the program and what it is made of, one line."""


Start = Callable[[str, str, str], AbstractContextManager[System]]
"""Starts a system, given the broker's URL, an exchange and a routing key."""


def cpu_of(pids: Sequence[int]) -> float:
    """CPU seconds that the processes have used so far."""
    return sum(map(cpu_seconds, pids))


def resident_of(pids: Sequence[int]) -> int:
    """Bytes of memory that the processes have now."""
    return sum(map(resident_bytes, pids))


def peak_of(pids: Sequence[int]) -> int:
    """The most bytes of memory that each process has had since ``forget_peak``, added up."""
    return sum(map(peak_resident_bytes, pids))


def forget_peak(pids: Sequence[int]) -> None:
    """Have the kernel begin anew with its peaks (proc(5), clear_refs)."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


class Relay:
    """``relay serve`` with one route, in so many processes on one port; a context manager.

    One process listens by itself. Several get a socket each from outside, bound to the same port,
    as systemd hands them over to the instances of ``relay@.service``.
    """

    def __init__(
        self,
        url: str,
        exchange: str,
        routing_key: str,
        *,
        processes: int = 1,
        frame_size: int = FRAME_SIZE,
        prefix: Sequence[str] = (),
    ) -> None:
        """Prepares, and starts nothing. ``prefix`` is a command that runs each process."""
        self._directory = tempfile.TemporaryDirectory(prefix="relay-bench-")
        config = CONFIG.format(
            exchange=exchange,
            routing_key=routing_key,
            # The default exchange has a binding for each queue.
            mandatory="false" if exchange else "true",
            frame_size=frame_size,
        )
        shared = [sys.executable, "-m", handover.__name__, str(free_ports(1)[0])]
        self._stack = ExitStack()
        self._daemons = []
        for number in range(processes):
            directory = Path(self._directory.name, str(number))
            directory.mkdir()
            before = [*prefix, *shared] if processes > 1 else prefix
            self._daemons.append(Daemon(url, config, directory=directory, prefix=before))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of all of them."""
        return self._daemons[0].address

    @property
    def path(self) -> str:
        """Of the one route."""
        return "/upload/bench"

    @property
    def pids(self) -> Sequence[int]:
        """The daemons."""
        return [daemon.pid for daemon in self._daemons]

    @property
    def version(self) -> str:
        """relay's own."""
        return f"relay {__version__}"

    def __enter__(self) -> Self:
        self._stack.enter_context(self._directory)
        with self._stack:
            for daemon in self._daemons:
                self._stack.enter_context(daemon)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def relays(
    processes: Sequence[int], *, frame_size: int = FRAME_SIZE, prefix: Sequence[str] = ()
) -> dict[str, Start]:
    """relay in so many processes each, by name; options as for ``Relay``."""
    return {
        RELAY if count == 1 else f"{RELAY}, {count} processes": partial(
            Relay, processes=count, frame_size=frame_size, prefix=prefix
        )
        for count in processes
    }


@contextmanager
def running(
    starts: Mapping[str, Start], url: str, exchange: str, routing_key: str
) -> Iterator[dict[str, System]]:
    """All of them, for the block's length."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(start(url, exchange, routing_key))
            for name, start in starts.items()
        }
