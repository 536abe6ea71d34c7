"""The consuming end: AMQP messages in, whole and verified transfers out.

``Receiver`` is fed messages by whatever AMQP client there is, and tells exactly which deliveries
may be acknowledged; what becomes of the bytes is the business of a ``Sink``. This module opens no
connection and no file, and knows no client library.

The rule for acknowledging: a delivery may be acked once the sink has put its bytes, and the
position after them, where they survive a crash. Not earlier, or a crash would lose frames. Not as
late as the transfer's end either: prefetch is limited, and brokers close the channel of a consumer
that holds a delivery for half an hour.

Two things a consumer of frames must not do, because on a quorum queue they change the order of
the messages, and frames out of order are a gap: requeue a delivery (basic.nack or basic.reject
with requeue), and cancel its consumer while deliveries are under way, as most clients do when they
close a channel in good order. Dropping the connection is safe.
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from relay.model import Abort, Frame, PartHead, Totals, Transfer
from relay.protocol.framing import ALGORITHMS
from relay.protocol.reassembly import (
    Aborted,
    Committed,
    Dropped,
    Event,
    Expired,
    Failed,
    Fault,
    Ignored,
    Parked,
    PartData,
    PartEnded,
    PartStarted,
    Past,
    Position,
    Reassembler,
    Repeated,
    Stray,
    TransferStarted,
)
from relay.protocol.wire import WireError, decode

__all__ = [
    "Delivered",
    "Earlier",
    "KnownKey",
    "Problem",
    "Receiver",
    "Refused",
    "Settlement",
    "Sink",
]

_TRANSFER_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A UUID in lower case. Anything else could not be used as a name without further thought."""

_REASON: Final = re.compile(r"[a-z0-9-]{1,64}")
"""What an abort's reason looks like; other text, which anybody may have written, is not shown."""

_REMEMBER: Final = 10_000
"""Transfers delivered by an earlier process whose commit frame may still come once more."""

_SWEEP_INTERVAL: Final = 60.0
"""Seconds between two looks at what the sink holds of transfers that are not open."""


class Refused(Exception):
    """The sink cannot take this transfer: only it fails, with this text as the reason."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """The sink's answer about a transfer that it has delivered already.

    Attributes:
        where: for people.
        key: its ``reassembly.key_digest``.
    """

    where: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What became of a transfer that was complete and had an idempotency key.

    Attributes:
        key: its ``reassembly.key_digest``.
        transfer_id: the transfer.
        repeated: it was dropped, because another with that key had been delivered before.
    """

    key: str
    transfer_id: str
    repeated: bool = False


class Sink(ABC):
    """Where the bytes of transfers go. Called by one thread at a time.

    Four methods are a sink; the others have to do with surviving crashes, and do nothing here.
    Those that are told a transfer's progress may raise ``Refused``, which fails that transfer.
    Other exceptions, such as OSError on a full disk, end the receiver: nothing is acked then whose
    bytes have not been saved.
    """

    rereads: ClassVar[bool] = False
    """Whether ``end_part`` verifies, from the sink's own copy, digests left unchecked."""

    @abstractmethod
    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        """A part begins. The first part of a transfer makes the transfer known."""

    @abstractmethod
    def write(self, transfer_id: str, body: bytes) -> None:
        """The next bytes of the part that is open."""

    def end_part(self, ended: PartEnded) -> None:
        """The part that is open is complete.

        Raises:
            Refused: a digest does not match, or cannot be verified.
        """
        if ended.unchecked:
            raise Refused(f"digests of part {ended.part} cannot be verified")

    @abstractmethod
    def commit(self, transfer: Transfer, totals: Totals) -> str:
        """The transfer is complete: deliver it, all or nothing. Returns where to, for people."""

    @abstractmethod
    def abort(self, transfer_id: str) -> None:
        """Drop all that there is of the transfer, which may be nothing."""

    def fail(self, transfer_id: str, reason: str) -> None:
        """The transfer cannot be completed: drop it, or keep what there is of it for people."""
        self.abort(transfer_id)

    def repeated(self, transfer: Transfer) -> None:
        """The transfer is complete, but the same upload was delivered before: drop it.

        What there is of it may be needed until ``flush``, if the earlier one is not safe yet.
        """
        self.abort(transfer.id)

    def known_keys(self) -> Sequence[KnownKey]:
        """Keys of transfers that earlier processes delivered or dropped, oldest first."""
        return ()

    def save(self, transfer_id: str, position: Position) -> None:  # noqa: B027  optional
        """Make what was written of the transfer so far, and the position, safe from a crash."""

    def flush(self) -> None:  # noqa: B027  optional
        """Make the commits since the last call safe from a crash."""

    def recall(self, transfer_id: str) -> Position | Earlier | None:
        """What there is of a transfer that is not open: perhaps a crash's remains."""
        return None

    def park(self, transfer_id: str, position: Position) -> None:
        """Save the transfer and close it: the most silent one, to make room for another.

        Raises:
            Refused: this sink has no ``recall`` to bring it back.
        """
        raise Refused("too many transfers at once")

    def sweep(self, expire_after: float) -> list[str]:
        """Drop what is not open and was not touched for so many seconds; returns their ids."""
        return []


