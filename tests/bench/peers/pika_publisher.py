"""Confirmed uploads by pika, for a server with threads.

pika's BlockingConnection waits for the confirm of each message. Whoever needs a window has a
SelectConnection in a thread of its own, and hands it calls by ``add_callback_threadsafe``: pika's
connections are not thread-safe otherwise. Each upload has a channel in confirm mode to itself while
it lasts, so that what is nacked or returned on it is its own; channels are kept for the next one.
"""

import threading
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pika
from pika.channel import Channel
from pika.connection import Connection
from pika.frame import Method

from tests.bench.peers.destination import WINDOW, Destination, NotConfirmed

TIMEOUT: Final = 60.0
"""Seconds for the broker to answer anything."""


class Broker:
    """The connection of a process: made when it is needed first, and anew when it is lost.

    Not before: gunicorn forks its workers, and threads do not survive a fork.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._lock = threading.Lock()
        self._link: _Link | None = None

    @contextmanager
    def upload(self) -> Iterator["Upload"]:
        """An upload; left when all of its messages are confirmed.

        Raises:
            NotConfirmed: one of them was not, or there is no broker.
        """
        with self._lock:
            if self._link is None or not self._link.is_open:
                self._link = _Link(self._destination.url)
            link = self._link
        with link.lent_channel() as channel:
            upload = Upload(channel, self._destination)
            yield upload
            channel.wait_confirmed()


class Upload:
    """Publishes what one request brought."""

    def __init__(self, channel: "_ConfirmChannel", destination: Destination) -> None:
        self._channel = channel
        self._destination = destination
        self._id = str(uuid.uuid4())
        self.messages = 0

    def publish(self, name: str, body: bytes) -> None:
        """Has one message published, when there is room in the window. Raises NotConfirmed."""
        properties = pika.BasicProperties(
            delivery_mode=pika.DeliveryMode.Persistent.value,
            correlation_id=self._id,
            headers={"name": name, "piece": self.messages},
        )
        self._channel.publish(self._destination, body, properties)
        self.messages += 1


def settle(unconfirmed: deque[int], ack: pika.spec.Basic.Ack) -> None:
    """Takes what an ack is for from the delivery tags, which are in order."""
    tag: Any = ack.delivery_tag
    if ack.multiple:
        while unconfirmed and unconfirmed[0] <= tag:
            unconfirmed.popleft()
    else:
        unconfirmed.remove(tag)


class _Link:
    """A connection and the thread that does its I/O. Lives once."""

    def __init__(self, url: str) -> None:
        opened: Future[Connection] = Future()

        def not_opened(connection: Connection, error: BaseException) -> None:
            opened.set_exception(NotConfirmed(f"no broker: {error!r}"))
            connection.ioloop.stop()

        self._connection = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=opened.set_result,
            on_open_error_callback=not_opened,
            on_close_callback=lambda *_: self._connection.ioloop.stop(),
        )
        self._idle: list[_ConfirmChannel] = []
        threading.Thread(target=self._connection.ioloop.start, daemon=True).start()
        opened.result(TIMEOUT)

    @property
    def is_open(self) -> bool:
        return self._connection.is_open

    @contextmanager
    def lent_channel(self) -> Iterator["_ConfirmChannel"]:
        """A channel for one upload; one that failed, or was left with an error, is closed."""
        try:
            channel = self._idle.pop()
        except IndexError:
            channel = self._opened_channel()
        try:
            yield channel
        except BaseException:
            self.call(channel.close)
            raise
        self._idle.append(channel)

    def call(self, function: partial[Any] | Any) -> None:
        """Has the connection's thread call a function."""
        self._connection.ioloop.add_callback_threadsafe(function)

    def _opened_channel(self) -> "_ConfirmChannel":
        confirming: Future[_ConfirmChannel] = Future()

        def opened(channel: Channel) -> None:
            lent = _ConfirmChannel(self, channel)
            channel.confirm_delivery(lent.on_confirm, lambda _: confirming.set_result(lent))

        self.call(partial(self._connection.channel, on_open_callback=opened))
        try:
            return confirming.result(TIMEOUT)
        except TimeoutError:
            raise NotConfirmed("the broker opened no channel") from None


class _ConfirmChannel:
    """A channel in confirm mode, with the book of what is unconfirmed.

    Handlers publish and wait; the connection's thread sends, and calls what begins with ``on_``.
    """

    def __init__(self, link: _Link, channel: Channel) -> None:
        self._link = link
        self._channel = channel
        self._changed = threading.Condition()
        self._last_tag = 0
        self._unconfirmed: deque[int] = deque()
        self._failure: str | None = None
        channel.add_on_return_callback(self.on_return)
        channel.add_on_close_callback(self.on_close)

    def publish(
        self, destination: Destination, body: bytes, properties: pika.BasicProperties
    ) -> None:
        """Publish when fewer than ``WINDOW`` messages are unconfirmed. Raises NotConfirmed."""
        with self._changed:
            self._wait_until(WINDOW - 1)
            self._last_tag += 1
            self._unconfirmed.append(self._last_tag)
        self._link.call(partial(self._send, destination, body, properties))

    def wait_confirmed(self) -> None:
        """Return when nothing is unconfirmed. Raises NotConfirmed."""
        with self._changed:
            self._wait_until(0)

    def close(self) -> None:
        """Close it, unless it is."""
        if self._channel.is_open:
            self._channel.close()

    def on_confirm(self, frame: Method[Any]) -> None:
        """An ack or a nack of one message, or of all up to it."""
        confirm: Any = frame.method
        with self._changed:
            if isinstance(confirm, pika.spec.Basic.Nack):
                self._failure = "rejected"
            else:
                settle(self._unconfirmed, confirm)
            self._changed.notify()

    def on_return(self, *_: object) -> None:
        """A message came back: no queue takes it. Its ack comes after it."""
        with self._changed:
            self._failure = "unroutable"

    def on_close(self, _channel: Channel, reason: Exception) -> None:
        """What is unconfirmed now will stay so."""
        with self._changed:
            self._failure = str(reason)
            self._changed.notify()

    def _wait_until(self, most: int) -> None:
        done = self._changed.wait_for(
            lambda: self._failure is not None or len(self._unconfirmed) <= most, TIMEOUT
        )
        if self._failure is not None or not done:
            raise NotConfirmed(self._failure or "no confirm in time")

    def _send(
        self, destination: Destination, body: bytes, properties: pika.BasicProperties
    ) -> None:
        if self._channel.is_open:
            self._channel.basic_publish(
                destination.exchange,
                destination.routing_key,
                body,
                properties,
                mandatory=destination.mandatory,
            )
