"""Upload requests, from the first byte to the answer: one, and true, whatever happens."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from relay.config import HttpConfig, RouteConfig
from relay.errors import (
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    ConfirmTimeout,
    OutcomeUnknown,
    QueueFull,
    RelayError,
    Unroutable,
)
from relay.model import Frame, PartHead, Transfer
from relay.protocol.crc import crc32c
from relay.server.connection import HttpConnection
from relay.server.handler import UploadHandler
from relay.server.identity import Peer
from relay.server.uploads import IDLE_GRACE, Uploads
from tests.memory_broker import (
    PEER,
    Answer,
    MemoryBroker,
    MemoryClient,
    MemorySink,
    NewPair,
    connected,
    slow_upstream_pair,
)
from tests.uploading import Part, browser_form, chunked, request, request_head

FRAME_SIZE = 4096
LARGE = bytes(range(256)) * 20
FORM_TYPE, FORM = browser_form(
    [Part(b"value", name="field"), Part(LARGE, name="f", filename="ä.bin")]
)


@dataclass
class Server:
    """An upload handler with its broker in memory."""

    config: HttpConfig = field(default_factory=lambda: HttpConfig(max_uploads=4))
    routes: dict[str, RouteConfig] = field(
        default_factory=lambda: {
            "default": RouteConfig(name="default", frame_size=FRAME_SIZE),
            "small": RouteConfig(
                name="small",
                frame_size=FRAME_SIZE,
                max_bytes=1000,
                max_part_bytes=100,
                max_parts=3,
                max_part_header_bytes=100,
                digests=("crc32c", "sha-256"),
            ),
        }
    )

    def __post_init__(self) -> None:
        self.broker = MemoryBroker()
        self.uploads = Uploads(self.config.max_uploads, client_rate=self.config.max_client_rate)
        self.handler = UploadHandler(self.config, self.routes, self.broker, self.uploads)

    @property
    def sink(self) -> MemorySink:
        return self.broker.sink

    @asynccontextmanager
    async def client(
        self, new_pair: NewPair = memory_stream_pair, *, patience: float = 120.0
    ) -> AsyncGenerator[MemoryClient, None]:
        async with connected(self.handler.serve, new_pair, patience=patience) as client:
            yield client
        assert len(self.uploads) == 0
        assert all(sink.closed for sink in self.broker.sinks)

    async def answer(self, data: bytes) -> Answer:
        """The answer to one request on a connection of its own."""
        async with self.client() as client:
            return await client.exchange(data)


@pytest.fixture
def server() -> Server:
    return Server()


def put(body: bytes, path: str = "/upload/x.bin", *headers: str) -> bytes:
    return request(path, body, None, *headers, method="PUT")


def post_chunked(body: bytes, sizes: list[int], content_type: str) -> bytes:
    head = request_head("/upload", 0, content_type)
    head = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + chunked(body, sizes)


def check_problem(answer: Answer, status: int, code: str) -> None:
    """Whether ``answer`` is a problem document (RFC 9457) as the contract has it."""
    assert (answer.status, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]
    assert document.keys() <= {"type", "title", "status", "detail", "code", "transfer"}


def raising(error: Exception) -> Callable[[object], Awaitable[None]]:
    async def hook(_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    return hook


# --- uploads that succeed ----------------------------------------------------------------------


async def test_a_raw_upload_is_relayed_and_its_receipt_tells_the_truth(server: Server) -> None:
    answer = await server.answer(put(LARGE, "/upload/ä.bin"))
    frames = -(-len(LARGE) // FRAME_SIZE)
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "transfer": server.sink.transfer.id,
        "route": "default",
        "frames": frames,
        "bytes": len(LARGE),
        "parts": [
            {
                "part": 0,
                "filename": "ä.bin",
                "bytes": len(LARGE),
                "frames": frames,
                "digest": {"crc32c": f"{crc32c(LARGE):08x}"},
            }
        ],
    }
    assert server.sink.committed
    assert server.sink.aborted == []
    assert server.sink.body == LARGE
    assert [frame.seq for frame in server.sink.frames] == list(range(frames))


async def test_a_form_is_relayed_part_by_part(server: Server) -> None:
    answer = await server.answer(request("/upload", FORM, FORM_TYPE))
    assert answer.status == 201
    assert [part["name"] for part in answer.json()["parts"]] == ["field", "f"]
    heads = [frame.head for frame in server.sink.frames if frame.head is not None]
    assert heads == [PartHead(name="field"), PartHead(name="f", filename="ä.bin")]
    assert server.sink.body == b"value" + LARGE
    assert [frame.commit is not None for frame in server.sink.frames][-1]
    assert sum(frame.commit is not None for frame in server.sink.frames) == 1


@pytest.mark.parametrize("size", [1, 100, 5000])
@pytest.mark.parametrize("new_pair", [memory_stream_pair, lockstep_stream_pair])
async def test_an_upload_is_the_same_however_it_arrives(
    server: Server, size: int, new_pair: NewPair
) -> None:
    for data in (
        request("/upload", FORM, FORM_TYPE),
        post_chunked(FORM, [1, 7, 3000], FORM_TYPE),
    ):
        async with server.client(new_pair) as client, trio.open_nursery() as nursery:
            nursery.start_soon(partial(client.send, data, size=size))
            assert (await client.answer()).status == 201
        assert server.sink.body == b"value" + LARGE
        assert server.sink.committed


@pytest.mark.parametrize("data", [put(b""), request("/upload", b""), put(b"", "/upload/r/x")])
async def test_an_empty_body_is_an_empty_part(server: Server, data: bytes) -> None:
    server.routes["r"] = server.routes["default"]
    answer = await server.answer(data)
    assert answer.status == 201
    assert (answer.json()["bytes"], answer.json()["frames"]) == (0, 1)
    assert [frame.body for frame in server.sink.frames] == [b""]


async def test_the_route_decides_about_frames_and_digests(server: Server) -> None:
    answer = await server.answer(request("/upload/small", b"a"))
    assert answer.json()["route"] == "small"
    assert list(answer.json()["parts"][0]["digest"]) == ["crc32c", "sha-256"]
    assert server.sink.route is server.routes["small"]
    assert server.sink.transfer.route == "small"


async def test_digests_that_the_client_wants_are_made_once(server: Server) -> None:
    wanted = "Want-Repr-Digest: sha-256=1, sha-512=3"
    answer = await server.answer(request("/upload/small", b"a", None, wanted))
    assert list(answer.json()["parts"][0]["digest"]) == ["crc32c", "sha-256", "sha-512"]


async def test_the_transfer_carries_the_clients_key_and_a_time_ordered_id(server: Server) -> None:
    for _ in range(3):
        await server.answer(request("/upload", b"a", None, 'Idempotency-Key: "key-1"'))
    ids = [sink.transfer.id for sink in server.broker.sinks]
    assert ids == sorted(set(ids))
    assert {sink.transfer.idempotency_key for sink in server.broker.sinks} == {"key-1"}
    assert {sink.transfer.client for sink in server.broker.sinks} == {None}


async def test_a_receipt_is_bounded(server: Server) -> None:
    server = Server(config=HttpConfig(receipt_parts=2))
    content_type, body = browser_form([Part(b"x", name=f"{i}") for i in range(5)])
    document = (await server.answer(request("/upload", body, content_type))).json()
    assert [part["name"] for part in document["parts"]] == ["0", "1"]
    assert document["parts_omitted"] == 3
    assert document["frames"] == 5


# --- connections -------------------------------------------------------------------------------

THREE = [put(b"one"), request("/upload", FORM, FORM_TYPE), post_chunked(FORM, [999], FORM_TYPE)]


@pytest.mark.parametrize("size", [None, 1, 1000])
async def test_pipelined_requests_are_answered_in_order(server: Server, size: int | None) -> None:
    async with server.client() as client:
        await client.send(b"".join(THREE), size=size)
        answers = [await client.answer() for _ in THREE]
    assert [answer.status for answer in answers] == [201] * 3
    assert [answer.closes for answer in answers] == [False] * 3
    assert [sink.body for sink in server.broker.sinks] == [b"one", *[b"value" + LARGE] * 2]
    ids = [answer.json()["transfer"] for answer in answers]
    assert ids == [sink.transfer.id for sink in server.broker.sinks]


async def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    async with server.client() as client:
        for data in THREE * 3:
            answer = await client.exchange(data)
            assert (answer.status, answer.closes) == (201, False)


@pytest.mark.parametrize("line", [b"Connection: close", b"Connection: keep-alive, Close"])
async def test_a_client_that_asks_for_it_gets_its_connection_closed(
    server: Server, line: bytes
) -> None:
    data = put(b"one").replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)
    async with server.client() as client:
        await client.send(data + put(b"two"))
        await client.stream.send_eof()
        answer = await client.answer()
        assert (answer.status, answer.closes) == (201, True)
        assert await client.ends()
    assert server.sink.body == b"one"


async def test_http_10_is_answered_and_closed(server: Server) -> None:
    async with server.client() as client:
        await client.send(put(b"one").replace(b"HTTP/1.1", b"HTTP/1.0") + put(b"two"))
        await client.stream.send_eof()
        answer = await client.answer()
        assert (answer.status, answer.closes) == (201, True)
        assert await client.ends()
    assert server.sink.body == b"one"


async def test_no_request_is_answered_after_a_connection_was_said_to_close(server: Server) -> None:
    async with server.client() as client:
        await client.send(b"GET / HTTP/1.1\r\n\r\n" + put(b"smuggled"))
        await client.stream.send_eof()
        assert (await client.answer()).closes
        assert await client.ends()
    assert server.broker.sinks == []


# --- 100 (Continue) ----------------------------------------------------------------------------

EXPECT = "Expect: 100-continue"


@pytest.mark.parametrize("new_pair", [memory_stream_pair, lockstep_stream_pair])
async def test_a_client_that_waits_is_told_to_continue(server: Server, new_pair: NewPair) -> None:
    async with server.client(new_pair) as client:
        await client.send(request_head("/upload", 5, None, EXPECT))
        answer = await client.answer()
        assert (answer.status, answer.headers) == (100, {})
        await client.send(b"hello")
        answer = await client.answer()
        assert (answer.status, answer.closes) == (201, False)


async def test_a_client_that_did_not_wait_is_not_told_to_continue(server: Server) -> None:
    answer = await server.answer(request("/upload", b"hello", None, EXPECT))
    assert answer.status == 201


@pytest.mark.parametrize(
    ("path", "size", "refused", "status", "code"),
    [
        ("/upload/nowhere", 5, None, 404, "not-found"),
        ("/upload/small", 101, None, 413, "too-large"),
        ("/upload", 5, BrokerUnavailable("down"), 503, "broker-unavailable"),
        ("/upload", 5, BrokerBlocked("alarm"), 503, "broker-blocked"),
    ],
)
async def test_an_upload_that_is_not_admitted_is_refused_before_its_body(
    server: Server,
    path: str,
    size: int,
    refused: RelayError | None,
    status: int,
    code: str,
    autojump_clock: MockClock,
) -> None:
    server.broker.refused = refused
    async with server.client() as client:
        answer = await client.exchange(request_head(path, size, None, EXPECT))
        check_problem(answer, status, code)
        assert answer.closes
        assert "transfer" not in answer.json()
        assert await client.ends()
    assert server.broker.sinks == []


async def test_an_upload_whose_sink_cannot_be_opened_is_refused_before_its_body(
    server: Server, autojump_clock: MockClock
) -> None:
    server.broker.before_open = raising(BrokerRefused("no channel"))
    answer = await server.answer(request_head("/upload", 5, None, EXPECT))
    check_problem(answer, 502, "broker-refused")
    assert answer.closes


# --- errors ------------------------------------------------------------------------------------


def get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: relay.test\r\n\r\n"


def form_request(body: bytes, path: str = "/upload", *headers: str) -> bytes:
    return request(path, body, FORM_TYPE, *headers)


def form(*parts: tuple[str, bytes]) -> bytes:
    return browser_form([Part(data, name=name) for name, data in parts])[1]


REFUSED_REQUESTS: dict[str, tuple[bytes, int, str]] = {
    "not HTTP": (b"hello\r\n\r\n", 400, "bad-request"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad-request"),
    "no Host": (b"PUT /upload/x HTTP/1.1\r\n\r\n", 400, "bad-request"),
    "two lengths": (put(b"abc", "/upload/x", "Content-Length: 3"), 400, "bad-request"),
    "length and coding": (
        put(b"abc", "/upload/x", "Transfer-Encoding: chunked"),
        400,
        "bad-request",
    ),
    "bare line feed": (put(b"").replace(b"\r\n", b"\n"), 400, "bad-request"),
    "no boundary": (request("/upload", FORM, "multipart/form-data"), 400, "bad-multipart"),
    "no such path": (request("/elsewhere", b"abc"), 404, "not-found"),
    "wrong method": (get(b"/upload"), 405, "method-not-allowed"),
    "asterisk": (get(b"*").replace(b"GET", b"OPTIONS"), 405, "method-not-allowed"),
    "content coding": (
        request("/upload", b"abc", None, "Content-Encoding: gzip"),
        415,
        "unsupported-media-type",
    ),
    "multipart/mixed": (
        request("/upload", FORM, "multipart/mixed; boundary=x"),
        415,
        "unsupported-media-type",
    ),
    "expectation": (put(b"abc", "/upload/x", "Expect: a-pony"), 417, "expectation-failed"),
    "large head": (put(b"", "/upload/x", "X: " + "x" * 16384), 431, "headers-too-large"),
    "many headers": (put(b"", "/upload/x", *["X: y"] * 101), 431, "headers-too-large"),
    "gzip coding": (
        put(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: gzip, chunked"),
        501,
        "not-implemented",
    ),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http-version"),
}


@pytest.mark.parametrize(
    ("data", "status", "code"), REFUSED_REQUESTS.values(), ids=list(REFUSED_REQUESTS)
)
async def test_a_request_that_is_not_acceptable_is_refused_and_its_connection_closed(
    server: Server, data: bytes, status: int, code: str
) -> None:
    async with server.client() as client:
        await client.send(data)
        await client.stream.send_eof()
        answer = await client.answer()
        check_problem(answer, status, code)
        assert answer.closes
        assert "transfer" not in answer.json()
        assert await client.ends()
    assert server.broker.sinks == []


async def test_method_not_allowed_says_what_is(server: Server) -> None:
    assert (await server.answer(get(b"/upload"))).headers["allow"] == "POST"
    assert (await server.answer(get(b"/upload/x"))).headers["allow"] == "POST, PUT"


async def test_a_refusal_of_head_has_no_body(server: Server) -> None:
    async with server.client() as client:
        await client.send(get(b"/upload").replace(b"GET", b"HEAD"))
        await client.stream.send_eof()
        answer = await client.answer(to_head=True)
        assert (answer.status, answer.closes) == (405, True)
        assert await client.ends()


# Bodies that are refused after a transfer has begun: the request, and whether all of it was read.
REFUSED_BODIES: dict[str, tuple[bytes, int, str, bool]] = {
    "incomplete form": (form_request(FORM[:-10]), 400, "bad-multipart", True),
    "malformed form": (form_request(b"x" * 100), 400, "bad-multipart", True),
    "form of no parts": (form_request(form()), 400, "bad-multipart", True),
    "data behind the form": (form_request(FORM + b"x"), 400, "bad-multipart", True),
    "large part": (form_request(form(("f", b"x" * 101)), "/upload/small"), 413, "too-large", True),
    "many parts": (form_request(form(*[("f", b"")] * 4), "/upload/small"), 413, "too-large", True),
    "large headers of a part": (
        form_request(form(("x" * 100, b"")), "/upload/small"),
        431,
        "headers-too-large",
        True,
    ),
    "wrong digest": (
        request("/upload", b"abc", None, f"Repr-Digest: sha-256=:{'A' * 43}=:"),
        422,
        "digest-mismatch",
        True,
    ),
    "malformed chunk": (
        post_chunked(FORM, [9999], FORM_TYPE).replace(b"\r\n0\r\n", b"\r\n-1\r\n"),
        400,
        "bad-request",
        False,
    ),
    "many trailers": (
        post_chunked(FORM, [9999], FORM_TYPE)[:-2] + b"X: y\r\n" * 101 + b"\r\n",
        431,
        "headers-too-large",
        False,
    ),
    "chunked and too large": (
        post_chunked(form(("f", b"x" * 99), *[("g", b"x" * 99)] * 999), [500], FORM_TYPE).replace(
            b"/upload", b"/upload/small", 1
        ),
        413,
        "too-large",
        False,
    ),
}


@pytest.mark.parametrize(
    ("data", "status", "code", "is_read"), REFUSED_BODIES.values(), ids=list(REFUSED_BODIES)
)
async def test_a_body_that_is_refused_is_never_committed(
    server: Server, data: bytes, status: int, code: str, is_read: bool
) -> None:
    async with server.client() as client:
        await client.send(data)
        answer = await client.answer()
        check_problem(answer, status, code)
        assert answer.json()["transfer"] == server.sink.transfer.id
        assert answer.closes is not is_read
        if is_read:
            assert (await client.exchange(put(b"next"))).status == 201
        else:
            await client.stream.send_eof()
            assert await client.ends()
    refused = server.broker.sinks[0]
    assert not refused.committed
    assert refused.aborted == [code]
    assert all(frame.commit is None for frame in refused.frames)


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/upload/small", 100, 201),
        ("/upload/small", 101, 413),
        ("/upload/small", 1001, 413),
        ("/upload/large", 1000, 201),
        ("/upload/large", 1001, 413),
    ],
)
async def test_a_length_over_the_limit_is_refused_without_the_body(
    server: Server, path: str, size: int, status: int, autojump_clock: MockClock
) -> None:
    server.routes["large"] = changed(server.routes["small"], max_part_bytes=0)
    async with server.client() as client:
        await client.send(request_head(path, size))
        if status == 201:
            await client.send(bytes(size))
        answer = await client.answer()
        assert answer.status == status
        assert answer.closes is (status != 201)


async def test_a_form_may_be_larger_than_its_largest_part(server: Server) -> None:
    body = form(("f", b"x" * 100), ("g", b"x" * 100))
    assert (await server.answer(form_request(body, "/upload/small"))).status == 201


BROKER_ERRORS: list[tuple[RelayError, int, str, str | None]] = [
    (Unroutable("nothing is bound"), 502, "unroutable", None),
    (BrokerRefused("404"), 502, "broker-refused", None),
    (BrokerUnavailable("lost"), 503, "broker-unavailable", "5"),
    (BrokerBlocked("memory alarm"), 503, "broker-blocked", "30"),
    (ConfirmTimeout("overdue"), 504, "confirm-timeout", None),
    (QueueFull("nacked"), 507, "queue-full", None),
]


@pytest.mark.parametrize(("error", "status", "code", "retry_after"), BROKER_ERRORS)
async def test_a_broker_that_fails_in_the_middle_is_told_and_the_connection_closed(
    server: Server, error: RelayError, status: int, code: str, retry_after: str | None
) -> None:
    server.broker.before_send = raising(error)
    async with server.client(slow_upstream_pair) as client, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send(put(bytes(10_000_000)), size=100_000)
            await client.stream.send_eof()

        answer = await client.answer()
        check_problem(answer, status, code)
        assert answer.closes
        assert answer.headers.get("retry-after") == retry_after
        assert answer.json()["transfer"] == server.sink.transfer.id
        assert await client.ends()
    assert server.sink.aborted == [code]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [*BROKER_ERRORS, (OutcomeUnknown("lost after the commit"), 504, "outcome-unknown", None)],
)
async def test_a_broker_that_fails_at_the_commit_is_told_and_the_connection_goes_on(
    server: Server, error: RelayError, status: int, code: str, retry_after: str | None
) -> None:
    server.broker.before_commit = raising(error)
    async with server.client() as client:
        answer = await client.exchange(put(LARGE))
        check_problem(answer, status, code)
        assert answer.headers.get("retry-after") == retry_after
        assert not answer.closes
        server.broker.before_commit = MemoryBroker().before_commit
        assert (await client.exchange(put(LARGE))).status == 201
    assert [sink.committed for sink in server.broker.sinks] == [False, True]


async def test_too_many_uploads_are_refused_and_told_to_come_back(server: Server) -> None:
    go_on = trio.Event()

    async def hold(_: object) -> None:
        await go_on.wait()

    server.broker.before_commit = hold
    statuses = []

    async def upload() -> None:
        statuses.append((await server.answer(put(b"a"))).status)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(upload)
        await trio.testing.wait_all_tasks_blocked()
        async with connected(server.handler.serve) as client:
            answer = await client.exchange(put(b"", "/upload/x"))
        check_problem(answer, 503, "too-many-uploads")
        assert int(answer.headers["retry-after"]) > 0
        assert not answer.closes
        go_on.set()
    assert statuses == [201] * 4
    assert (await server.answer(put(b"a"))).status == 201


# --- deadlines ---------------------------------------------------------------------------------


async def test_a_head_that_does_not_end_is_answered(
    server: Server, autojump_clock: MockClock
) -> None:
    async with server.client() as client:
        await client.send(put(b"")[:-1])
        answer = await client.answer()
        check_problem(answer, 408, "too-slow")
        assert answer.closes
        assert await client.ends()
    assert trio.current_time() == server.config.header_timeout


@pytest.mark.parametrize("data", [b"", b"\r\n", put(b"")])
async def test_a_connection_without_a_request_ends_in_silence(
    server: Server, data: bytes, autojump_clock: MockClock
) -> None:
    async with server.client() as client:
        await client.send(data)
        if data == put(b""):
            await client.answer()
        assert await client.ends()


@pytest.mark.parametrize("data", [put(LARGE), THREE[1], THREE[2]])
async def test_a_body_that_stops_is_answered_and_aborted(
    server: Server, data: bytes, autojump_clock: MockClock
) -> None:
    async with server.client() as client:
        await client.send(data[:-100])
        answer = await client.answer()
        check_problem(answer, 408, "too-slow")
        assert answer.closes
        assert trio.current_time() == server.config.body_idle_timeout
        assert await client.ends()
    assert server.sink.aborted == ["too-slow"]
    assert server.sink.frames
    assert not server.sink.committed


async def test_a_body_under_the_minimum_rate_is_answered_and_aborted(
    server: Server, autojump_clock: MockClock
) -> None:
    async with server.client() as client, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def drip() -> None:
            await client.send(request_head("/upload", len(LARGE)))
            for byte in LARGE:
                await client.send(bytes([byte]))
                await trio.sleep(0.25)

        answer = await client.answer()
        check_problem(answer, 408, "too-slow")
        nursery.cancel_scope.cancel()
    assert server.sink.aborted == ["too-slow"]


HOUR = 3600.0


async def an_hour(_: object) -> None:
    await trio.sleep(HOUR)


@pytest.mark.parametrize("new_pair", [memory_stream_pair, slow_upstream_pair])
@pytest.mark.parametrize("data", THREE[1:])
async def test_no_clock_runs_against_the_client_while_the_broker_holds_the_upload_back(
    server: Server, data: bytes, new_pair: NewPair, autojump_clock: MockClock
) -> None:
    server.broker.before_send = server.broker.before_open = server.broker.before_commit = an_hour
    async with (
        server.client(new_pair, patience=50 * HOUR) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: client.send(data, size=5000))
        answer = await client.answer()
    assert answer.status == 201
    assert trio.current_time() >= HOUR * (2 + len(server.sink.frames))
    assert server.sink.body == b"value" + LARGE


async def test_a_client_that_was_held_back_has_its_whole_time_again(
    server: Server, autojump_clock: MockClock
) -> None:
    server.broker.before_send = an_hour
    pause = server.config.body_idle_timeout - 1
    async with (
        server.client(slow_upstream_pair, patience=50 * HOUR) as client,
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def send() -> None:
            await client.send(request_head("/upload", 4 * 5 * FRAME_SIZE))
            for _ in range(4):
                await client.send(bytes(5 * FRAME_SIZE))
                await trio.sleep(pause)

        answer = await client.answer()
    assert answer.status == 201


# --- clients that go ---------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("data", [put(LARGE), THREE[1], THREE[2]])
async def test_a_client_gone_in_the_middle_is_told_to_consumers_and_never_committed(
    server: Server, data: bytes, broken: bool
) -> None:
    async with server.client() as client:
        await client.send(data[:-100])
        if broken:
            await trio.aclose_forcefully(client.stream)
        else:
            await client.stream.send_eof()
            assert await client.ends()
    assert server.sink.aborted == ["client-gone"]
    assert not server.sink.committed
    assert all(frame.commit is None for frame in server.sink.frames)


async def test_a_client_gone_after_its_body_does_not_undo_the_upload(server: Server) -> None:
    async with server.client() as client:
        await client.send(put(LARGE))
        await trio.aclose_forcefully(client.stream)
    assert server.sink.committed
    assert server.sink.aborted == []


async def test_a_half_closed_connection_still_gets_its_answer(server: Server) -> None:
    async with server.client() as client:
        await client.send(put(LARGE))
        await client.stream.send_eof()
        assert (await client.answer()).status == 201
        assert await client.ends()


# --- the end of the daemon ---------------------------------------------------------------------


async def test_the_last_request_that_a_connection_may_have_is_answered_with_its_end() -> None:
    server = Server(HttpConfig(keep_alive_requests=2))
    async with server.client() as client:
        # The third one was sent in good faith, too; it is neither answered nor uploaded.
        await client.send(put(b"1") + put(b"2") + put(b"3"))
        answers = [await client.answer(), await client.answer()]
        assert [(answer.status, answer.closes) for answer in answers] == [(201, False), (201, True)]
        assert await client.ends()
    assert [sink.body for sink in server.broker.sinks] == [b"1", b"2"]


async def test_a_client_that_is_read_no_faster_than_its_rate_is_not_too_slow(
    autojump_clock: MockClock,
) -> None:
    server = Server(HttpConfig(max_client_rate=1000, min_body_rate=10_000))
    async with server.client(slow_upstream_pair, patience=300) as client:
        answer = await client.exchange(put(bytes(100_000)))
        assert answer.status == 201
    assert 90 <= trio.current_time() <= 100


async def test_a_drain_lets_uploads_finish_and_closes_their_connections(
    server: Server, autojump_clock: MockClock
) -> None:
    async with server.client() as client, trio.open_nursery() as nursery:
        await client.send(put(LARGE)[:-100])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(server.uploads.drain, 20.0)
        await trio.sleep(9)
        await client.send(LARGE[-100:])
        answer = await client.answer()
        assert (answer.status, answer.closes) == (201, True)
    assert server.sink.committed


async def test_an_upload_that_outlives_the_drain_is_told_so(
    server: Server, autojump_clock: MockClock
) -> None:
    async with server.client() as client, trio.open_nursery() as nursery:
        await client.send(put(LARGE)[:-100])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(server.uploads.drain, 20.0)
        answer = await client.answer()
        assert trio.current_time() == 20.0
        check_problem(answer, 503, "shutting-down")
        assert answer.closes
        assert await client.ends()
    assert server.sink.aborted == ["shutting-down"]
    assert not server.sink.committed


async def test_a_drain_admits_nothing_new(server: Server) -> None:
    async with server.client() as client:
        assert (await client.exchange(put(b"a"))).status == 201
        await server.uploads.drain(0)
        answer = await client.exchange(put(b"", "/upload/x"))
        check_problem(answer, 503, "shutting-down")
        assert answer.closes


async def test_a_drain_serves_a_request_that_was_on_its_way_and_then_closes(
    server: Server, autojump_clock: MockClock
) -> None:
    async with server.client() as busy, server.client() as new, server.client() as idle:
        assert (await busy.exchange(put(b"a"))).status == 201
        assert (await idle.exchange(put(b"a"))).status == 201
        await new.send(b"PUT /upl")
        await trio.testing.wait_all_tasks_blocked()
        with server.uploads.connected():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.uploads.drain, 20.0)
                await trio.sleep(IDLE_GRACE / 2)
                answer = await busy.exchange(put(b"b"))
                assert (answer.status, answer.closes) == (201, True)
                assert await idle.ends()
                assert trio.current_time() == IDLE_GRACE
                await trio.sleep(5)
                await new.send(put(b"c").removeprefix(b"PUT /upl"))
                answer = await new.answer()
                assert (answer.status, answer.closes) == (201, True)
                nursery.cancel_scope.cancel()


async def forever(_: object) -> None:
    await trio.sleep_forever()


async def test_a_drain_ends_an_upload_whose_sink_is_not_open_yet(
    server: Server, autojump_clock: MockClock
) -> None:
    server.broker.before_open = forever
    async with server.client() as client, trio.open_nursery() as nursery:
        await client.send(put(LARGE))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(server.uploads.drain, 20.0)
        check_problem(await client.answer(), 503, "shutting-down")


async def test_a_drain_between_commit_and_confirm_does_not_pretend_to_know(
    server: Server, autojump_clock: MockClock
) -> None:
    server.broker.before_commit = forever
    async with server.client() as client, trio.open_nursery() as nursery:
        await client.send(put(LARGE))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(server.uploads.drain, 20.0)
        answer = await client.answer()
        check_problem(answer, 504, "outcome-unknown")
        assert answer.closes


# --- nothing is left behind --------------------------------------------------------------------


class CancelBeforeStep(trio.abc.Instrument):
    """Cancels ``scope`` just before the n-th step of the task that called ``watch``.

    The scope may be changed; one that was cancelled before it was changed has had its turn.
    """

    def __init__(self, step: int) -> None:
        self.left = step
        self.scope = trio.CancelScope()
        self._task: trio.lowlevel.Task | None = None

    def watch(self) -> None:
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


async def upload_cancelled_by(
    instrument: CancelBeforeStep, server: Server, scope: trio.CancelScope
) -> int | None:
    """Send one upload in all its stages. Returns the status of its final answer, if any came."""

    async def serve(stream: trio.abc.HalfCloseableStream, peer: Peer) -> None:
        instrument.watch()
        with scope:
            await server.handler.serve(stream, peer)

    async with connected(serve, slow_upstream_pair) as client:
        try:
            await client.send(request_head("/upload", len(FORM), FORM_TYPE, EXPECT))
            if (status := (await client.answer()).status) == 100:
                await client.send(FORM, size=1000)
                await client.stream.send_eof()
                status = (await client.answer()).status
        except (AssertionError, trio.BrokenResourceError):
            return None
    return status


async def every_step(whose: str) -> list[int | None]:
    """Cancel a connection or upload at each step in turn; returns the answers' statuses."""
    statuses: list[int | None] = []
    is_within = True
    while is_within:
        instrument = CancelBeforeStep(len(statuses) + 1)
        server = Server()
        scope = instrument.scope
        if whose == "upload":
            scope = trio.CancelScope()
            server.broker.before_open = partial(hand_over, instrument, server)
        trio.lowlevel.add_instrument(instrument)
        try:
            status = await upload_cancelled_by(instrument, server, scope)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        is_within = instrument.left <= 0
        statuses.append(status)
        assert len(server.uploads) == 0
        for sink in server.broker.sinks:
            assert sink.closed
            assert sink.aborted in ([], ["shutting-down"])
            assert sink.may_be_committed is not bool(sink.aborted)
            expected = {201} if sink.committed else {504 if sink.may_be_committed else 503}
            assert status in {None, *expected}
    return statuses


