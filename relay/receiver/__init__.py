"""The consuming end: AMQP messages in, whole and verified transfers out.

``Receiver`` is fed messages by whatever AMQP client there is, and tells exactly which deliveries
may be acknowledged; what becomes of the bytes is the business of a ``Sink``. This module opens no
connection and no file, and knows no client library. ``relay/receiver/README.md`` has complete
consumers to copy.

    receiver = Receiver(sink)
    with a channel, prefetch set, consuming one queue with manual acks:
        receiver.feed(tag, ...)         each delivery, in order
        receiver.settle()               every so many, and when nothing has come for a second:
            reject(tag, requeue=False)      each of .reject
            ack(tag)                        each of .ack
    receiver.disconnected()             when the channel is gone; then again with another one

The rule for acknowledging: a delivery may be acked once the sink has put its bytes, and the
position after them, where they survive a crash, or once its transfer has ended. Not earlier, or a
crash would lose frames. Not much later either: prefetch is limited, and brokers close the channel
of a consumer that holds a delivery for half an hour.

Two things a consumer of frames must not do, because on a quorum queue they change the order of
the messages, and frames out of order are a gap: requeue a delivery (basic.nack or basic.reject
with requeue), and cancel its consumer while deliveries are under way, as most clients do when they
close a channel in good order. Dropping the connection is safe.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

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
    key_digest,
)
from relay.protocol.wire import WireError, decode
from relay.receiver.settlement import Delivered, Problem, Settlement
from relay.receiver.sink import Earlier, KnownKey, Refused, Sink, verify

__all__ = [
    "Delivered",
    "Earlier",
    "KnownKey",
    "PartEnded",
    "PartHead",
    "Past",
    "Position",
    "Problem",
    "Receiver",
    "Refused",
    "Settlement",
    "Sink",
    "Totals",
    "Transfer",
    "key_digest",
    "verify",
]

_TRANSFER_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A UUID in lower case. Anything else could not be used as a name without further thought."""

_REASON: Final = re.compile(r"[a-z0-9-]{1,64}")
"""What an abort's reason looks like; other text, which anybody may have written, is not shown."""

_REMEMBER: Final = 10_000
"""Transfers delivered by an earlier process whose commit frame may still come once more."""

_HOLD: Final = 1200.0
"""Seconds of silence after which a transfer whose deliveries are held is dropped, at the latest: a
broker closes the channel of who holds one for 1,800 (RabbitMQ's ``consumer_timeout``)."""


@dataclass(frozen=True, slots=True)
class _Rejection:
    """Why a delivery must be rejected, for programs and for people."""

    kind: str
    reason: str


