"""The server's end of TLS, against Python's own client over memory streams."""

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import trio
import trustme
from trio.testing import (
    MemorySendStream,
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from relay.server.tls_stream import RECORD, TlsStream
from tests.memory_broker import NewPair

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
Client = trio.SSLStream[trio.abc.HalfCloseableStream]


@cache
def contexts() -> tuple[ssl.SSLContext, trustme.CA]:
    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("relay.example").configure_cert(server)
    server.num_tickets = 0
    return server, ca


@dataclass
class Ends:
    client: Client
    server: TlsStream
    wire: trio.abc.HalfCloseableStream
    """The client's end of what is below TLS."""


@asynccontextmanager
async def connected(
    new_pair: NewPair = memory_stream_pair, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> AsyncGenerator[Ends, None]:
    server_context, ca = contexts()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    ours, theirs = new_pair()
    client = trio.SSLStream(ours, context, server_hostname="relay.example")
    server = TlsStream(theirs, server_context)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        yield Ends(client, server, ours)


async def all_of(stream: trio.abc.ReceiveStream, size: int, max_bytes: int | None = None) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some(max_bytes)
        assert piece
        assert max_bytes is None or len(piece) <= max_bytes
        data += piece
    return bytes(data)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("new_pair", [memory_stream_pair, lockstep_stream_pair])
@pytest.mark.parametrize("max_bytes", [1, 1000, RECORD + 1, 1 << 20, None])
async def test_bytes_arrive_in_order_both_ways(
    new_pair: NewPair, version: ssl.TLSVersion, max_bytes: int | None
) -> None:
    data = bytes(range(256)) * (10 if max_bytes == 1 else 300)
    async with connected(new_pair, version) as ends:
        for sender, receiver in ((ends.client, ends.server), (ends.server, ends.client)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send_all, data)
                assert await all_of(receiver, len(data), max_bytes) == data


async def test_many_records_are_received_at_once_and_no_more_is_read_than_asked_for() -> None:
    async with connected() as ends:
        await ends.client.send_all(b"x" * (8 * RECORD))
        # The transport gives as much as it is asked for: six records and a bit, TLS's own included.
        limit = 6 * RECORD + 1000
        received = await ends.server.receive_some(limit)
        assert 5 * RECORD <= len(received) <= limit
        left = 8 * RECORD - len(received)
        assert len(await all_of(ends.server, left, limit)) == left


async def test_nothing_to_send_sends_nothing() -> None:
    async with connected() as ends:
        await ends.server.send_all(b"")
        await ends.server.send_all(b"x")
        assert await ends.client.receive_some() == b"x"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_goodbye_is_an_end_and_so_is_an_end_without(version: ssl.TLSVersion) -> None:
    for is_polite in (True, False):
        async with connected(version=version) as ends:
            await ends.client.send_all(b"x")
            if is_polite:
                await ends.client.aclose()
            else:
                await trio.aclose_forcefully(ends.wire)
            assert await ends.server.receive_some() == b"x"
            assert await ends.server.receive_some() == b""
            assert await ends.server.receive_some() == b""


@pytest.mark.parametrize("version", VERSIONS)
async def test_after_its_own_end_it_still_receives(version: ssl.TLSVersion) -> None:
    async with connected(version=version) as ends:
        await ends.server.send_all(b"last")
        await ends.server.send_eof()
        await ends.server.send_eof()
        await ends.client.send_all(b"late")
        assert await ends.server.receive_some() == b"late"
        assert await ends.client.receive_some() == b"last"
        assert await ends.client.receive_some() == b""


async def test_what_came_before_a_damaged_record_is_received_and_then_it_is_told() -> None:
    async with connected() as ends:
        await ends.client.send_all(b"x")
        await ends.wire.send_all(b"\x17\x03\x03\x00\x20" + b"damaged!" * 4)
        assert await ends.server.receive_some(1 << 20) == b"x"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                await ends.server.receive_some()


async def test_a_receive_that_is_cancelled_loses_nothing(autojump_clock: MockClock) -> None:
    async with connected() as ends:
        for _ in range(3):
            with trio.move_on_after(1):
                await ends.server.receive_some()
                raise AssertionError
        await ends.client.send_all(b"x")
        assert await ends.server.receive_some() == b"x"


async def test_after_a_send_that_was_cancelled_no_more_is_sent(autojump_clock: MockClock) -> None:
    """What follows a piece that is missing would be noise to the client."""
    async with connected() as ends:
        assert isinstance(ends.server.transport, trio.StapledStream)
        pipe = ends.server.transport.send_stream
        assert isinstance(pipe, MemorySendStream)
        pipe.send_all_hook = trio.sleep_forever
        with trio.move_on_after(1):
            await ends.server.send_all(b"lost")
        pipe.send_all_hook = None
        with pytest.raises(trio.BrokenResourceError):
            await ends.server.send_all(b"x")


async def test_others_get_their_turn() -> None:
    async with connected() as ends:
        await ends.client.send_all(b"x" * 1000)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await all_of(ends.server, 1000, 10)
            nursery.cancel_scope.cancel()
        assert turns >= 100


async def test_a_client_that_leaves_in_the_handshake_is_told_of() -> None:
    ours, theirs = memory_stream_pair()
    server = TlsStream(theirs, contexts()[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_all_tasks_blocked)
        await ours.send_all(b"\x16\x03\x01")
        await ours.send_eof()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.do_handshake()
    assert isinstance(caught.value.__cause__, ssl.SSLEOFError)
