"""A broker of which the test decides every word: the server's half of AMQP 0-9-1 on a trio stream.

A real broker acks in order, nacks rarely and hardly ever dies in the middle of a frame; this one
does what it is told. It reads and writes with pika's codec, counts delivery tags as RabbitMQ does,
and answers nothing by itself: the test that holds it plays the broker's part. ``Network`` makes
one for each connection that relay opens.
"""

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import trio
import trio.testing
from pika import frame as amqp
from pika.amqp_object import Method
from pika.spec import Basic, BasicProperties, Channel, Confirm, Connection, Queue

from tests.queue_reader import Delivered

MOCKED_PATIENCE = 7200.0
REAL_PATIENCE = 60.0
"""Seconds for a whole test: who waits longer waits for what never comes."""

AnyMethod = TypeVar("AnyMethod", bound=Method)
StreamPair = tuple[trio.abc.Stream, trio.abc.Stream]


def patience() -> AbstractContextManager[trio.CancelScope]:
    """Has a test fail that would hang; hours of a mocked clock cost nothing."""
    is_mocked = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    return trio.fail_after(MOCKED_PATIENCE if is_mocked else REAL_PATIENCE)


class RelayGone(Exception):
    """Relay has closed the connection."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Published(Delivered):
    """A message as relay published it, with the delivery tag that its channel has come to."""

    channel: int
    tag: int
    method: Basic.Publish

    def __repr__(self) -> str:
        headers = self.properties.headers
        return f"<{self.channel}/{self.tag} {self.properties.type} {headers} {len(self.body)} B>"

    @property
    def correlation_id(self) -> str:
        """The transfer's id."""
        return str(self.properties.correlation_id)

    @property
    def seq(self) -> int:
        """The header of that name."""
        return int((self.properties.headers or {})["seq"])


@dataclass(frozen=True, kw_only=True)
class Said:
    """A method without content that relay has sent, or a heartbeat (None)."""

    channel: int
    method: Method | None


