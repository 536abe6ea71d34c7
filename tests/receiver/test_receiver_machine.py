"""The receiver driven by hypothesis: a queue, a consumer that crashes, sinks with and without save.

The broker here is the least that one is: messages in order, those unacked come back to where they
were when the channel is lost. What the sink holds beyond a crash is its ``safe``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import astuple, dataclass, field, replace
from itertools import count
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

from relay.model import Frame
from relay.protocol.framing import Framer
from relay.protocol.wire import APP_ID, Message, decode, encode_abort, encode_frame
from relay.receiver import (
    Earlier,
    KnownKey,
    PartEnded,
    PartHead,
    Past,
    Position,
    Problem,
    Receiver,
    Settlement,
    Sink,
    Totals,
    Transfer,
    key_digest,
    verify,
)

PREFETCH = 16
MAX_HELD = 10
MAX_OPEN = 2
EXPIRE_AFTER = 100.0

SIZES = (0, 3, 4, 5, 8, 17)
"""Bytes of parts; four of them are a frame."""

Parts = list[bytes]
Upload = tuple[list[int], str | None]


class Full(Exception):
    """The disk is full, or whatever keeps a sink from going on."""


@dataclass
class Safe:
    """What survives a crash."""

    delivered: dict[str, Parts] = field(default_factory=dict)
    keys: dict[str, KnownKey] = field(default_factory=dict)
    staged: dict[str, tuple[Position, Parts]] = field(default_factory=dict)
    unwanted: dict[str, Past] = field(default_factory=dict)


class Memory(Sink):
    """Four methods, and keys of what was delivered. A crash leaves ``safe``."""

    def __init__(self, safe: Safe) -> None:
        self.safe = safe
        self.open: dict[str, Parts] = {}
        self.committed: set[str] = set()
        self.full = False

    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        parts = self.open.setdefault(transfer_id, [])
        assert part == len(parts)
        parts.append(b"")

    def write(self, transfer_id: str, body: bytes) -> None:
        self.work()
        assert body
        self.open[transfer_id][-1] += body

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        self.work()
        parts = self.open.pop(transfer.id)
        assert (totals.parts, totals.bytes) == (len(parts), sum(map(len, parts)))
        # Once more after a crash that came before the acks, and then the same.
        assert transfer.id not in self.committed
        self.committed.add(transfer.id)
        assert self.safe.delivered.setdefault(transfer.id, parts) == parts
        if (key := key_digest(transfer)) is not None:
            self.safe.keys[transfer.id] = KnownKey(key, transfer.id)
        return "memory"

    def abort(self, transfer_id: str) -> None:
        self.open.pop(transfer_id, None)

    def known_keys(self) -> Sequence[KnownKey]:
        return list(self.safe.keys.values())

    def work(self) -> None:
        if self.full:
            raise Full


class Saving(Memory):
    """The same, and goes on after a crash. What it does counts from ``flush`` on."""

    def __init__(self, safe: Safe) -> None:
        super().__init__(deepcopy(safe))
        self.flushed = safe

    def end_part(self, ended: PartEnded) -> None:
        verify(ended, [self.open[ended.transfer_id][-1]])

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        assert transfer.id not in self.safe.delivered
        where = super().commit(transfer, totals)
        self.safe.staged.pop(transfer.id, None)
        return where

    def abort(self, transfer_id: str) -> None:
        super().abort(transfer_id)
        self.safe.staged.pop(transfer_id, None)

    def save(self, transfer_id: str, position: Position) -> None:
        self.work()
        parts = self.open[transfer_id]
        assert sum(map(len, parts)) == position.bytes
        self.safe.staged[transfer_id] = position, list(parts)

    def flush(self) -> None:
        self.work()
        self.flushed.__dict__.update(deepcopy(self.safe).__dict__)

    def aborted(self, transfer_id: str) -> None:
        self.abort(transfer_id)
        self.safe.unwanted[transfer_id] = Past.ABORTED

    def recall(self, transfer_id: str) -> Position | Earlier | Past | None:
        if transfer_id in self.safe.unwanted:
            return self.safe.unwanted[transfer_id]
        if transfer_id in self.safe.delivered:
            known = self.safe.keys.get(transfer_id)
            return Earlier("memory", None if known is None else known.key)
        if transfer_id not in self.safe.staged:
            return None
        position, parts = self.safe.staged[transfer_id]
        self.open[transfer_id] = list(parts)
        return position

    def park(self, transfer_id: str, position: Position) -> None:
        self.save(transfer_id, position)
        del self.open[transfer_id]

    def repeated(self, transfer: Transfer) -> None:
        self.abort(transfer.id)
        key = key_digest(transfer)
        assert key is not None
        self.safe.keys[transfer.id] = KnownKey(key, transfer.id)
        self.safe.unwanted[transfer.id] = Past.REPEATED


@dataclass
class Queue:
    """A broker's: ready and unacked messages, each with the number it was published under."""

    ready: list[tuple[int, Message]] = field(default_factory=list)
    unacked: dict[int, tuple[int, Message]] = field(default_factory=dict)
    tags: Iterator[int] = field(default_factory=lambda: count(1))

    def deliver(self) -> tuple[int, Message] | None:
        if not self.ready or len(self.unacked) == PREFETCH:
            return None
        tag = next(self.tags)
        self.unacked[tag] = self.ready.pop(0)
        return tag, self.unacked[tag][1]

    def reopen(self) -> None:
        """The channel is lost, and another one there."""
        self.ready = sorted([*self.unacked.values(), *self.ready], key=lambda entry: entry[0])
        self.unacked = {}
        self.tags = count(1)


