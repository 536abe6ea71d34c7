"""The incident: a form upload is written to a temporary file or held in memory as a whole.

Both services get the same uploads, are looked at shortly before an upload's end, and again
after it: inotify on every directory they could be expected to write to; /proc for open
files, memory and bytes written to storage.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.incident.flask_process import FlaskService
from tests.incident.held_upload import HeldUpload, Part, upload
from tests.incident.inotify import FileWatch
from tests.incident.observe import (
    OpenFile,
    open_files,
    peak_resident_bytes,
    resident_bytes,
    temporary_bytes,
    written_bytes,
)

# Werkzeug moves a file to a temporary one above 500 KiB and refuses a field above 500 kB.
SMALL = random.Random(1).randbytes(400_000)
LARGE = random.Random(2).randbytes(8 * 1024 * 1024)
HELD_BACK = 1024 * 1024
# More than a service may have read and not yet written on, or passed on.
IN_BETWEEN = 1024 * 1024
PASSED_ON = len(LARGE) - HELD_BACK - IN_BETWEEN
FLASK_QUEUE = "incident.flask"
# Where relay publishes without any configuration.
RELAY_QUEUE = "uploads"
WAIT_SECONDS = 30
STDERR = 2


@pytest.fixture
def channel(rabbitmq: RabbitMQNode) -> Iterator[BlockingChannel]:
    """A channel to the node that relay and Flask publish to."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    yield connection.channel()
    connection.close()


@pytest.fixture
def flask_queue(channel: BlockingChannel) -> Iterator[str]:
    """The queue that Flask publishes to."""
    channel.queue_declare(FLASK_QUEUE, durable=True)
    yield FLASK_QUEUE
    channel.queue_delete(FLASK_QUEUE)


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something that must happen and has no event of its own to wait for."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def received(channel: BlockingChannel, queue: str) -> Iterator[tuple[pika.BasicProperties, bytes]]:
    """Yields what arrives in a queue, as it arrives."""
    for method, properties, body in channel.consume(queue, True, inactivity_timeout=WAIT_SECONDS):
        assert method is not None, f"nothing more in {WAIT_SECONDS} s"
        assert properties is not None
        assert body is not None
        yield properties, body


def writable_files(pid: int) -> list[OpenFile]:
    """Returns the files a process could write to, but for standard output and error.

    Those are the test run's own, and may well be files.
    """
    return [file for file in open_files(pid) if file.writable and file.descriptor > STDERR]


class TestFlask:
    """What the service of old does, measured with the instruments that relay is held to."""

    def test_a_small_file_is_not_written_to_disk(
        self, rabbitmq: RabbitMQNode, flask_queue: str, tmp_path: Path
    ) -> None:
        with (
            FlaskService(rabbitmq.url, tmp_path, routing_key=flask_queue) as service,
            FileWatch(tmp_path) as watch,
        ):
            assert upload(service.url, {"file": ("small.bin", SMALL)}) == 201
            assert watch.events() == []

    def test_a_file_over_500_kb_is_written_to_a_temporary_file(
        self, rabbitmq: RabbitMQNode, flask_queue: str, tmp_path: Path
    ) -> None:
        with (
            FlaskService(rabbitmq.url, tmp_path, routing_key=flask_queue) as service,
            FileWatch(tmp_path) as watch,
        ):
            # Python tries out TMPDIR with a file of its own before the first temporary file.
            assert upload(service.url, {"file": ("first.bin", LARGE)}) == 201
            watch.events()
            held = HeldUpload(service.url, {"file": ("large.bin", LARGE)}, held_back=HELD_BACK)
            with held:
                wait_until(lambda: temporary_bytes(service.pid, tmp_path) >= PASSED_ON)
                assert writable_files(service.pid)
                assert held.finish() == 201
            assert "modify" in {event.kind for event in watch.events()}

    def test_a_large_plain_field_is_refused_since_release_3_1(
        self, rabbitmq: RabbitMQNode, flask_queue: str, tmp_path: Path
    ) -> None:
        with FlaskService(rabbitmq.url, tmp_path, routing_key=flask_queue) as service:
            status = upload(service.url, {"field": LARGE})
        assert status == 413, f"Flask {version('flask')}, Werkzeug {version('werkzeug')}"

    def test_a_large_plain_field_was_held_in_memory_and_damaged_before_release_3_1(
        self, rabbitmq: RabbitMQNode, channel: BlockingChannel, flask_queue: str, tmp_path: Path
    ) -> None:
        with (
            FlaskService(
                rabbitmq.url, tmp_path, routing_key=flask_queue, unlimited_fields=True
            ) as service,
            FileWatch(tmp_path) as watch,
        ):
            assert upload(service.url, {"field": b"warm"}) == 201
            before = resident_bytes(service.pid)
            assert upload(service.url, {"field": LARGE}) == 201
            assert watch.events() == []
            assert peak_resident_bytes(service.pid) - before >= len(LARGE)
        messages = received(channel, flask_queue)
        assert next(messages)[1] == b"warm"
        # A plain field is text to Werkzeug: bytes that are not UTF-8 do not survive.
        assert next(messages)[1] == LARGE.decode("utf-8", "replace").encode()


class TestRelay:
    """What relay does with the same uploads."""

    @pytest.mark.parametrize("part", [("large.bin", LARGE), LARGE], ids=["file", "field"])
    def test_a_large_part_arrives_whole_and_no_file_is_written(
        self, rabbitmq: RabbitMQNode, channel: BlockingChannel, tmp_path: Path, part: Part
    ) -> None:
        daemon = watchable_daemon(rabbitmq, tmp_path)
        with FileWatch(tmp_path) as watch, daemon:
            # To load a module may change its access time, and the kernel books that as written:
            # only what comes after the first upload is the daemon's doing.
            assert upload(daemon.url, {"file": ("small.bin", SMALL)}) == 201
            written = written_bytes(daemon.pid)
            channel.queue_purge(RELAY_QUEUE)
            frames = received(channel, RELAY_QUEUE)
            held = HeldUpload(daemon.url, {"part": part}, held_back=HELD_BACK)
            arrived = b""
            with held:
                while len(arrived) < PASSED_ON:
                    arrived += next(frames)[1]
                assert writable_files(daemon.pid) == []
                assert held.finish() == 201
            assert arrived + rest(frames) == LARGE
            assert written_bytes(daemon.pid) == written
            assert daemon.stop() == 0
            assert watch.events() == []


def watchable_daemon(rabbitmq: RabbitMQNode, directory: Path) -> Daemon:
    """A daemon, not yet started, to which `directory` is all the world it may write to."""
    environment = os.environ | {
        "TMPDIR": str(directory),
        "HOME": str(directory),
        # Python's own cache of compiled modules is not the daemon's doing.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return Daemon(rabbitmq.url, directory=directory, env=environment, cwd=directory)


def rest(frames: Iterator[tuple[pika.BasicProperties, bytes]]) -> bytes:
    """Returns the bytes of the frames that are still to come, up to the commit frame."""
    bodies = []
    for properties, body in frames:
        bodies.append(body)
        if properties.headers and properties.headers.get("commit"):
            break
    return b"".join(bodies)
