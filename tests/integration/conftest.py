"""What tests of ``relay receive`` share: queues, a directory, receivers that end with the test."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pika
import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.receiving import QUORUM, MakeQueue, Queue, Receiver, Start


@pytest.fixture
def make_queue(rabbitmq: RabbitMQNode) -> Iterator[MakeQueue]:
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    yield lambda arguments=QUORUM: Queue(channel, arguments)
    connection.close()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def start(rabbitmq: RabbitMQNode, output: Path) -> Iterator[Start]:
    receivers: list[Receiver] = []

    def start(
        queue: str, *options: str, url: str = rabbitmq.url, under: Sequence[str] = ()
    ) -> Receiver:
        receivers.append(Receiver(url, queue, output, *options, under=under))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()
