"""``relay receive`` and a producer that means harm: good transfers come through, memory is bounded.

What cannot be prevented: whoever may publish to the queue, and knows the id of a transfer that is
under way, can abort it or make it fail. Ids are random, and told to nobody but the client that
uploads.
"""

import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from signal import SIGTERM
from typing import Final

import pytest

from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Frame, PartHead, PartTail, Totals, Transfer
from relay.protocol.crc import crc32c
from relay.protocol.framing import Framer
from relay.protocol.wire import encode_abort, encode_frame
from tests import hostile_messages as hostile
from tests.hostile_messages import HUGE, Published
from tests.observed_receiver import (
    Depth,
    ObservedReceiver,
    declare,
    drain,
    memory_bound,
    properties_of,
    publish,
    wait_until,
)
from tests.receiving import FRAME, QUORUM, cut

PARTS: Final = 300
OPEN: Final = 1000

LINE_MAX: Final = 400
"""Bytes of a line on standard error; a transfer's id and a sentence."""

NAMES: Final = (
    *("../../outside/victim", "/etc/passwd", "..", ".", "", " ", "...", "~", "C:\\outside\\victim"),
    *(".relay-staging", "keys", "ledger", "receipt.json", ".journal", "-rf", "0-body", "CON"),
    *("a\x00b", "\x1b[2J\x07", "evil\u202egnp.exe", "\u200b", "\u2028", "e\u0301", "\ud7ff\uffff"),
    *("n" * 300, "é" * 300, "\U0001f600" * 100, "n" * 60_000, "n" * 250 + ".tar.gz"),
)


@dataclass(frozen=True)
class Received:
    """What a receiver came to: its standard error, and its peak of memory in bytes."""

    err: str
    peak: int


class Rig:
    """A queue with dead letters, a directory, and a neighbour of it that must not be touched."""

    def __init__(self, node: RabbitMQNode, directory: Path) -> None:
        self.url = node.url
        self.queue = f"hostile-{uuid.uuid4()}"
        self.dead = f"{self.queue}.dead"
        declare(self.url, self.dead, QUORUM)
        declare(
            self.url,
            self.queue,
            QUORUM | {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.dead},
        )
        self.output = directory / "receiver" / "output"
        self.output.parent.mkdir()
        self.outside = directory / "outside"
        self.outside.mkdir()
        (self.outside / "victim").write_text("untouched")
        self._tree = self._snapshot(directory)
        self._directory = directory

    def receive(self, transfers: int) -> Received:
        """Have so many good transfers delivered, and all else answered for."""
        with ObservedReceiver(self.url, self.queue, self.output) as receiver:
            wait_until(lambda: receiver.out.count("\n") >= transfers, "the good ones delivered")
            with Depth(self.url, self.queue) as depth:
                wait_until(lambda: depth.ready() == 0, "an empty queue")
            peak = receiver.peak()
            assert receiver.stop(SIGTERM) == 0, receiver.err
            return Received(receiver.err, peak)

    def check_tree(self) -> None:
        """Nothing outside the output has changed."""
        assert self._snapshot(self._directory) == self._tree

    def delivered(self) -> set[str]:
        """Ids of what is in the output."""
        return {path.name for path in self.output.iterdir() if not path.name.startswith(".")}

    def dead_letters(self) -> set[str]:
        """The message_ids of the dead letters, which are taken."""
        with Depth(self.url, self.queue) as depth:
            assert depth.ready() == 0
        return {str(properties.message_id) for properties in drain(self.url, self.dead)}

    def _snapshot(self, directory: Path) -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in directory.rglob("*")
            if path.is_file() and self.output.parent not in path.parents
        }


@pytest.fixture
def rig(rabbitmq: RabbitMQNode, tmp_path: Path) -> Rig:
    return Rig(rabbitmq, tmp_path)


def good(number: int) -> list[Frame]:
    """A transfer of some frames, like a thousand others."""
    body = Random(number).randbytes(5 * FRAME + number)
    return cut((f"good {number}", body), digests=["sha-256"])


def as_published(frames: list[Frame]) -> list[Published]:
    return [(properties_of(message), message.body) for message in map(encode_frame, frames)]


