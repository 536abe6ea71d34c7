"""``relay receive`` as a process, queues made for it, and what it must have written.

The fixtures that hand these out are in ``integration/conftest.py``.
"""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

import relay
from relay.demo.rabbitmq import RabbitMQNode
from relay.model import Frame, PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import APP_ID, CONTENT_TYPE, Message, encode_frame

FRAME = 4096
PATIENCE = 60.0
"""Seconds for anything; a test that waits longer has failed."""

QUORUM = {"x-queue-type": "quorum"}


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll: neither the broker's queues nor another process's files tell when they change."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE} s: {what}")
        time.sleep(0.02)


class Queue:
    """A queue of its own for a test, and a channel to publish to it."""

    def __init__(self, channel: BlockingChannel, arguments: Mapping[str, object]) -> None:
        self.name = f"receive-{uuid.uuid4()}"
        self._channel = channel
        channel.queue_declare(self.name, durable=True, arguments=dict(arguments))

    def publish(self, message: Message, **properties: object) -> None:
        changed = {
            "app_id": APP_ID,
            "type": message.type,
            "correlation_id": message.correlation_id,
            "message_id": message.message_id,
            "timestamp": message.timestamp,
            "headers": dict(message.headers),
            "content_type": CONTENT_TYPE,
            "delivery_mode": 2,
        } | properties
        self._channel.basic_publish("", self.name, message.body, BasicProperties(**changed))

    def publish_frames(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self.publish(encode_frame(frame))

    def wait_for(self, count: int) -> None:
        """Until so many messages are ready in it."""
        eventually(lambda: self._ready() == count, f"{count} messages ready in {self.name}")

    def drain(self, count: int) -> list[BasicProperties]:
        """Properties of so many messages, which must be all there are."""
        self.wait_for(count)
        taken = [self._channel.basic_get(self.name, auto_ack=True)[1] for _ in range(count)]
        assert None not in taken
        return [properties for properties in taken if properties is not None]

    def _ready(self) -> int:
        return int(self._channel.queue_declare(self.name, passive=True).method.message_count)


class Receiver:
    """``relay receive`` as a process."""

    def __init__(
        self, url: str, queue: str, output: Path, *options: str, under: Sequence[str] = ()
    ) -> None:
        """``under``: a command that runs the one that follows it."""
        self._queue = queue
        self._streams = [open(output.with_suffix(s), "a+") for s in (".out", ".err")]  # noqa: SIM115
        command = [*under, sys.executable, "-m", "relay", "receive", "--amqp", url]
        self._process = subprocess.Popen(
            [*command, "--queue", queue, "--output", str(output), *options],
            stdout=self._streams[0],
            stderr=self._streams[1],
            env=os.environ | {"PYTHONPATH": str(Path(relay.__file__).parents[1])},
        )

    @property
    def out(self) -> str:
        return self._text(0)

    @property
    def err(self) -> str:
        return self._text(1)

    def wait(self) -> int:
        return self._process.wait(PATIENCE)

    def consumers(self, rabbitmq: RabbitMQNode) -> int:
        """How many consumers its queue has."""
        return rabbitmq.ctl("list_consumers", "queue_name").split().count(self._queue)

    def stop(self, number: int) -> int:
        self._process.send_signal(number)
        return self.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in self._streams:
            stream.close()

    def _text(self, index: int) -> str:
        self._streams[index].seek(0)
        return self._streams[index].read()


MakeQueue = Callable[..., Queue]
Start = Callable[..., Receiver]


def cut(*parts: tuple[str, bytes], digests: Sequence[str] = ()) -> list[Frame]:
    """The frames of a new transfer."""
    transfer = Transfer(id=str(uuid.uuid4()), began=int(time.time()), route="default")
    framer = Framer(transfer, frame_size=FRAME, digests=digests)
    frames: list[Frame] = []
    for filename, body in parts:
        frames += framer.start_part(PartHead(name="file", filename=filename))
        frames += framer.feed(body)
        framer.end_part()
    return [*frames, framer.finish()[0]]


def interleave(random: Random, *lines: list[Frame]) -> list[Frame]:
    order = [n for n, line in enumerate(lines) for _ in line]
    random.shuffle(order)
    queues = [iter(line) for line in lines]
    return [next(queues[n]) for n in order]


def check(output: Path, frames: Sequence[Frame], *parts: tuple[str, bytes]) -> None:
    """The transfer's directory holds these parts under these names, a receipt, and no more."""
    directory = output / frames[0].transfer.id
    assert {p.name for p in directory.iterdir()} == {"receipt.json", *(name for name, _ in parts)}
    for name, body in parts:
        assert (directory / name).read_bytes() == body
    receipt = json.loads((directory / "receipt.json").read_text())
    assert receipt["bytes"] == sum(len(body) for _, body in parts)
    assert receipt["frames"] == len(frames)


def nothing_staged(output: Path) -> bool:
    """Nothing of any transfer: what is named otherwise is the receiver's own."""
    entries = os.listdir(output / ".relay-staging")
    return not any(re.match("[0-9a-f]{8}-", entry) for entry in entries)


def messages(rabbitmq: RabbitMQNode, queue: Queue) -> int:
    """Ready and unacked ones."""
    for line in rabbitmq.ctl("list_queues", "name", "messages", "--no-table-headers").splitlines():
        name, count = line.split()
        if name == queue.name:
            return int(count)
    pytest.fail("no such queue")


def staged_bytes(output: Path) -> int:
    """What has come so far, staged or delivered; files move meanwhile."""
    total = 0
    for directory, _, names in os.walk(output):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue
    return total
