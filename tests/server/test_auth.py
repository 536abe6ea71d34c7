"""Uploads of clients that are somebody: what they are refused with, and where their name goes."""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from relay.config import HttpConfig, RouteConfig
from relay.logs import LogfmtFormatter
from relay.server.admin import AdminHandler
from relay.server.handler import UploadHandler
from relay.server.identity import Access, Peer
from relay.server.tokens import Tokens, line_of
from relay.server.uploads import Uploads
from tests.memory_broker import PEER, Answer, MemoryBroker, MemoryClient, connected
from tests.uploading import request, request_head

ROUTES = {
    "default": RouteConfig(name="default"),
    "alices": RouteConfig(name="alices", clients=("alice",), max_bytes=10),
}
SECRETS = {"alice": "relay_alices-secret", "bob": "relay_bobs-secret"}
ALICE = f"Authorization: Bearer {SECRETS['alice']}"
BOB = f"Authorization: Bearer {SECRETS['bob']}"
WRONG = "Authorization: Bearer relay_nobodys-secret"
EXPECT = "Expect: 100-continue"


class Server:
    """An upload handler that knows alice and bob by their tokens."""

    def __init__(self, *, anonymous: bool = False, per_client: int = 0) -> None:
        self.broker = MemoryBroker()
        self.uploads = Uploads(10, per_client=per_client)
        lines = [line_of(name, token) for name, token in SECRETS.items()]
        self.access = Access(tokens=Tokens("\n".join(lines)), anonymous=anonymous)
        self.handler = UploadHandler(HttpConfig(), ROUTES, self.broker, self.uploads, self.access)

    @asynccontextmanager
    async def client(self, peer: Peer = PEER) -> AsyncGenerator[MemoryClient, None]:
        async def serve(stream: trio.abc.HalfCloseableStream, _: Peer) -> None:
            await self.handler.serve(stream, peer)

        async with connected(serve) as client:
            yield client

    async def answer(self, *headers: str, path: str = "/upload", peer: Peer = PEER) -> Answer:
        """The answer to an upload on a connection of its own."""
        async with self.client(peer) as client:
            return await client.exchange(request(path, b"hello", None, *headers))


