"""One AMQP connection and its confirm channels. It dies once and never reconnects.

Turns pika's callbacks into state and wakes who waits; translates pika's exceptions into relay's.
What to do when a session dies is ``publisher.py``'s business.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import pika.exceptions
import trio
from pika.channel import Channel
from pika.connection import Connection, Parameters
from pika.frame import Method
from pika.spec import Basic, BasicProperties
from pika.spec import Connection as AmqpConnection

from relay.broker.adapter import TrioConnection
from relay.broker.content_header import HeaderMarshaller
from relay.config import QueueConfig
from relay.errors import BrokerError, BrokerRefused, BrokerUnavailable
from relay.protocol.confirms import Confirms, Outcome, UnknownDeliveryTag
from relay.protocol.wire import Message

log = logging.getLogger(__name__)

RPC_TIMEOUT: Final = 15.0
"""Seconds for the broker to say anything while it owes the answer to a synchronous method."""

_WORDS: Final = re.compile(r"\((\d+)\) (['\"])(.*)\2")
"""Reply code and text, in what pika makes of a connection that is closed while it opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a channel's messages go."""

    exchange: str
    routing_key: str
    mandatory: bool
    delivery_mode: int


class ChannelOwner(Protocol):
    """Who is told what becomes of the messages on a channel. Must not block."""

    def on_settled(self, message: Message, outcome: Outcome) -> None:
        """The broker has settled ``message``."""

    def on_channel_lost(self, unknown: list[Message], error: BrokerError) -> None:
        """The channel is gone; what became of ``unknown``, oldest first, nobody can tell."""


class ConfirmChannel:
    """A channel in confirm mode, used by one upload at a time.

    Attributes:
        has_taken: whether a message to its present address was acked.
        has_rejected: whether any message was nacked. It may go on nacking, see ``rejection.py``.
    """

    def __init__(self, connection: TrioConnection, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        self._confirms: Confirms[Message] = Confirms()
        self._owner: ChannelOwner | None = None
        self._address: Address | None = None
        self.has_taken = False
        self.has_rejected = False
        self._method = {True: b"", False: b""}
        self._header = HeaderMarshaller(channel.channel_number, 2)
        connection.set_on_ack(channel.channel_number, self._on_ack)
        channel.add_on_return_callback(self._on_return)
        channel.add_on_close_callback(self._on_close)

    @property
    def is_open(self) -> bool:
        """Whether messages can be published."""
        return bool(self._channel.is_open)

    @property
    def outstanding(self) -> int:
        """Number of messages not yet settled."""
        return len(self._confirms)

    def assign(self, owner: ChannelOwner, address: Address) -> None:
        """Give the channel to an upload, whose messages all go to ``address``.

        Raises:
            BrokerRefused: AMQP cannot express the address. The channel keeps its owner.
        """
        assert not self._confirms, "a channel changes hands with nothing outstanding"
        if address != self._address:
            self._header = HeaderMarshaller(self._channel.channel_number, address.delivery_mode)
            try:
                self._method = {
                    mandatory: Method(
                        self._channel.channel_number,
                        Basic.Publish(
                            exchange=address.exchange,
                            routing_key=address.routing_key,
                            mandatory=mandatory,
                        ),
                    ).marshal()
                    for mandatory in (True, False)
                }
            except pika.exceptions.ShortStringTooLong as exc:
                self._address = None
                raise BrokerRefused("exchange or routing key is longer than 255 bytes") from exc
            self._address = address
            self.has_taken = False
        self._owner = owner

    def publish(self, message: Message, *, mandatory: bool) -> None:
        """Book ``message`` under the next delivery tag and queue it to be written.

        Raises:
            BrokerRefused: its headers are too large to be sent. Nothing is booked.
        """
        header = self._header.marshal(message)
        if len(header) > self._connection.params.frame_max:
            # The broker would end the connection over it, and every other upload with it.
            raise BrokerRefused("the frame's headers are larger than the broker's frame_max")
        # Booked first: the confirm of a message can be back before the next line has run.
        self._confirms.register(message)
        self._connection.send_content(
            self._channel.channel_number, self._method[mandatory], header, message.body
        )

    def close(self) -> None:
        """Close the channel; nothing may be outstanding that anybody waits for."""
        if self._channel.is_open or self._channel.is_opening:
            self._channel.close()

    def retire(self) -> None:
        """Close the channel; its owner is told nothing any more."""
        self._owner = None
        self.close()

    def on_confirm(self, frame: Method[Basic.Ack | Basic.Nack]) -> None:
        """Take basic.nack, and what acks the connection leaves to pika; a callback of pika's."""
        method = frame.method
        acked = isinstance(method, Basic.Ack)
        self._settle(int(method.delivery_tag or 0), bool(method.multiple), acked=acked)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple, acked=True)

    def _settle(self, tag: int, multiple: bool, *, acked: bool) -> None:
        try:
            settled = self._confirms.settle(tag, multiple=multiple, acked=acked)
        except UnknownDeliveryTag as exc:
            log.error("broker confirmed what was not published: %s", exc)
            self._connection.abort(f"confirms are out of step: {exc}")
            return
        self.has_taken = self.has_taken or acked
        self.has_rejected = self.has_rejected or not acked
        owner = self._owner  # who may give the channel back at the first of several
        if owner is not None:
            for message, outcome in settled:
                owner.on_settled(message, outcome)

    def _on_return(
        self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes
    ) -> None:
        known = self._confirms.mark_returned(lambda m: m.message_id == properties.message_id)
        if not known:
            log.warning("broker returned a message that is not outstanding")

    def _on_close(self, _channel: Channel, reason: Exception) -> None:
        self._connection.set_on_ack(self._channel.channel_number, None)
        unknown = self._confirms.lost()
        if self._owner is not None:
            self._owner.on_channel_lost(unknown, translate(reason))


