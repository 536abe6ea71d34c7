"""The side of ``relay receive`` that touches the disk: batches of deliveries in, settlements out.

It runs in a worker thread, one call at a time; what has to do with commands, in another one. When
the disk is full it lets go of everything, as a crash would, and begins again from what is safe:
there is one way of recovering, and it is the one that is tested with kill -9. It knows no
connection.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Final

from relay.receiver import Receiver, Settlement
from relay.receiver.files import FileSink
from relay.receiver.link import Delivery
from relay.receiver.pending import Pending

BATCH_TIME: Final = 5.0
"""Seconds of writing after which a batch is settled, however many deliveries are left of it: a
slow disk must not keep the broker waiting for its acks (half an hour, RabbitMQ's default)."""

RECENT: Final = 2000
"""Transfers whose commit frames may be unacked: as many as deliveries can be (RabbitMQ)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What became of a batch.

    Attributes:
        settlement: of the deliveries that were fed.
        fed: how many of the batch these are, from the first on.
    """

    settlement: Settlement
    fed: int


class Intake:
    """A sink and its receiver, made when they are needed and discarded when the disk is full."""

    def __init__(
        self,
        open_sink: Callable[[], FileSink],
        *,
        count: int | None = None,
        expire_after: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes one that holds nothing yet.

        Args:
            open_sink: makes the sink; again after each ``discard``.
            count: transfers after which no more is fed; None for no end.
            expire_after: as ``Receiver`` has it.
            clock: seconds, never going back.
        """
        self._open_sink = open_sink
        self._count = count
        self._expire_after = expire_after
        self._clock = clock
        self._sink: FileSink | None = None
        self._receiver: Receiver | None = None
        self._delivered = 0
        # What earlier processes delivered, and is due; None before it is known.
        self._due_before: frozenset[str] | None = None
        self._is_working = False
        # Held while the sink is closed, or used by who runs commands.
        self._in_use = Lock()
        self._recent: deque[str] = deque(maxlen=RECENT)

    @property
    def open_transfers(self) -> int:
        """Transfers in progress."""
        return 0 if self._receiver is None else self._receiver.open_transfers

    @property
    def is_complete(self) -> bool:
        """Whether ``count`` transfers were delivered, and are safe."""
        return self._count is not None and self._delivered >= self._count

    def open(self) -> None:
        """Make sink and receiver, if there are none.

        Raises:
            OutputInUse: another process writes to the same directory.
            OSError: the directory cannot be made or written.
        """
        if self._sink is None:
            self._sink = self._open_sink()
            self._receiver = Receiver(self._sink, expire_after=self._expire_after)
            if self._due_before is None:
                # They count now, because they did not count then: their commands were due.
                self._due_before = frozenset(
                    due.transfer_id for due in self._sink.handover.pending()
                )
                self._delivered = len(self._due_before)

    def work(self, batch: Sequence[Delivery]) -> Work:
        """Feed deliveries, as many as there is time for, and settle them.

        Raises:
            OSError: from the sink. Then ``discard``, or ``close``.
        """
        self._is_working = True
        try:
            return self._work(batch)
        finally:
            self._is_working = False

    def _work(self, batch: Sequence[Delivery]) -> Work:
        receiver = self._receiver
        assert receiver is not None, "open() comes first"
        until = self._clock() + BATCH_TIME
        before, fed = receiver.delivered, 0
        for delivery in batch:
            delivered = self._delivered + receiver.delivered - before
            enough = self._count is not None and delivered >= self._count
            if enough or (fed and self._clock() >= until):
                break
            _feed(receiver, delivery)
            fed += 1
        settlement = receiver.settle()
        # Not the receiver's count: what it has delivered, but not settled, comes once more. So
        # does, to a new receiver, what was settled and could not be acked.
        new = [d for d in settlement.delivered if d.transfer.id not in self._recent]
        self._recent.extend(delivered.transfer.id for delivered in new)
        self._delivered += sum(d.transfer.id not in (self._due_before or ()) for d in new)
        return Work(replace(settlement, delivered=tuple(new)), fed)

    def discard(self) -> None:
        """Let go of sink and receiver as a crash would.

        If ``work`` was abandoned and goes on, it keeps them until the process ends.
        """
        if self._is_working:
            return
        with self._in_use:
            sink, self._sink, self._receiver = self._sink, None, None
            if sink is not None:
                sink.close()

    # --- for commands: called by another thread, also while a batch is worked on ---------------

    def pending(self) -> Sequence[Pending]:
        """Transfers whose command is due, the oldest first."""
        with self._in_use:
            return [] if self._sink is None else self._sink.handover.pending()

    def done(self, transfer_id: str) -> None:
        """Its command has succeeded. Raises OSError if that cannot be noted now."""
        with self._open_sink_in_use() as sink:
            sink.handover.done(transfer_id)

    def note_try(self, transfer_id: str) -> None:
        """Its command has failed once more. Raises as ``done`` does."""
        with self._open_sink_in_use() as sink:
            sink.handover.note_try(transfer_id)

    def give_up(self, transfer_id: str, reason: str) -> None:
        """Its command has failed for good: into quarantine with it. Raises as ``done`` does."""
        with self._open_sink_in_use() as sink:
            sink.handover.give_up(transfer_id, reason)

    @contextmanager
    def _open_sink_in_use(self) -> Iterator[FileSink]:
        with self._in_use:
            if self._sink is None:
                raise OSError("the output directory is not open now")
            # Not pending any more: another process had the directory meanwhile, and has done it.
            with suppress(KeyError):
                yield self._sink


def _feed(receiver: Receiver, delivery: Delivery) -> None:
    properties = delivery.properties
    receiver.feed(
        delivery.tag,
        app_id=properties.app_id,
        type=properties.type,
        correlation_id=properties.correlation_id,
        timestamp=properties.timestamp,
        headers=properties.headers,
        body=delivery.body,
    )
