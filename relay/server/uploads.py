"""The uploads in progress: how many may be, what each is doing, and their end at shutdown."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from relay.errors import ShuttingDown, TooManyUploads
from relay.model import Transfer

READ_SIZE_MIN: Final = 64 * 1024
READ_SIZE_MAX: Final = 1024 * 1024
READ_BUDGET: Final = 32 * 1024 * 1024
"""Bytes that all uploads together may read at once, beyond READ_SIZE_MIN for each."""

_BUDGET_SHARE: Final = 16
"""The part of what is left of the budget that the next upload gets: one in so many."""


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

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: set[UploadRecord] = set()
        self._answering = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._read_budget = READ_BUDGET
        self.draining = False
        self.finished: Counter[str] = Counter()
        self.bytes_committed = 0
        self._bytes_of_ended = 0

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[UploadRecord]:
        return iter(self._records)

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies since the start, whatever became of their uploads."""
        return self._bytes_of_ended + sum(record.bytes_received for record in self._records)

    def check(self) -> None:
        """Raise what an upload would be refused with now, if anything.

        Raises:
            ShuttingDown: the daemon is stopping.
            TooManyUploads: the limit is reached.
        """
        if self.draining:
            raise ShuttingDown("the daemon is stopping")
        if len(self._records) >= self._limit:
            raise TooManyUploads(f"{self._limit} uploads are in progress")

    @contextmanager
    def enter(self, transfer: Transfer, peer: str) -> Iterator[UploadRecord]:
        """Count an upload for the length of the block. Raises what ``check`` does."""
        self.check()
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
    def answering(self) -> Iterator[None]:
        """Count a request, from its admission until its answer is sent, for the block's length."""
        self._answering += 1
        try:
            yield
        finally:
            self._answering -= 1
            self._changed.unpark_all()

    async def drain(self, timeout: float) -> None:
        """Admit no more, wait ``timeout`` seconds for those in progress, then cancel them."""
        self.draining = True
        with trio.move_on_after(timeout):
            await self._wait_empty()
        for record in self._records:
            record.scope.cancel()
        await self._wait_empty()

    async def wait_answered(self) -> None:
        """Wait until every request that came so far has its answer."""
        while self._answering:
            await self._changed.park()

    async def _wait_empty(self) -> None:
        while self._records:
            await self._changed.park()