@dataclass
class Sent:
    """A transfer at its sender."""

    frames: list[Frame]
    parts: Parts
    next: int = 0
    spoilt: bool = False
    given_up: bool = False

    @property
    def id(self) -> str:
        return self.frames[0].transfer.id

    @property
    def key(self) -> str | None:
        return self.frames[0].transfer.idempotency_key

    @property
    def is_complete(self) -> bool:
        return self.next == len(self.frames) and not self.spoilt


def uploads() -> st.SearchStrategy[Upload]:
    """Sizes of parts, and an idempotency key."""
    sizes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)
    return st.tuples(sizes, st.sampled_from([None, "k"]))


def cut(number: int, parts: Parts, key: str | None) -> list[Frame]:
    transfer_id = f"0199c0de-0000-7000-8000-{number:012x}"
    transfer = Transfer(id=transfer_id, began=1, route="default", idempotency_key=key)
    framer = Framer(transfer, frame_size=4, digests=["sha-256"])
    frames: list[Frame] = []
    for part in parts:
        frames += framer.start_part(PartHead())
        frames += framer.feed(part)
        framer.end_part()
    return [*frames, framer.finish()[0]]


class ReceiverMachine(RuleBasedStateMachine):
    """Publishers, a queue, and a consumer as one would write it."""

    transfers = Bundle("transfers")

    @initialize(
        target=transfers,
        kind=st.sampled_from([Memory, Saving]),
        uploads=st.lists(uploads(), min_size=4, max_size=4),
    )
    def start(self, kind: type[Memory], uploads: list[Upload]) -> MultipleResults[str]:
        self.kind = kind
        self.now = 0.0
        self.published = 0
        self.queue = Queue()
        self.sent: dict[str, Sent] = {}
        self.safe = Safe()
        self.told: Counter[str] = Counter()
        self.excused: set[str] = set()
        self.boot()
        return multiple(*map(self.add, uploads))

    def boot(self) -> None:
        self.sink = self.kind(self.safe)
        self.receiver = Receiver(
            self.sink,
            max_open=MAX_OPEN,
            max_held=MAX_HELD,
            expire_after=EXPIRE_AFTER,
            clock=lambda: self.now,
        )

    # --- publishers ------------------------------------------------------------------------------

    @rule(target=transfers, upload=uploads())
    def begin(self, upload: Upload) -> str:
        return self.add(upload)

    def add(self, upload: Upload) -> str:
        sizes, key = upload
        number = len(self.sent)
        parts = [Random(f"{number}.{n}").randbytes(size) for n, size in enumerate(sizes)]
        sent = Sent(cut(number, parts, key), parts)
        self.sent[sent.id] = sent
        return sent.id

    @rule(of=transfers, how_many=st.sampled_from([1, 2, 3, 99, 99]))
    def publish(self, of: str, how_many: int) -> None:
        sent = self.sent[of]
        for _ in range(how_many):
            if not sent.given_up and sent.next < len(sent.frames):
                sent.next += 1
                self.put(encode_frame(sent.frames[sent.next - 1]))

    @rule(of=transfers, how_many=st.integers(1, 4))
    def publish_again(self, of: str, how_many: int) -> None:
        sent = self.sent[of]
        if not sent.spoilt:
            for frame in sent.frames[max(0, sent.next - how_many) : sent.next]:
                self.put(encode_frame(frame))

    @rule(of=transfers, in_digest=st.booleans())
    def publish_spoilt(self, of: str, in_digest: bool) -> None:
        sent = self.sent[of]
        if sent.given_up or sent.next == len(sent.frames):
            return
        frame = sent.frames[sent.next]
        sent.next += 1
        sent.spoilt = True
        if in_digest and frame.tail is not None:
            tail = replace(frame.tail, digest={**frame.tail.digest, "sha-256": "00"})
            self.put(encode_frame(frame._replace(tail=tail)))
        else:
            self.put(encode_frame(frame._replace(body=frame.body + b"!")))

    @rule(of=transfers)
    def give_up(self, of: str) -> None:
        sent = self.sent[of]
        if sent.next < len(sent.frames):
            sent.given_up = True
            self.put(encode_abort(sent.frames[0].transfer, sent.next, "client-gone"))

    @rule()
    def publish_something_else(self) -> None:
        self.put(Message("frame", "?", "?", 1, {"relay": 1}, b"hello"))

    def put(self, message: Message) -> None:
        self.queue.ready.append((self.published, message))
        self.published += 1

    # --- the consumer ----------------------------------------------------------------------------

    @rule(how_many=st.integers(1, PREFETCH))
    def feed(self, how_many: int) -> None:
        for _ in range(how_many):
            if (delivery := self.queue.deliver()) is None:
                break
            tag, message = delivery
            try:
                self.receiver.feed(
                    tag,
                    app_id=APP_ID,
                    type=message.type,
                    correlation_id=message.correlation_id,
                    timestamp=message.timestamp,
                    headers=message.headers,
                    body=message.body,
                )
            except Full:
                self.crash()
                return

    @rule(lost_after=st.one_of(st.none(), st.none(), st.integers(0, PREFETCH)))
    def settle(self, lost_after: int | None = None) -> None:
        """``lost_after``: so many answers get through before the connection is lost."""
        before = set(self.queue.unacked)
        try:
            settlement = self.receiver.settle()
        except Full:
            self.crash()
            return
        self.check(settlement, before)
        answers = [*settlement.reject, *settlement.ack]
        for tag in answers[:lost_after]:
            del self.queue.unacked[tag]
        if lost_after is not None:
            self.reconnect()

    @rule()
    def crash_before_anything_is_told(self) -> None:
        with suppress(Full):
            self.receiver.settle()
        self.crash()

    @rule()
    def reconnect(self) -> None:
        self.queue.reopen()
        self.receiver.disconnected()

    @rule()
    def crash(self) -> None:
        self.queue.reopen()
        self.boot()

    @rule()
    def fill_the_disk(self) -> None:
        self.sink.full = True

    @rule(seconds=st.sampled_from([1.0, EXPIRE_AFTER]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def check(self, settlement: Settlement, unacked: set[int]) -> None:
        """Each delivery answered for once or held; what may be acked is safe."""
        answered = [*settlement.ack, *settlement.reject]
        assert len(set(answered)) == len(answered)
        assert set(answered) <= unacked
        assert len(unacked) - len(answered) == settlement.held == self.receiver.unsettled
        assert settlement.held <= (MAX_HELD if self.kind is Memory else 0)
        assert list(settlement.ack) == sorted(settlement.ack)
        self.told.update(delivered.transfer.id for delivered in settlement.delivered)
        for problem in settlement.problems:
            self.excuse(problem)
        for tag in settlement.ack:
            self.check_safe(self.queue.unacked[tag][1])

    def excuse(self, problem: Problem) -> None:
        """Note what need not be delivered, if it is a problem that there may be."""
        if problem.transfer_id is None:
            return
        sent = self.sent[problem.transfer_id]
        why = {
            "expired": self.now >= EXPIRE_AFTER,
            "refused": self.kind is Memory,  # cannot park, nor hold very much
            "repeated": sent.key is not None,
            "aborted": sent.given_up,
            # Who cannot note that it was aborted, rejects what comes again of it after a crash.
            "stray": self.kind is Memory and sent.given_up,
        }
        known = sent.spoilt or sent.id in self.excused
        assert known or why.get(problem.kind), problem
        self.excused.add(sent.id)

    def check_safe(self, message: Message) -> None:
        """What a crash would lose by the loss of this message is in the sink, or of no use."""
        of = message.correlation_id
        if message.type == "abort" or of in self.excused or self.sent[of].given_up:
            return
        frame = decode(**{k: getattr(message, k) for k in FIELDS}, app_id=APP_ID)
        assert isinstance(frame, Frame)
        if of not in self.safe.delivered:
            position, parts = self.safe.staged[of]
            assert position.seq > frame.seq
            assert b"".join(parts) == b"".join(self.sent[of].parts)[: position.bytes]
            assert position == Position(*astuple(position))

    # --- what holds ------------------------------------------------------------------------------

    @invariant()
    def only_what_was_sent_whole_is_delivered(self) -> None:
        for of, parts in self.safe.delivered.items():
            assert self.sent[of].next == len(self.sent[of].frames)
            assert parts == self.sent[of].parts

    @invariant()
    def the_same_upload_is_delivered_once(self) -> None:
        assert sum(self.sent[of].key is not None for of in self.safe.delivered) <= 1

    def teardown(self) -> None:
        """In the end everything is settled, and what was sent whole is delivered."""
        if not hasattr(self, "queue"):
            return
        self.sink.full = False
        while self.queue.ready:
            self.feed(PREFETCH)
            self.settle()
        self.now += EXPIRE_AFTER
        self.settle()
        assert self.queue.unacked == {}
        assert self.told.keys() == self.safe.delivered.keys()
        keys = {self.sent[of].key for of in self.safe.delivered}
        for of, sent in self.sent.items():
            if sent.is_complete and of not in self.excused:
                assert of in self.safe.delivered or (sent.key is not None and sent.key in keys)
        assert not self.sink.open


FIELDS = ("type", "correlation_id", "timestamp", "headers", "body")

ReceiverMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestReceiver = ReceiverMachine.TestCase