class Receiver:
    """Messages of one queue, in the order of their delivery, into a sink.

    One queue, one consumer on it at a time, one channel at a time. Neither thread-safe nor tied to
    a thread: call one method at a time. Each takes as long as the sink does, so in an event loop
    call it where blocking is allowed.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        max_open: int = 256,
        max_held: int = 1000,
        expire_after: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes one that knows no transfer but those that the sink recalls.

        Args:
            sink: takes the bytes.
            max_open: transfers in progress at once; one more parks the most silent one.
            max_held: deliveries to hold for a sink that has no ``save``. Beyond it the transfer
                that has most of them fails. Must be below the prefetch, or nothing moves any more.
            expire_after: seconds of silence after which a transfer is dropped; without a ``save``
                never more than 1,200, while RabbitMQ still lets a delivery be held.
            clock: seconds, never going back.
        """
        self.delivered = 0
        """Transfers delivered so far, also those that ``settle`` has yet to tell."""
        self._sink = sink
        self._clock = clock
        self._resumes = type(sink).save is not Sink.save
        self._max_held = max_held
        self._expire_after = expire_after if self._resumes else min(expire_after, _HOLD)
        self._reassembler = Reassembler(
            digests=() if sink.rereads else tuple(ALGORITHMS),
            max_open=max_open,
            expire_after=self._expire_after,
        )
        for known in sink.known_keys():
            self._reassembler.remember_key(known.key, known.transfer_id)
        self._earlier: dict[str, str] = {}
        # Since the last settlement, or held:
        self._tags: list[tuple[int, str]] = []
        self._reject: dict[int, _Rejection] = {}
        self._doomed: dict[str, _Rejection] = {}
        self._delivered: list[Delivered] = []
        self._problems: list[Problem] = []

    @property
    def unsettled(self) -> int:
        """Number of deliveries fed that no ``settle`` has answered for, held ones included."""
        return len(self._tags) + len(self._reject)

    @property
    def open_transfers(self) -> int:
        """Number of transfers in progress, those left out that were parked."""
        return len(self._reassembler)

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
        """Take one delivery: every one of the channel, in order, whatever it looks like.

        Args:
            tag: its delivery tag.
            app_id: this, and those that follow, as the client library gives them.
            type: the AMQP property, a word; not a class.
            correlation_id: the transfer's id.
            timestamp: Unix seconds or a datetime, taken for UTC if it has no time zone.
            headers: with AMQP's types as Python's.
            body: not kept by the receiver.

        Raises:
            OSError: or whatever else keeps the sink from going on. Discard the receiver then.
        """
        if isinstance(timestamp, datetime):
            aware = timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)
            timestamp = int(aware.timestamp())
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
            self._reject[tag] = _Rejection("not-a-frame", f"not a frame: {exc}")
            self._problems.append(Problem("not-a-frame", f"a message is not a frame: {exc}"))
            return
        rejection = self._take(item, transfer_id)
        if rejection is None:
            self._tags.append((tag, transfer_id))
        else:
            self._reject[tag] = rejection

    def settle(self) -> Settlement:
        """Make safe what was fed, and say which deliveries may be acked, or must be rejected.

        Call it after so many deliveries, well before the prefetch is used up, and when none has
        come for a second or so: the last ones of a burst must be acked, and silence expired, too.

        Raises:
            OSError: or whatever else keeps the sink from going on. Discard the receiver then.
        """
        now = self._clock()
        for transfer_id in self._in_progress():
            position = self._reassembler.position(transfer_id)
            assert position is not None
            self._sink.save(transfer_id, position)
        self._sink.flush()
        self._apply(self._reassembler.expire(now))
        self._problems += map(_expired, self._sink.sweep(self._expire_after))
        held = self._hold()
        done = [(tag, of) for tag, of in self._tags if of not in held]
        # Frames that were good, of a transfer that then failed, are of use to nobody else than who
        # looks at the dead letters.
        doomed = {tag: self._doomed[of] for tag, of in done if of in self._doomed}
        reject = self._reject | doomed
        settlement = Settlement(
            tuple(tag for tag, _ in done if tag not in doomed),
            {tag: rejection.reason for tag, rejection in reject.items()},
            tuple(self._delivered),
            tuple(self._problems),
            Counter(rejection.kind for rejection in reject.values()),
            held.total(),
        )
        self._tags = [(tag, of) for tag, of in self._tags if of in held]
        self._reject = {}
        self._doomed.clear()
        self._delivered.clear()
        self._problems.clear()
        return settlement

    def disconnected(self) -> None:
        """Forget the deliveries that were not settled: the channel is gone, they come again.

        Call it before the first ``feed`` from another channel, whose tags begin with 1 once more.
        Transfers in progress go on where they were.
        """
        self._tags.clear()
        self._reject = {}
        self._doomed.clear()

    def _in_progress(self) -> Counter[str]:
        """Transfers that have not ended, with the number of their deliveries."""
        position = self._reassembler.position
        return Counter(of for _, of in self._tags if position(of) is not None)

    def _hold(self) -> Counter[str]:
        """Transfers whose deliveries must not be acked yet; those there is no room for fail."""
        if self._resumes:
            return Counter()
        held = self._in_progress()
        while held.total() > self._max_held:
            transfer_id, _ = held.most_common(1)[0]
            del held[transfer_id]
            why = f"more than {self._max_held} frames cannot be held, and this sink has no save"
            position = self._reassembler.position(transfer_id)
            seq = 0 if position is None else position.seq
            self._apply([self._reassembler.doom(transfer_id, seq, Fault.REFUSED, why)])
        return held

    def _take(self, item: Frame | Abort, transfer_id: str) -> _Rejection | None:
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
        elif isinstance(known, Past):
            self._reassembler.remember(transfer_id, known)
        elif known is not None:
            self._apply(self._reassembler.restore(transfer_id, known, now))

    def _apply(self, events: list[Event]) -> _Rejection | None:
        rejection = None
        for event in events:
            rejection = self._apply_one(event) or rejection
        return rejection

    def _apply_one(self, event: Event) -> _Rejection | None:
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
            case TransferStarted():
                sink.begin(event.transfer)
            case Dropped():
                pass
            case Aborted():
                # Without frames there never was anything: anybody may send an abort.
                if event.frames:
                    sink.aborted(event.transfer_id)
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
                return _Rejection("stray", reason)
            case Ignored():
                return _Rejection("late", "the transfer has failed")
        return None

    def _fail(self, event: Failed) -> _Rejection:
        reason = f"failed: {event.detail} ({event.fault})"
        self._sink.fail(event.transfer_id, reason)
        rejection = self._doomed[event.transfer_id] = _Rejection(event.fault, reason)
        self._report(event.fault, reason, event.transfer_id)
        return rejection

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
