"""The uploads in progress: how many may be, what each is doing, and their end at shutdown."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from relay.errors import ShuttingDown, TooManyUploads
from relay.model import Transfer


@dataclass(eq=False, kw_only=True)
class UploadRecord:
    """One upload in progress. ``began`` is in trio's clock, seconds."""

    transfer: Transfer
    peer: str
    began: float
    bytes_received: int = 0
    waits_for: str = "client"
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Uploads:
    """Admits uploads up to a limit and knows them all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: set[UploadRecord] = set()
        self._empty = trio.lowlevel.ParkingLot()
        self.draining = False

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[UploadRecord]:
        return iter(self._records)

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
        record = UploadRecord(transfer=transfer, peer=peer, began=trio.current_time())
        self._records.add(record)
        try:
            yield record
        finally:
            self._records.discard(record)
            if not self._records:
                self._empty.unpark_all()

    async def drain(self, timeout: float) -> None:
        """Admit no more, wait ``timeout`` seconds for those in progress, then cancel them."""
        self.draining = True
        with trio.move_on_after(timeout):
            await self._wait_empty()
        for record in self._records:
            record.scope.cancel()
        await self._wait_empty()

    async def _wait_empty(self) -> None:
        while self._records:
            await self._empty.park()
