"""Frames to transfers: duplicates, gaps, checks, aborts, silence.

Pure: it is fed decoded frames with the time as a number, and answers with events. It holds a few
numbers for each open transfer and no bytes of any; how many transfers are open at once and how
many ended ones are remembered is bounded. It does not know where frames come from, where bytes
go, or what an acknowledgement is.

A transfer that is complete, and has the idempotency key of another that was complete before it, is
the same upload sent twice: it ends as ``Repeated``, and is not to be delivered.

    never seen ── seq 0 ──▶ open ── commit frame ──▶ committed, or repeated
                             │ ├─── abort ─────────▶ aborted
                             │ ├─── fault ─────────▶ doomed
                             │ ├─── silence ───────▶ (forgotten)
                             │ └─── no room ───────▶ (parked: whoever keeps the position brings
                             ▼                        it back with ``restore``)
             each frame verified before an event tells of it

A frame is verified before anybody gets to see its bytes, and a whole part before its end is told.
One transfer's fault never touches another's.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

from relay.model import Abort, Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import ALGORITHMS, PartDigest

KNOWN_DIGESTS: Final = frozenset({"crc32c", *ALGORITHMS})
"""Digests that are verified; others, which a later publisher may add, are ignored."""


class Fault(StrEnum):
    """What was wrong with a frame."""

    GAP = "gap"
    POSITION = "position"
    CHECKSUM = "checksum"
    SIZE = "size"
    DIGEST = "digest"
    TOTALS = "totals"
    REFUSED = "refused"
    """Not the frame: whoever takes the bytes could not accept the transfer."""


class Past(Enum):
    """What became of a transfer that is no longer open."""

    COMMITTED = "committed"
    REPEATED = "repeated"
    ABORTED = "aborted"
    DOOMED = "doomed"
    STRAY = "stray"
    """Its beginning was never seen."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a transfer has come, between two frames: all that is needed to go on from there.

    Attributes:
        seq: of the frame that is due.
        part: of the frame that is due.
        offset: of the frame that is due within its part; 0 between two parts.
        part_frames: frames of the part in progress so far.
        bytes: of all parts so far.
    """

    seq: int
    part: int
    offset: int
    part_frames: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TransferStarted:
    """The first frame of a transfer."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class PartStarted:
    """The first frame of a part."""

    transfer_id: str
    part: int
    head: PartHead


@dataclass(frozen=True, slots=True)
class PartData:
    """Verified bytes of the part in progress, in order and without gaps. Never empty."""

    transfer_id: str
    part: int
    offset: int
    body: bytes


@dataclass(frozen=True, slots=True)
class PartEnded:
    """The part is complete.

    Attributes:
        transfer_id: the transfer it belongs to.
        part: its number.
        tail: its size, which is verified, and its digests, which are except for ``unchecked``.
        frames: how many it consisted of.
        unchecked: known digests that could not be computed as the bytes went by. Who has the
            bytes must verify them before it trusts the part.
    """

    transfer_id: str
    part: int
    tail: PartTail
    frames: int
    unchecked: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Committed:
    """The transfer is complete, its totals verified."""

    transfer: Transfer
    totals: Totals


