"""pika's AMQP engine on a trio stream: no thread, no second event loop.

pika implements the protocol; this module moves its bytes. It is the only place that touches
pika's private hooks (``_adapter_*``, ``_on_*``), which is why pyproject.toml pins pika's minor
version. It knows nothing of transfers, confirms or reconnecting: one stream, driven until it ends.

Three things differ from pika's own adapters. Message bodies are queued as they are, never copied
into an AMQP frame, and leave with ``sendmsg`` of many buffers. Channels take turns: nothing waits
for all that another channel has queued before. And nothing here bounds the queue: pika's writes are
synchronous, so whoever publishes bounds what is outstanding (``window.py``).
"""

import ssl
import struct
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

import pika.exceptions
import trio
from pika import frame as amqp
from pika.connection import Connection, Parameters
from pika.spec import FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_METHOD, Basic, BasicProperties

from relay.tls import explain

READ_SIZE: Final = 64 * 1024
"""Bytes asked of the socket at once; confirms are small and come many to a read."""

BULK_SIZE: Final = 256 * 1024
ACK_PAUSE: Final = 0.001
"""Seconds that acks are left to gather if so many bytes were queued since the last read. They come
three to a read else, and a turn of trio's and two system calls for each read are a tenth of the
daemon's CPU. Small uploads, each of which waits for its ack, are far from it."""

SENDMSG_BUFFERS: Final = 64
"""Buffers per system call: about twenty frames, some MiB, far below IOV_MAX (1024)."""

STAGE_SIZE: Final = 512 * 1024
"""Bytes that are next, in an order that is settled: a message that comes now waits for those, and
for one message of each other channel. Some frames, so that a system call is worth its price."""

JOIN_SIZE: Final = 256 * 1024
"""Bytes written at once to a stream that takes no list of buffers, such as TLS: 16 full records
of it. It holds copies of them, joined and encrypted, while they are on their way."""

LAST_WORDS: Final = 1.0
"""Seconds in which the reader finds the end of a stream that can no longer be written to."""

_FRAME_START: Final = struct.Struct(">BHI")
"""Type, channel and payload size of an AMQP frame."""

_HEADER_START: Final = struct.Struct(">HHQ")
"""Class, weight and body size: how the payload of a content header begins."""

_FRAME_END: Final = bytes([FRAME_END])

# The whole AMQP frame of a basic.ack: type, channel, payload size, method, tag, bits, frame end.
_ACK: Final = struct.Struct(">BHIIQBB")
_IS_ACK: Final = (FRAME_METHOD, 13, Basic.Ack.INDEX, FRAME_END)

Buffer = bytes | memoryview

OnAck = Callable[[int, bool], None]
"""Takes a delivery tag and whether it stands for all up to it."""

