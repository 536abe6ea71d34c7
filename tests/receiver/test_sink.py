"""What a receiver promises to a sink that cannot resume, and to whoever feeds it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone

import pytest

from relay.model import Frame
from relay.protocol.framing import Framer
from relay.protocol.wire import APP_ID, encode_frame
from relay.receiver import PartHead, Receiver, Settlement, Sink, Totals, Transfer


def cut(body: bytes, number: int) -> list[Frame]:
    transfer_id = f"0199c0de-0000-7000-8000-{number:012x}"
    framer = Framer(Transfer(id=transfer_id, began=1, route="default"), frame_size=4, digests=[])
    frames = [*framer.start_part(PartHead(filename="x.bin")), *framer.feed(body)]
    framer.end_part()
    return [*frames, framer.finish()[0]]


@dataclass
class Memory(Sink):
    """Four methods, and nothing that survives."""

    open: dict[str, bytearray] = field(default_factory=dict)
    done: dict[str, bytes] = field(default_factory=dict)
    began: list[int] = field(default_factory=list)

    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        self.open[transfer_id] = bytearray()

    def write(self, transfer_id: str, body: bytes) -> None:
        self.open[transfer_id] += body

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        self.done[transfer.id] = bytes(self.open.pop(transfer.id))
        self.began.append(transfer.began)
        return "memory"

    def abort(self, transfer_id: str) -> None:
        self.open.pop(transfer_id, None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(receiver: Receiver, frames: Sequence[Frame], first_tag: int = 1) -> Settlement:
    for tag, frame in enumerate(frames, first_tag):
        give(receiver, tag, frame)
    return receiver.settle()


def give(receiver: Receiver, tag: int, frame: Frame, timestamp: object = 1) -> None:
    message = encode_frame(frame)
    receiver.feed(
        tag,
        app_id=APP_ID,
        type=message.type,
        correlation_id=message.correlation_id,
        timestamp=timestamp,
        headers=message.headers,
        body=message.body,
    )


def test_what_a_sink_that_cannot_resume_was_given_is_acked_when_its_transfer_ends() -> None:
    sink = Memory()
    receiver = Receiver(sink)
    first, second = cut(b"123456789", 0), cut(b"abc", 1)
    settlement = feed(receiver, first[:2])
    assert (settlement.ack, settlement.held) == ((), 2)
    # Between them another one ends: no ack may stand for more than itself.
    settlement = feed(receiver, second, 3)
    assert (settlement.ack, settlement.held) == ((3,), 2)
    settlement = feed(receiver, first[2:], 4)
    assert (settlement.ack, settlement.held) == ((1, 2, 4), 0)
    assert set(sink.done.values()) == {b"123456789", b"abc"}


def test_a_crash_of_a_sink_that_cannot_resume_loses_nothing() -> None:
    frames = cut(b"123456789", 0)
    assert feed(Receiver(Memory()), frames[:2]).ack == ()
    sink = Memory()
    assert feed(Receiver(sink), frames).ack == (1, 2, 3)
    assert list(sink.done.values()) == [b"123456789"]


def test_what_cannot_be_held_fails_alone_and_is_rejected_whole() -> None:
    sink = Memory()
    receiver = Receiver(sink, max_held=3)
    large, small = cut(bytes(40), 0), cut(b"12345", 1)
    settlement = feed(receiver, [small[0], *large[:2]])
    assert (settlement.ack, settlement.held) == ((), 3)
    settlement = feed(receiver, large[2:4], 4)
    assert (settlement.ack, sorted(settlement.reject), settlement.held) == ((), [2, 3, 4, 5], 1)
    assert [problem.kind for problem in settlement.problems] == ["refused"]
    settlement = feed(receiver, [*large[4:], small[1]], 6)
    assert settlement.ack == (1, 5 + len(large[4:]) + 1)
    assert sorted(settlement.reject) == list(range(6, 6 + len(large[4:])))
    assert list(sink.done.values()) == [b"12345"]


def test_deliveries_are_held_for_less_time_than_brokers_allow() -> None:
    clock = Clock()
    receiver = Receiver(Memory(), clock=clock)
    assert feed(receiver, cut(b"123456789", 0)[:2]).held == 2
    clock.now = 1201.0
    settlement = receiver.settle()
    assert (settlement.ack, settlement.held) == ((1, 2), 0)
    assert [problem.kind for problem in settlement.problems] == ["expired"]


@pytest.mark.parametrize(
    "timestamp",
    [
        1_700_000_000,
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
        datetime(2023, 11, 15, 0, 13, 20, tzinfo=timezone(timedelta(hours=2))),
        datetime(2023, 11, 14, 22, 13, 20),
    ],
    ids=["seconds", "UTC", "elsewhere", "naive"],
)
def test_a_timestamp_is_what_any_client_library_gives(timestamp: object) -> None:
    sink = Memory()
    receiver = Receiver(sink)
    give(receiver, 1, cut(b"abc", 0)[0], timestamp)
    receiver.settle()
    assert sink.began == [1_700_000_000]
