import math
import socket
import struct
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

import pika
import pika.exceptions
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import frame as amqp
from pika import spec
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from relay.broker.adapter import ACK_PAUSE, BULK_SIZE, JOIN_SIZE, TrioConnection
from tests.scripted_broker import Published, RelayGone, ScriptedBroker, patience

FRAME_MAX = 4096
BODY_MAX = FRAME_MAX - 8  # frame header (7) and end (1)


class Line:
    """A connection under test, the broker's end of it, and what it has told."""

    def __init__(self, ours: trio.abc.Stream, broker: ScriptedBroker, heartbeat: int = 0) -> None:
        self.broker = broker
        self.opened = 0
        self.ends: list[Exception] = []
        self.ended = trio.Event()
        parameters = pika.ConnectionParameters(heartbeat=heartbeat)
        self.connection = TrioConnection(
            parameters, ours, on_open=self._on_open, on_closed=self._on_closed
        )

    def _on_open(self, _connection: object) -> None:
        self.opened += 1

    def _on_closed(self, _connection: object, reason: Exception) -> None:
        self.ends.append(reason)
        self.ended.set()

    async def open_channel(self) -> pika.channel.Channel:
        """A confirm channel."""
        channel = self.connection.channel(on_open_callback=lambda _: None)
        await self.broker.accept_open()
        await wait_all_tasks_blocked()
        return channel

    def publish(self, channel: int, body: bytes) -> None:
        """Queue a message as the session does."""
        method = amqp.Method(channel, spec.Basic.Publish(exchange="ex", routing_key="key"))
        header = amqp.Header(channel, len(body), spec.BasicProperties(app_id="relay"))
        self.connection.send_content(channel, method.marshal(), header.marshal(), body)


def line(*, heartbeat: int = 0, frame_max: int = FRAME_MAX) -> Line:
    """Both ends of a connection over memory; nothing runs yet."""
    ours, theirs = memory_stream_pair()
    return Line(ours, ScriptedBroker(theirs, frame_max=frame_max), heartbeat)


@asynccontextmanager
async def opened(under_test: Line) -> AsyncGenerator[Line, None]:
    """Runs a connection, past its handshake, for the length of the block."""
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(under_test.connection.run)
            await under_test.broker.handshake()
            await wait_all_tasks_blocked()
            yield under_test
            nursery.cancel_scope.cancel()


async def test_a_paused_connection_reads_nothing_and_then_everything() -> None:
    async with opened(line()) as it:
        it.connection.pause_reading()
        await it.broker.heartbeat()
        # The read that had begun ends; another does not begin.
        await wait_all_tasks_blocked()
        received = it.connection.bytes_received
        for _ in range(3):
            await it.broker.heartbeat()
        await wait_all_tasks_blocked()
        assert it.connection.bytes_received == received
        it.connection.resume_reading()
        await wait_all_tasks_blocked()
        assert it.connection.bytes_received == received + 3 * 8