_MALFORMED = (
    pika.exceptions.AMQPError,
    struct.error,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What pika's decoder raises on bytes that are not AMQP, apart from its own exceptions; OSError is
what datetime says of a date out of range."""

_ONCE: Final = b"\x0fx-stream-offset"
"""A header that RabbitMQ sets in what a stream delivers, in place of a publisher's. In place of the
first one: a publisher that writes it twice gets the other one through (3.10), and pika takes the
last. No reader of a stream may believe such a message, so it is delivered without properties."""


class TrioConnection(Connection):
    """One AMQP connection over an established stream.

    Construct it, then await ``run``, which ends when the connection does. pika's callbacks are
    called from within ``run`` and must not block.
    """

    def __init__(
        self,
        parameters: Parameters,
        stream: trio.abc.Stream,
        *,
        on_open: Callable[[Connection], None],
        on_closed: Callable[[Connection, Exception], None],
    ) -> None:
        """``on_closed`` is called exactly once if ``run`` is, also when opening failed."""
        self._stream = stream
        # What is next, and behind it what is queued: by channel, and whose turn it is.
        self._stage: deque[Buffer] = deque()
        self._staged = 0
        self._lanes: dict[int, deque[tuple[int, tuple[Buffer, ...]]]] = {}
        self._turns: deque[int] = deque()
        self._queued = 0
        self._writable = trio.lowlevel.ParkingLot()
        self._paused = False
        self._resumed = trio.lowlevel.ParkingLot()
        self._sent_before_read = 0
        self._nursery: trio.Nursery | None = None
        self._lost: Exception | None = None
        self._on_ack: dict[int, OnAck] = {}
        self.last_heard = trio.current_time()
        super().__init__(
            parameters,
            on_open_callback=on_open,
            on_open_error_callback=on_closed,
            on_close_callback=on_closed,
            internal_connection_workflow=False,
        )

    @property
    def queued(self) -> int:
        """Bytes waiting to be written to the socket."""
        return self._queued

    async def run(self) -> None:
        """Speak AMQP over the stream until it ends, for whatever reason; then close it."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._lost is not None:  # aborted before it began
                    nursery.cancel_scope.cancel()
                self._on_stream_connected()
                nursery.start_soon(self._read)
                nursery.start_soon(self._write)
        finally:
            # Also when cancelled from outside: whoever waits for a confirm must learn of it.
            if self._lost is None and self._error is None:
                self._lost = pika.exceptions.StreamLostError("the connection was abandoned")
            self._stage.clear()
            self._turns.clear()
            self._lanes.clear()
            self._queued = self._staged = 0
            try:
                await trio.aclose_forcefully(self._stream)
            finally:
                self._on_stream_terminated(self._lost)

    def abort(self, reason: str) -> None:
        """Drop the connection without a word to the broker. ``run`` ends; safe to call twice."""
        self._lose(pika.exceptions.StreamLostError(reason))

    def send_content(self, channel_number: int, method: bytes, header: bytes, body: bytes) -> None:
        """Queue a content-bearing method, such as basic.publish.

        Args:
            channel_number: of an open channel.
            method: the marshalled AMQP method frame.
            header: the marshalled AMQP content header frame.
            body: of the message; it is kept, not copied, until it is written.
        """
        size = len(body)
        head = method + header
        if size <= self._body_max_length:
            if size:
                head += _FRAME_START.pack(FRAME_BODY, channel_number, size)
                self._emit(channel_number, head, body, _FRAME_END)
            else:
                self._emit(channel_number, head)
            return
        view = memoryview(body)
        buffers: list[Buffer] = []
        for start in range(0, size, self._body_max_length):
            piece = view[start : start + self._body_max_length]
            head += _FRAME_START.pack(FRAME_BODY, channel_number, len(piece))
            buffers += (head, piece)
            head = _FRAME_END
        self._emit(channel_number, *buffers, head)

    def pause_reading(self) -> None:
        """Read no more until ``resume_reading``; what has been read is still handled.

        TCP stops the broker meanwhile. RabbitMQ resets a connection that takes nothing for a
        while (3.10: within 40 s), and its heartbeats count for nothing while they are not read.
        """
        self._paused = True

    def resume_reading(self) -> None:
        """Go on reading; of no effect if reading goes on."""
        self._paused = False
        self._resumed.unpark_all()

    def set_on_ack(self, channel_number: int, on_ack: OnAck | None) -> None:
        """Have ``on_ack`` called for each basic.ack on a channel, past pika's own dispatch."""
        if on_ack is None:
            self._on_ack.pop(channel_number, None)
        else:
            self._on_ack[channel_number] = on_ack

    # --- moving bytes --------------------------------------------------------------------------

    def _emit(self, channel: int, *buffers: Buffer) -> None:
        """Queue whole AMQP frames of a channel, between which no other's may come."""
        size = sum(map(len, buffers))
        self.bytes_sent += size
        self._enqueue(channel, buffers, size)

    def _enqueue(self, channel: int, buffers: tuple[Buffer, ...], size: int) -> None:
        lane = self._lanes.get(channel)
        if lane is None:
            lane = self._lanes[channel] = deque()
            self._turns.append(channel)
        lane.append((size, buffers))
        self._queued += size
        if self._writable:
            self._writable.unpark()

    async def _read(self) -> None:
        try:
            while data := await self._receive():
                self.last_heard = trio.current_time()
                self._on_data_available(self._take_acks(bytes(data)))
                # pika collects a frame of any size, up to 4 GiB, without asking what was agreed.
                if len(self._frame_buffer) > self.params.frame_max:
                    raise pika.exceptions.InvalidFrameError("a frame larger than agreed")
        except trio.BrokenResourceError as exc:
            self._lose(_lost(exc))
        except _MALFORMED as exc:
            self._lose(exc)
        else:
            self._lose(pika.exceptions.StreamLostError("the broker closed the connection"))

    async def _receive(self) -> bytes | bytearray:
        while self._paused:
            await self._resumed.park()
        if self.bytes_sent - self._sent_before_read > BULK_SIZE:
            await trio.sleep(ACK_PAUSE)
        self._sent_before_read = self.bytes_sent
        return await self._stream.receive_some(READ_SIZE)

    def _take_acks(self, data: bytes) -> bytes:
        """Handle the acks that ``data`` begins with; returns what is left for pika.

        A large upload gets an ack for nearly every frame, and pika's dispatch of one costs as
        much as publishing a frame does. They are also all that most reads consist of.
        """
        position = 0
        if self._frame_buffer:  # pika holds the beginning of what this continues
            return data
        while len(data) - position >= _ACK.size:
            kind, channel, size, method, tag, bits, end = _ACK.unpack_from(data, position)
            on_ack = self._on_ack.get(channel)
            if (kind, size, method, end) != _IS_ACK or on_ack is None:
                break
            position += _ACK.size
            self.bytes_received += _ACK.size
            self.frames_received += 1
            on_ack(tag, bool(bits & 1))
        return data[position:]

    async def _write(self) -> None:
        try:
            while True:
                while not self._queued:
                    await self._writable.park()
                self._fill_stage()
                self._sent(await self._send())
        except (trio.BrokenResourceError, OSError) as exc:
            # What the broker said before it went, such as why, may still be unread.
            await trio.sleep(LAST_WORDS)
            self._lose(_lost(exc))

    def _fill_stage(self) -> None:
        """Decide what is next: something of each channel that has something, in turn."""
        while self._turns and self._staged < STAGE_SIZE:
            channel = self._turns.popleft()
            lane = self._lanes[channel]
            size, buffers = lane.popleft()
            self._stage += buffers
            self._staged += size
            if lane:
                self._turns.append(channel)
            else:
                del self._lanes[channel]

    async def _send(self) -> int:
        if isinstance(self._stream, trio.SocketStream):
            return await self._stream.socket.sendmsg(list(islice(self._stage, SENDMSG_BUFFERS)))
        data = self._joined()
        await self._stream.send_all(data)
        return len(data)

    def _joined(self) -> bytes:
        """What is next, up to JOIN_SIZE bytes."""
        buffers, room = [], JOIN_SIZE
        for buffer in self._stage:
            buffers.append(buffer if len(buffer) <= room else memoryview(buffer)[:room])
            room -= len(buffers[-1])
            if not room:
                break
        return b"".join(buffers)

    def _sent(self, size: int) -> None:
        self._queued -= size
        self._staged -= size
        while size:
            first = self._stage[0]
            if len(first) > size:
                self._stage[0] = memoryview(first)[size:]
                return
            size -= len(first)
            self._stage.popleft()

    def _lose(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = error
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    # --- the hooks that pika calls -------------------------------------------------------------

    def _read_frame(self) -> tuple[int, amqp.Frame | amqp.ProtocolHeader | None]:
        try:
            consumed, frame = super()._read_frame()
        except _MALFORMED:
            kind, channel, size = _FRAME_START.unpack_from(self._frame_buffer)
            end = _FRAME_START.size + size
            if kind != FRAME_HEADER or not channel or self._frame_buffer[end] != FRAME_END:
                raise
            # Brokers pass on headers of which pika cannot make sense, such as tables in tables in
            # tables. One such message, coming again after each lost connection, would stop its
            # consumer for ever; so it is delivered without its properties.
            _, _, body_size = _HEADER_START.unpack_from(self._frame_buffer, _FRAME_START.size)
            return end + 1, amqp.Header(channel, body_size, BasicProperties())
        if isinstance(frame, amqp.Header) and self._frame_buffer.count(_ONCE, 0, consumed) > 1:
            frame.properties = BasicProperties()
        return consumed, frame

    def _adapter_emit_data(self, data: bytes) -> None:
        # One AMQP frame; or the protocol header, before there is anything else.
        _, channel, _ = _FRAME_START.unpack_from(data)
        self._enqueue(channel, (data,), len(data))

    def _adapter_disconnect_stream(self) -> None:
        # pika has noted the reason in self._error; run() passes it on.
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _adapter_connect_stream(self) -> None:
        raise NotImplementedError("the stream is connected before the connection is made")

    def _adapter_call_later(self, delay: float, callback: Callable[[], object]) -> object:
        assert self._nursery is not None
        timer = trio.CancelScope()

        async def wait() -> None:
            with timer:
                await trio.sleep(delay)
                callback()

        self._nursery.start_soon(wait)
        return timer

    def _adapter_remove_timeout(self, timeout_id: object) -> None:
        assert isinstance(timeout_id, trio.CancelScope)
        timeout_id.cancel()

    def _adapter_add_callback_threadsafe(self, callback: Callable[..., object]) -> None:
        trio.lowlevel.current_trio_token().run_sync_soon(callback)


def _lost(error: Exception) -> pika.exceptions.AMQPConnectionError:
    """What to tell of a stream that broke."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
        # With TLS 1.3 a broker refuses relay's certificate when relay thinks the handshake done.
        # Not a StreamLostError: pika takes one so early for a wrong protocol or password.
        return pika.exceptions.AMQPConnectionError(explain(cause, "the broker"))
    return pika.exceptions.StreamLostError(f"connection lost: {explain(cause, 'the broker')}")