class ScriptedBroker:
    """The broker's end of one connection.

    Attributes:
        address: host and port that relay asked for.
        body_sizes: payload sizes of the AMQP body frames received, in order.
        heartbeats: heartbeat frames received.
        channels: confirm channels that ``published`` and ``serve`` have opened and not closed.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        address: tuple[str, int] = ("memory", 0),
        *,
        frame_max: int = 131072,
        channel_max: int = 2047,
    ) -> None:
        self.address = address
        self.body_sizes: list[int] = []
        self.heartbeats = 0
        self.channels: set[int] = set()
        self._stream = stream
        self._frame_max = frame_max
        self._channel_max = channel_max
        self._unread = b""
        self._tags: dict[int, int] = {}

    # --- listening -----------------------------------------------------------------------------

    async def receive(self) -> Published | Said:
        """The next thing relay says. Raises RelayGone at the connection's end."""
        frame = await self._frame()
        if isinstance(frame, amqp.Heartbeat):
            self.heartbeats += 1
            return Said(channel=0, method=None)
        assert isinstance(frame, amqp.Method), frame
        if isinstance(frame.method, Basic.Publish):
            return await self._content(frame.channel_number, frame.method)
        return Said(channel=frame.channel_number, method=frame.method)

    async def expect(self, kind: type[AnyMethod]) -> tuple[int, AnyMethod]:
        """The next method, heartbeats aside, which must be of that kind; with its channel."""
        while True:
            said = await self.receive()
            assert isinstance(said, Said), said
            if said.method is not None:
                assert isinstance(said.method, kind), said.method
                return said.channel, said.method

    async def published(self, count: int = 1) -> list[Published]:
        """The next ``count`` messages; channels are opened and closed as relay asks."""
        messages: list[Published] = []
        while len(messages) < count:
            said = await self.receive()
            if isinstance(said, Published):
                messages.append(said)
            else:
                await self._open_or_close(said)
        return messages

    async def _open_or_close(self, said: Said) -> None:
        if isinstance(said.method, Channel.Open):
            self._tags[said.channel] = 0
            await self.send(Channel.OpenOk(), channel=said.channel)
        elif isinstance(said.method, Confirm.Select):
            self.channels.add(said.channel)
            await self.send(Confirm.SelectOk(), channel=said.channel)
        elif isinstance(said.method, Channel.Close):
            await self.send(Channel.CloseOk(), channel=said.channel)
            self.channels.discard(said.channel)
        else:
            assert said.method is None, said.method

    async def silence(self) -> None:
        """Make sure that relay has nothing to say now, once all that could run has run."""
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.001):
            raise AssertionError(await self.receive())

    async def wait_gone(self) -> None:
        """Read on until relay has closed the connection; what it says is of no interest."""
        try:
            while await self._stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass

    async def _frame(self) -> amqp.Frame | amqp.ProtocolHeader:
        while True:
            used, frame = amqp.decode_frame(self._unread) if self._unread else (0, None)
            if frame is not None:
                self._unread = self._unread[used:]
                return frame
            try:
                data = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise RelayGone from exc
            if not data:
                raise RelayGone
            self._unread += data

    async def _content(self, channel: int, method: Basic.Publish) -> Published:
        header = await self._frame()
        assert isinstance(header, amqp.Header)
        assert header.channel_number == channel
        body = b""
        while len(body) < header.body_size:
            piece = await self._frame()
            assert isinstance(piece, amqp.Body)
            assert piece.channel_number == channel
            self.body_sizes.append(len(piece.fragment))
            body += piece.fragment
        tag = self._tags[channel] = self._tags[channel] + 1
        properties = header.properties
        assert isinstance(properties, BasicProperties)
        return Published(properties, body, channel=channel, tag=tag, method=method)

    # --- speaking ------------------------------------------------------------------------------

    async def send_bytes(self, data: bytes) -> None:
        """Send anything."""
        await self._stream.send_all(data)

    async def send(self, *methods: Method, channel: int = 0) -> None:
        """Send methods without content, all in one write."""
        await self.send_bytes(b"".join(amqp.Method(channel, m).marshal() for m in methods))

    async def ack(self, *tags: int, multiple: bool = False, channel: int = 1) -> None:
        """Send a basic.ack for each tag, in that order."""
        await self.send(*(Basic.Ack(tag, multiple) for tag in tags), channel=channel)

    async def confirm(self, *messages: Published) -> None:
        """Ack each message, in that order."""
        for message in messages:
            await self.ack(message.tag, channel=message.channel)

    async def nack(self, *tags: int, multiple: bool = False, channel: int = 1) -> None:
        """Send a basic.nack for each tag, in that order."""
        await self.send(*(Basic.Nack(tag, multiple) for tag in tags), channel=channel)

    async def reject(self, *messages: Published) -> None:
        """Nack each message, in that order."""
        for message in messages:
            await self.nack(message.tag, channel=message.channel)

    async def give_back(self, message: Published) -> None:
        """Send a basic.return, as for a mandatory message that no queue took. No ack follows."""
        method = Basic.Return(312, "NO_ROUTE", message.method.exchange, message.method.routing_key)
        frames: list[amqp.Frame] = [
            amqp.Method(message.channel, method),
            amqp.Header(message.channel, len(message.body), message.properties),
        ]
        if message.body:
            frames.append(amqp.Body(message.channel, message.body))
        await self.send_bytes(b"".join(frame.marshal() for frame in frames))

    async def heartbeat(self) -> None:
        """Send a heartbeat."""
        await self.send_bytes(amqp.Heartbeat().marshal())

    async def block(self, reason: str = "low on memory") -> None:
        """Tell relay that an alarm keeps the broker from reading."""
        await self.send(Connection.Blocked(reason))

    async def unblock(self) -> None:
        """Tell relay that it reads again."""
        await self.send(Connection.Unblocked())

    async def cut(self) -> None:
        """End the connection as a crash would: no word of AMQP."""
        await trio.aclose_forcefully(self._stream)

    # --- whole exchanges -----------------------------------------------------------------------

    async def accept_protocol(self, *capabilities: str) -> None:
        """Take relay's protocol header and credentials."""
        assert isinstance(await self._frame(), amqp.ProtocolHeader)
        able = dict.fromkeys(capabilities, True)
        await self.send(
            Connection.Start(server_properties={"capabilities": able}, mechanisms="PLAIN")
        )
        await self.expect(Connection.StartOk)

    async def handshake(self, *capabilities: str) -> None:
        """From relay's protocol header to connection.open-ok.

        ``capabilities`` take the place of those that relay needs.
        """
        await self.accept_protocol(*(capabilities or ("publisher_confirms", "basic.nack")))
        await self.send(Connection.Tune(self._channel_max, self._frame_max, 0))
        await self.expect(Connection.TuneOk)
        await self.expect(Connection.Open)
        await self.send(Connection.OpenOk())

    async def accept_open(self) -> int:
        """Answer a channel.open, and nothing else; returns the channel's number."""
        channel, _ = await self.expect(Channel.Open)
        self._tags[channel] = 0
        await self.send(Channel.OpenOk(), channel=channel)
        return channel

    async def accept_channel(self) -> int:
        """Answer what opens a confirm channel; returns its number."""
        channel = await self.accept_open()
        await self.expect(Confirm.Select)
        await self.send(Confirm.SelectOk(), channel=channel)
        return channel

    async def accept_close(self) -> int:
        """Answer relay's closing of a channel; returns its number."""
        channel, _ = await self.expect(Channel.Close)
        await self.send(Channel.CloseOk(), channel=channel)
        return channel

    async def accept_declare(self, ready: int = 0) -> Queue.Declare:
        """Answer a declaration, on a channel of its own: the queue has ``ready`` messages."""
        channel = await self.accept_open()
        _, declare = await self.expect(Queue.Declare)
        await self.send(Queue.DeclareOk(declare.queue, ready, 0), channel=channel)
        await self.accept_close()
        return declare

    async def close_channel(self, channel: int, code: int, text: str) -> None:
        """Close a channel and wait for relay's consent."""
        await self.send(Channel.Close(code, text, 60, 40), channel=channel)
        while True:
            said = await self.receive()
            # What relay published before it knew is lost, as it is with a real broker.
            if isinstance(said, Said) and isinstance(said.method, Channel.CloseOk):
                assert said.channel == channel
                return

    async def serve(self, take: Callable[[Published], Awaitable[None]] | None = None) -> None:
        """Open and close channels as relay asks, and ``take`` or confirm all, until it goes."""
        try:
            while True:
                said = await self.receive()
                if isinstance(said, Published):
                    await (take or self.confirm)(said)
                else:
                    await self._open_or_close(said)
        except (RelayGone, trio.BrokenResourceError):
            return

    async def accept_goodbye(self) -> None:
        """Answer relay's closing of its channels and of the connection."""
        while True:
            said = await self.receive()
            if isinstance(said, Said) and isinstance(said.method, Channel.Close):
                await self.send(Channel.CloseOk(), channel=said.channel)
            elif isinstance(said, Said) and isinstance(said.method, Connection.Close):
                await self.send(Connection.CloseOk())
                return


