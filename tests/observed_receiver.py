"""A receiver looked at from outside, and queues filled as fast as one connection can.

What the kernel says of the process, what the broker says of the queue. What is published, and what
must come of it, is for others to know.
"""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pika
from pika.compat import long
from pika.spec import BasicProperties

from relay.protocol.wire import APP_ID, CONTENT_TYPE, LONG_HEADERS, Message
from relay.receiver.options import PREFETCH
from tests.incident.observe import peak_resident_bytes, resident_bytes
from tests.receiving import Receiver

PATIENCE = 120.0
"""Seconds for anything; whoever waits longer has found a failure."""

POLL = 0.001
"""Seconds between two looks: neither files nor queues tell when they change."""


MIB = 1 << 20

BASE = 38 * MIB
"""Bytes of memory that a receiver has while it waits for its first message."""

HEADERS = 4 * 128 * 1024
"""Bytes of memory for a message's headers: they fit in an AMQP frame, and Python has strings of up
to four bytes for each that came."""


def memory_bound(frame_size: int) -> int:
    """The most memory, in bytes, that a receiver may ever have, whatever it is sent.

    This is the formula that the README states.
    """
    return BASE + PREFETCH * (frame_size + HEADERS)


class TooLong(Exception):
    """Something did not happen within PATIENCE; the text says what."""


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Poll until it holds.

    Raises:
        TooLong: it did not.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TooLong(f"not within {patience:g} s: {what}")
        time.sleep(POLL)


class ObservedReceiver(Receiver):
    """``relay receive`` into a directory; a context manager that kills it."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.poll()

    def handles(self, number: signal.Signals) -> bool:
        """Whether it would do something of its own about a signal by now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, mask = line.partition(":")
            if name == "SigCgt":
                return bool(int(mask, 16) >> (number - 1) & 1)
        raise LookupError("no SigCgt in /proc/PID/status")

    def written(self) -> int:
        """Bytes it has passed to write(2) so far; what it sends to sockets does not count."""
        for line in Path(f"/proc/{self.pid}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name == "wchar":
                return int(value)
        raise LookupError("no wchar in /proc/PID/io")

    def resident(self) -> int:
        """Bytes of memory it has now."""
        return resident_bytes(self.pid)

    def peak(self) -> int:
        """The most bytes of memory it has had."""
        return peak_resident_bytes(self.pid)

    def usage(self) -> resource.struct_rusage | None:
        """Once it has ended by itself: what it used in all; None while it runs."""
        found, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not found:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return usage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def properties_of(message: Message, **changed: object) -> BasicProperties:
    """The AMQP properties that relay publishes ``message`` with, but for those ``changed``."""
    properties = {
        "app_id": APP_ID,
        "type": message.type,
        "correlation_id": message.correlation_id,
        "message_id": message.message_id,
        "timestamp": message.timestamp,
        "headers": {
            key: long(value) if key in LONG_HEADERS else value  # type: ignore[arg-type]
            for key, value in message.headers.items()
        },
        "content_type": CONTENT_TYPE,
        "delivery_mode": 2,
    }
    return BasicProperties(**(properties | changed))


def publish(url: str, queue: str, messages: Iterable[tuple[BasicProperties, bytes]]) -> int:
    """Publish to a queue that exists; returns how many, when the broker has taken all of them.

    Raises:
        ConnectionBlockedTimeout: an alarm of the broker's has lasted for PATIENCE.
    """
    count = 0
    parameters = pika.URLParameters(url)
    parameters.blocked_connection_timeout = PATIENCE
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        for properties, body in messages:
            channel.basic_publish("", queue, body, properties)
            count += 1
        # The answer to any method comes after all that was sent before it has been dealt with.
        channel.queue_declare(queue, passive=True)
    return count


def declare(url: str, queue: str, arguments: Mapping[str, object]) -> None:
    """Make a durable queue."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=dict(arguments))


def drain(url: str, queue: str) -> list[BasicProperties]:
    """Take all that is ready in a queue; the messages' properties."""
    taken: list[BasicProperties] = []
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        while True:
            _, properties, _ = channel.basic_get(queue, auto_ack=True)
            if properties is None:
                return taken
            taken.append(properties)


class Depth:
    """What the broker says of a queue, asked over one connection; a context manager."""

    def __init__(self, url: str, queue: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._queue = queue

    def ready(self) -> int:
        """Messages ready for delivery; those that were delivered and not acked do not count."""
        return int(self._channel.queue_declare(self._queue, passive=True).method.message_count)

    def consumers(self) -> int:
        """How many consume it."""
        return int(self._channel.queue_declare(self._queue, passive=True).method.consumer_count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()
