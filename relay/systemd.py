"""What systemd is told: sd_notify(3) over the datagram socket that it names in NOTIFY_SOCKET.

Without that socket nothing is sent. It knows nothing of what runs: readiness and status are asked
for. Its own few lines, because the protocol is one datagram of ``KEY=value`` lines, and stable.
"""

import math
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final

import trio

STATUS_INTERVAL: Final = 5.0
"""Seconds between two status lines, at most."""

READY_GRACE: Final = 10.0
"""Seconds in which a broker that is away delays READY. One that is away for longer must not keep
the unit from starting, or boot would depend on another machine."""

_READY_POLL: Final = 0.1
"""Seconds between two looks at readiness, which comes about in many places, at the start only."""

_SEND_TIMEOUT: Final = 1.0
"""Seconds: systemd always reads, and what it does not read must not stop the event loop."""


class Rate:
    """What a figure that only grows has grown by since the last look, per second."""

    def __init__(self) -> None:
        self._last = (0, -math.inf)

    def per_second(self, figure: int, now: float) -> float:
        """0 at the first look: there was no other."""
        (before, then), self._last = self._last, (figure, now)
        # The clock may not have moved.
        return (figure - before) / max(now - then, 1e-3)


class Notifier:
    """Tells systemd, if it wants to know."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Takes its variables out of ``environ``: commands that are run must not speak for us."""
        path = environ.pop("NOTIFY_SOCKET", "")
        watchdog = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        # An "@" stands for the zero byte of an abstract socket.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self.interval = STATUS_INTERVAL
        """Seconds between two datagrams of ``run``."""
        self._watched = False
        self._stopping = False
        if watchdog.isdecimal() and int(watchdog) and pid in ("", str(os.getpid())):
            self._watched = True
            # Half of what is allowed, as sd_watchdog_enabled(3) recommends.
            self.interval = min(STATUS_INTERVAL, int(watchdog) / 2e6)

    async def run(self, *, ready: Callable[[], bool], status: Callable[[], str]) -> None:
        """Say READY once, then the status and that the event loop turns, until cancelled.

        Being a task of the event loop, it says nothing when that is stuck, and systemd restarts us.
        """
        if not self._address:
            return
        with trio.move_on_after(READY_GRACE):
            while not ready():  # noqa: ASYNC110  no one event makes a program ready
                await trio.sleep(_READY_POLL)
        if not self._stopping:
            self._send("READY=1")
        while True:
            self._send(_status(status()), *["WATCHDOG=1"] * self._watched)
            await trio.sleep(self.interval)

    def stopping(self, seconds: float) -> None:
        """Stopping has begun and may take so many seconds."""
        self._stopping = True
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def reloading(self) -> None:
        """The configuration is being read again; ``reloaded`` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self, status: str) -> None:
        """The configuration has been read again, or the old one stays, as the status says."""
        self._send("READY=1", _status(status))

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_SEND_TIMEOUT)
            try:
                sender.sendto("\n".join(assignments).encode(), self._address)
            except OSError:
                # As sd_notify(3) recommends: what is not heard is not worth ending for.
                return


def _status(line: str) -> str:
    # A line feed would begin another assignment.
    return "STATUS=" + line.replace("\n", " ")