def mixed_in(bad: list[Published], lines: list[list[Frame]]) -> Iterator[Published]:
    """The bad ones in order, between the frames of good transfers."""
    random = Random(len(bad))
    queues: list[list[Published]] = [bad[::-1], *(as_published(line)[::-1] for line in lines)]
    while queues := [queue for queue in queues if queue]:
        weights = [len(queue) for queue in queues]
        yield random.choices(queues, weights)[0].pop()


def check_good(rig: Rig, lines: list[list[Frame]]) -> None:
    """They are delivered, whole, and nothing else is."""
    assert rig.delivered() == {line[0].transfer.id for line in lines}
    for line in lines:
        (part,) = (rig.output / line[0].transfer.id).glob("0-*")
        assert part.read_bytes() == b"".join(frame.body for frame in line)


def check_words(received: Received, at_most: int) -> None:
    """Standard error has no more lines than there was trouble, short ones, for any terminal."""
    lines = received.err.splitlines()
    assert len(lines) <= at_most
    for line in lines:
        assert len(line.encode()) <= LINE_MAX
        assert not [c for c in line if unicodedata.category(c)[0] == "C"], line


def test_messages_that_are_no_frames_are_dead_lettered_between_good_ones(rig: Rig) -> None:
    bad = [*hostile.not_frames(Random(1)), *hostile.contradictory()]
    lines = [good(number) for number in range(20)]
    publish(rig.url, rig.queue, mixed_in(bad, lines))

    received = rig.receive(len(lines))

    check_good(rig, lines)
    expected = {str(properties.message_id) for properties, _ in bad}
    assert len(expected) == len(bad)
    assert rig.dead_letters() == expected
    check_words(received, at_most=len(bad))
    rig.check_tree()


def test_messages_that_client_libraries_cannot_decode_stop_nobody(rig: Rig) -> None:
    bad = [*hostile.undecodable()]
    lines = [good(number) for number in range(5)]
    publish(rig.url, rig.queue, mixed_in(bad, lines))

    received = rig.receive(len(lines))

    check_good(rig, lines)
    # Not drained: that would take a client library that can decode them.
    with Depth(rig.url, rig.queue) as queue, Depth(rig.url, rig.dead) as dead:
        assert (queue.ready(), dead.ready()) == (0, len(bad))
    check_words(received, at_most=len(bad))


# Of a transfer with a part of three frames and one of two: which frame says what.
WRONG: Final[tuple[tuple[int, dict[str, object]], ...]] = (
    (1, {"seq": 2}),
    (1, {"seq": HUGE}),
    (1, {"offset": HUGE}),
    (1, {"part": HUGE}),
    (1, {"crc32c": 0}),
    (1, {"body": b"", "crc32c": 0}),
    (1, {"tail": PartTail(2 * FRAME, {})}),
    (2, {"tail": PartTail(HUGE, {"crc32c": "00000000"})}),
    (2, {"commit": Totals(5, 2, 5 * FRAME)}),
    (3, {"part": 0}),
    (4, {"commit": Totals(HUGE, HUGE, HUGE)}),
)


def test_transfers_that_contradict_themselves_touch_no_other(rig: Rig) -> None:
    bad, required, allowed = [], set(), set()
    for number, (at, change) in enumerate(WRONG):
        frames = cut(("a", Random(number).randbytes(3 * FRAME)), ("b", b"x" * 2 * FRAME))
        frames[at] = frames[at]._replace(**change)  # type: ignore[arg-type]
        bad.append(frames)
        names = [encode_frame(frame).message_id for frame in frames]
        required |= set(names[at:])
        allowed |= set(names)
    lines = [good(number) for number in range(20)]
    publish(rig.url, rig.queue, mixed_in([], [*bad, *lines]))

    received = rig.receive(len(lines))

    check_good(rig, lines)
    dead = rig.dead_letters()
    assert required <= dead <= allowed
    check_words(received, at_most=len(bad))
    rig.check_tree()