class Session:
    """An AMQP connection from connecting to its end."""

    def __init__(self, parameters: Parameters, stream: trio.abc.Stream) -> None:
        self.opened = trio.Event()
        self.closed = trio.Event()
        self.blocked_reason: str | None = None
        self.error: BrokerError | None = None
        self.on_blocked_changed: Callable[[], None] = lambda: None
        self._idle: list[ConfirmChannel] = []
        self._connection = TrioConnection(
            parameters, stream, on_open=self._on_open, on_closed=self._on_closed
        )
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)

    @property
    def is_open(self) -> bool:
        """Whether channels can be had."""
        return self.opened.is_set() and not self.closed.is_set()

    @property
    def rabbitmq_major(self) -> int | None:
        """The first number of RabbitMQ's version; None if the broker does not say, or is another.

        Known from when the session is open.
        """
        properties = self._connection.server_properties or {}
        major = str(properties.get("version", "")).partition(".")[0]
        is_known = properties.get("product") == "RabbitMQ" and major.isdecimal()
        return int(major) if is_known else None

    @property
    def last_heard(self) -> float:
        """When the broker last sent anything, by trio's clock."""
        return self._connection.last_heard

    @property
    def queued(self) -> int:
        """Bytes waiting to be written to the socket."""
        return self._connection.queued

    @property
    def channels(self) -> int:
        """Number of idle channels in the pool."""
        return len(self._idle)

    async def run(self) -> None:
        """Drive the connection until it ends; ``error`` tells why."""
        await self._connection.run()

    async def wait_open(self) -> None:
        """Wait until the AMQP handshake is done.

        Raises:
            BrokerUnavailable: it failed, or took longer than RPC_TIMEOUT seconds.
        """
        with trio.move_on_after(RPC_TIMEOUT):
            await self.opened.wait()
        if not self.is_open:
            self.abort("the AMQP handshake took too long")
            raise self.error or BrokerUnavailable("the AMQP handshake took too long")

    def abort(self, reason: str) -> None:
        """Drop the connection."""
        self._connection.abort(reason)

    async def close(self) -> None:
        """Say goodbye to the broker, and drop the connection if it does not answer."""
        if self._connection.is_open:
            self._connection.close()
            with trio.move_on_after(RPC_TIMEOUT):
                await self.closed.wait()
        self.abort("relay is stopping")

    async def acquire(self) -> ConfirmChannel:
        """A confirm channel that nobody uses.

        Raises:
            BrokerError: the broker refuses, does not answer in time, or is gone.
        """
        return self.take_idle() or await self.open_confirm_channel()

    def take_idle(self) -> ConfirmChannel | None:
        """A confirm channel that is open and that nobody uses, if there is one."""
        while self._idle:
            channel = self._idle.pop()
            if channel.is_open:
                return channel
        return None

    def release(self, channel: ConfirmChannel) -> None:
        """Give a channel back to the pool; nothing may be outstanding on it.

        One that has rejected is closed: it may reject whatever the next upload has for it, too.
        """
        if channel.has_rejected:
            channel.retire()
        elif channel.is_open and not channel.outstanding:
            self._idle.append(channel)

    async def declare(self, queue: QueueConfig) -> None:
        """Declare a durable queue; harmless if it exists with the same properties.

        Raises:
            BrokerRefused: it exists with other properties, or may not be declared.
        """
        await self.declare_as(queue.name, {"x-queue-type": queue.type, **queue.arguments})

    async def declare_as(
        self,
        name: str,
        arguments: Mapping[str, str | int | bool],
        *,
        durable: bool = True,
        auto_delete: bool = False,
    ) -> None:
        """Declare a queue with exactly these properties.

        Raises:
            BrokerRefused: it exists with other properties (406, naming the first that differs),
                or may not be declared.
        """
        await self._ask(
            f"declaring queue {name}",
            lambda channel, answered: channel.queue_declare(
                name,
                durable=durable,
                auto_delete=auto_delete,
                arguments=dict(arguments),
                callback=answered,
            ),
        )

    async def find_queue(self, name: str) -> int:
        """How many messages a queue has ready; needs no permission, and changes nothing.

        RabbitMQ says 0 of a quorum queue whose leader does not answer.

        Raises:
            BrokerRefused: it does not (404), or another connection has it for itself (405).
        """
        frame = await self._ask(
            f"looking for queue {name}",
            lambda channel, answered: channel.queue_declare(name, passive=True, callback=answered),
        )
        assert isinstance(frame, Method)
        return int(frame.method.message_count)

    async def find_exchange(self, name: str) -> None:
        """Make sure that an exchange other than the default one exists, and change nothing.

        Raises:
            BrokerRefused: it does not (404).
        """
        await self._ask(
            f"looking for exchange {name}",
            lambda channel, answered: channel.exchange_declare(
                name, passive=True, callback=answered
            ),
        )

    async def _ask(
        self, doing: str, ask: Callable[[Channel, Callable[..., None]], object]
    ) -> object:
        """One synchronous method on a channel of its own, because a refusal closes it.

        Returns pika's frame with the answer.
        """
        channel = await self._open_channel()
        reply = _Reply()
        channel.add_on_close_callback(lambda _, reason: reply.fail(translate(reason)))
        ask(channel, reply.set)
        await self._wait(reply, doing)
        channel.close()
        return reply.frame

    async def _open_channel(self) -> Channel:
        reply = _Reply()
        try:
            channel = self._connection.channel(on_open_callback=reply.set)
        except pika.exceptions.AMQPError as exc:
            raise translate(exc) from exc
        channel.add_on_close_callback(lambda _, reason: reply.fail(translate(reason)))
        try:
            await self._wait(reply, "opening a channel")
        except trio.Cancelled:
            if channel.is_opening or channel.is_open:
                channel.close()
            raise
        return channel

    async def open_confirm_channel(self) -> ConfirmChannel:
        """A confirm channel that nobody has used before. Raises as ``acquire``."""
        channel = await self._open_channel()
        confirm_channel = ConfirmChannel(self._connection, channel)
        reply = _Reply()
        channel.add_on_close_callback(lambda _, reason: reply.fail(translate(reason)))
        channel.confirm_delivery(confirm_channel.on_confirm, callback=reply.set)
        try:
            await self._wait(reply, "selecting confirm mode")
        except trio.Cancelled:
            confirm_channel.close()
            raise
        return confirm_channel

    async def _wait(self, reply: "_Reply", doing: str) -> None:
        while not reply.event.is_set():
            received = self._connection.bytes_received
            with trio.move_on_after(RPC_TIMEOUT):
                await reply.event.wait()
            # A slow broker comes to it when it has read what was published before, and confirms
            # meanwhile. One that says nothing at all is as good as lost.
            if not reply.event.is_set() and self._connection.bytes_received == received:
                self.abort(f"no answer from the broker while {doing}")
                raise BrokerUnavailable(f"no answer from the broker while {doing}")
        if reply.error is not None:
            raise reply.error

    def _on_open(self, connection: Connection) -> None:
        if connection.publisher_confirms and connection.basic_nack:
            self.opened.set()
        else:
            self.abort("the broker does not confirm what it takes")

    def _on_closed(self, _connection: Connection, reason: Exception) -> None:
        self.error = translate(reason)
        self._idle.clear()
        self.closed.set()
        self.opened.set()

    def _on_blocked(self, _connection: Connection, frame: Method[AmqpConnection.Blocked]) -> None:
        self.blocked_reason = str(getattr(frame.method, "reason", "") or "resource alarm")
        self.on_blocked_changed()

    def _on_unblocked(
        self, _connection: Connection, _frame: Method[AmqpConnection.Unblocked]
    ) -> None:
        self.blocked_reason = None
        self.on_blocked_changed()


