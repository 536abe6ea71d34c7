"""Reassembly driven by hypothesis, against a model that knows only who is due and what was sent.

The driver does what a consumer does: it keeps positions of what was parked or saved, brings them
back, and verifies digests from its own bytes where reassembly could not.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from relay.model import Abort, Frame, PartHead, PartTail, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import ALGORITHMS, Framer
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

MAX_OPEN = 2
EXPIRE_AFTER = 10.0

SIZES = (0, 3, 4, 5, 8, 17)
"""Bytes of parts; four of them are a frame."""

Parts = list[bytes]


def cut(number: int, parts: Parts, key: str | None, digests: Sequence[str]) -> list[Frame]:
    transfer_id = f"0199c0de-0000-7000-8000-{number:012x}"
    transfer = Transfer(id=transfer_id, began=1, route="default", idempotency_key=key)
    framer = Framer(transfer, frame_size=4, digests=digests)
    frames: list[Frame] = []
    for part in parts:
        frames += framer.start_part(PartHead())
        frames += framer.feed(part)
        framer.end_part()
    return [*frames, framer.finish()[0]]


def spoil(frame: Frame, how: int) -> Frame:
    """The frame with one thing wrong that its place does not tell."""
    spoilt = [
        frame._replace(crc32c=frame.crc32c ^ 1),
        frame._replace(part=frame.part + 1),
        frame._replace(offset=frame.offset + 1),
        frame._replace(seq=frame.seq + 1),
    ]
    if frame.body:
        spoilt.append(frame._replace(body=bytes([frame.body[0] ^ 1]) + frame.body[1:]))
    if (tail := frame.tail) is not None:
        spoilt.append(frame._replace(tail=replace(tail, size=tail.size + 1)))
        spoilt += [
            frame._replace(tail=PartTail(tail.size, {**tail.digest, name: "00"}))
            for name in tail.digest
        ]
    if (commit := frame.commit) is not None:
        spoilt.append(frame._replace(commit=replace(commit, frames=commit.frames + 1)))
        spoilt.append(frame._replace(commit=replace(commit, bytes=commit.bytes + 1)))
        spoilt.append(frame._replace(commit=replace(commit, parts=commit.parts + 1)))
    return spoilt[how % len(spoilt)]


Upload = tuple[list[int], str | None, Sequence[str]]


def uploads() -> st.SearchStrategy[Upload]:
    """Sizes of parts, idempotency key, digests."""
    return st.tuples(
        st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
        st.sampled_from([None, "k"]),
        st.sampled_from([(), ("sha-256",)]),
    )


@dataclass
class Sent:
    """A transfer at its sender."""

    frames: list[Frame]
    parts: Parts
    next: int = 0
    given_up: bool = False

    @property
    def id(self) -> str:
        return self.frames[0].transfer.id

    @property
    def key(self) -> str | None:
        return key_digest(self.frames[0].transfer)

    def before(self, seq: int) -> Parts:
        """Bytes of the frames before ``seq``, by part; a part begins with its first frame."""
        parts: Parts = []
        for frame in self.frames[:seq]:
            if frame.offset == 0:
                parts.append(b"")
            parts[-1] += frame.body
        return parts


@dataclass
class Model:
    """What must have become of each transfer: a word, and for open ones the seq that is due."""

    state: dict[str, str] = field(default_factory=dict)
    due: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    """Of the open ones that are not parked, the most silent first, with when they were fed."""
    parked: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def expect(self, item: Frame | Abort, sent: Sent, spoilt: bool, now: float) -> type[Event]:
        """What the item must end in."""
        of, state = sent.id, self.state.get(sent.id, "unknown")
        if state in ("committed", "repeated", "aborted"):
            return Dropped
        if state == "doomed":
            return Dropped if isinstance(item, Abort) else Ignored
        if isinstance(item, Abort):
            return self._end(of, "aborted", Aborted)
        if of not in self.due:
            if item.seq:
                self.state[of] = "stray"
                return Stray if state == "unknown" else Ignored
            self.due[of] = 0, now
            self.state[of] = "open"
        due, _ = self.due[of]
        self.due[of] = due, now
        self.due.move_to_end(of)
        if item.seq < due:
            return Dropped
        if spoilt or item.seq > due:
            return self._end(of, "doomed", Failed)
        if item.commit is None:
            self.due[of] = due + 1, now
            return PartData
        if sent.key is not None and self.keys.setdefault(sent.key, of) != of:
            return self._end(of, "repeated", Repeated)
        return self._end(of, "committed", Committed)

    def park_but(self, room: int) -> list[str]:
        """Park until there are no more than so many open."""
        gone = []
        while len(self.due) > room:
            of, (due, _) = self.due.popitem(last=False)
            self.parked[of] = due
            gone.append(of)
        return gone

    def _end(self, of: str, state: str, event: type[Event]) -> type[Event]:
        self.due.pop(of, None)
        self.state[of] = state
        return event


class ReassemblyMachine(RuleBasedStateMachine):
    """A queue that repeats itself, transfers that go wrong, a consumer that starts again."""

    transfers = Bundle("transfers")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sent: dict[str, Sent] = {}
        self.log: list[tuple[Frame | Abort, bool]] = []
        self.model = Model()
        self.output: dict[str, Parts] = {}
        self.committed: dict[str, Parts] = {}
        self.parked: dict[str, Position] = {}
        self.from_middle: set[str] = set()
        self.start()
        self.save()

    def start(self) -> None:
        self.reassembler = Reassembler(max_open=MAX_OPEN, expire_after=EXPIRE_AFTER)

    # --- what happens ----------------------------------------------------------------------------

    @initialize(target=transfers, uploads=st.lists(uploads(), min_size=4, max_size=4))
    def begin_some(self, uploads: list[Upload]) -> MultipleResults[str]:
        return multiple(*map(self.add, uploads))

    @rule(target=transfers, upload=uploads())
    def begin(self, upload: Upload) -> str:
        return self.add(upload)

    def add(self, upload: Upload) -> str:
        sizes, key, digests = upload
        number = len(self.sent)
        parts = [Random(f"{number}.{n}").randbytes(size) for n, size in enumerate(sizes)]
        sent = Sent(cut(number, parts, key, digests), parts)
        self.sent[sent.id] = sent
        return sent.id

    @rule(of=transfers, count=st.sampled_from([1, 1, 2, 3, 99]))
    def publish(self, of: str, count: int) -> None:
        sent = self.sent[of]
        for _ in range(count):
            if not sent.given_up and sent.next < len(sent.frames):
                sent.next += 1
                self.deliver(sent.frames[sent.next - 1])

    @rule(of=transfers, how=st.integers(0, 999))
    def publish_spoilt(self, of: str, how: int) -> None:
        sent = self.sent[of]
        if not sent.given_up and sent.next < len(sent.frames):
            sent.next += 1
            self.deliver(spoil(sent.frames[sent.next - 1], how), spoilt=True)

    @rule(of=transfers)
    def lose_one(self, of: str) -> None:
        self.sent[of].next += 1

    @rule(of=transfers, count=st.integers(1, 4))
    def publish_again(self, of: str, count: int) -> None:
        sent = self.sent[of]
        for frame in sent.frames[max(0, sent.next - count) : sent.next]:
            self.deliver(frame)

    @rule(of=transfers)
    def give_up(self, of: str) -> None:
        sent = self.sent[of]
        if sent.next < len(sent.frames):
            sent.given_up = True
            self.deliver(Abort(of, sent.next, "client-gone"))

    @rule(count=st.integers(1, 12))
    def redeliver(self, count: int) -> None:
        for item, spoilt in self.log[-count:]:
            self.feed(item, spoilt)

    @rule(seconds=st.sampled_from([1.0, 4.0, EXPIRE_AFTER]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        events = self.reassembler.expire(self.now)
        expired = [of for of, (_, fed) in self.model.due.items() if self.now - fed >= EXPIRE_AFTER]
        assert [event.transfer_id for event in events if isinstance(event, Expired)] == expired
        assert len(events) == len(expired)
        for of in expired:
            del self.model.due[of]
            del self.model.state[of]
            del self.output[of]

    @rule()
    def save(self) -> None:
        positions = {of: self.reassembler.position(of) for of in self.model.due} | self.parked
        self.saved = {of: position for of, position in positions.items() if position is not None}
        self.unsaved = 0

    @rule()
    def restart(self) -> None:
        """Another process, from what was saved; what came since comes again."""
        self.start()
        ended = {of: s for of, s in self.model.state.items() if s in ("committed", "repeated")}
        # What ended since it was saved has nothing left to be brought back.
        alive = {of: at for of, at in self.saved.items() if self.model.state.get(of) == "open"}
        self.model.state = ended | dict.fromkeys(alive, "open")
        self.model.due.clear()
        self.model.parked = {of: position.seq for of, position in alive.items()}
        self.parked = alive
        self.output = {of: self.sent[of].before(position.seq) for of, position in alive.items()}
        for key, of in self.model.keys.items():
            self.reassembler.remember_key(key, of)
        if self.unsaved:
            self.redeliver(self.unsaved)

    # --- what a consumer does --------------------------------------------------------------------

    def deliver(self, item: Frame | Abort, *, spoilt: bool = False) -> None:
        self.log.append((item, spoilt))
        self.unsaved += 1
        self.feed(item, spoilt)

    def feed(self, item: Frame | Abort, spoilt: bool) -> None:
        of = item.transfer_id if isinstance(item, Abort) else item.transfer.id
        self.recall(of)
        expected = self.model.expect(item, self.sent[of], spoilt, self.now)
        events = self.reassembler.feed(item, self.now)
        self.check_parked(events, self.model.park_but(MAX_OPEN))
        told = self.take([event for event in events if not isinstance(event, Parked)])
        if expected is PartData:
            assert isinstance(told, (PartStarted, PartData, PartEnded))
        else:
            assert isinstance(told, expected), (told, expected)

    def recall(self, of: str) -> None:
        if self.reassembler.knows(of):
            return
        if of in self.parked:
            assert self.parked[of].seq == self.model.parked[of]
            position = self.parked.pop(of)
            parked = self.model.park_but(MAX_OPEN - 1)
            self.check_parked(self.reassembler.restore(of, position, self.now), parked)
            self.model.due[of] = self.model.parked.pop(of), self.now
            if position.offset:
                self.from_middle.add(of)
        elif self.model.state.get(of) in ("committed", "repeated"):
            self.reassembler.remember(of, Past(self.model.state[of]))

    def check_parked(self, events: Sequence[Event], expected: list[str]) -> None:
        parked = [event for event in events if isinstance(event, Parked)]
        assert [event.transfer_id for event in parked] == expected
        for event in parked:
            self.parked[event.transfer_id] = event.position
            self.from_middle.discard(event.transfer_id)

    def take(self, events: Sequence[Event]) -> Event:
        """Believe the events; returns the last of them."""
        told: Event | None = None
        for event in events:
            told = event
            match event:
                case TransferStarted(transfer):
                    self.output[transfer.id] = []
                case PartStarted(of, part):
                    assert part == len(self.output[of])
                    self.output[of].append(b"")
                    self.from_middle.discard(of)
                case PartData(of, part, offset, body):
                    assert (part, offset) == (len(self.output[of]) - 1, len(self.output[of][-1]))
                    assert body
                    self.output[of][-1] += body
                case PartEnded(of):
                    if (failed := self.verify(event)) is not None:
                        del self.output[of]
                        return failed
                case Committed(transfer):
                    assert transfer.id not in self.committed
                    self.committed[transfer.id] = self.output.pop(transfer.id)
                case Repeated(transfer, first):
                    assert first == self.model.keys[str(self.sent[transfer.id].key)]
                    del self.output[transfer.id]
                case Aborted(of) | Failed(of):
                    self.output.pop(of, None)
        assert told is not None
        return told

    def verify(self, ended: PartEnded) -> Event | None:
        """As a sink does that has the bytes: what could not be checked as they went by."""
        of = ended.transfer_id
        assert ended.unchecked == (ended.tail.digest if of in self.from_middle else {})
        self.from_middle.discard(of)
        body = self.output[of][-1]
        found = {"crc32c": f"{crc32c(body):08x}"}
        for name, algorithm in ALGORITHMS.items():
            hash_ = algorithm()
            hash_.update(body)
            found[name] = hash_.hexdigest()
        if all(found[name] == digest for name, digest in ended.unchecked.items()):
            return None
        return self.reassembler.doom(of, 0, Fault.REFUSED, "a digest does not match")

    # --- what holds after each step --------------------------------------------------------------

    @invariant()
    def what_is_committed_is_what_was_sent(self) -> None:
        committed = {of for of, state in self.model.state.items() if state == "committed"}
        assert self.committed.keys() == committed
        for of, parts in self.committed.items():
            assert parts == self.sent[of].parts

    @invariant()
    def what_is_open_is_what_was_sent_so_far(self) -> None:
        assert len(self.reassembler) == len(self.model.due) <= MAX_OPEN
        due = {of: seq for of, (seq, _) in self.model.due.items()}
        for of, seq in due.items():
            position = self.reassembler.position(of)
            assert position is not None
            assert position.seq == seq
        assert self.output == {
            of: self.sent[of].before(n) for of, n in (due | self.model.parked).items()
        }


ReassemblyMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestReassembly = ReassemblyMachine.TestCase
