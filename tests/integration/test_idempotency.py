"""Uploads with an Idempotency-Key, sent twice: curl, the real daemon, a real broker, a receiver."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pika
import pytest

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.queue_reader import messages_left, transfers_in

QUEUE = "idempotency"
FULL = "idempotency.full"
CONFIG = f"""
[routes.default]
routing_key = "{QUEUE}"
[routes.default.queue]
name = "{QUEUE}"

[routes.full]
routing_key = "{FULL}"
[routes.full.queue]
name = "{FULL}"
type = "classic"
arguments = {{ x-max-length = 1, x-overflow = "reject-publish" }}
"""


@dataclass(frozen=True)
class Answer:
    status: int
    replayed: bool
    document: dict[str, Any]


class Curl:
    """One run of curl that uploads standard input, or a file."""

    def __init__(self, url: str, key: str, *arguments: str, stdin: int | None = None) -> None:
        command = ["curl", "-sS", "--include", "-H", f"Idempotency-Key: {key}", *arguments, url]
        self.process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def answer(self) -> Answer:
        """What it was answered, when it is done."""
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        *heads, body = out.decode().split("\r\n\r\n")
        final = heads[-1].splitlines()
        replayed = "idempotency-replayed: true" in (line.lower() for line in final)
        return Answer(int(final[0].split()[1]), replayed, json.loads(body))


@pytest.fixture
def daemon(rabbitmq: RabbitMQNode, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon:
        yield daemon


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def replays(daemon: Daemon) -> float:
    return daemon.metric('relay_uploads_total{outcome="replayed",route="default"}')


def test_the_same_key_again_is_replayed_and_uploaded_once(
    rabbitmq: RabbitMQNode, daemon: Daemon, file: Path
) -> None:
    first = Curl(f"{daemon.url}/upload/", '"again"', "-T", str(file)).answer()
    assert (first.status, first.replayed) == (201, False)
    frames = first.document["frames"]
    assert messages_left(rabbitmq.url, QUEUE) == frames
    # curl waits for 100 (Continue), or does not; quotes around the key make no difference.
    for arguments in (["-T", str(file)], ["-T", str(file), "-H", "Expect:"]):
        again = Curl(f"{daemon.url}/upload/", "again", *arguments).answer()
        assert (again.status, again.replayed) == (201, True)
        assert again.document == first.document
    assert replays(daemon) == 2
    assert messages_left(rabbitmq.url, QUEUE) == frames
    (transfer,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
    assert transfer.committed
    assert transfer.parts[0].data == file.read_bytes()
    assert transfer.transfer.idempotency_key == "again"


def test_a_form_sent_again_by_curl_is_replayed_and_another_form_is_not(
    rabbitmq: RabbitMQNode, daemon: Daemon, file: Path
) -> None:
    url = f"{daemon.url}/upload"
    first = Curl(url, "form", "-F", f"f=@{file}", "-F", "note=x").answer()
    again = Curl(url, "form", "-F", f"f=@{file}", "-F", "note=x").answer()
    assert (again.status, again.replayed, again.document) == (201, True, first.document)
    other = Curl(url, "form", "-F", f"f=@{file}", "-F", "note=xy").answer()
    assert (other.status, other.document["code"]) == (422, "digest-mismatch")
    assert len(transfers_in(rabbitmq.url, QUEUE, ended=1)) == 1
    assert messages_left(rabbitmq.url, QUEUE) == 0


def test_the_same_key_at_the_same_time_is_refused(rabbitmq: RabbitMQNode, daemon: Daemon) -> None:
    arguments = ["-H", "Transfer-Encoding: chunked", "-T", "-"]
    first = Curl(f"{daemon.url}/upload/", "busy", *arguments, stdin=subprocess.PIPE)
    assert first.process.stdin is not None
    first.process.stdin.write(b"the beginning, ")
    first.process.stdin.flush()
    daemon.wait_until(lambda: len(daemon.transfers()) == 1, "the first upload is in progress")
    second = Curl(f"{daemon.url}/upload", "busy", "--data-binary", "x").answer()
    assert (second.status, second.document["code"]) == (409, "key-in-use")
    first.process.stdin.write(b"the end")
    answer = first.answer()
    assert (answer.status, answer.replayed) == (201, False)
    (transfer,) = transfers_in(rabbitmq.url, QUEUE, ended=1).values()
    assert transfer.parts[0].data == b"the beginning, the end"


def test_after_a_failure_the_same_key_uploads(rabbitmq: RabbitMQNode, daemon: Daemon) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    for _ in range(2):
        # Such a queue rejects only when it is over its limit.
        channel.basic_publish("", FULL, b"in the way")
    channel.queue_declare(FULL, passive=True)

    def upload() -> Answer:
        return Curl(f"{daemon.url}/upload/full", "failed", "--data-binary", "x").answer()

    failed = upload()
    assert (failed.status, failed.document["code"]) == (507, "queue-full")
    channel.queue_purge(FULL)
    again = upload()
    assert (again.status, again.replayed) == (201, False)
    assert upload().replayed
    assert list(transfers_in(rabbitmq.url, FULL, ended=1)) == [again.document["transfer"]]
    connection.close()


def test_what_a_restarted_daemon_uploads_again_the_receiver_drops(
    rabbitmq: RabbitMQNode, file: Path, tmp_path: Path
) -> None:
    receipts = []
    for _ in range(2):
        with Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon:
            answer = Curl(f"{daemon.url}/upload/", "restart", "-T", str(file)).answer()
            assert (answer.status, answer.replayed) == (201, False)
            receipts.append(answer.document["transfer"])
            after = Curl(f"{daemon.url}/upload", "other", "--data-binary", "x").answer()
            receipts.append(after.document["transfer"])
            assert daemon.stop() == 0
    first, other, second, other_again = receipts
    with Daemon(rabbitmq.url, CONFIG, directory=tmp_path) as daemon:
        last = Curl(f"{daemon.url}/upload", "last", "--data-binary", "x").answer()
    output = tmp_path / "output"
    command = [sys.executable, "-m", "relay", "receive", "--amqp", rabbitmq.url]
    command += ["--queue", QUEUE, "--output", str(output), "--count", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    delivered = [line.split()[1] for line in done.stdout.splitlines()]
    assert delivered == [first, other, last.document["transfer"]]
    for repeated, of in ((second, first), (other_again, other)):
        assert f"transfer {repeated} dropped: {of}" in done.stderr
    assert messages_left(rabbitmq.url, QUEUE) == 0
