"""One request and its answer: what is sent when, and how long anything is waited for."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from relay.client.exchange import (
    CONTINUE_TIMEOUT,
    EXPECT_FROM,
    LAST_WORDS,
    MAX_ANSWER,
    PATIENCE,
    Answer,
    Lost,
    Request,
    Unsendable,
    Unusable,
    exchange,
)
from tests.http_server import ScriptedServer
from tests.memory_broker import NewPair

BLOCK = b"x" * 4096


class Body:
    """Blocks to send, counted."""

    def __init__(self, *blocks: bytes, fails: bool = False) -> None:
        self._blocks = iter(blocks)
        self._fails = fails
        self.given = 0

    async def read(self) -> bytes:
        await trio.lowlevel.checkpoint()
        block = next(self._blocks, b"")
        if self._fails and not block:
            raise Unsendable("it changed")
        self.given += bool(block)
        return block


def post(length: int | None) -> Request:
    fields = [("Idempotency-Key", "k")]
    return Request(target="/upload/r", host="relay.test:1", fields=fields, length=length)


@asynccontextmanager
async def exchanging(
    body: Body, length: int | None, new_pair: NewPair = memory_stream_pair
) -> AsyncGenerator[tuple[ScriptedServer, Callable[[], Awaitable[Answer]]], None]:
    """A server, and a function that waits for what the client's side comes to."""
    ours, theirs = new_pair()
    outcome: list[Answer | Exception] = []

    async def run() -> None:
        try:
            outcome.append(await exchange(ours, post(length), body.read, lambda: None))
        except (Lost, Unusable, Unsendable) as exc:
            outcome.append(exc)

    async with trio.open_nursery() as nursery:
        done = trio.Event()

        async def run_and_tell() -> None:
            await run()
            done.set()

        async def result() -> Answer:
            await done.wait()
            if isinstance(outcome[0], Exception):
                raise outcome[0]
            return outcome[0]

        nursery.start_soon(run_and_tell)
        yield ScriptedServer(theirs), result
        nursery.cancel_scope.cancel()


async def test_a_request_is_answered() -> None:
    async with exchanging(Body(b"he", b"llo"), 5) as (server, result):
        await server.receive()
        assert server.request is not None
        assert (server.request.method, server.request.target) == (b"POST", b"/upload/r")
        assert server.body == b"hello"
        assert server.fields["host"] == "relay.test:1"
        assert server.fields["content-length"] == "5"
        assert server.fields["idempotency-key"] == "k"
        assert "expect" not in server.fields
        await server.answer(201, {"a": 1}, {"X-Y": "z"})
        answer = await result()
    assert (answer.status, answer.body, answer.fields["x-y"]) == (201, b'{"a": 1}', "z")


@given(st.lists(st.binary(min_size=1, max_size=50)), st.booleans())
def test_any_body_arrives_as_it_is(blocks: list[bytes], is_chunked: bool) -> None:
    whole = b"".join(blocks)

    async def main() -> None:
        length = None if is_chunked else len(whole)
        async with exchanging(Body(*blocks), length) as (server, result):
            await server.receive_head()
            if is_chunked:
                await server.go_on()
            while await server.receive_block():
                pass
            await server.answer(201)
            assert (await result()).status == 201
            assert server.body == whole

    trio.run(main)


