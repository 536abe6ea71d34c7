"""``relay receive`` as a process, against a real broker: what goes in comes out."""

import os
import signal
from pathlib import Path
from random import Random

import pika
import pika.exceptions
import pytest

from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Frame
from relay.protocol.wire import encode_abort, encode_frame
from tests.observed_receiver import properties_of
from tests.receiving import (
    FRAME,
    QUORUM,
    MakeQueue,
    Queue,
    Start,
    check,
    cut,
    eventually,
    interleave,
    messages,
    nothing_staged,
    staged_bytes,
)

STOPS = 4


@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
def test_interleaved_transfers_come_out_byte_for_byte(
    make_queue: MakeQueue, start: Start, output: Path, arguments: dict[str, object]
) -> None:
    random = Random(1)
    sizes = [0, 1, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 300_000]
    bodies = {size: random.randbytes(size) for size in sizes}
    lines = [cut((f"{size}.bin", body), digests=["sha-256"]) for size, body in bodies.items()]
    together = cut(*((f"ü{size}", body) for size, body in bodies.items()))
    queue = make_queue(arguments)
    queue.publish_frames(interleave(random, *lines, together))

    receiver = start(queue.name, "--count", "8")

    assert receiver.wait() == 0
    for frames, (size, body) in zip(lines, bodies.items(), strict=True):
        check(output, frames, (f"0-{size}.bin", body))
    check(output, together, *((f"{n}-ü{s}", b) for n, (s, b) in enumerate(bodies.items())))
    assert nothing_staged(output)
    assert len(receiver.out.splitlines()) == 8
    transfer = together[0].transfer.id
    total = sum(sizes)
    assert f"transfer {transfer}  parts 7  bytes {total}  {output / transfer}\n" in receiver.out
    assert receiver.err == ""
    queue.wait_for(0)


