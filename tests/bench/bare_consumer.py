"""The floor of any consumer: pika takes messages, and drops them.

Same prefetch and acks in the same batches as ``relay receive``, and no byte of a body looked at.
A program of its own, so that its CPU time is its own:
``KIND URL QUEUE TYPE MESSAGES PREFETCH BATCH``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.channel import Channel
from pika.connection import Connection
from pika.spec import Basic, BasicProperties

# From a stream's beginning; other queues refuse the argument.
ARGUMENTS: Final = {"stream": {"x-stream-offset": "first"}}

Stop = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What is to be consumed, and how."""

    queue: str
    queue_type: str
    messages: int
    prefetch: int
    batch: int


class Dropper:
    """Counts and acks."""

    def __init__(self, work: Work, stop: Stop) -> None:
        self._left = work.messages
        self._batch = work.batch
        self._stop = stop

    def take(
        self,
        channel: Channel | BlockingChannel,
        method: Basic.Deliver,
        _properties: BasicProperties,
        _body: bytes,
    ) -> None:
        """pika's callback."""
        self._left -= 1
        if self._left % self._batch == 0:
            channel.basic_ack(method.delivery_tag or 0, multiple=True)
        if self._left == 0:
            self._stop()


def blocking(url: str, work: Work) -> None:
    """What most people write."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=work.prefetch)
        dropper = Dropper(work, channel.stop_consuming)
        channel.basic_consume(work.queue, dropper.take, arguments=ARGUMENTS.get(work.queue_type))
        channel.start_consuming()


def select(url: str, work: Work) -> None:
    """pika's own event loop: the least that pika can cost."""

    def connected(connection: Connection) -> None:
        connection.channel(on_open_callback=opened)

    def opened(channel: Channel) -> None:
        dropper = Dropper(work, channel.connection.close)
        channel.basic_qos(prefetch_count=work.prefetch)
        channel.basic_consume(work.queue, dropper.take, arguments=ARGUMENTS.get(work.queue_type))

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=connected,
        on_close_callback=lambda *_: connection.ioloop.stop(),
    )
    connection.ioloop.start()


KINDS: Final = {"blocking": blocking, "select": select}


if __name__ == "__main__":
    kind, url, queue, queue_type, *numbers = sys.argv[1:]
    KINDS[kind](url, Work(queue, queue_type, *map(int, numbers)))
