"""One connection that consumes one queue: deliveries in, acks and rejects out.

It dies once and never reconnects. It knows neither what a delivery carries nor which may be acked.

Whether the queue is a stream, only a refusal tells: RabbitMQ closes the channel of a consumer that
names an offset of any other queue. So an offset is named first, and the second channel does
without.

Two things bound what is held: the prefetch, in messages, and HELD_MAX, in bytes, beyond which
nothing more is read from the connection. A prefetch alone would not do: a frame may have 16 MiB,
and streams deliver by whole blocks of messages, beyond the prefetch (RabbitMQ 3.10). Headers count
as what they take in memory, which for a table made for it is some 20 times what came.
"""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
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

HELD_MAX: Final = 64 * 1024 * 1024
"""Bytes of deliveries held; one more may be on its way into memory."""

OFFSET: Final = "x-stream-offset"
"""The consumer's argument that says where in a stream to begin, and the header of deliveries."""

_PRECONDITION_FAILED: Final = 406


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message, with what it takes to answer for it.

    Attributes:
        tag: of the delivery.
        properties: of the message.
        body: of the message.
        offset: in the stream; None if the queue is none, or the message's headers are of no use.
        size: bytes of memory for body and headers.
    """

    tag: int
    properties: BasicProperties
    body: bytes
    offset: int | None = None
    size: int = 0


class OneChannel(ABC):
    """One connection with one channel that matters, until it ends; it never reconnects.

    pika's callbacks change state and wake the one who waits, no more.

    Attributes:
        error: why it has ended; None if it has not.
        dropped: whether ``drop`` ended it.
    """

    def __init__(self, parameters: Parameters, stream: trio.abc.Stream) -> None:
        self.error: Exception | None = None
        self.dropped = False
        self._stream = stream
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

    def drop(self, reason: str) -> None:
        """End the connection without a word to the broker; of no effect if it has ended."""
        self.dropped = self.dropped or self.error is None
        self._connection.abort(reason)
        self._end(pika.exceptions.StreamLostError(reason))

    @abstractmethod
    def _on_channel_open(self, channel: Channel) -> None: ...

    def _on_open(self, connection: Connection) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._on_channel_closed)
        self._on_channel_open(channel)

    def _on_channel_closed(self, _channel: Channel, reason: Exception) -> None:
        self._end(reason)

    def _on_closed(self, _connection: Connection, reason: Exception) -> None:
        self._end(reason)

    def _end(self, reason: Exception) -> None:
        if self.error is None:
            self.error = reason
        self._changed.unpark_all()


class Link(OneChannel):
    """One connection that consumes one queue.

    Attributes:
        consuming: whether deliveries may come.
        is_stream: whether the queue is a stream; known when ``consuming`` is true.
        deliveries: those that nobody has taken yet.
        largest: size of the largest delivery so far.
    """

    def __init__(
        self,
        parameters: Parameters,
        stream: trio.abc.Stream,
        queue: str,
        prefetch: int,
        *,
        offset: str | int = "first",
        acks_rejected: bool = False,
    ) -> None:
        """Makes one that is not connected yet.

        Args:
            parameters: of the connection.
            stream: to the broker.
            queue: to consume.
            prefetch: deliveries to hold unacked.
            offset: where to begin if the queue is a stream.
            acks_rejected: ack what is to be rejected: somebody else has put it elsewhere.
        """
        super().__init__(parameters, stream)
        self.consuming = False
        self.is_stream = True
        self.deliveries: deque[Delivery] = deque()
        self.largest = 0
        self._queue = queue
        self._prefetch = prefetch
        self._offset = offset
        self._acks_rejected = acks_rejected
        self._held = 0
        self._is_closing = False

    @property
    def is_paused(self) -> bool:
        """Whether nothing is read because enough is held."""
        return self._held >= HELD_MAX

    def take(self, limit: int) -> list[Delivery]:
        """Up to ``limit`` deliveries, in order, and no more than half of HELD_MAX has room for.

        At least one if there is one. They count as held until they are settled, or put back.
        """
        taken: list[Delivery] = []
        size = 0
        while self.deliveries and len(taken) < limit:
            size += self.deliveries[0].size
            if taken and size > HELD_MAX // 2:
                break
            taken.append(self.deliveries.popleft())
        return taken

    def put_back(self, deliveries: list[Delivery]) -> None:
        """Give back the last of those that were taken; the next ``take`` begins with them."""
        self.deliveries.extendleft(reversed(deliveries))

    def settle(self, deliveries: list[Delivery], settlement: Settlement) -> None:
        """Reject and ack. Of no effect if the channel is gone: all of it will come again.

        ``deliveries`` are those that ``settlement`` answers for: all up to the last of them.
        """
        self._release(deliveries)
        channel = self._channel
        if self.error is not None or channel is None or not channel.is_open or not deliveries:
            return
        ack: list[int] = [*settlement.ack]
        if self.is_stream or self._acks_rejected:
            # RabbitMQ 3.10 ends the whole connection over a reject on a stream.
            ack += settlement.reject
        else:
            for tag in settlement.reject:
                channel.basic_reject(tag, requeue=False)
        if ack:
            # All up to this one have been settled, so one ack does for many.
            channel.basic_ack(max(ack), multiple=True)

    def skip(self, delivery: Delivery) -> None:
        """Ack one that was taken and is known already."""
        self.settle([delivery], Settlement((delivery.tag,), {}, (), ()))

    async def close(self) -> None:
        """End the connection when the broker has taken what was settled.

        Not in pika's way: that cancels the consumer first, and quorum queues then put deliveries
        that are under way behind those that wait. The next consumer would see a gap.
        """
        channel = self._channel
        self._is_closing = True
        self.deliveries.clear()
        self._connection.resume_reading()
        if self.error is None and self.consuming and channel is not None:
            # The answer to any method on the channel comes after its acks have been taken.
            flushed = trio.Event()
            channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _: self._set(flushed))
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self.wait_until(flushed.is_set)
        self.drop("relay receive is done")

    def _on_channel_open(self, channel: Channel) -> None:
        channel.add_on_cancel_callback(
            lambda _: self._end(pika.exceptions.ConsumerCancelled("the queue was deleted or moved"))
        )
        channel.basic_qos(prefetch_count=self._prefetch, callback=self._on_qos)

    def _on_qos(self, _frame: object) -> None:
        assert self._channel is not None
        self._channel.basic_consume(
            self._queue,
            self._on_message,
            arguments={OFFSET: self._offset} if self.is_stream else None,
            callback=self._on_consuming,
        )

    def _on_channel_closed(self, channel: Channel, reason: Exception) -> None:
        if (
            self.is_stream
            and not self.consuming
            and isinstance(reason, pika.exceptions.ChannelClosedByBroker)
            and reason.reply_code == _PRECONDITION_FAILED
            and OFFSET in reason.reply_text
        ):
            self.is_stream = False
            self._on_open(self._connection)
        else:
            super()._on_channel_closed(channel, reason)

    def _on_consuming(self, _frame: object) -> None:
        self.consuming = True
        self._changed.unpark_all()

    def _on_message(
        self, _channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        if self._is_closing:
            return
        headers = properties.headers or {}
        offset = headers.get(OFFSET) if self.is_stream else None
        size = len(body) + footprint(headers)
        self.deliveries.append(
            Delivery(
                int(method.delivery_tag or 0),
                properties,
                body,
                offset if isinstance(offset, int) else None,
                size,
            )
        )
        self.largest = max(self.largest, size)
        self._held += size
        if self.is_paused:
            self._connection.pause_reading()
        self._changed.unpark_all()

    def _release(self, deliveries: list[Delivery]) -> None:
        self._held -= sum(delivery.size for delivery in deliveries)
        if not self.is_paused:
            self._connection.resume_reading()

    def _set(self, event: trio.Event) -> None:
        event.set()
        self._changed.unpark_all()


def footprint(headers: Mapping[str, object]) -> int:
    """Bytes of memory that headers take, tables in tables included."""
    size = 0
    containers: list[object] = [headers]
    while containers:
        container = containers.pop()
        size += sys.getsizeof(container)
        if isinstance(container, Mapping):
            size += sum(map(sys.getsizeof, container))
            values: Iterable[object] = container.values()
        else:
            assert isinstance(container, list)
            values = container
        for value in values:
            if isinstance(value, dict | list):
                containers.append(value)
            else:
                size += sys.getsizeof(value)
    return size
