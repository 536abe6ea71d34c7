"""The floor of any relay: bytes from one socket to another and nothing else.

``recv_into`` one buffer, ``sendall`` it, in a process of its own. What a relay costs beyond this
is its own doing. Also here: the sink behind the pump, and the CPU time of another process.
"""

import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Final, Self

BUFFER: Final = 256 * 1024
"""Bytes per read, as relay reads."""

_CPU_CLOCK: Final = 2
"""The CPU clock of a whole process, as Linux numbers it (CPUCLOCK_SCHED)."""

_SPAWN = multiprocessing.get_context("spawn")


def cpu_seconds(pid: int) -> float:
    """User and system CPU seconds that a process has used so far, its threads included.

    By its CPU clock, as clock_getcpuclockid(3) numbers it: exact where /proc counts in steps of
    10 ms, a tenth of what the pump needs for a quarter of a GiB.

    Raises:
        OSError: there is no such process.
    """
    return time.clock_gettime(~pid << 3 | _CPU_CLOCK)


def _sink(ready: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ready.send(server.getsockname()[1])
        buffer = bytearray(1 << 20)
        while True:
            client, _ = server.accept()
            with client:
                while client.recv_into(buffer):
                    pass


def _pump(sink_port: int, ready: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ready.send(server.getsockname()[1])
        view = memoryview(bytearray(BUFFER))
        while True:
            client, _ = server.accept()
            with client, socket.create_connection(("127.0.0.1", sink_port)) as onward:
                while size := client.recv_into(view):
                    onward.sendall(view[:size])
                client.sendall(b"done")


class Pump:
    """The pump and its sink as processes; a context manager."""

    def __init__(self) -> None:
        self.port = 0
        self.pid = 0
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> Self:
        sink_port, _ = self._start(_sink)
        self.port, self.pid = self._start(_pump, sink_port)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _start(self, function: object, *arguments: int) -> tuple[int, int]:
        here, there = _SPAWN.Pipe(duplex=False)
        process = _SPAWN.Process(target=function, args=(*arguments, there), daemon=True)  # type: ignore[arg-type]
        process.start()
        self._processes.append(process)
        port: int = here.recv()
        assert process.pid is not None
        return port, process.pid