def test_duplicates_and_aborts_change_nothing(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    body = Random(2).randbytes(10 * FRAME)
    frames, given_up, last = cut(("a", body)), cut(("b", body)), cut(("c", b"x"))
    queue = make_queue()
    queue.publish_frames(given_up[:4])
    # Published again from the fifth frame on, as after a lost connection to the broker.
    queue.publish_frames([*frames[:7], *frames[4:], *frames[8:]])
    queue.publish(encode_abort(given_up[0].transfer, 4, "client-gone"))
    queue.publish_frames([*given_up[2:4], *last])

    receiver = start(queue.name, "--count", "2")

    assert receiver.wait() == 0
    check(output, frames, ("0-a", body))
    check(output, last, ("0-c", b"x"))
    assert not (output / given_up[0].transfer.id).exists()
    assert nothing_staged(output)
    assert f"{given_up[0].transfer.id} aborted: client-gone" in receiver.err
    queue.wait_for(0)


def test_hostile_file_names_stay_inside(
    make_queue: MakeQueue, start: Start, output: Path, tmp_path: Path
) -> None:
    names = ["../../../evil", f"{tmp_path}/evil", "..\\..\\evil", "é" * 1000, "a\nb\x1b[2J", ".."]
    frames = cut(*((name, b"x") for name in names))
    queue = make_queue()
    queue.publish_frames(frames)

    receiver = start(queue.name, "--count", "1")

    assert receiver.wait() == 0
    expected = ["0-evil", "1-evil", "2-evil", "3-" + "é" * 126, "4-a_b_[2J", "5-file"]
    check(output, frames, *((name, b"x") for name in expected))
    assert {p.name for p in tmp_path.iterdir()} == {"output", "output.out", "output.err"}


def test_bad_messages_are_dead_lettered_and_the_good_ones_delivered(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    dead = make_queue()
    queue = make_queue(
        QUORUM | {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    )
    body = Random(3).randbytes(5 * FRAME)
    good, gap, rotten = cut(("good", body)), cut(("gap", body)), cut(("rotten", body))
    message = encode_frame(good[0])
    queue.publish(message, app_id="billing", message_id="foreign")
    queue.publish(message, headers={"relay": 2}, message_id="version 2")
    queue.publish(message, headers=None, message_id="no headers")
    queue.publish(message, correlation_id="../../evil", message_id="path")
    queue.publish_frames([gap[0], *gap[2:]])
    queue.publish_frames([rotten[0]._replace(body=b"x" * FRAME), *rotten[1:]])
    queue.publish_frames(good)

    receiver = start(queue.name, "--count", "1")

    assert receiver.wait() == 0
    check(output, good, ("0-good", body))
    expected = [".relay-quarantine", ".relay-staging", good[0].transfer.id]
    assert sorted(p.name for p in output.iterdir()) == expected
    assert os.listdir(output / ".relay-quarantine") == [gap[0].transfer.id]
    expected = ["foreign", "version 2", "no headers", "path"]
    expected += [encode_frame(f).message_id for f in (gap[0], *gap[2:], *rotten)]
    assert sorted(p.message_id for p in dead.drain(len(expected))) == sorted(expected)
    assert f"transfer {gap[0].transfer.id} failed: frame 2 came where 1 was due" in receiver.err
    assert f"transfer {rotten[0].transfer.id} failed: crc32c of frame 0" in receiver.err
    assert len(receiver.err.splitlines()) == 6
    queue.wait_for(0)


def test_killed_after_acks_it_goes_on_from_its_staging(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    body = Random(4).randbytes(100 * FRAME)
    frames = cut(("a", body), ("b", body), digests=["sha-512"])
    queue = make_queue()
    queue.publish_frames(frames[:150])
    first = start(queue.name, "--count", "1")
    eventually(lambda: messages(rabbitmq, queue) == 0, "150 frames acked")
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (output / frames[0].transfer.id).exists()

    queue.publish_frames(frames[150:])
    second = start(queue.name, "--count", "1")

    assert second.wait() == 0
    check(output, frames, ("0-a", body), ("1-b", body))
    assert nothing_staged(output)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
def test_ended_again_and_again_it_misses_nothing(
    make_queue: MakeQueue,
    start: Start,
    output: Path,
    how: signal.Signals,
    arguments: dict[str, object],
) -> None:
    # On a quorum queue, whatever is requeued in another way than by losing the connection comes
    # back in another order: a receiver that closed as AMQP clients do would see a gap here.
    random = Random(5)
    bodies = [random.randbytes(800 * FRAME) for _ in range(4)]
    lines = [cut(("x", body)) for body in bodies]
    small = [cut(("y", b"z")) for _ in range(60)]
    total = sum(map(len, bodies))
    queue = make_queue(arguments)
    queue.publish_frames(interleave(random, *lines, *small))
    for stop in range(1, STOPS + 1):
        receiver = start(queue.name, "--count", "64")
        enough = total * stop // (STOPS + 1)
        eventually(lambda enough=enough: staged_bytes(output) >= enough, f"{enough} bytes")  # type: ignore[misc]
        assert receiver.stop(how) == (1 if how == signal.SIGTERM else -how)

    receiver = start(queue.name)
    eventually(lambda: len(os.listdir(output)) == 65, "64 transfers delivered")
    queue.wait_for(0)

    assert receiver.stop(signal.SIGTERM) == 0
    for frames, body in zip(lines, bodies, strict=True):
        check(output, frames, ("0-x", body))
    for frames in small:
        check(output, frames, ("0-y", b"z"))
    assert nothing_staged(output)
    assert receiver.err == ""
    # Each is told of, though a kill between the two may have it told of twice.
    told = {line.split()[1] for line in receiver.out.splitlines()}
    assert told == {frames[0].transfer.id for frames in (*lines, *small)}


def test_it_ends_at_count_and_leaves_the_rest_in_the_queue(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    transfers = [cut(("x", b"x" * FRAME * 2)) for _ in range(5)]
    queue = make_queue()
    for frames in transfers:
        queue.publish_frames(frames)
    assert start(queue.name, "--count", "2").wait() == 0
    queue.wait_for(2 * 3)
    assert start(queue.name, "--count", "3").wait() == 0
    for frames in transfers:
        check(output, frames, ("0-x", b"x" * FRAME * 2))


def test_a_disk_that_takes_no_more_ends_it_and_nothing_is_lost(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    body = Random(7).randbytes(100 * FRAME)
    frames = cut(("x", body))
    queue = make_queue()
    queue.publish_frames(frames)

    full = start(queue.name, "--count", "1", under=["prlimit", f"--fsize={70 * FRAME}"])

    assert full.wait() == 1
    assert len(full.err.splitlines()) == 1
    assert not (output / frames[0].transfer.id).exists()
    assert start(queue.name, "--count", "1").wait() == 0
    check(output, frames, ("0-x", body))


def _is_taken(connection: pika.BlockingConnection, queue: Queue, frame: Frame) -> bool:
    """Whether the broker confirms a frame, on a channel of its own."""
    message = encode_frame(frame)
    with connection.channel() as channel:
        channel.confirm_delivery()
        try:
            channel.basic_publish("", queue.name, message.body, properties_of(message))
        except pika.exceptions.NackError:
            return False
    return True


def test_a_restarted_broker_is_found_again(start: Start, output: Path) -> None:
    with RabbitMQNode() as node:
        body = Random(6).randbytes(50 * FRAME)
        frames = cut(("x", body))
        connection = pika.BlockingConnection(pika.URLParameters(node.url))
        queue = Queue(connection.channel(), QUORUM)
        queue.publish_frames(frames[:25])
        receiver = start(queue.name, "--count", "1", url=node.url)
        eventually(lambda: messages(node, queue) == 0, "25 frames acked")
        connection.close()
        node.restart()
        with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
            # As long as the queue has no leader, what is published to it is rejected.
            eventually(lambda: _is_taken(connection, queue, frames[25]), "the queue has a leader")
            for frame in frames[26:]:
                assert _is_taken(connection, queue, frame)
        assert receiver.wait() == 0
    check(output, frames, ("0-x", body))
    assert "trying again" in receiver.err


def test_without_a_queue_it_fails_with_one_clear_line(start: Start) -> None:
    receiver = start("no-such-queue")
    assert receiver.wait() == 1
    assert "no-such-queue" in receiver.err
    assert len(receiver.err.splitlines()) == 1


def test_a_wrong_password_is_told_and_not_tried_again(rabbitmq: RabbitMQNode, start: Start) -> None:
    receiver = start("x", url=rabbitmq.url.replace("guest:guest", "guest:secret"))
    assert receiver.wait() == 1
    assert len(receiver.err.splitlines()) == 1
    assert "secret" not in receiver.err


def test_a_missing_virtual_host_is_told_and_not_tried_again(
    rabbitmq: RabbitMQNode, start: Start
) -> None:
    receiver = start("x", url=rabbitmq.url.replace("%2f", "nowhere"))
    assert receiver.wait() == 1
    assert len(receiver.err.splitlines()) == 1


@pytest.mark.parametrize("url", ["amqp://guest:sesame/x@localhost/", "http://localhost/", "x"])
def test_a_url_that_is_none_is_a_usage_error(start: Start, url: str) -> None:
    receiver = start("x", url=url)
    assert receiver.wait() == 2
    assert len(receiver.err.splitlines()) == 1
    assert "sesame" not in receiver.err


def test_an_output_that_cannot_be_made_fails_with_one_clear_line(
    start: Start, output: Path
) -> None:
    output.write_text("a file")
    receiver = start("x")
    assert receiver.wait() == 1
    assert len(receiver.err.splitlines()) == 1


def test_a_deleted_queue_ends_it(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    receiver = start(queue.name)
    queue.publish_frames(cut(("x", b"x")))
    eventually(lambda: "transfer" in receiver.out, "the receiver is at work")
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
        connection.channel().queue_delete(queue.name)
    assert receiver.wait() == 1
    assert queue.name in receiver.err
