"""Uploads with an Idempotency-Key, as a client sees them: one upload, however often it is sent."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.config import HttpConfig, RouteConfig
from relay.errors import BrokerUnavailable, OutcomeUnknown, QueueFull, RelayError
from relay.model import Frame
from relay.server.handler import UploadHandler
from relay.server.uploads import Uploads
from tests.memory_broker import MemoryBroker, MemoryClient, connected

ROUTES = {name: RouteConfig(name=name, frame_size=4096) for name in ("default", "other")}
REPLAYED = "idempotency-replayed"


class Server:
    """An upload handler with a broker in memory."""

    def __init__(self, **config: float) -> None:
        self.broker = MemoryBroker()
        self.uploads = Uploads(2)
        self.handler = UploadHandler(
            HttpConfig(**config),  # type: ignore[arg-type]
            ROUTES,
            self.broker,
            self.uploads,
        )
        self.serve = self.handler.serve

    @property
    def committed(self) -> list[bytes]:
        """The bodies of all committed transfers."""
        return [sink.body for sink in self.broker.sinks if sink.committed]


def request(body: bytes = b"0123456789", *fields: str, key: str = "k", route: str = "") -> bytes:
    target = f"/upload/{route}" if route else "/upload"
    lines = [f"POST {target} HTTP/1.1", "Host: relay.test", f"Idempotency-Key: {key}"]
    lines += [f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def expecting(size: int = 10) -> bytes:
    """A request whose client waits for 100 (Continue)."""
    return request(b"x" * size, "Expect: 100-continue")[:-size]


async def test_a_retry_after_success_gets_the_same_receipt_and_uploads_nothing() -> None:
    server = Server()
    async with connected(server.serve) as client:
        first = await client.exchange(request())
        # The same connection and another one.
        again = await client.exchange(request())
    async with connected(server.serve) as client:
        once_more = await client.exchange(request())
    assert (first.status, first.headers.get(REPLAYED)) == (201, None)
    for answer in (again, once_more):
        assert (answer.status, answer.headers[REPLAYED]) == (201, "true")
        assert answer.body == first.body
    assert len(server.broker.sinks) == 1
    assert server.uploads.finished == {"committed": 1, "replayed": 2}
    assert server.broker.sink.frames[0].transfer.idempotency_key == "k"


async def test_a_replay_sends_no_continue_and_does_not_read_the_body() -> None:
    server = Server()
    async with connected(server.serve) as client:
        await client.exchange(request())
    async with connected(server.serve) as client:
        answer = await client.exchange(expecting())
        assert (answer.status, answer.headers[REPLAYED]) == (201, "true")
        assert answer.closes
        assert await client.ends()


async def test_a_client_that_sends_everything_before_it_looks_gets_the_replay_too() -> None:
    server = Server()
    body = bytes(300_000)
    async with connected(server.serve) as client:
        await client.exchange(request(body))
        await client.send(request(body)[:-1])
        await wait_all_tasks_blocked()
        await client.send(body[:1])
        answer = await client.answer()
        assert answer.headers[REPLAYED] == "true"
        assert not answer.closes
        assert (await client.exchange(request(key="other"))).status == 201


async def test_a_retry_that_dawdles_with_its_body_gets_the_replay_at_the_deadline(
    autojump_clock: MockClock,
) -> None:
    server = Server(body_idle_timeout=7.0)
    async with connected(server.serve) as client:
        await client.exchange(request())
        began = trio.current_time()
        answer = await client.exchange(request()[:-1])
        assert (answer.status, answer.closes) == (201, True)
        assert trio.current_time() - began == pytest.approx(7.0)


async def test_a_replay_needs_neither_room_nor_broker() -> None:
    server = Server()
    async with connected(server.serve) as client:
        await client.exchange(request())
        server.broker.refused = BrokerUnavailable("gone")
        server.uploads.draining = True
        answer = await client.exchange(request())
    assert answer.headers[REPLAYED] == "true"


async def test_a_key_whose_upload_is_in_progress_is_refused_before_the_body() -> None:
    server = Server()
    async with connected(server.serve) as first, connected(server.serve) as second:
        await first.send(request()[:-1])
        await wait_all_tasks_blocked()
        answer = await second.exchange(expecting())
        assert (answer.status, answer.json()["code"]) == (409, "key-in-use")
        assert answer.closes
        assert answer.headers["retry-after"] == "5"
        await first.send(b"9")
        assert (await first.answer()).status == 201
    assert len(server.broker.sinks) == 1
    assert server.uploads.finished == {"committed": 1, "key-in-use": 1}


async def test_other_keys_and_routes_and_requests_without_a_key_are_not_held_up() -> None:
    server = Server()
    async with connected(server.serve) as first, connected(server.serve) as second:
        await first.send(request()[:-1])
        await wait_all_tasks_blocked()
        for other in [
            request(key="other"),
            request(route="other"),
            request().replace(b"Idempotency-Key: k\r\n", b""),
        ]:
            answer = await second.exchange(other)
            assert (answer.status, answer.headers.get(REPLAYED)) == (201, None)
        await first.send(b"9")
        await first.answer()


async def test_a_key_of_another_request_is_refused_before_the_body() -> None:
    server = Server()
    async with connected(server.serve) as client:
        await client.exchange(request())
        answer = await client.exchange(expecting(11))
        assert (answer.status, answer.json()["code"]) == (422, "digest-mismatch")
        assert answer.closes
    assert len(server.broker.sinks) == 1


@pytest.mark.parametrize("error", [QueueFull("full"), OutcomeUnknown("lost")])
async def test_a_retry_after_a_failure_uploads(error: RelayError) -> None:
    server = Server()
    failures = [error]

    async def fail_once(_: Frame) -> None:
        await trio.lowlevel.checkpoint()
        if failures:
            raise failures.pop()

    server.broker.before_commit = fail_once
    async with connected(server.serve) as client:
        assert (await client.exchange(request())).json()["code"] == error.code
        answer = await client.exchange(request())
    assert (answer.status, answer.headers.get(REPLAYED)) == (201, None)
    assert server.committed == [b"0123456789"]
    # Only so can consumers tell that these are the same upload.
    assert {sink.transfer.idempotency_key for sink in server.broker.sinks} == {"k"}


async def test_a_refused_retry_leaves_the_key_to_the_upload_that_has_it() -> None:
    server = Server()
    async with connected(server.serve) as first:
        await first.send(request()[:-1])
        await wait_all_tasks_blocked()
        for _ in range(2):
            async with connected(server.serve) as second:
                assert (await second.exchange(expecting())).status == 409
        await first.send(b"9")
        assert (await first.answer()).status == 201


async def _leave(server: Server, client: MemoryClient) -> None:
    await client.stream.send_eof()


async def _break(server: Server, client: MemoryClient) -> None:
    await trio.aclose_forcefully(client.stream)


async def _drain(server: Server, client: MemoryClient) -> None:
    for record in server.uploads:  # as a drain does at its end
        record.scope.cancel()
    assert (await client.answer()).json()["code"] == "shutting-down"


@pytest.mark.parametrize("end", [_leave, _break, _drain])
async def test_an_upload_that_ends_early_gives_its_key_back(end: object) -> None:
    server = Server()
    async with connected(server.serve) as client:
        await client.send(request()[:-1])
        await wait_all_tasks_blocked()
        assert server.handler.keys.held == 1
        assert callable(end)
        await end(server, client)
        await wait_all_tasks_blocked()
        assert server.handler.keys.held == 0
    async with connected(server.serve) as client:
        answer = await client.exchange(request())
    assert (answer.status, answer.headers.get(REPLAYED)) == (201, None)


async def test_cancelled_wherever_it_waits_an_upload_gives_its_key_back() -> None:
    waits = 0
    is_done = False
    while not is_done:
        server = Server()
        left = waits

        async with trio.open_nursery() as nursery:

            async def count(_: object, scope: trio.CancelScope = nursery.cancel_scope) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    scope.cancel()
                await trio.lowlevel.checkpoint()

            server.broker.before_open = server.broker.before_send = count
            server.broker.before_commit = count
            async with connected(server.serve) as client:
                is_done = (await client.exchange(request(bytes(10_000)))).status == 201
        assert server.handler.keys.held == 0
        assert len(server.handler.keys) == (1 if is_done else 0)
        waits += 1
    # The channel, three frames, and the commit.
    assert waits > 4


async def test_the_answer_is_remembered_though_its_client_has_gone() -> None:
    server = Server()
    committing = trio.Event()
    go_on = trio.Event()

    async def wait(_: Frame) -> None:
        committing.set()
        await go_on.wait()

    server.broker.before_commit = wait
    async with connected(server.serve) as client:
        await client.send(request())
        await committing.wait()
        await trio.aclose_forcefully(client.stream)
        go_on.set()
    async with connected(server.serve) as client:
        answer = await client.exchange(request())
    assert (answer.status, answer.headers[REPLAYED]) == (201, "true")
    assert server.committed == [b"0123456789"]