@dataclass(frozen=True, slots=True)
class Repeated:
    """The transfer is complete and verified, and the same upload as the earlier transfer ``of``."""

    transfer: Transfer
    of: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """Its sender gave the transfer up. ``frames`` of it had been seen, perhaps none."""

    transfer_id: str
    reason: str
    frames: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A frame or abort that changes nothing: a duplicate, or of a transfer that has ended."""

    transfer_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The transfer cannot be completed; no more is told of it."""

    transfer_id: str
    seq: int
    fault: Fault
    detail: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A frame of a transfer that has failed, or whose beginning was missed."""

    transfer_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class Stray:
    """A frame from the middle of an unknown transfer: we joined late, or it had expired."""

    transfer_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class Expired:
    """Nothing was heard of the transfer for too long; it is forgotten."""

    transfer_id: str
    position: Position


@dataclass(frozen=True, slots=True)
class Parked:
    """Forgotten to make room for another. It can go on if it is restored with ``position``."""

    transfer_id: str
    position: Position


Event = (
    TransferStarted
    | PartStarted
    | PartData
    | PartEnded
    | Committed
    | Repeated
    | Aborted
    | Dropped
    | Failed
    | Ignored
    | Stray
    | Expired
    | Parked
)


def key_digest(transfer: Transfer) -> str | None:
    """What tells one upload from another: 32 hex digits; None if its sender gave it no key.

    A key belongs to one client and one route. Digested, so that what is remembered of it has one
    size, whatever somebody wrote into a header.
    """
    if transfer.idempotency_key is None:
        return None
    identity = json.dumps([transfer.client, transfer.route, transfer.idempotency_key])
    return hashlib.blake2b(identity.encode("ascii"), digest_size=16).hexdigest()


class Reassembler:
    """Any number of interleaved transfers, each frame fed in the order of its delivery."""

    def __init__(
        self,
        *,
        digests: Collection[str] = tuple(ALGORITHMS),
        max_open: int = 256,
        max_remembered: int = 10_000,
        expire_after: float = 86_400.0,
    ) -> None:
        """Makes one that knows no transfer yet.

        Args:
            digests: algorithms, besides crc32c, computed while the bytes go by. A part's end
                names those that the publisher gave and that were not computed.
            max_open: transfers open at once. One more parks the one that was silent longest.
            max_remembered: ended transfers whose duplicates are recognised, the latest first; and
                as many idempotency keys.
            expire_after: silence after which ``expire`` forgets a transfer, in the unit of
                ``now``.
        """
        self._digests = tuple(name for name in ALGORITHMS if name in digests)
        self._max_open = max_open
        self._max_remembered = max_remembered
        self._expire_after = expire_after
        # Both in order of the last frame, so that room and expiry look at the first only.
        self._open: OrderedDict[str, _Progress] = OrderedDict()
        self._past: OrderedDict[str, Past] = OrderedDict()
        # Digests of the keys of committed transfers, and these transfers' ids.
        self._keys: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        """Number of open transfers."""
        return len(self._open)

    def knows(self, transfer_id: str) -> bool:
        """Whether the transfer is open or its end is remembered."""
        return transfer_id in self._open or self._past.get(transfer_id, Past.STRAY) != Past.STRAY

    def position(self, transfer_id: str) -> Position | None:
        """How far the transfer has come; None if it is not open."""
        progress = self._open.get(transfer_id)
        return None if progress is None else progress.position()

    def restore(self, transfer_id: str, position: Position, now: float) -> list[Event]:
        """Go on with a transfer that was parked, or begun by an earlier process.

        The digests of a part in progress start in its middle, so its end will name them all as
        unchecked. Returns what had to be parked to make room.
        """
        progress = _Progress(now, self._digests)
        progress.restore(position)
        events = self._make_room()
        self._open[transfer_id] = progress
        self._past.pop(transfer_id, None)
        return events

    def remember(self, transfer_id: str, past: Past) -> None:
        """Note what became of a transfer, known from elsewhere, and forget it if it is open."""
        self._open.pop(transfer_id, None)
        self._past[transfer_id] = past
        self._past.move_to_end(transfer_id)
        while len(self._past) > self._max_remembered:
            self._past.popitem(last=False)

    def remember_key(self, key: str, transfer_id: str) -> None:
        """Note a committed transfer's ``key_digest``: further ones with the same are repeated."""
        self._keys.setdefault(key, transfer_id)
        self._keys.move_to_end(key)
        while len(self._keys) > self._max_remembered:
            self._keys.popitem(last=False)

    def feed(self, item: Frame | Abort, now: float) -> list[Event]:
        """The next delivery, and what follows from it, in order."""
        if isinstance(item, Abort):
            return self._abort(item)
        transfer_id, seq = item.transfer.id, item.seq
        events: list[Event] = []
        progress = self._open.get(transfer_id)
        if progress is None:
            if (answer := self._not_open(transfer_id, seq)) is not None:
                return [answer]
            progress = _Progress(now, self._digests)
            events.append(TransferStarted(item.transfer))
        else:
            progress.fed = now
            self._open.move_to_end(transfer_id)
            if seq < progress.seq:
                return [Dropped(transfer_id, seq)]
        try:
            events += progress.take(item)
        except _FaultyFrame as exc:
            return [self.doom(transfer_id, seq, exc.fault, exc.detail)]
        if item.commit is not None:
            events.append(self._complete(item.transfer, item.commit))
        elif transfer_id not in self._open:
            events[:0] = self._make_room()
            self._open[transfer_id] = progress
            self._past.pop(transfer_id, None)
        return events

    def doom(self, transfer_id: str, seq: int, fault: Fault, detail: str) -> Failed:
        """Give the transfer up, whatever was told of it; its further frames are ignored."""
        if self._past.get(transfer_id) is Past.COMMITTED:
            # It came to nothing after all, so the next one with its key is the first.
            for key in [key for key, of in self._keys.items() if of == transfer_id]:
                del self._keys[key]
        self.remember(transfer_id, Past.DOOMED)
        return Failed(transfer_id, seq, fault, detail)

    def expire(self, now: float) -> list[Event]:
        """Forget the transfers that have been silent for too long."""
        events: list[Event] = []
        while self._open:
            transfer_id, progress = next(iter(self._open.items()))
            if now - progress.fed < self._expire_after:
                break
            del self._open[transfer_id]
            events.append(Expired(transfer_id, progress.position()))
        return events

    def _complete(self, transfer: Transfer, totals: Totals) -> Committed | Repeated:
        if (key := key_digest(transfer)) is not None:
            self.remember_key(key, transfer.id)
            if (first := self._keys[key]) != transfer.id:
                self.remember(transfer.id, Past.REPEATED)
                return Repeated(transfer, first)
        self.remember(transfer.id, Past.COMMITTED)
        return Committed(transfer, totals)

    def _not_open(self, transfer_id: str, seq: int) -> Event | None:
        """The answer to a frame of a transfer that is not open; None if it opens one."""
        past = self._past.get(transfer_id)
        if past in (Past.COMMITTED, Past.REPEATED, Past.ABORTED):
            return Dropped(transfer_id, seq)
        if past is Past.DOOMED:
            return Ignored(transfer_id, seq)
        # A stray one may be redelivered whole: only then does it begin with its first frame.
        if seq == 0:
            return None
        if past is Past.STRAY:
            return Ignored(transfer_id, seq)
        self.remember(transfer_id, Past.STRAY)
        return Stray(transfer_id, seq)

    def _abort(self, abort: Abort) -> list[Event]:
        transfer_id = abort.transfer_id
        if self._past.get(transfer_id, Past.STRAY) is not Past.STRAY:
            return [Dropped(transfer_id, abort.seq)]
        progress = self._open.get(transfer_id)
        self.remember(transfer_id, Past.ABORTED)
        return [Aborted(transfer_id, abort.reason, 0 if progress is None else progress.seq)]

    def _make_room(self) -> list[Event]:
        events: list[Event] = []
        while len(self._open) >= self._max_open:
            transfer_id, progress = self._open.popitem(last=False)
            events.append(Parked(transfer_id, progress.position()))
        return events


