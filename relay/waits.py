"""What an upload waits for, and for how long it has waited for what.

Whoever waits says so before and after. It knows nothing of clients, windows or brokers.
"""

from enum import StrEnum
from typing import Final

import trio


class Wait(StrEnum):
    """What there is to wait for."""

    CLIENT = "client"  # the next bytes of the body
    WINDOW = "window"  # room for a frame: too much is unconfirmed
    BROKER = "broker"  # a channel, the last confirms, a connection that was lost, an alarm


NO_SECONDS: Final = dict.fromkeys(Wait, 0.0)
"""Waited for nothing yet. To be copied: going through an enum takes as long as all else here."""


class Waits:
    """The waits of one upload.

    Attributes:
        now: what it waits for; None while it works.
    """

    __slots__ = ("_seconds", "_since", "now")

    def __init__(self) -> None:
        self._seconds = NO_SECONDS.copy()
        self._since = 0.0
        self.now: Wait | None = None

    def begin(self, what: Wait) -> None:
        """It begins to wait."""
        self.now = what
        self._since = trio.current_time()

    def end(self) -> None:
        """It has what it waited for. Need not be called when it failed: nothing follows then."""
        if self.now is not None:
            self._seconds[self.now] += trio.current_time() - self._since
            self.now = None

    @property
    def seconds(self) -> dict[Wait, float]:
        """So far, the present wait included."""
        seconds = dict(self._seconds)
        if self.now is not None:
            seconds[self.now] += trio.current_time() - self._since
        return seconds
