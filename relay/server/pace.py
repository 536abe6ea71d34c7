"""How fast clients may send: each has a rate that all its uploads share. Knows no HTTP.

Nothing is counted ahead: what was read is paid for with time in which the client is not read, so a
burst is one read of each of its uploads. TCP slows the client meanwhile.
"""

from collections.abc import Hashable
from typing import Final

import trio

READ_SIZE_MIN: Final = 4096

FORGET_AT: Final = 1000
"""Clients that are remembered before those who owe nothing are forgotten."""


class Pace:
    """The rates of all clients.

    Attributes:
        rate: in bytes per second, of each client; 0: as fast as they can.
    """

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._paid_at: dict[Hashable, float] = {}

    @property
    def noted(self) -> int:
        """Number of clients that are remembered."""
        return len(self._paid_at)

    def read_size(self, most: int) -> int:
        """Bytes to ask for at once, up to ``most``: what is paid for within a second."""
        return min(most, max(self.rate, READ_SIZE_MIN)) if self.rate else most

    async def wait(self, client: Hashable) -> None:
        """Wait until ``client`` may be read."""
        if self.rate:
            await trio.sleep_until(self._paid_at.get(client, 0.0))

    def count(self, client: Hashable, size: int) -> None:
        """Note that ``size`` bytes of ``client`` were read."""
        if not self.rate:
            return
        now = trio.current_time()
        if len(self._paid_at) >= FORGET_AT:
            self._paid_at = {who: at for who, at in self._paid_at.items() if at > now}
        self._paid_at[client] = max(now, self._paid_at.get(client, now)) + size / self.rate
