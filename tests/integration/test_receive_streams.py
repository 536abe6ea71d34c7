"""``relay receive`` from stream queues, which keep what is acked: where to go on is its own."""

import json
import os
import signal
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pika
import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.receiving import (
    FRAME,
    MakeQueue,
    Start,
    check,
    cut,
    eventually,
    interleave,
    nothing_staged,
    staged_bytes,
)

STREAM = {"x-queue-type": "stream"}


def delivered(output: Path) -> set[str]:
    return {name for name in os.listdir(output) if not name.startswith(".")}


def test_killed_again_and_again_it_goes_on_from_its_offset(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    random = Random(1)
    bodies = [random.randbytes(300 * FRAME) for _ in range(3)]
    lines = [cut(("x", body), digests=["sha-256"]) for body in bodies]
    small = [cut(("y", b"z")) for _ in range(40)]
    queue = make_queue(STREAM)
    queue.publish_frames(interleave(random, *lines, *small))
    for stop in range(1, 4):
        receiver = start(queue.name)
        enough = sum(map(len, bodies)) * stop // 4
        eventually(lambda enough=enough: staged_bytes(output) >= enough, f"{enough} bytes")  # type: ignore[misc]
        assert receiver.stop(signal.SIGKILL) == -signal.SIGKILL

    receiver = start(queue.name)
    eventually(lambda: len(delivered(output)) == 43, "43 transfers delivered")

    assert receiver.stop(signal.SIGTERM) == 0
    for frames, body in zip(lines, bodies, strict=True):
        check(output, frames, ("0-x", body))
    for frames in small:
        check(output, frames, ("0-y", b"z"))
    assert nothing_staged(output)
    assert receiver.err == ""


def test_what_was_delivered_and_taken_away_does_not_come_again(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    first, second = cut(("a", b"x" * 3 * FRAME)), cut(("b", b"y"))
    queue = make_queue(STREAM)
    queue.publish_frames(first)
    assert start(queue.name, "--count", "1").wait() == 0
    (output / first[0].transfer.id).rename(output.parent / "taken")
    queue.publish_frames(second)

    assert start(queue.name, "--count", "1").wait() == 0

    assert delivered(output) == {second[0].transfer.id}


def test_each_stream_has_its_own_place(make_queue: MakeQueue, start: Start, output: Path) -> None:
    transfers = [cut(("a", b"x" * 3 * FRAME)) for _ in range(3)]
    one, other = make_queue(STREAM), make_queue(STREAM)
    one.publish_frames(transfers[0])
    other.publish_frames(transfers[1])
    one.publish_frames(transfers[2])
    assert start(one.name, "--count", "1").wait() == 0
    assert start(other.name, "--count", "1").wait() == 0
    assert start(one.name, "--count", "1").wait() == 0
    assert delivered(output) == {frames[0].transfer.id for frames in transfers}


@pytest.mark.parametrize(("where", "expected"), [("first", [0, 1, 2, 3]), ("2", [2, 3])])
def test_it_begins_where_it_is_told(
    make_queue: MakeQueue, start: Start, output: Path, where: str, expected: list[int]
) -> None:
    transfers = [cut(("a", b"x")) for _ in range(4)]
    queue = make_queue(STREAM)
    for frames in transfers:
        queue.publish_frames(frames)

    receiver = start(queue.name, "--from", where, "--idle-exit", "2 s")

    assert receiver.wait() == 0
    assert delivered(output) == {transfers[n][0].transfer.id for n in expected}


def test_with_next_it_takes_only_what_comes(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    before = cut(("a", b"x"))
    queue = make_queue(STREAM)
    queue.publish_frames(before)
    receiver = start(queue.name, "--from", "next", "--count", "1")

    def something_came() -> bool:
        # RabbitMQ does not tell when a stream has a consumer.
        queue.publish_frames(cut(("a", b"y")))
        return receiver.out != ""

    eventually(something_came, "a transfer")
    assert receiver.wait() == 0
    assert before[0].transfer.id not in delivered(output)


def test_messages_that_are_no_frames_are_told_and_passed(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    good, gap = cut(("a", b"x" * 3 * FRAME)), cut(("b", b"x" * 5 * FRAME))
    queue = make_queue(STREAM)
    queue.publish_frames([gap[0], *gap[2:]])
    queue.publish_frames(good)

    receiver = start(queue.name, "--count", "1")

    assert receiver.wait() == 0
    check(output, good, ("0-a", b"x" * 3 * FRAME))
    assert receiver.err.splitlines() == [
        f"relay receive: transfer {gap[0].transfer.id} failed: frame 2 came where 1 was due (gap)"
    ]


def test_a_transfer_whose_beginning_is_gone_is_told_and_passed(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    limits = {"x-max-length-bytes": 200_000, "x-stream-max-segment-size-bytes": 100_000}
    queue = make_queue(STREAM | limits)
    early, long, last = cut(("a", b"x")), cut(("b", b"x" * 300 * FRAME)), cut(("c", b"x"))
    queue.publish_frames(early)
    assert start(queue.name, "--count", "1").wait() == 0
    queue.publish_frames(long[:-1])
    eventually(lambda: begins_at(rabbitmq, queue.name) > 1, "retention")
    # Retention may have left nothing; of the transfer something must be there.
    queue.publish_frames([long[-1], *last])

    receiver = start(queue.name, "--count", "1")

    assert receiver.wait() == 0
    check(output, last, ("0-c", b"x"))
    told = receiver.err.splitlines()
    assert "was received up to 0: retention may have removed" in told[0]
    assert f"transfer {long[0].transfer.id} has no beginning" in told[1]
    assert len(told) == 2


def begins_at(rabbitmq: RabbitMQNode, queue: str) -> int:
    """The first offset that the stream's files still have; each is called after its own first one.

    No consumer can tell: all may be gone, and then nothing comes. And a stream delivers by whole
    blocks of messages, whatever the prefetch; what pika's BlockingConnection has not handed out it
    rejects when it closes, which RabbitMQ answers with 540, for streams know no rejects.
    """
    segments = [int(file.stem) for file in rabbitmq.directory.rglob(f"*{queue}*/*.segment")]
    return min(segments, default=0)


def test_a_stream_made_anew_is_not_mistaken_for_the_old_one(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    old, new = cut(("a", b"x")), cut(("a", b"y"))
    queue = make_queue(STREAM)
    queue.publish_frames(old)
    assert start(queue.name, "--count", "1").wait() == 0
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        connection.channel().queue_delete(queue.name)
        connection.channel().queue_declare(queue.name, durable=True, arguments=STREAM)
    queue.publish_frames(new)

    receiver = start(queue.name, "--count", "1")

    assert receiver.wait() == 1
    assert "is not the one that was received before" in receiver.err
    offset = output / ".relay-staging" / "offset"
    assert f"remove {offset}" in receiver.err
    offset.unlink()
    assert start(queue.name, "--count", "1").wait() == 0
    check(output, new, ("0-a", b"y"))


class Twice(dict[str, int]):
    """A header table that names one header twice, as no dict can."""

    def items(self) -> Any:
        return [("x-stream-offset", self["first"]), ("x-stream-offset", self["second"])]


def test_an_offset_that_a_publisher_made_up_is_not_believed(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue(STREAM)
    frames, after = cut(("a", b"x" * 3 * FRAME)), cut(("b", b"y"))
    queue.publish_frames(frames)
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for headers in (Twice(first=5, second=10**12), {"x-stream-offset": 10**12}):
            forged = pika.BasicProperties(headers=headers)
            channel.basic_publish("", queue.name, b"forged", forged)
    receiver = start(queue.name, "--idle-exit", "1 s")
    assert receiver.wait() == 0
    (noted,) = json.loads((output / ".relay-staging" / "offset").read_text()).values()
    assert noted["last"] == len(frames) + 1
    queue.publish_frames(after)

    assert start(queue.name, "--idle-exit", "1 s").wait() == 0

    assert delivered(output) == {frames[0].transfer.id, after[0].transfer.id}


def test_a_message_without_readable_headers_at_the_end_does_not_undo_what_was_noted(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue(STREAM)
    frames = cut(("a", b"x" * 3 * FRAME))
    queue.publish_frames(frames)
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        forged = pika.BasicProperties(headers=Twice(first=5, second=10**12))
        channel.basic_publish("", queue.name, b"forged", forged)
    for _ in range(2):
        receiver = start(queue.name, "--idle-exit", "1 s")
        assert receiver.wait() == 0
        (noted,) = json.loads((output / ".relay-staging" / "offset").read_text()).values()
        # RabbitMQ 3.10 adds its header to those that are there; 4.0 replaces them, and is believed.
        assert noted["last"] in (len(frames) - 1, len(frames))
        assert "not a frame" in receiver.err