@dataclass(frozen=True, slots=True)
class Delivered:
    """A transfer that the sink has committed. Told at least once, after a crash perhaps twice."""

    transfer: Transfer
    totals: Totals
    where: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an operator should know; its text is one line for people.

    Attributes:
        kind: one of a few words, for programs: ``not-a-frame``, ``stray``, ``aborted``,
            ``expired``, ``repeated``, or a ``reassembly.Fault``.
        detail: the line without the transfer.
        transfer_id: None if the message told none.
    """

    kind: str
    detail: str
    transfer_id: str | None = None

    def __str__(self) -> str:
        of = "" if self.transfer_id is None else f"transfer {self.transfer_id} "
        return of + self.detail


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of all deliveries fed since the last one.

    Attributes:
        ack: delivery tags to acknowledge.
        reject: delivery tags to reject without requeueing, which dead-letters them, each with
            the reason.
        delivered: transfers that are complete.
        problems: what went wrong, each told once.
    """

    ack: tuple[int, ...]
    reject: Mapping[int, str]
    delivered: tuple[Delivered, ...]
    problems: tuple[Problem, ...]


class Receiver:
    """Messages of one channel, in the order of their delivery, into a sink.

    ``feed`` each delivery; every now and then, and before a client's prefetch runs out, ``settle``
    and do to the channel what it says: reject, then ack. It blocks as long as the sink does.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        max_open: int = 256,
        expire_after: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes one that knows no transfer but those that the sink recalls.

        Args:
            sink: takes the bytes.
            max_open: transfers in progress at once; one more parks the most silent one.
            expire_after: seconds of silence after which a transfer is dropped.
            clock: seconds, never going back.
        """
        self.delivered = 0
        """Transfers delivered so far, also those that ``settle`` has yet to tell."""
        self._sink = sink
        self._clock = clock
        self._expire_after = expire_after
        self._next_sweep = clock()
        self._reassembler = Reassembler(
            digests=() if sink.rereads else tuple(ALGORITHMS),
            max_open=max_open,
            expire_after=expire_after,
        )
        for known in sink.known_keys():
            self._reassembler.remember_key(known.key, known.transfer_id)
            if known.repeated:
                self._reassembler.remember(known.transfer_id, Past.REPEATED)
        self._earlier: dict[str, str] = {}
        # Since the last settlement:
        self._tags: list[tuple[int, str]] = []
        self._reject: dict[int, str] = {}
        self._doomed: dict[str, str] = {}
        self._delivered: list[Delivered] = []
        self._problems: list[Problem] = []

    @property
    def unsettled(self) -> int:
        """Number of deliveries that the next ``settle`` will answer for."""
        return len(self._tags) + len(self._reject)

    def feed(
        self,
        tag: int,
        *,
        app_id: object,
        type: object,
        correlation_id: object,
        timestamp: object,
        headers: Mapping[Any, object] | None,
        body: bytes,
    ) -> None:
        """Take one delivery, its properties as the client library gives them.

        Raises:
            OSError: or whatever else keeps the sink from going on. Discard the receiver then.
        """
        try:
            item = decode(
                app_id=app_id,
                type=type,
                correlation_id=correlation_id,
                timestamp=timestamp,
                headers=headers,
                body=body,
            )
            transfer_id = item.transfer_id if isinstance(item, Abort) else item.transfer.id
            if not _TRANSFER_ID.fullmatch(transfer_id):
                raise WireError("the transfer's id is not a UUID in lower case")
        except WireError as exc:
            self._reject[tag] = f"not a frame: {exc}"
            self._problems.append(Problem("not-a-frame", f"a message is not a frame: {exc}"))
            return
        reason = self._take(item, transfer_id)
        if reason is None:
            self._tags.append((tag, transfer_id))
        else:
            self._reject[tag] = reason

    def settle(self) -> Settlement:
        """Make safe what was fed, and say which deliveries may be acked, or must be rejected.

        Raises:
            OSError: or whatever else keeps the sink from going on. Discard the receiver then.
        """
        now = self._clock()
        for transfer_id in dict.fromkeys(transfer_id for _, transfer_id in self._tags):
            position = self._reassembler.position(transfer_id)
            if position is not None:
                self._sink.save(transfer_id, position)
        self._sink.flush()
        self._apply(self._reassembler.expire(now))
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_INTERVAL
            self._problems += map(_expired, self._sink.sweep(self._expire_after))
        settlement = Settlement(
            tuple(tag for tag, transfer_id in self._tags if transfer_id not in self._doomed),
            # Frames that were good, of a transfer that then failed, are of use to nobody else
            # than who looks at the dead letters.
            self._reject | {tag: self._doomed[of] for tag, of in self._tags if of in self._doomed},
            tuple(self._delivered),
            tuple(self._problems),
        )
        self.disconnected()
        self._delivered.clear()
        self._problems.clear()
        return settlement

    def disconnected(self) -> None:
        """Forget the deliveries that were not settled: the channel is gone, they come again."""
        self._tags.clear()
        self._reject = {}
        self._doomed.clear()

    def _take(self, item: Frame | Abort, transfer_id: str) -> str | None:
        """Returns why the delivery must be rejected; None if it may be acked once it is safe."""
        now = self._clock()
        seq = item.seq
        try:
            if not self._reassembler.knows(transfer_id):
                self._recall(transfer_id, now)
            if isinstance(item, Frame) and item.commit is not None and transfer_id in self._earlier:
                where = self._earlier.pop(transfer_id)
                self._deliver(Delivered(item.transfer, item.commit, where))
            return self._apply(self._reassembler.feed(item, now))
        except Refused as exc:
            return self._apply([self._reassembler.doom(transfer_id, seq, Fault.REFUSED, str(exc))])

    def _recall(self, transfer_id: str, now: float) -> None:
        known = self._sink.recall(transfer_id)
        if isinstance(known, Earlier):
            self._reassembler.remember(transfer_id, Past.COMMITTED)
            if known.key is not None:
                self._reassembler.remember_key(known.key, transfer_id)
            self._earlier[transfer_id] = known.where
            if len(self._earlier) > _REMEMBER:
                del self._earlier[next(iter(self._earlier))]
        elif known is not None:
            self._apply(self._reassembler.restore(transfer_id, known, now))

    def _apply(self, events: list[Event]) -> str | None:
        reason = None
        for event in events:
            reason = self._apply_one(event) or reason
        return reason

    def _apply_one(self, event: Event) -> str | None:
        """Returns why the frame that caused the event must be rejected, if it must."""
        sink = self._sink
        match event:
            case PartData():
                sink.write(event.transfer_id, event.body)
            case PartStarted():
                sink.open_part(event.transfer_id, event.part, event.head)
            case PartEnded():
                sink.end_part(event)
            case Committed():
                where = sink.commit(event.transfer, event.totals)
                self._deliver(Delivered(event.transfer, event.totals, where))
            case Repeated():
                sink.repeated(event.transfer)
                self._report(
                    "repeated",
                    f"dropped: {event.of}, with the same Idempotency-Key, was delivered before",
                    event.transfer.id,
                )
            case TransferStarted() | Dropped():
                pass
            case Aborted():
                sink.abort(event.transfer_id)
                if event.frames:
                    reason = event.reason if _REASON.fullmatch(event.reason) else "unknown"
                    self._report("aborted", f"aborted: {reason}", event.transfer_id)
            case Parked():
                self._park(event)
            case Expired():
                sink.abort(event.transfer_id)
                self._problems.append(_expired(event.transfer_id))
            case Failed():
                return self._fail(event)
            case Stray():
                reason = f"has no beginning: frame {event.seq} is the first that came"
                self._report("stray", reason, event.transfer_id)
                return reason
            case Ignored():
                return "the transfer has failed"
        return None

    def _fail(self, event: Failed) -> str:
        reason = f"failed: {event.detail} ({event.fault})"
        self._sink.fail(event.transfer_id, reason)
        self._doomed[event.transfer_id] = reason
        self._report(event.fault, reason, event.transfer_id)
        return reason

    def _report(self, kind: str, detail: str, transfer_id: str) -> None:
        self._problems.append(Problem(kind, detail, transfer_id))

    def _park(self, event: Parked) -> None:
        try:
            self._sink.park(event.transfer_id, event.position)
        except Refused as exc:
            # The parked transfer's frames are at fault, not the frame that made it park.
            seq = event.position.seq
            self._apply_one(self._reassembler.doom(event.transfer_id, seq, Fault.REFUSED, str(exc)))

    def _deliver(self, delivered: Delivered) -> None:
        self.delivered += 1
        self._delivered.append(delivered)


def _expired(transfer_id: str) -> Problem:
    return Problem("expired", "expired: it fell silent before its end", transfer_id)
