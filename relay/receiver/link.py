"""One connection that consumes one queue: deliveries in, acks and rejects out.

It dies once and never reconnects. It knows neither what a delivery carries nor which may be acked.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pika.exceptions
import trio
from pika.channel import Channel
from pika.connection import Connection, Parameters
from pika.spec import Basic, BasicProperties

from relay.broker.adapter import TrioConnection
from relay.receiver import Settlement

CLOSE_TIMEOUT: Final = 5.0
"""Seconds in which the broker takes the last acks; without them it delivers once more."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message, with what it takes to answer for it."""

    tag: int
    properties: BasicProperties
    body: bytes


class Link:
    """One connection that consumes one queue, until it ends; it never reconnects.

    pika's callbacks change state and wake the one who waits, no more.
    """

    def __init__(
        self, parameters: Parameters, stream: trio.abc.Stream, queue: str, prefetch: int
    ) -> None:
        self.consuming = False
        self.deliveries: deque[Delivery] = deque()
        self.error: Exception | None = None
        self._stream = stream
        self._queue = queue
        self._prefetch = prefetch
        self._channel: Channel | None = None
        self._changed = trio.lowlevel.ParkingLot()
        self._connection = TrioConnection(
            parameters, stream, on_open=self._on_open, on_closed=self._on_closed
        )

    async def run(self) -> None:
        """Drive the connection until ``close``, or until it is lost; ``error`` tells why."""
        # Shielded, so that the last acks leave when the task is cancelled; close() ends it.
        with trio.CancelScope(shield=True):
            if self.error is None:
                await self._connection.run()
            else:
                # Closed before it could begin: the connection would not notice.
                await trio.aclose_forcefully(self._stream)

    async def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until something is ready, or the connection has ended."""
        while self.error is None and not ready():
            await self._changed.park()

    def settle(self, settlement: Settlement) -> None:
        """Reject and ack. Of no effect if the channel is gone: all of it will come again."""
        channel = self._channel
        if self.error is not None or channel is None or not channel.is_open:
            return
        for tag in settlement.reject:
            channel.basic_reject(tag, requeue=False)
        if settlement.ack:
            # All up to this one have been settled, so one ack does for many.
            channel.basic_ack(max(settlement.ack), multiple=True)

    def take(self, limit: int) -> list[Delivery]:
        """Up to ``limit`` deliveries, in order."""
        return [self.deliveries.popleft() for _ in range(min(limit, len(self.deliveries)))]

    async def close(self) -> None:
        """End the connection when the broker has taken what was settled.

        Not in pika's way: that cancels the consumer first, and quorum queues then put deliveries
        that are under way behind those that wait. The next consumer would see a gap.
        """
        channel = self._channel
        if self.error is None and self.consuming and channel is not None:
            # The answer to any method on the channel comes after its acks have been taken.
            flushed = trio.Event()
            channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _: self._set(flushed))
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self.wait_until(flushed.is_set)
        self._connection.abort("relay receive is done")
        self._end(pika.exceptions.StreamLostError("relay receive is done"))

    def _on_open(self, connection: Connection) -> None:
        connection.channel(on_open_callback=self._on_channel_open)

    def _on_channel_open(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(lambda _, reason: self._end(reason))
        channel.add_on_cancel_callback(
            lambda _: self._end(pika.exceptions.ConsumerCancelled("the queue was deleted or moved"))
        )
        channel.basic_qos(prefetch_count=self._prefetch, callback=self._on_qos)

    def _on_qos(self, _frame: object) -> None:
        assert self._channel is not None
        self._channel.basic_consume(self._queue, self._on_message, callback=self._on_consuming)

    def _on_consuming(self, _frame: object) -> None:
        self.consuming = True
        self._changed.unpark_all()

    def _on_message(
        self, _channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        self.deliveries.append(Delivery(int(method.delivery_tag or 0), properties, body))
        self._changed.unpark_all()

    def _set(self, event: trio.Event) -> None:
        event.set()
        self._changed.unpark_all()

    def _on_closed(self, _connection: Connection, reason: Exception) -> None:
        self._end(reason)

    def _end(self, reason: Exception) -> None:
        if self.error is None:
            self.error = reason
        self._changed.unpark_all()
