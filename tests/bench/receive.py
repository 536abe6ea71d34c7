"""Rate and CPU of `relay receive`, beside bare pika consumers that drop what they get.

The queue is filled first, then consumed; rounds alternate. relay verifies each frame and writes
files to memory (tmpfs); the others do nothing. The broker may be what limits all of them.
``./dev bench receive [--gib N] [--rounds N] [--queue TYPE] [--frame-size BYTES]``.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from pika.spec import BasicProperties

from relay.demo.rabbitmq import RabbitMQNode
from relay.model import PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import Message, encode_frame
from relay.receiver.options import PREFETCH
from tests.bench import bare_consumer
from tests.bench.kills import QUEUES
from tests.bench.pump import cpu_seconds
from tests.observed_receiver import Depth, declare, properties_of, publish, wait_until

MIB: Final = 1 << 20
TRANSFER: Final = 64 * MIB
MEMORY: Final = "/dev/shm"  # noqa: S108  a directory of its own in it
TARGET: Final = 0.8
"""Rate of the bare blocking consumer that relay is meant to reach."""

RELAY: Final = "relay receive"
FLOOR: Final = "pika, blocking"


@dataclass(frozen=True)
class Measured:
    """One run: CPU seconds of the consumer and wall seconds, per GiB."""

    cpu: float
    wall: float


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="./dev bench receive", description=__doc__)
    parser.add_argument("--gib", type=int, default=2, help="GiB per run (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--queue", choices=QUEUES, default="quorum")
    parser.add_argument("--frame-size", type=int, default=131064, help="bytes (default 131064)")
    options = parser.parse_args(argv)
    runs: dict[str, list[Measured]] = {FLOOR: [], "pika, select": [], RELAY: []}
    with RabbitMQNode() as node:
        for number in range(options.rounds):
            for name, measured in runs.items():
                queue = f"{name} {number}"
                declare(node.url, queue, {"x-queue-type": options.queue})
                messages = transfers(options.gib << 30, options.frame_size)
                count = publish(node.url, queue, messages)
                measured.append(_run(node.url, queue, options.queue, name, count, options.gib))
                node.ctl("delete_queue", queue)
    _report(runs)
    return 0


def transfers(size: int, frame_size: int) -> Iterator[tuple[BasicProperties, bytes]]:
    """So many bytes in transfers of 64 MiB, as messages."""
    block = Random(1).randbytes(TRANSFER)
    for _ in range(size // TRANSFER):
        for message in _frames(block, frame_size):
            yield properties_of(message), message.body


def _frames(block: bytes, frame_size: int) -> Iterator[Message]:
    framer = Framer(Transfer(id=str(uuid.uuid4()), began=1, route="default"), frame_size=frame_size)
    list(framer.start_part(PartHead(filename="x.bin")))
    for start in range(0, len(block), MIB):
        yield from map(encode_frame, framer.feed(block[start : start + MIB]))
    framer.end_part()
    yield encode_frame(framer.finish()[0])


def _run(url: str, queue: str, queue_type: str, name: str, count: int, gib: int) -> Measured:
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=MEMORY) as directory:
        if name == RELAY:
            arguments = ["relay", "receive", "--amqp", url, "--queue", queue]
            arguments += ["--output", directory, "--count", str((gib << 30) // TRANSFER)]
        else:
            arguments = [bare_consumer.__name__, name.split()[-1], url, queue, queue_type]
            arguments += map(str, (count, PREFETCH, PREFETCH // 2))
        return _measure([sys.executable, "-m", *arguments], url, queue, gib)


def _measure(command: Sequence[str], url: str, queue: str, gib: int) -> Measured:
    """Run a consumer; measured from its first delivery to its end, without its start."""
    with Depth(url, queue) as depth, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        wait_until(lambda: depth.consumers() > 0 or process.poll() is not None, "it consumes")
        if process.returncode is None:
            began, cpu = time.perf_counter(), cpu_seconds(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()}")
    return Measured((usage.ru_utime + usage.ru_stime - cpu) / gib, wall / gib)


def _report(runs: dict[str, list[Measured]]) -> None:
    print(f"{'':<16} {'CPU s/GiB':>10} {'MiB/s':>8} {'rate / blocking':>16}")
    for name, measured in runs.items():
        cpu = statistics.median(m.cpu for m in measured)
        rate = 1024 / statistics.median(m.wall for m in measured)
        ratio = statistics.median(
            floor.wall / m.wall for m, floor in zip(measured, runs[FLOOR], strict=True)
        )
        print(f"{name:<16} {cpu:>10.2f} {rate:>8.0f} {ratio:>16.2f}")
    print(f"(medians; relay is meant to reach {TARGET:g} of the blocking consumer's rate)")