async def hand_over(instrument: CancelBeforeStep, server: Server, _: Transfer) -> None:
    (record,) = server.uploads
    instrument.scope = record.scope
    await trio.lowlevel.checkpoint()


async def test_cancelling_a_connection_at_any_point_leaves_nothing(
    autojump_clock: MockClock,
) -> None:
    statuses = await every_step("connection")
    assert len(statuses) > 20
    assert set(statuses) == {None, 201}


async def test_ending_an_upload_at_any_point_leaves_nothing_and_is_answered(
    autojump_clock: MockClock,
) -> None:
    statuses = await every_step("upload")
    assert len(statuses) > 20
    assert set(statuses) == {201, 503, 504}


async def test_an_unexpected_exception_aborts_the_transfer_and_leaves_nothing(
    server: Server,
) -> None:
    server.broker.before_send = raising(ZeroDivisionError())
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with server.client() as client:
            await client.send(put(LARGE))
            answer = await client.answer()
            assert (answer.status, answer.json()["code"]) == (500, "internal-error")
    assert server.sink.aborted == ["internal-error"]
    assert server.sink.closed
    assert len(server.uploads) == 0


@pytest.mark.parametrize(
    ("where", "status"),
    [("relay.server.handler.parse_request", 500), ("relay.server.handler.created", 504)],
)
async def test_a_bug_is_told_and_its_client_hears_nothing_of_what_it_was(
    where: str, status: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(where, fail)
    client, stream = memory_stream_pair()
    await client.send_all(put(LARGE))
    await client.send_eof()
    with pytest.raises(ZeroDivisionError):
        await server.handler.serve(stream, PEER)
    received = bytes(await client.receive_some())
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert b"secret" not in received
    assert received.count(b"HTTP/1.1") == 1


async def test_a_bug_after_an_answer_is_not_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpConnection, "_linger", raising(ZeroDivisionError()))
    client, stream = memory_stream_pair()
    await client.send_all(put(LARGE, "/upload/name", "Connection: close"))
    with pytest.raises(ZeroDivisionError):
        await server.handler.serve(stream, PEER)
    received = bytes(await client.receive_some())
    assert received.startswith(b"HTTP/1.1 201 ")
    assert received.count(b"HTTP/1.1") == 1