def test_names_of_every_kind_stay_inside_and_apart(rig: Rig) -> None:
    together = cut(*((name, name.encode()) for name in NAMES))
    alone = [cut((name, name.encode())) for name in NAMES]
    lines = [good(number) for number in range(5)]
    publish(rig.url, rig.queue, mixed_in([], [together, *alone, *lines]))

    received = rig.receive(1 + len(alone) + len(lines))

    check_words(received, at_most=0)
    rig.check_tree()
    assert rig.delivered() == {frames[0].transfer.id for frames in (together, *alone, *lines)}
    for frames, names in ((together, NAMES), *zip(alone, zip(NAMES), strict=True)):
        files = {path.name: path for path in (rig.output / frames[0].transfer.id).iterdir()}
        for number, name in enumerate(names):
            (path,) = (path for name, path in files.items() if name.startswith(f"{number}-"))
            assert path.read_bytes() == name.encode()
            assert not [c for c in path.name if unicodedata.category(c)[0] == "C"]


def test_who_does_not_know_a_transfer_in_progress_cannot_touch_it(rig: Rig) -> None:
    lines = [good(number) for number in range(10)]
    lies: list[Published] = []
    for line in lines:
        of = line[0].transfer
        # What was taken once is taken: the second one with a number changes nothing.
        lies += as_published([line[0]._replace(body=b"lie", crc32c=crc32c(b"lie"))])
        # Of a transfer that nobody has begun.
        message = encode_abort(replace(of, id=str(uuid.uuid4())), HUGE, "x" * 50_000 + "\x1b[2J")
        lies.append((properties_of(message), b""))
    early = [published for line in lines for published in as_published(line[:2])]
    late = [published for line in lines for published in as_published(line[2:])]
    # An abort after the commit comes too late.
    aborts = [(properties_of(encode_abort(line[0].transfer, 6, "too-slow")), b"") for line in lines]
    publish(rig.url, rig.queue, [*early, *lies, *late, *aborts, *lies])

    received = rig.receive(len(lines))

    check_good(rig, lines)
    assert rig.dead_letters() == set()
    check_words(received, at_most=len(lines))
    rig.check_tree()


def test_very_many_parts_and_headers_as_large_as_amqp_allows_are_delivered(rig: Rig) -> None:
    many = cut(*((f"{number}", b"") for number in range(PARTS)))
    wordy = [_wordy(number) for number in range(20)]
    lines = [good(number) for number in range(5)]
    publish(rig.url, rig.queue, mixed_in([], [many, *wordy, *lines]))

    received = rig.receive(1 + len(wordy) + len(lines))

    assert len([*(rig.output / many[0].transfer.id).glob("*-*")]) == PARTS
    for frames in wordy:
        (part,) = (rig.output / frames[0].transfer.id).glob("0-*")
        assert part.read_bytes() == frames[0].body
    check_words(received, at_most=0)
    assert received.peak <= memory_bound(FRAME)


def test_a_thousand_transfers_that_never_end_take_no_memory_and_stop_no_other(rig: Rig) -> None:
    unended = [cut(("x", b"x" * 2 * FRAME))[0] for _ in range(OPEN)]
    lines = [good(number) for number in range(20)]
    publish(rig.url, rig.queue, mixed_in(as_published(unended), lines))

    received = rig.receive(len(lines))

    check_good(rig, lines)
    assert rig.dead_letters() == set()
    check_words(received, at_most=0)
    assert received.peak <= memory_bound(FRAME)


def _wordy(number: int) -> list[Frame]:
    """A transfer with 100 KiB of headers; all of a message's must fit in one AMQP frame."""
    text = "\u202e\x00\x1b[2Jé" * 1600
    transfer = Transfer(
        id=str(uuid.uuid4()), began=1, route=text, client=text, idempotency_key=f"{number} {text}"
    )
    framer = Framer(transfer, frame_size=FRAME)
    list(framer.start_part(PartHead(name=text, filename=text, content_type=text)))
    list(framer.feed(b"few bytes"))
    framer.end_part()
    (frame, _) = framer.finish()
    unknown = {f"md{n}": "0" * 32 for n in range(250)}
    assert frame.tail is not None
    return [frame._replace(tail=replace(frame.tail, digest={**frame.tail.digest, **unknown}))]
