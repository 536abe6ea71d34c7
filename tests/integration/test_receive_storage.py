"""``relay receive`` as a process: the options that say where what it gets goes."""

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from random import Random

import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.receiving import FRAME, MakeQueue, Start, cut, eventually, nothing_staged


def test_files_go_where_the_template_says_and_exist_once(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    random = Random(1)
    first, second = random.randbytes(3 * FRAME), random.randbytes(FRAME)
    queue = make_queue()
    day = time.strftime("%Y-%m-%d", time.gmtime())
    transfers = [cut(("../scan.pdf", first), ("scan.pdf", second)), cut(("scan.pdf", second))]
    for frames in transfers:
        queue.publish_frames(frames)

    receiver = start(queue.name, "--name", "{date}/{client}/{filename}", "--count", "2")

    assert receiver.wait() == 0
    (directory,) = (p for p in output.iterdir() if p.is_dir() and not p.name.startswith(".relay"))
    assert directory.name >= day
    found = {p.name: p.read_bytes() for p in (directory / "anonymous").iterdir()}
    assert found == {"scan.pdf": first, "scan-2.pdf": second, "scan-3.pdf": second}
    for frames, names in zip(transfers, (["scan", "scan-2"], ["scan-3"]), strict=True):
        path = output / f"{frames[0].transfer.id}.receipt.json"
        files = [part["file"] for part in json.loads(path.read_text())["parts"]]
        assert files == [f"{directory.name}/anonymous/{name}.pdf" for name in names]
        assert f"  {path}\n" in receiver.out
    assert nothing_staged(output)


def test_standard_output_gets_the_bytes_and_standard_error_the_lines(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    transfers = [cut(("a", b"1" * FRAME * 2), ("b", b"2")), cut(("c", b"3"))]
    for frames in transfers:
        queue.publish_frames(frames)

    receiver = start(queue.name, "--stdout", "--count", "2")

    assert receiver.wait() == 0
    assert receiver.out == "1" * FRAME * 2 + "23"
    told = receiver.err.splitlines()
    assert [line.split()[:2] for line in told] == [
        ["transfer", frames[0].transfer.id] for frames in transfers
    ]
    assert {p.name for p in output.iterdir()} == {".relay-staging"}
    assert nothing_staged(output)


def test_a_reader_that_is_gone_ends_it_and_the_next_one_gets_everything(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    queue.publish_frames(cut(("a", b"1" * FRAME)))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "relay", "receive", "--amqp", rabbitmq.url]
    command += ["--queue", queue.name, "--output", str(output), "--stdout"]
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "Broken pipe" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not nothing_staged(output)

    receiver = start(queue.name, "--stdout", "--count", "1")

    assert receiver.wait() == 0
    assert receiver.out == "1" * FRAME
    assert nothing_staged(output)


def test_a_reader_that_reads_nothing_does_not_keep_it_from_ending(
    rabbitmq: RabbitMQNode, make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    body = Random(1).randbytes(1_000_000).hex()
    queue.publish_frames(cut(("a", body.encode())))
    command = [sys.executable, "-m", "relay", "receive", "--amqp", rabbitmq.url]
    command += ["--queue", queue.name, "--output", str(output), "--stdout"]
    # The first one is stopped while it delivers, the second one while it finishes what the first
    # one has left.
    for _ in range(2):
        reading, writing = os.pipe()
        with (
            os.fdopen(reading, "rb"),
            os.fdopen(writing, "wb") as full,
            subprocess.Popen(command, stdout=full) as receiver,
        ):
            eventually(lambda pipe=reading: unread(pipe) > 0, "it writes")  # type: ignore[misc]
            receiver.send_signal(signal.SIGTERM)
            assert receiver.wait(60) == 0
        assert not nothing_staged(output)

    last = start(queue.name, "--stdout", "--idle-exit", "1 s")

    assert last.wait() == 0
    assert last.out == body
    assert nothing_staged(output)


def unread(pipe: int) -> int:
    """Bytes that are in the pipe."""
    count = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return int(struct.unpack("i", count)[0])


def test_silent_transfers_expire_when_told(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    frames = cut(("a", b"1" * FRAME * 2))
    queue.publish_frames(frames[:1])
    receiver = start(queue.name, "--expire", "10 ms")
    eventually(lambda: "expired" in receiver.err, "the transfer expires")
    assert f"transfer {frames[0].transfer.id} expired" in receiver.err
    assert nothing_staged(output)


@pytest.mark.parametrize(
    "options",
    [
        ("--name", "../{filename}"),
        ("--name", "/srv/{filename}"),
        ("--name", ".relay-staging/{filename}"),
        ("--name", "{user}/{filename}"),
        ("--stdout", "--overwrite"),
        ("--stdout", "--name", "{filename}"),
    ],
)
def test_what_cannot_be_is_a_usage_error_in_one_line(
    start: Start, output: Path, options: tuple[str, ...]
) -> None:
    receiver = start("x", *options)
    assert receiver.wait() == 2
    assert len(receiver.err.splitlines()) == 1
    assert options[0] in receiver.err
    assert not output.exists()