@pytest.mark.parametrize(("size", "at_once"), [(BULK_SIZE // 2, True), (BULK_SIZE, False)])
async def test_acks_are_left_to_gather_only_while_much_goes_out(
    autojump_clock: MockClock, size: int, at_once: bool
) -> None:
    async with opened(line()) as it:
        await it.open_channel()
        it.publish(1, bytes(size))
        await it.broker.published()
        await it.broker.heartbeat()  # ends the read that had begun
        await wait_all_tasks_blocked()
        began, received = trio.current_time(), it.connection.bytes_received
        await it.broker.heartbeat()
        await wait_all_tasks_blocked()
        assert (it.connection.bytes_received > received) is at_once
        await trio.sleep(ACK_PAUSE)
        await wait_all_tasks_blocked()
        assert it.connection.bytes_received > received
        assert trio.current_time() - began == ACK_PAUSE


# --- what goes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (0, []),
        (1, [1]),
        (BODY_MAX - 1, [BODY_MAX - 1]),
        (BODY_MAX, [BODY_MAX]),
        (BODY_MAX + 1, [BODY_MAX, 1]),
        (2 * BODY_MAX, [BODY_MAX, BODY_MAX]),
        (2 * BODY_MAX + 1, [BODY_MAX, BODY_MAX, 1]),
    ],
)
async def test_a_body_is_cut_into_amqp_frames_of_the_negotiated_size(
    size: int, pieces: list[int]
) -> None:
    async with opened(line()) as it:
        await it.open_channel()
        body = bytes(range(256)) * (size // 256 + 1)
        it.publish(1, body[:size])
        it.publish(1, b"next")
        first, second = await it.broker.published(2)
    assert first.body == body[:size]
    assert it.broker.body_sizes == [*pieces, 4]
    assert second.body == b"next"


async def test_queued_bodies_are_not_copied() -> None:
    async with opened(line(frame_max=131072)) as it:
        await it.open_channel()
        bodies = [bytes(131064) for _ in range(64)] + [bytes(1 << 20)]
        tracemalloc.start()
        try:
            for body in bodies:
                it.publish(1, body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert it.connection.queued > sum(map(len, bodies))
        assert peak < 100_000


async def test_the_queue_counts_what_is_not_yet_written() -> None:
    async with opened(line()) as it:
        await it.open_channel()
        assert it.connection.queued == 0
        it.publish(1, bytes(10_000))
        assert it.connection.queued > 10_000
        await it.broker.published()
        assert it.connection.queued == 0


class Gauge(trio.abc.Stream):
    """A stream that is no socket, as TLS is none, and notes the size of each write."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.sizes: list[int] = []
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sizes.append(len(data))
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def test_a_stream_that_is_no_socket_gets_every_byte_in_bounded_writes() -> None:
    ours, theirs = memory_stream_pair()
    gauge = Gauge(ours)
    async with opened(Line(gauge, ScriptedBroker(theirs, frame_max=1 << 20))) as it:
        await it.open_channel()
        bodies = [bytes([n]) * size for n, size in enumerate([1, 700_000, 40_000, 131_064] * 4)]
        for body in bodies:
            it.publish(1, body)
        messages = await it.broker.published(len(bodies))
    assert [message.body for message in messages] == bodies
    assert max(gauge.sizes) == JOIN_SIZE
    assert sum(size == JOIN_SIZE for size in gauge.sizes) == sum(map(len, bodies)) // JOIN_SIZE


async def test_a_socket_that_takes_little_at_a_time_gets_every_byte_in_order() -> None:
    ours, theirs = trio.socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    broker = ScriptedBroker(trio.SocketStream(theirs), frame_max=131072)
    async with trio.SocketStream(theirs), opened(Line(trio.SocketStream(ours), broker)) as it:
        await it.open_channel()
        # More buffers than one system call takes, more bytes than the socket holds.
        bodies = [bytes([n]) * (n * 997) for n in range(100)]
        for body in bodies:
            it.publish(1, body)
        assert [message.body for message in await broker.published(100)] == bodies
        assert it.connection.queued == 0


# --- heartbeats --------------------------------------------------------------------------------


async def test_heartbeats_are_sent_while_nothing_else_is(autojump_clock: MockClock) -> None:
    async with opened(line(heartbeat=30)) as it:
        for _ in range(10):
            said = await it.broker.receive()
            assert not isinstance(said, Published)
            assert said.method is None
            await it.broker.heartbeat()
        assert trio.current_time() == pytest.approx(10 * 15, abs=1)
        assert not it.ends


async def test_a_silent_broker_ends_the_connection(autojump_clock: MockClock) -> None:
    async with opened(line(heartbeat=30)) as it:
        await it.ended.wait()
        # pika looks every 35 s whether anything came since it last looked.
        assert 30 <= trio.current_time() <= 71
        (reason,) = it.ends
        assert isinstance(reason, pika.exceptions.AMQPHeartbeatTimeout)


async def test_acks_count_as_signs_of_life(autojump_clock: MockClock) -> None:
    tags: list[int] = []
    async with opened(line(heartbeat=30)) as it:
        await it.open_channel()
        it.connection.set_on_ack(1, lambda tag, _multiple: tags.append(tag))
        for tag in range(1, 10):
            await trio.sleep(20)
            await it.broker.ack(tag)
        await wait_all_tasks_blocked()
        assert tags == [*range(1, 10)]
        assert not it.ends


async def test_without_heartbeats_silence_is_no_fault(autojump_clock: MockClock) -> None:
    async with opened(line(heartbeat=0)) as it:
        await trio.sleep(3000)
        assert not it.ends


# --- what comes in -----------------------------------------------------------------------------


def acks(*tags: int, multiple: bool = False) -> bytes:
    return b"".join(amqp.Method(1, spec.Basic.Ack(tag, multiple)).marshal() for tag in tags)


async def test_acks_are_the_same_however_their_bytes_are_cut() -> None:
    data = (
        acks(1, 3)
        + amqp.Heartbeat().marshal()
        + acks(2)
        + amqp.Method(1, spec.Basic.Nack(4)).marshal()
        + acks(9, multiple=True)
    )
    expected = [(1, False), (3, False), (2, False), "nack", (9, True)]
    for size in range(1, len(data) + 1):
        seen: list[object] = []
        async with opened(line()) as it:
            channel = await it.open_channel()
            it.connection.set_on_ack(1, lambda *ack, seen=seen: seen.append(ack))
            channel.callbacks.add(1, spec.Basic.Ack, told_of_ack(seen), one_shot=False)
            channel.callbacks.add(
                1, spec.Basic.Nack, lambda _, seen=seen: seen.append("nack"), one_shot=False
            )
            for start in range(0, len(data), size):
                await it.broker.send_bytes(data[start : start + size])
                await wait_all_tasks_blocked()
            assert not it.ends
        assert seen == expected


def told_of_ack(seen: list[object]) -> Callable[[amqp.Method[spec.Basic.Ack]], None]:
    """A callback as the session registers it with pika, for acks that come in pieces."""
    return lambda frame: seen.append((frame.method.delivery_tag, frame.method.multiple))


async def test_a_connection_cut_at_any_byte_of_a_frame_ends_with_an_error() -> None:
    data = acks(1)
    for length in range(len(data) + 1):
        async with opened(line()) as it:
            await it.broker.send_bytes(data[:length])
            await it.broker.cut()
            await wait_all_tasks_blocked()
            (reason,) = it.ends
            assert isinstance(reason, pika.exceptions.StreamLostError)


async def test_a_broker_that_closes_the_connection_tells_why() -> None:
    async with opened(line()) as it:
        await it.broker.send(spec.Connection.Close(320, "CONNECTION_FORCED", 0, 0))
        await it.ended.wait()
        (reason,) = it.ends
        assert isinstance(reason, pika.exceptions.ConnectionClosedByBroker)
        assert reason.reply_code == 320


async def test_a_frame_larger_than_agreed_ends_the_connection_before_it_is_complete() -> None:
    async with opened(line()) as it:
        await it.broker.send_bytes(struct.pack(">BHI", spec.FRAME_BODY, 1, 1 << 31))
        await it.broker.send_bytes(bytes(FRAME_MAX))
        await it.ended.wait()
        assert isinstance(it.ends[0], pika.exceptions.InvalidFrameError)


def malformed() -> st.SearchStrategy[bytes]:
    """Bytes that a broker should not send: from noise to well-formed frames of the wrong sort."""
    methods = st.sampled_from(sorted(spec.methods))
    payloads = st.one_of(
        st.binary(max_size=60),
        st.tuples(methods, st.binary(max_size=60)).map(lambda m: struct.pack(">I", m[0]) + m[1]),
        st.binary(max_size=40).map(lambda table: _start(table)),
    )
    frames = st.tuples(
        st.sampled_from([1, 2, 3, 4, 8, 0]), st.sampled_from([0, 1, 2, 65535]), payloads
    ).map(lambda f: struct.pack(">BHI", f[0], f[1], len(f[2])) + f[2] + b"\xce")
    return st.lists(st.one_of(frames, st.binary(max_size=20)), min_size=1, max_size=5).map(b"".join)


def _start(table: bytes) -> bytes:
    """connection.start with arbitrary server properties."""
    properties = struct.pack(">I", len(table)) + table
    return struct.pack(">IBB", spec.Connection.Start.INDEX, 0, 9) + properties + bytes(8)


def _field(kind: bytes, value: bytes) -> bytes:
    """connection.start with one server property."""
    payload = _start(b"\x01k" + kind + value)
    return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


def _method(channel: int, method: object) -> bytes:
    return bytes(amqp.Method(channel, method).marshal())  # type: ignore[type-var]


NESTED = b"".join(b"\x00\x00\x0f\x00\x01kF" for _ in range(2000))

NONSENSE = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another version of AMQP": b"AMQP\x00\x01\x00\x00",
    "a frame without an end": struct.pack(">BHI", 1, 0, 4) + bytes(5),
    "a method without its fields": struct.pack(">BHI", 1, 0, 4) + b"\x00\x0a\x00\x1e\xce",
    "an unknown method": struct.pack(">BHI", 1, 0, 4) + b"\xff\xff\xff\xff\xce",
    "an infinite float": _field(b"f", struct.pack(">f", math.inf)),
    "a float that is no number": _field(b"d", struct.pack(">d", math.nan)),
    "a time beyond time": _field(b"T", b"\xff" * 8),
    "a time that datetime calls too large": _field(b"T", struct.pack(">Q", 1 << 62)),
    "tables in tables in tables": _field(b"F", NESTED),
    "a broker of no version": _method(0, spec.Connection.Start(0, 0, {}, "PLAIN")),
    "no mechanism that we know": _method(0, spec.Connection.Start(0, 9, {}, "GSSAPI")),
    "start, again": 2 * _method(0, spec.Connection.Start(0, 9, {}, "PLAIN")),
    "a negative channel_max": _method(0, spec.Connection.Tune(65535, 1, 0)),
    "a frame_max of 1": _method(0, spec.Connection.Tune(1, 1, 0)),
    "open-ok out of turn": _method(0, spec.Connection.OpenOk()),
    "close-ok out of turn": _method(0, spec.Connection.CloseOk()),
    "a channel that is closed twice": 2 * _method(1, spec.Channel.Close(404, "no", 0, 0)),
    "a channel that nobody opened": _method(9, spec.Channel.Close(404, "no", 0, 0)),
    "channel.open-ok, again": _method(1, spec.Channel.OpenOk()),
    "a secret to update": _method(0, spec.Connection.UpdateSecret("new", "why")),
    "a body without a header": amqp.Body(1, b"x").marshal(),
    "a return with too much of a body": _method(1, spec.Basic.Return(312, "", "", ""))
    + amqp.Header(1, 1, spec.BasicProperties()).marshal()
    + amqp.Body(1, b"xyz").marshal(),
    "a header of another class": struct.pack(">BHI", 2, 1, 14) + b"\xff" * 14 + b"\xce",
}


UNDECODABLE = {
    "a time beyond time": b"\x01kT" + b"\xff" * 8,
    "a time that datetime calls too large": b"\x01kT" + struct.pack(">Q", 1 << 62),
    "tables in tables in tables": b"\x01kF" + NESTED,
    "an unknown type": b"\x01k?",
}


@pytest.mark.parametrize("table", UNDECODABLE.values(), ids=UNDECODABLE.keys())
async def test_a_message_whose_headers_cannot_be_decoded_is_delivered_without_them(
    table: bytes,
) -> None:
    # Otherwise it would end each connection that it comes over, and stay in the queue.
    messages: list[tuple[spec.BasicProperties, bytes]] = []
    async with opened(line(frame_max=131072)) as it:
        channel = await it.open_channel()
        channel.basic_consume(
            "queue", lambda _channel, _method, properties, body: messages.append((properties, body))
        )
        _, consume = await it.broker.expect(spec.Basic.Consume)
        flags = spec.BasicProperties.FLAG_HEADERS
        properties = struct.pack(">HI", flags, len(table)) + table
        header = struct.pack(">HHQ", spec.Basic.INDEX, 0, 4) + properties
        deliver = spec.Basic.Deliver(consume.consumer_tag, 1, False, "", "queue")
        await it.broker.send_bytes(
            _method(1, spec.Basic.ConsumeOk(consume.consumer_tag))
            + _method(1, deliver)
            + (struct.pack(">BHI", spec.FRAME_HEADER, 1, len(header)) + header + b"\xce")
            + amqp.Body(1, b"body").marshal()
            + _method(1, spec.Basic.Deliver(consume.consumer_tag, 2, False, "", "queue"))
            + amqp.Header(1, 0, spec.BasicProperties(app_id="relay")).marshal()
        )
        await wait_all_tasks_blocked()
        assert not it.ends
    (bare, body), (following, _) = messages
    assert (bare.headers, bare.app_id, body) == (None, None, b"body")
    assert following.app_id == "relay"


@pytest.mark.parametrize("is_open", [False, True], ids=["handshake", "open"])
@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE.keys())
async def test_nonsense_never_raises_out_of_the_connection(data: bytes, is_open: bool) -> None:
    await speak_nonsense(data, is_open=is_open)


@settings(max_examples=300, deadline=None)
@given(malformed(), st.booleans())
async def test_no_bytes_at_all_raise_out_of_the_connection(data: bytes, is_open: bool) -> None:
    await speak_nonsense(data, is_open=is_open)


async def speak_nonsense(data: bytes, *, is_open: bool) -> None:
    """Send ``data`` before or after the handshake, then hang up: the end is told, once."""
    it = line()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.connection.run)
        if is_open:
            await it.broker.handshake()
            await wait_all_tasks_blocked()
            await it.open_channel()
        # It may have gone after the first bytes.
        with suppress(trio.BrokenResourceError):
            await it.broker.send_bytes(data)
        await wait_all_tasks_blocked()
        await it.broker.cut()
    assert len(it.ends) == 1


# --- the end -----------------------------------------------------------------------------------


async def test_a_cancelled_connection_tells_its_channels() -> None:
    told: list[Exception] = []
    async with opened(line()) as it:
        channel = await it.open_channel()
        channel.add_on_close_callback(lambda _, reason: told.append(reason))
    assert len(told) == 1
    assert len(it.ends) == 1
    with pytest.raises(RelayGone):
        await it.broker.receive()


async def test_an_aborted_connection_tells_the_reason_once() -> None:
    async with opened(line()) as it:
        it.connection.abort("first")
        it.connection.abort("second")
        await it.ended.wait()
        it.connection.abort("third")
        assert [str(reason) for reason in it.ends] == [
            str(pika.exceptions.StreamLostError("first"))
        ]


async def test_a_connection_aborted_before_it_runs_ends_at_once() -> None:
    it = line()
    it.connection.abort("never mind")
    await it.connection.run()
    assert len(it.ends) == 1
    assert not it.opened


async def test_goodbye_is_said_and_answered() -> None:
    async with opened(line()) as it:
        await it.open_channel()
        it.connection.close()
        await it.broker.accept_goodbye()
        await it.ended.wait()
        (reason,) = it.ends
        assert isinstance(reason, pika.exceptions.ConnectionClosedByClient)


async def test_nothing_of_a_connection_outlives_it(autojump_clock: MockClock) -> None:
    it = line(heartbeat=30)
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with opened(it):
        await it.broker.cut()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert it.connection.queued == 0