async def test_logs_name_the_transfer_and_quote_nothing_that_the_client_sent(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await server.answer(put(b"secret-body", "/upload/secret-name", "X-Secret: secret-header"))
    await server.answer(request("/upload/secret-route", b"secret"))
    await server.answer(b"PUT /secret HTTP/1.1\r\nHost: secret\r\nX: secret\0\r\n\r\n")
    assert server.sink.transfer.id in str([vars(record) for record in caplog.records])
    for record in caplog.records:
        assert "secret" not in record.getMessage() + str(fields_of(record))


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    return getattr(record, "fields", {})


async def test_every_result_is_logged_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await server.answer(put(LARGE))
    await server.answer(form_request(FORM[:-10]))
    await server.answer(get(b"/upload"))
    assert [fields_of(record).get("outcome") for record in caplog.records] == [
        "committed",
        "bad-multipart",
        "method-not-allowed",
    ]
    assert fields_of(caplog.records[0])["bytes"] == len(LARGE)
    assert server.uploads.finished == {
        "committed": 1,
        "bad-multipart": 1,
        "method-not-allowed": 1,
    }
    assert server.uploads.committed_bytes == {"default": len(LARGE)}


async def test_what_an_upload_does_can_be_watched(server: Server) -> None:
    seen = []

    async def look(frame: Frame) -> None:
        await trio.lowlevel.checkpoint()
        (record,) = server.uploads
        seen.append((record.waits.now, record.bytes_received, record.transfer is frame.transfer))

    server.broker.before_send = look
    async with server.client() as client:
        await client.send(put(LARGE)[:-100])
        await trio.testing.wait_all_tasks_blocked()
        (record,) = server.uploads
        assert record.waits.now == "client"
        await client.send(LARGE[-100:])
        await client.answer()
    assert {(waits_for, is_it) for waits_for, _, is_it in seen} == {("window", True)}
    assert seen[-1][1] == len(LARGE)
