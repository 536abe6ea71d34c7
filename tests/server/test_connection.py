"""One HTTP connection: what is read, under which deadlines, and how it ends."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from relay.config import HttpConfig
from relay.errors import (
    BadRequest,
    ClientGone,
    HeadersTooLarge,
    RelayError,
    TooSlow,
)
from relay.protocol.chunked import MAX_CHUNKS
from relay.protocol.request import RequestHead, parse_request
from relay.server.connection import (
    KNOWN_HEAD_MAX,
    LINGER_IDLE,
    LINGER_TIMEOUT,
    READ_SIZE,
    HttpConnection,
)
from relay.server.responses import Response
from tests.memory_broker import MemoryClient, NewPair, slow_upstream_pair
from tests.uploading import chunked

CONFIG = HttpConfig()
HEAD = b"POST /upload HTTP/1.1\r\nHost: relay.test\r\nContent-Length: 10\r\n\r\n"
EMPTY = HEAD.replace(b"10", b"0")
CHUNKED = b"POST /upload HTTP/1.1\r\nHost: relay.test\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = Response(status=200, body=b"{}\n")


def new_connection(
    new_pair: NewPair = memory_stream_pair, **config: Any
) -> tuple[MemoryClient, HttpConnection]:
    client_stream, server_stream = new_pair()
    return MemoryClient(client_stream), HttpConnection(server_stream, replace(CONFIG, **config))


async def read_all(connection: HttpConnection) -> bytes:
    body = b""
    while data := await connection.receive():
        body += data
    return body


async def seconds_until(
    expected: type[RelayError] | None, action: Callable[[], Awaitable[object]]
) -> float:
    """How long ``action`` takes to raise ``expected``, or to return None."""
    began = trio.current_time()
    if expected is None:
        assert await action() is None
    else:
        with pytest.raises(expected):
            await action()
    return trio.current_time() - began


async def drip(client: MemoryClient, data: bytes, *, every: float) -> None:
    """Send ``data`` byte by byte, one now and one after each pause, until nobody takes it."""
    try:
        for i in range(len(data)):
            await client.send(data[i : i + 1])
            await trio.sleep(every)
    except trio.BrokenResourceError:
        return


# --- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 7])
async def test_a_head_is_the_same_however_it_arrives(size: int | None) -> None:
    client, connection = new_connection()
    await client.send(HEAD + b"0123456789", size=size)
    raw = await connection.next_head()
    assert raw is not None
    assert (raw.method, raw.target, raw.http_version) == (b"POST", b"/upload", b"1.1")
    assert raw.headers == [(b"host", b"relay.test"), (b"content-length", b"10")]
    connection.begin_body(10)
    assert await read_all(connection) == b"0123456789"


async def test_a_connection_without_any_request_just_ends() -> None:
    client, connection = new_connection()
    await client.stream.send_eof()
    assert await connection.next_head() is None


async def test_a_client_that_leaves_in_the_middle_of_a_head_is_gone() -> None:
    client, connection = new_connection()
    await client.send(HEAD[:-1])
    await client.stream.send_eof()
    with pytest.raises(ClientGone):
        await connection.next_head()


async def test_a_broken_connection_is_a_client_gone() -> None:
    client, connection = new_connection()
    await trio.aclose_forcefully(client.stream)
    with pytest.raises(ClientGone):
        await connection.respond(OK, close=False)


async def test_limits_on_heads_are_those_of_the_configuration() -> None:
    client, connection = new_connection(max_header_bytes=len(HEAD))
    await client.send(HEAD)
    assert await connection.next_head() is not None
    client, connection = new_connection(max_header_bytes=len(HEAD) - 1)
    await client.send(HEAD)
    with pytest.raises(HeadersTooLarge):
        await connection.next_head()
    client, connection = new_connection(max_headers=1)
    await client.send(HEAD)
    with pytest.raises(HeadersTooLarge):
        await connection.next_head()


# --- heads that come again ---------------------------------------------------------------------


class Understood:
    """``parse_request``, and what it was asked for."""

    def __init__(self) -> None:
        self.lengths: list[int | None] = []

    def __call__(self, *raw: Any) -> RequestHead:
        head = parse_request(*raw)
        self.lengths.append(head.content_length)
        return head


async def requests(connection: HttpConnection, understand: Understood) -> list[RequestHead]:
    """All requests of a connection, with a body each."""
    heads = []
    while (head := await connection.next_request(understand)) is not None:
        await connection.send_continue()
        assert await read_all(connection) == b"0123456789"[: head.content_length]
        heads.append(head)
    return heads


@pytest.mark.parametrize("size", [None, 1, 7])
async def test_a_head_that_comes_again_is_understood_once(size: int | None) -> None:
    client, connection = new_connection()
    understand = Understood()
    other = HEAD.replace(b"10", b"9")
    sent = (HEAD + b"0123456789") * 3 + other + b"012345678" + HEAD + b"0123456789"
    await client.send(sent, size=size)
    await client.stream.send_eof()
    heads = await requests(connection, understand)
    assert [head.content_length for head in heads] == [10, 10, 10, 9, 10]
    assert understand.lengths == [10, 9, 10]


async def test_long_heads_are_not_remembered() -> None:
    for excess, understood in ((0, 1), (1, 2)):
        client, connection = new_connection()
        understand = Understood()
        filler = b"X: " + b"x" * (KNOWN_HEAD_MAX - len(HEAD) - len(b"X: \r\n") + excess)
        await client.send((HEAD[:-2] + filler + b"\r\n\r\n" + b"0123456789") * 2)
        await client.stream.send_eof()
        assert len(await requests(connection, understand)) == 2
        assert len(understand.lengths) == understood


async def test_a_head_that_comes_again_is_not_mixed_up_with_one_that_waits_for_100() -> None:
    client, connection = new_connection()
    waiting = HEAD[:-2] + b"Expect: 100-continue\r\n\r\n"
    # It does not wait after all, so nothing is said, and nothing is owed to the next request.
    await client.send(HEAD + b"0123456789" + waiting + b"0123456789" + HEAD)
    for _ in range(2):
        assert await connection.next_request(parse_request) is not None
        await connection.send_continue()
        assert await read_all(connection) == b"0123456789"
    assert await connection.next_request(parse_request) is not None
    await connection.send_continue()
    await connection.respond(OK, close=False)
    assert (await client.answer()).status == 200


# --- deadlines of heads ------------------------------------------------------------------------


async def test_a_head_that_does_not_come_to_an_end_is_too_slow(autojump_clock: MockClock) -> None:
    client, connection = new_connection(header_timeout=10.0)
    await client.send(HEAD[:-1])
    assert await seconds_until(TooSlow, connection.next_head) == 10.0


async def test_the_deadline_of_a_head_is_for_the_whole_of_it(autojump_clock: MockClock) -> None:
    client, connection = new_connection(header_timeout=10.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: drip(client, HEAD, every=0.9))
        assert await seconds_until(TooSlow, connection.next_head) == 10.0
        nursery.cancel_scope.cancel()


async def test_a_connection_that_sends_nothing_ends_in_silence(autojump_clock: MockClock) -> None:
    _client, connection = new_connection(header_timeout=10.0, keep_alive_timeout=60.0)
    assert await seconds_until(None, connection.next_head) == 10.0


@pytest.mark.parametrize("nothing", [b"", b"\r\n", b"\r\n\r\n", b"\r"])
async def test_a_connection_idle_between_requests_ends_in_silence(
    nothing: bytes, autojump_clock: MockClock
) -> None:
    client, connection = new_connection(keep_alive_timeout=60.0)
    await client.send(EMPTY)
    await connection.next_head()
    await connection.respond(OK, close=False)
    if nothing:
        await client.send(nothing)
    assert await seconds_until(None, connection.next_head) == 60.0


async def test_a_later_head_has_its_own_deadline_from_its_first_byte(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection(header_timeout=10.0, keep_alive_timeout=60.0)
    await client.send(EMPTY)
    await connection.next_head()
    await connection.respond(OK, close=False)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send_late() -> None:
            await trio.sleep(59)
            await client.send(HEAD[:5])

        assert await seconds_until(TooSlow, connection.next_head) == 69.0


async def test_a_pipelined_beginning_of_a_head_is_under_its_deadline_at_once(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection(header_timeout=10.0, keep_alive_timeout=60.0)
    await client.send(EMPTY + HEAD[:5])
    await connection.next_head()
    await connection.respond(OK, close=False)
    assert await seconds_until(TooSlow, connection.next_head) == 10.0


# --- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 3])
async def test_a_body_with_a_length_takes_its_bytes_and_not_one_more(size: int | None) -> None:
    client, connection = new_connection()
    await client.send(HEAD + b"0123456789" + EMPTY, size=size)
    await connection.next_head()
    connection.begin_body(10)
    assert not connection.body_read
    assert await read_all(connection) == b"0123456789"
    assert connection.body_read
    await connection.respond(OK, close=False)
    following = await connection.next_head()
    assert following is not None
    assert (b"content-length", b"0") in following.headers


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("trailers", [b"", b"X-Checksum: 1\r\n"])
async def test_a_chunked_body_takes_its_bytes_and_not_one_more(
    size: int | None, trailers: bytes
) -> None:
    client, connection = new_connection()
    body = chunked(b"0123456789", [1, 4])[:-2] + trailers + b"\r\n"
    await client.send(CHUNKED + body + EMPTY, size=size)
    await connection.next_head()
    connection.begin_body(None)
    assert not connection.body_read
    assert await read_all(connection) == b"0123456789"
    assert connection.body_read
    assert await connection.receive() == b""
    await connection.respond(OK, close=False)
    following = await connection.next_head()
    assert following is not None
    assert (b"content-length", b"0") in following.headers


async def test_the_smallest_chunks_do_not_keep_other_connections_waiting() -> None:
    """CVE-2025-69229 (aiohttp): one read has room for 10,000 of them, and each costs its work."""
    client, connection = new_connection()
    number = 10_000
    await client.send(CHUNKED + b"1\r\nx\r\n" * number + b"0\r\n\r\n" + EMPTY)
    turns = reads = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    await connection.next_head()
    connection.begin_body(None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        size = 0
        while data := await connection.receive():
            size += len(data)
            reads += 1
        nursery.cancel_scope.cancel()
    assert size == number
    assert turns >= number // MAX_CHUNKS
    # Nor is each of them a read of its own to whoever relays them.
    assert reads <= number // MAX_CHUNKS + 2
    await connection.respond(OK, close=False)
    assert await connection.next_head() is not None


async def test_a_body_of_no_bytes_has_been_read() -> None:
    client, connection = new_connection()
    await client.send(EMPTY)
    await connection.next_head()
    connection.begin_body(0)
    assert connection.body_read
    assert await connection.receive() == b""


async def test_a_large_body_comes_in_pieces_of_bounded_size() -> None:
    client, connection = new_connection()
    size = 3 * READ_SIZE + 1
    await client.send(HEAD.replace(b"10", b"%d" % size) + bytes(size))
    await connection.next_head()
    connection.begin_body(size)
    pieces = []
    while data := await connection.receive():
        pieces.append(len(data))
    assert sum(pieces) == size
    assert max(pieces) <= READ_SIZE


@pytest.mark.parametrize("body", [b"x\r\n", b"2\r\nabc", b"5;a=\rb\r\n", b"1\r\nab\r\n", b"-1\r\n"])
async def test_a_malformed_chunked_body_is_a_bad_request(body: bytes) -> None:
    client, connection = new_connection()
    await client.send(CHUNKED + body + b"\r\n\r\n")
    await connection.next_head()
    connection.begin_body(None)
    with pytest.raises(BadRequest):
        await read_all(connection)
    assert not connection.body_read


async def test_trailers_are_under_the_limits_of_heads() -> None:
    client, connection = new_connection(max_headers=2)
    await client.send(CHUNKED + b"0\r\n" + b"A: b\r\n" * 3 + b"\r\n")
    await connection.next_head()
    connection.begin_body(None)
    with pytest.raises(HeadersTooLarge):
        await read_all(connection)


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"012345678", CHUNKED, CHUNKED + b"5\r\nabcde\r\n"])
@pytest.mark.parametrize("broken", [False, True])
async def test_a_client_that_leaves_before_the_end_of_its_body_is_gone(
    sent: bytes, broken: bool
) -> None:
    client, connection = new_connection()
    await client.send(sent)
    await connection.next_head()
    connection.begin_body(10 if sent.startswith(HEAD) else None)
    if broken:
        await trio.aclose_forcefully(client.stream)
    else:
        await client.stream.send_eof()
    with pytest.raises(ClientGone):
        await read_all(connection)


async def test_a_connection_serves_only_so_many_requests() -> None:
    client, connection = new_connection(keep_alive_requests=3)
    reusable = []
    for _ in range(3):
        await client.send(EMPTY)
        await connection.next_head()
        connection.begin_body(0)
        reusable.append(connection.reusable)
        await connection.respond(OK, close=False)
    assert reusable == [True, True, False]


async def test_a_connection_whose_body_was_not_read_is_not_used_again() -> None:
    client, connection = new_connection()
    await client.send(HEAD)
    await connection.next_head()
    connection.begin_body(10)
    assert not connection.reusable


# --- deadlines of bodies -----------------------------------------------------------------------


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"01234", CHUNKED, CHUNKED + b"5\r\nabc"])
async def test_a_body_that_stops_is_too_slow(sent: bytes, autojump_clock: MockClock) -> None:
    client, connection = new_connection(body_idle_timeout=30.0)
    await client.send(sent)
    await connection.next_head()
    connection.begin_body(10 if sent.startswith(HEAD) else None)
    assert await seconds_until(TooSlow, lambda: read_all(connection)) == 30.0


async def test_every_byte_renews_the_idle_deadline(autojump_clock: MockClock) -> None:
    client, connection = new_connection(body_idle_timeout=30.0, min_body_rate=0)
    await client.send(HEAD)
    await connection.next_head()
    connection.begin_body(10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: drip(client, b"0123456789", every=29.9))
        assert await read_all(connection) == b"0123456789"
    assert trio.current_time() == pytest.approx(299)


async def send_at_rate(client: MemoryClient, rate: int, seconds: int, every: int = 1) -> None:
    for _ in range(0, seconds, every):
        await client.send(b"x" * rate * every)
        await trio.sleep(every)


@pytest.mark.parametrize("coding", [HEAD, CHUNKED])
async def test_a_body_under_the_minimum_rate_is_too_slow_after_the_grace(
    coding: bytes, autojump_clock: MockClock
) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    await client.send(coding.replace(b"10", b"100000"))
    await connection.next_head()
    connection.begin_body(None if coding is CHUNKED else 100_000)
    if coding is CHUNKED:
        await client.send(b"%x\r\n" % 100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_at_rate, client, 500, 100)
        assert await seconds_until(TooSlow, lambda: read_all(connection)) == 11.0
        nursery.cancel_scope.cancel()


async def test_a_body_at_the_minimum_rate_may_take_for_ever(autojump_clock: MockClock) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    size = 1024 * 3600
    await client.send(HEAD.replace(b"10", b"%d" % size))
    await connection.next_head()
    connection.begin_body(size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_at_rate, client, 1024, 3600, 20)
        assert len(await read_all(connection)) == size
    assert trio.current_time() == 3600


async def test_a_body_that_begins_slowly_has_the_grace_to_catch_up(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    await client.send(HEAD.replace(b"10", b"100000"))
    await connection.next_head()
    connection.begin_body(100_000)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await drip(client, b"x" * 10, every=0.99)
            await client.send(b"x" * 99_990)

        assert len(await read_all(connection)) == 100_000


async def test_bytes_that_came_with_the_head_count_for_the_rate(autojump_clock: MockClock) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    await client.send(HEAD.replace(b"10", b"30001") + bytes(30_000))
    await connection.next_head()
    connection.begin_body(30_001)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send_late() -> None:
            await trio.sleep(20)
            await client.send(b"x")

        assert len(await read_all(connection)) == 30_001


async def test_no_byte_of_a_chunked_body_counts_twice_for_the_rate(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    chunks = b"1\r\nx\r\n" * 2000
    await client.send(CHUNKED + chunks)
    await connection.next_head()
    connection.begin_body(None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: drip(client, b"1\r\nx\r\n" * 20, every=1.0))
        seconds = await seconds_until(TooSlow, lambda: read_all(connection))
        nursery.cancel_scope.cancel()
    assert seconds == len(chunks) // 1024 + 1


async def test_each_body_is_timed_for_itself(autojump_clock: MockClock) -> None:
    client, connection = new_connection(min_body_rate=1024, min_body_rate_grace=10.0)
    for _ in range(5):
        await client.send(HEAD)
        await connection.next_head()
        connection.begin_body(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: drip(client, b"0123456789", every=0.9))
            assert await read_all(connection) == b"0123456789"
        await connection.respond(OK, close=False)


async def test_no_clock_runs_while_nobody_reads(autojump_clock: MockClock) -> None:
    client, connection = new_connection(slow_upstream_pair)
    size = 3 * READ_SIZE
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send(HEAD.replace(b"10", b"%d" % size))
            for _ in range(3):
                # As long as a client may take, however long it has been kept waiting before.
                await trio.sleep(CONFIG.body_idle_timeout - 1)
                await client.send(bytes(READ_SIZE))

        await connection.next_head()
        connection.begin_body(size)
        received = 0
        while data := await connection.receive():
            received += len(data)
            await trio.sleep(3600)
    assert received == size


# --- responses ---------------------------------------------------------------------------------


async def test_a_response_has_its_framing_and_no_field_twice() -> None:
    client, connection = new_connection()
    await client.send(EMPTY)
    await connection.next_head()
    response = Response(status=503, body=b"sorry\n", headers={"Retry-After": "5"})
    await connection.respond(response, close=False)
    answer = await client.answer()
    assert (answer.status, answer.body) == (503, b"sorry\n")
    assert answer.headers.pop("date").endswith(" GMT")
    assert answer.headers == {
        "server": "relay",
        "content-type": "application/json",
        "content-length": "6",
        "retry-after": "5",
    }


async def test_a_response_to_head_has_no_body() -> None:
    client, connection = new_connection()
    await client.send(b"HEAD / HTTP/1.1\r\nHost: relay.test\r\n\r\n" + EMPTY)
    await connection.next_head()
    await connection.respond(OK, close=False)
    answer = await client.answer(to_head=True)
    assert answer.headers["content-length"] == "3"
    await connection.next_head()
    await connection.respond(OK, close=False)
    assert (await client.answer()).body == OK.body


@pytest.mark.parametrize("request_", [EMPTY, EMPTY[:-2] + b"Connection: close\r\n\r\n"])
async def test_a_last_response_says_so_once_and_the_connection_ends(request_: bytes) -> None:
    client, connection = new_connection()
    await client.send(request_)
    await client.stream.send_eof()
    await connection.next_head()
    await connection.respond(OK, close=True)
    assert (await client.answer()).closes
    assert await client.ends()


async def test_a_client_that_does_not_take_its_response_is_gone(autojump_clock: MockClock) -> None:
    client, connection = new_connection(lockstep_stream_pair, body_idle_timeout=30.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, EMPTY)
        await connection.next_head()
    took = await seconds_until(ClientGone, lambda: connection.respond(OK, close=True))
    assert took == 30.0


async def continued(head: bytes, then: bytes = b"") -> list[int]:
    """The statuses that a client gets whose request is answered after an offered 100."""
    client, connection = new_connection()
    await client.send(head + then)
    assert await connection.next_head() is not None
    connection.begin_body(10)
    await connection.send_continue()
    await connection.respond(OK, close=False)
    statuses = [(await client.answer()).status]
    if statuses == [100]:
        statuses.append((await client.answer()).status)
    return statuses


async def test_a_client_that_waits_for_100_gets_it_and_no_other_does() -> None:
    waiting = HEAD[:-2] + b"Expect: 100-Continue\r\n\r\n"
    assert await continued(waiting) == [100, 200]
    assert await continued(waiting, b"0123456789") == [200]
    assert await continued(HEAD) == [200]
    assert await continued(waiting.replace(b"HTTP/1.1", b"HTTP/1.0")) == [200]


# --- the end of a connection -------------------------------------------------------------------


async def test_a_client_that_is_still_sending_gets_to_see_the_last_response(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection(slow_upstream_pair)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send(HEAD.replace(b"10", b"10000000"))
            await client.send(bytes(4 * READ_SIZE), size=READ_SIZE // 2)
            await client.stream.send_eof()

        await connection.next_head()
        await connection.respond(OK, close=True)
    answer = await client.answer()
    assert (answer.status, answer.closes) == (200, True)
    assert await client.ends()


async def test_a_last_response_waits_a_little_for_a_client_that_says_nothing(
    autojump_clock: MockClock,
) -> None:
    client, connection = new_connection()
    await client.send(EMPTY)
    await connection.next_head()
    took = await seconds_until(None, lambda: connection.respond(OK, close=True))
    assert took == LINGER_IDLE


async def test_a_client_that_never_stops_sending_is_cut_off(autojump_clock: MockClock) -> None:
    client, connection = new_connection()
    await client.send(HEAD)
    await connection.next_head()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: drip(client, bytes(1000), every=LINGER_IDLE / 2))
        took = await seconds_until(None, lambda: connection.respond(OK, close=True))
        assert took == LINGER_TIMEOUT
        nursery.cancel_scope.cancel()


async def test_a_client_that_breaks_off_after_the_last_response_is_no_error() -> None:
    client, connection = new_connection()
    await client.send(EMPTY)
    await connection.next_head()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def leave() -> None:
            await client.answer()
            await trio.aclose_forcefully(client.stream)

        await connection.respond(OK, close=True)
