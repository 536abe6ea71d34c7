"""The uploads in progress: how many may be, what each is doing, and their end at shutdown."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from relay.errors import ClientBusy, ShuttingDown, TooManyUploads
from relay.model import Transfer
from relay.server.idle import Idle

READ_SIZE_MIN: Final = 64 * 1024
READ_SIZE_MAX: Final = 1024 * 1024
READ_BUDGET: Final = 32 * 1024 * 1024
"""Bytes that all uploads together may read at once, beyond READ_SIZE_MIN for each."""

IDLE_GRACE: Final = 1.0
"""Seconds in which a request may still begin after the daemon was told to stop: one that was on its
way must not find its connection closed."""

_BUDGET_SHARE: Final = 16
"""The part of what is left of the budget that the next upload gets: one in so many."""


_Who = tuple[str | None, str]
"""A client's name, or none and its host."""


def _who(client: str | None, peer: str) -> _Who:
    return client, "" if client is not None else peer.rpartition(":")[0]


@dataclass(eq=False, kw_only=True)
class UploadRecord:
    """One upload in progress.

    Attributes:
        began: in trio's clock, seconds.
        read_size: bytes that it may ask of its socket at once.
        frames: cut so far.
        waits_for: ``client`` or ``broker``.
        may_be_committed: when it has ended, whether its commit frame was out.
    """

    transfer: Transfer
    peer: str
    began: float
    read_size: int
    bytes_received: int = 0
    frames: int = 0
    waits_for: str = "client"
    may_be_committed: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Uploads:
    """Admits uploads up to a limit and knows them all."""

    def __init__(self, limit: int, *, per_client: int = 0) -> None:
        """At most ``limit`` at once, and ``per_client`` of one client; 0: no such limit."""
        self.configure(limit, per_client=per_client)
        self._records: set[UploadRecord] = set()
        self._connections = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._read_budget = READ_BUDGET
        self._patience = trio.CancelScope()
        self._is_over = False
        self.draining = False
        self.idle = Idle()
        self.finished: Counter[str] = Counter()
        self.bytes_committed = 0
        self._bytes_of_ended = 0

    def configure(self, limit: int, *, per_client: int) -> None:
        """Have other limits for those that come from now on."""
        self._limit = limit
        self._per_client = per_client

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[UploadRecord]:
        return iter(self._records)

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies since the start, whatever became of their uploads."""
        return self._bytes_of_ended + sum(record.bytes_received for record in self._records)

    def check(self, client: str | None = None, peer: str = "") -> None:
        """Raise what an upload would be refused with now, if anything.

        Args:
            client: its name, if it has one.
            peer: its address. An anonymous client is its host.

        Raises:
            ShuttingDown: the daemon's time to end is over.
            TooManyUploads: the limit is reached.
            ClientBusy: the client's own limit is.
        """
        if self._is_over:
            raise ShuttingDown("the daemon is stopping")
        if len(self._records) >= self._limit:
            raise TooManyUploads(f"{self._limit} uploads are in progress")
        if self._per_client and self._count_of(_who(client, peer)) >= self._per_client:
            raise ClientBusy(f"{self._per_client} uploads of this client are in progress")

    def _count_of(self, who: _Who) -> int:
        return sum(_who(record.transfer.client, record.peer) == who for record in self._records)

    @contextmanager
    def enter(self, transfer: Transfer, peer: str) -> Iterator[UploadRecord]:
        """Count an upload for the length of the block. Raises what ``check`` does."""
        self.check(transfer.client, peer)
        # Large reads save CPU, and cost memory. A few uploads may read 1 MiB at a time; the more
        # there are, the less a further one gets, so that the sum stays within the budget.
        share = self._read_budget // _BUDGET_SHARE
        read_size = max(READ_SIZE_MIN, min(READ_SIZE_MAX, share))
        reserved = read_size - READ_SIZE_MIN
        record = UploadRecord(
            transfer=transfer, peer=peer, began=trio.current_time(), read_size=read_size
        )
        self._read_budget -= reserved
        self._records.add(record)
        try:
            yield record
        finally:
            self._read_budget += reserved
            self._records.discard(record)
            self._bytes_of_ended += record.bytes_received
            self._changed.unpark_all()

    def count(self, result: str, size: int = 0) -> None:
        """Count an upload that ended: with an error's code, or ``committed`` with its bytes."""
        self.finished[result] += 1
        self.bytes_committed += size

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Count a connection, which may bring uploads, for the length of the block."""
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1
            self._changed.unpark_all()

    async def drain(self, timeout: float) -> None:
        """Wait until no upload is in progress and no connection can bring one; then admit no more.

        Those that last longer than ``timeout`` seconds are cancelled.
        """
        self.draining = True
        now = trio.current_time()
        self.idle.end_at(now + IDLE_GRACE)
        self._patience.deadline = min(self._patience.deadline, now + timeout)
        with self._patience:
            await self.wait_disconnected()
        self._is_over = True
        for record in self._records:
            record.scope.cancel()
        while self._records:
            await self._changed.park()

    def hasten(self) -> None:
        """Let ``drain`` wait no longer."""
        self._patience.cancel()

    async def wait_disconnected(self) -> None:
        """Wait until every connection is gone; each goes once its answer is received."""
        while self._records or self._connections:
            await self._changed.park()