@pytest.mark.parametrize("length", [EXPECT_FROM, None])
async def test_a_large_body_waits_for_leave(length: int | None, mock_clock: MockClock) -> None:
    body = Body(*[BLOCK] * (EXPECT_FROM // len(BLOCK)))
    async with exchanging(body, length) as (server, result):
        await server.receive_head()
        assert server.fields["expect"] == "100-continue"
        await wait_all_tasks_blocked()
        assert body.given == 0
        await server.go_on()
        while await server.receive_block():
            pass
        await server.answer(201)
        assert (await result()).status == 201
    assert trio.current_time() == 0


async def test_without_leave_the_body_goes_after_a_while(autojump_clock: MockClock) -> None:
    body = Body(*[BLOCK] * (EXPECT_FROM // len(BLOCK)))
    began = trio.current_time()
    async with exchanging(body, EXPECT_FROM) as (server, result):
        await server.receive()
        await server.answer(201)
        assert (await result()).status == 201
    assert trio.current_time() - began == pytest.approx(CONTINUE_TIMEOUT)


async def test_a_refusal_in_place_of_leave_costs_no_byte_of_the_body() -> None:
    body = Body(BLOCK)
    async with exchanging(body, None) as (server, result):
        await server.receive_head()
        await server.answer(413)
        assert (await result()).status == 413
    assert body.given == 0


async def test_an_early_answer_stops_the_body() -> None:
    body = Body(*[BLOCK] * 100)
    async with exchanging(body, 100 * len(BLOCK), lockstep_stream_pair) as (server, result):
        await server.receive_head()
        await server.receive_block()
        await server.answer(507)
        assert (await result()).status == 507
    assert body.given <= 3


async def test_an_answer_is_found_although_the_server_takes_no_more() -> None:
    body = Body(*[BLOCK] * 100)
    async with exchanging(body, 100 * len(BLOCK)) as (server, result):
        await server.receive_head()
        await server.answer(503)
        assert isinstance(server.stream, trio.StapledStream)
        await server.stream.receive_stream.aclose()
        assert (await result()).status == 503


async def test_a_server_that_takes_no_more_and_says_nothing_is_lost_soon(
    autojump_clock: MockClock,
) -> None:
    async with exchanging(Body(*[BLOCK] * 100), 100 * len(BLOCK)) as (server, result):
        assert isinstance(server.stream, trio.StapledStream)
        await server.stream.receive_stream.aclose()
        with pytest.raises(Lost, match="broke before an answer"):
            await result()
    assert trio.current_time() == pytest.approx(LAST_WORDS)


async def test_a_send_that_stalls_ends(autojump_clock: MockClock) -> None:
    async with exchanging(Body(BLOCK), len(BLOCK), lockstep_stream_pair) as (_, result):
        with pytest.raises(Lost, match="took nothing for 300 s"):
            await result()
    assert trio.current_time() == pytest.approx(PATIENCE)


async def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(
    autojump_clock: MockClock,
) -> None:
    async with exchanging(Body(BLOCK), len(BLOCK)) as (server, result):
        await server.receive()
        with pytest.raises(Lost, match="no answer within 300 s"):
            await result()
    assert trio.current_time() == pytest.approx(PATIENCE)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", Lost),
        (b"HTTP/1.1 20", Lost),
        (b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhel", Lost),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Lost),
        (b"220 mail.example ESMTP\r\n\r\n", Unusable),
        (b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n", Unusable),
        (b"HTTP/1.1 201 Created\r\nContent-Length: x\r\n\r\n", Unusable),
    ],
)
async def test_what_is_no_answer_is_lost_or_no_server(
    said: bytes, expected: type[Exception]
) -> None:
    async with exchanging(Body(BLOCK), len(BLOCK)) as (server, result):
        await server.receive()
        await server.send_raw(said)
        assert isinstance(server.stream, trio.StapledStream)
        await server.stream.send_stream.aclose()
        with pytest.raises(expected):
            await result()


async def test_an_endless_answer_is_not_kept() -> None:
    async with exchanging(Body(), 0) as (server, result):
        await server.receive()
        await server.send_raw(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(MAX_ANSWER // len(BLOCK) + 1):
            await server.send_raw(BLOCK)
        with pytest.raises(Unusable, match="too long"):
            await result()


async def test_a_body_that_fails_is_never_a_whole_one() -> None:
    body = Body(BLOCK, fails=True)
    async with exchanging(body, 2 * len(BLOCK)) as (server, result):
        await server.receive_head()
        assert await server.receive_block()
        with pytest.raises(Unsendable, match="it changed"):
            await result()
        assert server.body == BLOCK