class Network:
    """Where relay connects to: each connection made is a ScriptedBroker to ``accept``.

    Attributes:
        attempts: time and address of every attempt to connect.
        is_down: have attempts fail, as when nobody listens.
    """

    def __init__(
        self,
        stream_pair: Callable[[], StreamPair] = trio.testing.memory_stream_pair,
        *,
        frame_max: int = 131072,
    ) -> None:
        """``frame_max`` is each ScriptedBroker's."""
        self.attempts: list[tuple[float, str, int]] = []
        self.is_down = False
        self._stream_pair = stream_pair
        self._frame_max = frame_max
        self._send, self._receive = trio.open_memory_channel[ScriptedBroker](math.inf)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """What the publisher calls in place of connecting by TCP."""
        self.attempts.append((trio.current_time(), host, port))
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise ConnectionRefusedError("nobody listens")
        ours, theirs = self._stream_pair()
        self._send.send_nowait(ScriptedBroker(theirs, (host, port), frame_max=self._frame_max))
        return ours

    async def accept(self) -> ScriptedBroker:
        """The broker's end of the next connection, before the handshake."""
        return await self._receive.receive()

    async def accept_ready(self) -> ScriptedBroker:
        """The broker's end of the next connection, after the handshake."""
        broker = await self.accept()
        await broker.handshake()
        return broker
