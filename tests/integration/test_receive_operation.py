"""``relay receive`` as an operator runs it: a full disk, a cron job, a standby."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.receiving import (
    FRAME,
    QUORUM,
    MakeQueue,
    Start,
    check,
    cut,
    eventually,
    messages,
    nothing_staged,
)

DISK = 4 * 1024 * 1024


@pytest.fixture
def small_disk(output: Path) -> Iterator[Path]:
    """The receiver's directory, on a filesystem of its own."""
    output.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", output],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.fail(f"this test mounts a small tmpfs and must be root: {mounted.stderr}")
    yield output
    subprocess.run(["umount", output], check=True)


@pytest.mark.parametrize(
    "arguments", [QUORUM, {"x-queue-type": "stream"}], ids=["quorum", "stream"]
)
def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    rabbitmq: RabbitMQNode,
    make_queue: MakeQueue,
    start: Start,
    small_disk: Path,
    arguments: dict[str, object],
) -> None:
    random = Random(1)
    bodies = [random.randbytes(12 * FRAME + 1) for _ in range(50)]
    transfers = [cut(("x", body)) for body in bodies]
    queue = make_queue(arguments)
    for frames in transfers:
        queue.publish_frames(frames)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(DISK * 5 // 8))

    receiver = start(queue.name, "--count", "50")

    eventually(lambda: "no room in" in receiver.err, "it says that the disk is full")
    eventually(lambda: receiver.consumers(rabbitmq) == 0, "it holds no connection")
    for frames, body in zip(transfers, bodies, strict=True):
        if (small_disk / frames[0].transfer.id).exists():
            check(small_disk, frames, ("0-x", body))
    if arguments == QUORUM:
        eventually(lambda: messages(rabbitmq, queue) > 0, "frames that are not acked")
    ballast.unlink()

    assert receiver.wait() == 0
    for frames, body in zip(transfers, bodies, strict=True):
        check(small_disk, frames, ("0-x", body))
    assert len(receiver.out.splitlines()) == 50
    told = receiver.err.splitlines()
    assert told[0] == f"relay receive: no room in {small_disk}: No space left on device; waiting"
    assert told[-1] == f"relay receive: there is room in {small_disk} again; going on"
    if arguments == QUORUM:
        assert nothing_staged(small_disk)
        queue.wait_for(0)


def test_a_disk_that_is_full_from_the_start_is_waited_for(
    make_queue: MakeQueue, start: Start, small_disk: Path
) -> None:
    frames = cut(("x", b"x" * FRAME))
    queue = make_queue()
    queue.publish_frames(frames)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(2 * DISK))
    receiver = start(queue.name, "--count", "1")
    eventually(lambda: "no room in" in receiver.err, "it says that the disk is full")
    ballast.unlink()
    assert receiver.wait() == 0
    check(small_disk, frames, ("0-x", b"x" * FRAME))


def test_as_a_cron_job_it_takes_what_there_is_and_ends(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    whole, half = cut(("x", b"x" * 3 * FRAME)), cut(("y", b"y" * 3 * FRAME))
    queue = make_queue()
    queue.publish_frames([*whole, *half[:2]])

    receiver = start(queue.name, "--idle-exit", "1 s")

    assert receiver.wait() == 0
    check(output, whole, ("0-x", b"x" * 3 * FRAME))
    assert "1 transfers are incomplete" in receiver.err
    queue.publish_frames(half[2:])
    assert start(queue.name, "--idle-exit", "1 s").wait() == 0
    check(output, half, ("0-y", b"y" * 3 * FRAME))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_standby_with_the_same_directory_takes_over_in_the_midst_of_a_transfer(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path, how: signal.Signals
) -> None:
    body = Random(2).randbytes(50 * FRAME)
    frames = cut(("x", body))
    queue = make_queue(QUORUM | {"x-single-active-consumer": True})
    queue.publish_frames(frames[:30])
    first = start(queue.name)
    eventually(lambda: messages(rabbitmq, queue) == 0, "30 frames acked")
    standby = start(queue.name, "--count", "1", "--wait")
    eventually(lambda: "waiting until it ends" in standby.err, "the standby waits")

    first.stop(how)
    queue.publish_frames(frames[30:])

    assert standby.wait() == 0
    check(output, frames, ("0-x", body))


def test_without_wait_a_directory_in_use_is_told_at_once(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    first = start(queue.name)
    queue.publish_frames(cut(("x", b"x")))
    eventually(lambda: "transfer" in first.out, "the receiver is at work")
    second = start(queue.name)
    assert second.wait() == 1
    assert f"another receiver writes to {output}" in second.err