class _Reply:
    """The answer to one synchronous method."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.error: BrokerError | None = None
        self.frame: object = None

    def set(self, frame: object) -> None:
        self.frame = frame
        self.event.set()

    def fail(self, error: BrokerError) -> None:
        # Even after the answer: both can come in one read, before the asking task has run.
        self.error = self.error or error
        self.event.set()


def translate(reason: Exception) -> BrokerError:
    """Make pika's exception relay's: refused if the broker closed a channel, else unavailable."""
    if isinstance(reason, pika.exceptions.ChannelClosedByBroker):
        text = f"{reason.reply_code} {reason.reply_text}"
        return BrokerRefused(f"the broker refused: {text}", reply_code=reason.reply_code)
    if isinstance(reason, pika.exceptions.NoFreeChannels):
        return BrokerRefused("the broker allows no further channel on this connection")
    if isinstance(reason, pika.exceptions.ConnectionClosedByClient):
        return BrokerUnavailable("relay has closed its connection to the broker")
    if isinstance(reason, pika.exceptions.ConnectionClosedByBroker):
        text = f"{reason.reply_code} {reason.reply_text}"
        return BrokerUnavailable(f"the broker closed the connection: {text}")
    if isinstance(reason, pika.exceptions.ProbableAuthenticationError):
        return BrokerUnavailable(
            "the broker refused the login: wrong user name or password, or a certificate of no user"
        )
    if isinstance(reason, pika.exceptions.ProbableAccessDeniedError):
        # Whether it is missing or forbidden, only the broker's words tell.
        words = _WORDS.search(str(reason))
        said = f": {words[1]} {words[3]}" if words else ""
        return BrokerUnavailable(f"the broker refused access to the virtual host{said}")
    if isinstance(reason, pika.exceptions.AuthenticationError):
        return BrokerUnavailable(f"the broker does not offer {reason} logins")
    if isinstance(reason, pika.exceptions.IncompatibleProtocolError):
        return BrokerUnavailable(
            "the broker closed the connection without a word of AMQP; is its port one for TLS?"
        )
    return BrokerUnavailable(f"no connection to the broker: {reason}")
