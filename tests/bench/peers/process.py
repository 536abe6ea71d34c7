"""A peer as processes of its own: started, found ready, counted, stopped.

It knows a program by its command line, and nothing of what is measured.
"""

import http.client
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from relay.demo.rabbitmq import HOST, free_ports
from tests.bench.peers.destination import Destination

ROOT: Final = Path(__file__).resolve().parents[3]

START_TIMEOUT: Final = 60.0
"""Seconds for a peer to answer its first request."""

STOP_TIMEOUT: Final = 10.0
"""Seconds for a peer to end when it is told to, before it is killed."""


class PeerFailed(Exception):
    """A peer did not start, or did not do what it is for; the text has what it said."""


@dataclass(frozen=True)
class Program:
    """How a peer is run.

    Attributes:
        command: its command line, for a port of 127.0.0.1.
        version: what it is, in one line: framework and client library.
        missing: what it lacks on this machine, in one line; None if it can be run.
        environment: variables that it needs beside ``PORT`` and the destination's.
    """

    command: Callable[[int], Sequence[str]]
    version: Callable[[], str]
    missing: Callable[[], str | None]
    environment: Callable[[], dict[str, str]] = dict


class PeerProcess:
    """A peer that serves ``POST /`` on loopback; a context manager.

    Attributes:
        address: where it listens.
        path: where it takes uploads.
    """

    path: Final = "/"

    def __init__(
        self,
        program: Program,
        url: str,
        exchange: str,
        routing_key: str,
        *,
        mandatory: bool | None = None,
    ) -> None:
        """Prepare, but do not start it.

        Args:
            program: what to run.
            url: the broker.
            exchange: where it publishes.
            routing_key: with which routing key.
            mandatory: have what no queue takes answered by an error; by default only for the
                default exchange, which has a binding for each queue.
        """
        self._program = program
        self._destination = Destination(
            url=url,
            exchange=exchange,
            routing_key=routing_key,
            mandatory=not exchange if mandatory is None else mandatory,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - gone with the process
        self.address: tuple[str, int] = (HOST, 0)

    @property
    def version(self) -> str:
        """Framework and client library with their versions, in one line."""
        return self._program.version()

    @property
    def pids(self) -> list[int]:
        """The processes that are there now: the first one and its children's children."""
        assert self._process is not None
        return [self._process.pid, *_descendants(self._process.pid)]

    def __enter__(self) -> Self:
        """Start it. Raises PeerFailed: it ended, or does not answer."""
        self.address = HOST, free_ports(1)[0]
        port = self.address[1]
        self._process = subprocess.Popen(
            [*self._program.command(port)],
            env={
                **os.environ,
                **self._program.environment(),
                **self._destination.environment(),
                "PORT": str(port),
            },
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_it_serves()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def log(self) -> str:
        """What it has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _wait_until_it_serves(self) -> None:
        """Polls: a socket that listens says nothing of who accepts."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None:
                raise PeerFailed(f"it ended with {self._process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise PeerFailed(f"it does not answer:\n{self.log()}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(*self.address, timeout=START_TIMEOUT)
        try:
            connection.request("GET", self.path)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _descendants(pid: int) -> list[int]:
    """Children of a process, and theirs (proc(5), children)."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for thread in threads for child in (thread / "children").read_text().split()
        ]
    except OSError:
        return []
    return children + [below for child in children for below in _descendants(child)]
