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
from relay.server.pace import Pace
from relay.waits import Wait, Waits

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
        waits: for what, now and so far.
        may_be_committed: when it has ended, whether its commit frame was out.
    """

    transfer: Transfer
    peer: str
    began: float
    read_size: int
    bytes_received: int = 0
    frames: int = 0
    waits: Waits = field(default_factory=Waits)
    may_be_committed: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def who(self) -> tuple[str | None, str]:
        """The client that limits are for: its name, or none and its host."""
        return _who(self.transfer.client, self.peer)


@dataclass(kw_only=True)
class Totals:
    """What all uploads since the start add up to, those in progress included.

    Attributes:
        bytes: of bodies received, by route.
        frames: cut, by route.
        seconds: waited, by what for.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    seconds: dict[Wait, float] = field(default_factory=lambda: dict.fromkeys(Wait, 0.0))

    def add(self, record: UploadRecord) -> None:
        """Add one upload."""
        self.bytes[record.transfer.route] += record.bytes_received
        self.frames[record.transfer.route] += record.frames
        for wait, seconds in record.waits.seconds.items():
            self.seconds[wait] += seconds


class Uploads:
    """Admits uploads up to a limit and knows them all.

    Attributes:
        ended: requests that ended, by route and outcome: ``committed``, ``replayed``, or an error's
            code. The route is empty where there was none, or none that is configured.
        committed_bytes: by route.
        connections: of clients, open now.
        limit: of uploads at once.
    """

    def __init__(self, limit: int, *, per_client: int = 0, client_rate: int = 0) -> None:
        """The arguments are those of ``configure``."""
        self.pace = Pace(client_rate)
        self.configure(limit, per_client=per_client, client_rate=client_rate)
        self._records: set[UploadRecord] = set()
        self.connections = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._read_budget = READ_BUDGET
        self._patience = trio.CancelScope()
        self._is_over = False
        self.draining = False
        self.idle = Idle()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.committed_bytes: Counter[str] = Counter()
        self._bytes_of_ended = 0
        self._totals_of_ended = Totals()

    def configure(self, limit: int, *, per_client: int, client_rate: int) -> None:
        """Have these limits for those that come from now on; the rate for all.

        At most ``limit`` at once, and ``per_client`` of one client; ``client_rate``: bytes per
        second of one client, in all its uploads. 0: no limit of that kind.
        """
        self.limit = limit
        self._per_client = per_client
        self.pace.rate = client_rate

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[UploadRecord]:
        return iter(self._records)

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies since the start, whatever became of their uploads."""
        return self._bytes_of_ended + sum(record.bytes_received for record in self._records)

    @property
    def totals(self) -> Totals:
        """Since the start, as it is now."""
        ended = self._totals_of_ended
        totals = Totals(
            bytes=Counter(ended.bytes), frames=Counter(ended.frames), seconds=dict(ended.seconds)
        )
        for record in self._records:
            totals.add(record)
        return totals

    @property
    def finished(self) -> Counter[str]:
        """Requests that ended, by outcome, whatever their route."""
        finished: Counter[str] = Counter()
        for (_, outcome), number in self.ended.items():
            finished[outcome] += number
        return finished

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
        if len(self._records) >= self.limit:
            raise TooManyUploads(f"{self.limit} uploads are in progress")
        if self._per_client and self._count_of(_who(client, peer)) >= self._per_client:
            raise ClientBusy(f"{self._per_client} uploads of this client are in progress")

    def _count_of(self, who: _Who) -> int:
        return sum(record.who == who for record in self._records)

    @contextmanager
    def enter(self, transfer: Transfer, peer: str) -> Iterator[UploadRecord]:
        """Count an upload for the length of the block. Raises what ``check`` does."""
        self.check(transfer.client, peer)
        record = UploadRecord(
            transfer=transfer, peer=peer, began=trio.current_time(), read_size=READ_SIZE_MIN
        )
        self._records.add(record)
        try:
            yield record
        finally:
            self._read_budget += record.read_size - READ_SIZE_MIN
            self._records.discard(record)
            self._bytes_of_ended += record.bytes_received
            self._totals_of_ended.add(record)
            self._changed.unpark_all()

    def widen(self, record: UploadRecord) -> None:
        """Let an upload that fills its reads make larger ones, as far as there is room for that.

        Large reads save CPU, and cost memory. A few uploads may read 1 MiB at a time; the more
        there are, the less a further one gets, so that the sum stays within the budget. Slow
        clients get nothing of it: a thousand of them would take it all, and never use it.
        """
        if record.read_size == READ_SIZE_MIN:
            share = self._read_budget // _BUDGET_SHARE
            record.read_size = max(READ_SIZE_MIN, min(READ_SIZE_MAX, share))
            self._read_budget -= record.read_size - READ_SIZE_MIN

    def count(self, outcome: str, route: str | None = None, size: int = 0) -> None:
        """Count a request that ended: with an error's code, or ``committed`` with its bytes.

        ``route`` must be configured: whoever sends a request could else make as many as they like.
        """
        self.ended[route or "", outcome] += 1
        if size:
            self.committed_bytes[route or ""] += size

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Count a connection, which may bring uploads, for the length of the block."""
        self.connections += 1
        try:
            yield
        finally:
            self.connections -= 1
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
        while self._records or self.connections:
            await self._changed.park()