class _FaultyFrame(Exception):
    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault
        self.detail = detail


class _Progress:
    """One open transfer: what is due next, and the digests of the part in progress."""

    __slots__ = (
        "_algorithms",
        "_bytes",
        "_digest",
        "_offset",
        "_part",
        "_part_frames",
        "fed",
        "seq",
    )

    def __init__(self, now: float, algorithms: tuple[str, ...]) -> None:
        self.fed = now
        self.seq = 0
        self._part = 0
        self._offset = 0
        self._part_frames = 0
        self._bytes = 0
        self._algorithms = algorithms
        # None for a part whose beginning went by before the transfer was restored.
        self._digest: PartDigest | None = None

    def position(self) -> Position:
        return Position(self.seq, self._part, self._offset, self._part_frames, self._bytes)

    def restore(self, position: Position) -> None:
        self.seq = position.seq
        self._part = position.part
        self._offset = position.offset
        self._part_frames = position.part_frames
        self._bytes = position.bytes

    def take(self, frame: Frame) -> list[Event]:
        """Verify the frame, and move on past it.

        Raises:
            _FaultyFrame: it is not what is due, or not what its sender meant to send.
        """
        self._check_place(frame)
        if crc32c(frame.body) != frame.crc32c:
            raise _FaultyFrame(Fault.CHECKSUM, f"crc32c of frame {frame.seq} does not match")
        events: list[Event] = []
        transfer_id = frame.transfer.id
        if frame.offset == 0:
            self._digest = PartDigest(self._algorithms)
            events.append(PartStarted(transfer_id, frame.part, frame.head or PartHead()))
        if frame.body:
            events.append(PartData(transfer_id, frame.part, frame.offset, frame.body))
        self._count(frame)
        if frame.tail is not None:
            events.append(self._end_part(frame, frame.tail))
        if frame.commit is not None:
            self._check_totals(frame.commit)
        return events

    def _check_place(self, frame: Frame) -> None:
        if frame.seq != self.seq:
            raise _FaultyFrame(Fault.GAP, f"frame {frame.seq} came where {self.seq} was due")
        if (frame.part, frame.offset) != (self._part, self._offset):
            raise _FaultyFrame(
                Fault.POSITION,
                f"frame {frame.seq} claims part {frame.part}, offset {frame.offset}; "
                f"part {self._part}, offset {self._offset} was due",
            )
        if not frame.body and (frame.offset or frame.tail is None):
            raise _FaultyFrame(Fault.POSITION, f"frame {frame.seq} is empty, but not its part")
        if frame.commit is not None and frame.tail is None:
            raise _FaultyFrame(Fault.POSITION, f"frame {frame.seq} commits in the midst of a part")

    def _count(self, frame: Frame) -> None:
        if self._digest is not None:
            self._digest.update(frame.body, frame.crc32c)
        self.seq += 1
        self._offset += len(frame.body)
        self._bytes += len(frame.body)
        self._part_frames += 1

    def _end_part(self, frame: Frame, tail: PartTail) -> PartEnded:
        if tail.size != self._offset:
            raise _FaultyFrame(
                Fault.SIZE, f"part {self._part} has {self._offset} bytes, not {tail.size}"
            )
        if "crc32c" not in tail.digest:
            raise _FaultyFrame(Fault.DIGEST, f"part {self._part} ends without a crc32c digest")
        computed = {} if self._digest is None else self._digest.tail().digest
        unchecked = {}
        for name in KNOWN_DIGESTS.intersection(tail.digest):
            if name not in computed:
                unchecked[name] = tail.digest[name]
            elif computed[name] != tail.digest[name]:
                raise _FaultyFrame(Fault.DIGEST, f"{name} of part {self._part} does not match")
        ended = PartEnded(frame.transfer.id, self._part, tail, self._part_frames, unchecked)
        self._digest = None
        self._part += 1
        self._offset = self._part_frames = 0
        return ended

    def _check_totals(self, totals: Totals) -> None:
        found = Totals(self.seq, self._part, self._bytes)
        if totals != found:
            raise _FaultyFrame(Fault.TOTALS, f"the totals are {found}, not {totals}")