def problem(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json()["code"]


async def test_a_token_makes_the_transfer_its_clients() -> None:
    server = Server()
    assert (await server.answer(ALICE)).status == 201
    assert server.broker.sink.transfer.client == "alice"


@pytest.mark.parametrize("headers", [[], [WRONG], ["Authorization: Basic YTpi"]])
@pytest.mark.parametrize("path", ["/upload", "/upload/alices", "/upload/nowhere"])
async def test_without_a_valid_token_nothing_is_relayed_and_nothing_is_told_of_routes(
    headers: list[str], path: str
) -> None:
    server = Server()
    answer = await server.answer(*headers, path=path)
    assert problem(answer) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="relay"')
    assert "transfer" not in answer.json()
    assert server.broker.sinks == []


async def test_what_is_wrong_with_a_token_is_told_as_rfc_6750_has_it() -> None:
    server = Server()
    fields = [(await server.answer(*lines)).headers["www-authenticate"] for lines in ([], [WRONG])]
    assert fields == ['Bearer realm="relay"', 'Bearer realm="relay", error="invalid_token"']


async def test_two_tokens_in_one_request_are_none() -> None:
    assert problem(await Server().answer(ALICE, BOB)) == (400, "bad-request")


@pytest.mark.parametrize(
    ("path", "header", "expected"),
    [
        ("/upload", WRONG, (401, "unauthorized")),
        ("/upload/alices", BOB, (403, "forbidden")),
    ],
)
async def test_the_refusal_comes_before_the_body_and_ends_the_connection(
    path: str, header: str, expected: tuple[int, str]
) -> None:
    server = Server()
    for more in ([header], [header, EXPECT]):
        async with server.client() as client:
            await client.send(request_head(path, 5, None, *more))
            answer = await client.answer()
            assert problem(answer) == expected
            assert answer.closes
            assert await client.ends()
    assert server.broker.sinks == []


async def test_a_route_is_for_its_clients_only() -> None:
    server = Server()
    assert (await server.answer(ALICE, path="/upload/alices")).status == 201
    assert problem(await server.answer(BOB, path="/upload/alices")) == (403, "forbidden")
    # What the route takes is not told to those who may not use it.
    for header, status in ((ALICE, 413), (BOB, 403)):
        async with server.client() as client:
            large = request("/upload/alices", b"x" * 11, None, header)
            assert (await client.exchange(large)).status == status


async def test_where_anonymous_clients_are_welcome_a_wrong_token_still_is_not() -> None:
    server = Server(anonymous=True)
    assert (await server.answer()).status == 201
    assert server.broker.sink.transfer.client is None
    assert problem(await server.answer(WRONG)) == (401, "unauthorized")
    assert problem(await server.answer(path="/upload/alices")) == (401, "unauthorized")


async def test_the_connection_says_who_it_is_where_no_token_does() -> None:
    server = Server()
    peer = Peer(address="unix", client="uid:1000")
    assert (await server.answer(peer=peer)).status == 201
    assert server.broker.sink.transfer.client == "uid:1000"
    assert (await server.answer(ALICE, peer=peer)).status == 201
    assert server.broker.sink.transfer.client == "alice"


async def test_each_request_of_a_connection_is_its_own_clients() -> None:
    server = Server()
    async with server.client() as client:
        for header in (ALICE, BOB):
            assert (await client.exchange(request("/upload", b"x", None, header))).status == 201
        assert problem(await client.exchange(request("/upload", b"x"))) == (401, "unauthorized")
    assert [sink.transfer.client for sink in server.broker.sinks] == ["alice", "bob"]


async def test_a_token_that_is_no_longer_valid_is_none_on_an_open_connection_either() -> None:
    server = Server()
    async with server.client() as client:
        same = request("/upload", b"hello", None, ALICE)
        assert (await client.exchange(same)).status == 201
        server.access.configure(tokens=Tokens(line_of("bob", SECRETS["bob"])), anonymous=False)
        assert problem(await client.exchange(same)) == (401, "unauthorized")


async def test_a_key_belongs_to_its_client() -> None:
    server = Server()
    key = "Idempotency-Key: k"
    first, others, again = [await server.answer(header, key) for header in (ALICE, BOB, ALICE)]
    assert first.json() == again.json()
    assert first.json() != others.json()
    assert again.headers["idempotency-replayed"] == "true"
    # Whoever has no token gets nobody's receipt.
    assert problem(await server.answer(key)) == (401, "unauthorized")


async def test_one_client_cannot_take_all_the_room() -> None:
    server = Server(per_client=1)
    held = trio.Event()
    server.broker.before_commit = lambda _: held.wait()
    async with trio.open_nursery() as nursery, server.client() as first:
        await first.send(request_head("/upload", 5, None, ALICE, EXPECT))
        assert (await first.answer()).status == 100
        busy = await server.answer(ALICE)
        assert problem(busy) == (429, "too-many-uploads")
        assert int(busy.headers["retry-after"]) > 0
        nursery.start_soon(partial(server.answer, BOB))
        while len(server.uploads) < 2:
            await trio.testing.wait_all_tasks_blocked()
        held.set()
        await first.send(b"hello")
        assert (await first.answer()).status == 201
    assert (await server.answer(ALICE)).status == 201


async def test_the_operator_sees_who_uploads() -> None:
    server = Server()
    admin = AdminHandler(HttpConfig(), server.uploads, lambda: None, metrics=list, status=dict)
    async with server.client() as client:
        await client.send(request_head("/upload", 5, None, ALICE, EXPECT))
        assert (await client.answer()).status == 100
        async with connected(admin.serve) as probe:
            get = b"GET /transfers HTTP/1.1\r\nHost: x\r\n\r\n"
            (listed,) = (await probe.exchange(get)).json()["transfers"]
        assert listed["client"] == "alice"
        await client.send(b"hello")
        assert (await client.answer()).status == 201


async def test_the_log_has_names_and_never_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = Server()
    for header in (ALICE, WRONG, "Authorization: Basic relay_x-secret"):
        await server.answer(header)
    await server.answer(BOB, path="/upload/alices")
    await server.answer(ALICE, BOB)
    lines = [LogfmtFormatter().format(record) for record in caplog.records]
    assert any('msg="upload committed"' in line and " client=alice " in line for line in lines)
    assert any(" client=bob " in line and " outcome=forbidden " in line for line in lines)
    assert len(lines) >= 5
    assert not any("secret" in line for line in lines)
