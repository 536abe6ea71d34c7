"""Connections beyond the limit: told at once, and kept only so long and so many."""

import logging
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from relay.server.connection import LINGER_IDLE
from relay.server.identity import Peer
from relay.server.overflow import TELL_PAUSE, Overflow
from tests.memory_broker import PEER, MemoryClient, Stream


class Crowd:
    """Clients that are refused, and how many of them the server is not yet rid of."""

    def __init__(self, overflow: Overflow, nursery: trio.Nursery) -> None:
        self.present = 0
        self._overflow = overflow
        self._nursery = nursery

    async def _refuse(self, stream: Stream, peer: Peer) -> None:
        self.present += 1
        await self._overflow.refuse(stream, peer)
        await trio.aclose_forcefully(stream)
        self.present -= 1

    async def client(self, peer: Peer = PEER) -> Stream:
        """One more, at whom everybody has looked."""
        client, server = memory_stream_pair()
        self._nursery.start_soon(self._refuse, server, peer)
        await wait_all_tasks_blocked()
        return client


async def test_a_client_is_told_before_it_has_said_anything_and_waited_for() -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(Overflow(7), nursery)
        stream = await crowd.client()
        client = MemoryClient(stream)
        answer = await client.answer()
        assert (answer.status, answer.json()["code"]) == (503, "too-many-uploads")
        assert answer.headers["retry-after"] == "5"
        assert answer.closes
        assert await client.ends()
        assert crowd.present == 1
        await client.send(b"POST /upload HTTP/1.1\r\nHost: too.late\r\n\r\n")
        await stream.send_eof()
        await wait_all_tasks_blocked()
        assert crowd.present == 0


async def test_a_client_that_does_not_leave_is_left(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(Overflow(7), nursery)
        client = await crowd.client()

        @nursery.start_soon
        async def go_on_sending() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(b"x")
                    await trio.sleep(0.1)

    assert trio.current_time() == pytest.approx(LINGER_IDLE, abs=0.2)


async def test_only_so_many_are_waited_for_and_all_are_told() -> None:
    async with trio.open_nursery() as nursery:
        overflow = Overflow(7, lingering=3)
        crowd = Crowd(overflow, nursery)
        clients = [await crowd.client() for _ in range(10)]
        assert crowd.present == 3
        assert [(await MemoryClient(one).answer()).status for one in clients] == [503] * 10
        assert overflow.refused == 10
        for client in clients:
            await trio.aclose_forcefully(client)
        await wait_all_tasks_blocked()
        assert crowd.present == 0


async def test_a_client_that_is_gone_is_no_trouble() -> None:
    client, server = memory_stream_pair()
    await trio.aclose_forcefully(client)
    await Overflow(7).refuse(server, PEER)


async def test_a_tls_client_gets_an_end_and_no_words_that_are_not_tls() -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(Overflow(7, has_tls=True), nursery)
        client = await crowd.client()
        assert await client.receive_some() == b""
        # There is no TLS on Unix sockets.
        local = await crowd.client(Peer(address="unix"))
        assert (await MemoryClient(local).answer()).status == 503
        nursery.cancel_scope.cancel()


async def test_a_crowd_is_worth_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(Overflow(7), nursery)
        for _ in range(3):
            for _ in range(20):
                await trio.aclose_forcefully(await crowd.client())
            await trio.sleep(TELL_PAUSE)
    lines = [record.getMessage() for record in caplog.records]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "there are 7 already" in lines[0]
    assert "(41 refused" in lines[2]
