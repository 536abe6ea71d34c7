"""The admin listener: what it tells, and that it changes nothing."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from prometheus_client import Metric
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, memory_stream_pair

from relay.config import HttpConfig
from relay.errors import BrokerBlocked, RelayError
from relay.model import Transfer
from relay.server.admin import AdminHandler
from relay.server.uploads import Uploads
from relay.waits import Wait
from tests.memory_broker import PEER, Answer, MemoryClient, connected
from tests.server.a_status import a_status
from tests.uploading import request


class Admin:
    """An admin handler and what it reads."""

    def __init__(self) -> None:
        self.uploads = Uploads(2)
        self.refusal: RelayError | None = None
        self.value = 7.0
        self.handler = AdminHandler(
            HttpConfig(),
            self.uploads,
            lambda: self.refusal,
            metrics=self.metrics,
            status=lambda: a_status(),
        )

    def metrics(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("relay_test", "A number.", self.value)

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[MemoryClient, None]:
        async with connected(self.handler.serve) as client:
            yield client

    async def get(self, path: str) -> Answer:
        async with self.client() as client:
            return await client.exchange(get(path))


@pytest.fixture
def admin() -> Admin:
    return Admin()


def get(path: str, method: str = "GET", version: str = "1.1", *lines: str) -> bytes:
    head = [f"{method} {path} HTTP/{version}", "Host: relay.test", *lines, "", ""]
    return "\r\n".join(head).encode()


def a_transfer(number: int, client: str | None = None) -> Transfer:
    return Transfer(id=f"id-{number}", began=1, route="default", client=client)


async def test_health_says_that_the_process_lives(admin: Admin) -> None:
    answer = await admin.get("/healthz")
    assert (answer.status, answer.json()) == (200, {"status": "alive"})
    admin.refusal = BrokerBlocked("alarm")
    assert (await admin.get("/healthz?verbose")).status == 200


async def test_readiness_is_whether_uploads_would_be_admitted(admin: Admin) -> None:
    answer = await admin.get("/readyz")
    assert (answer.status, answer.json()) == (200, {"status": "ready"})

    admin.refusal = BrokerBlocked("the broker has a memory alarm")
    answer = await admin.get("/readyz")
    assert (answer.status, answer.json()["code"]) == (503, "broker-blocked")
    assert answer.json()["detail"] == "the broker has a memory alarm"
    assert answer.headers["content-type"] == "application/problem+json"
    admin.refusal = None

    with admin.uploads.enter(a_transfer(1), "a:1"), admin.uploads.enter(a_transfer(2), "a:2"):
        answer = await admin.get("/readyz")
        assert (answer.status, answer.json()["code"]) == (503, "too-many-uploads")
    assert (await admin.get("/readyz")).status == 200

    await admin.uploads.drain(0)
    answer = await admin.get("/readyz")
    assert (answer.status, answer.json()["code"]) == (503, "shutting-down")


async def test_metrics_are_made_afresh_for_each_scrape(admin: Admin) -> None:
    for value in (7.0, 8.5):
        admin.value = value
        answer = await admin.get("/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        (family,) = text_string_to_metric_families(answer.body.decode())
        assert [(sample.name, sample.value) for sample in family.samples] == [("relay_test", value)]


async def test_transfers_lists_what_is_in_progress_oldest_first(
    admin: Admin, autojump_clock: MockClock
) -> None:
    assert (await admin.get("/transfers")).json() == {"transfers": []}
    with admin.uploads.enter(a_transfer(1, "zoë"), "192.0.2.1:5000") as first:
        await trio.sleep(10)
        with admin.uploads.enter(a_transfer(2), "192.0.2.2:6000") as second:
            second.waits.begin(Wait.CLIENT)
            first.bytes_received = 40_000
            first.waits.begin(Wait.BROKER)
            await trio.sleep(10)
            transfers = (await admin.get("/transfers")).json()["transfers"]
    known = ("transfer", "client", "peer", "bytes", "age_seconds", "bytes_per_second", "waits_for")
    assert [[transfer[key] for key in known] for transfer in transfers] == [
        ["id-1", "zoë", "192.0.2.1:5000", 40_000, 20.0, 2000, "broker"],
        ["id-2", None, "192.0.2.2:6000", 0, 10.0, 0, "client"],
    ]
    assert {transfer["route"] for transfer in transfers} == {"default"}


async def test_status_is_the_figures_and_whether_it_is_ready(admin: Admin) -> None:
    assert (await admin.get("/status")).json() == {"ready": True, "reason": None, **a_status()}
    admin.refusal = BrokerBlocked("alarm")
    status = (await admin.get("/status")).json()
    assert (status["ready"], status["reason"]) == (False, "alarm")


async def test_the_page_shows_the_same(admin: Admin) -> None:
    with admin.uploads.enter(a_transfer(1, "zoë"), "192.0.2.1:5000"):
        answer = await admin.get("/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for text in ("ready", "zoë", "192.0.2.1:5000"):
        assert text in answer.body.decode()


async def test_a_connection_serves_one_request_after_the_other(admin: Admin) -> None:
    async with admin.client() as client:
        await client.send(get("/healthz") + get("/readyz") + get("/transfers"))
        for key in ("status", "status", "transfers"):
            answer = await client.answer()
            assert key in answer.json()
            assert not answer.closes


async def test_head_is_get_without_the_body(admin: Admin) -> None:
    async with admin.client() as client:
        await client.send(get("/healthz", "HEAD") + get("/healthz"))
        head = await client.answer(to_head=True)
        assert head.status == 200
        answer = await client.answer()
        assert int(head.headers["content-length"]) == len(answer.body)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get("/upload"), 404),
        (get("/healthz/"), 404),
        (get("http://relay.test/healthz"), 404),
        (get("/healthz", "POST"), 405),
        (get("/healthz", "DELETE"), 405),
        (b"hello\r\n\r\n", 400),
        (get("/healthz", "GET", "2.0"), 505),
        (get("/healthz", "GET", "1.1", "X: " + "x" * 20_000), 431),
    ],
)
async def test_anything_else_is_refused(admin: Admin, data: bytes, status: int) -> None:
    async with admin.client() as client:
        await client.send(data)
        await client.stream.send_eof()
        answer = await client.answer()
        assert (answer.status, answer.closes) == (status, True)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers.get("allow") == ("GET, HEAD" if status == 405 else None)
        assert await client.ends()


@pytest.mark.parametrize(
    "data",
    [
        get("/healthz", "GET", "1.0"),
        get("/healthz", "GET", "1.1", "Connection: close"),
        request("/healthz", b"a body", method="GET"),
        get("/healthz", "GET", "1.1", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ],
)
async def test_the_connection_ends_where_another_request_would_be_in_doubt(
    admin: Admin, data: bytes
) -> None:
    async with admin.client() as client:
        await client.send(data)
        await client.stream.send_eof()
        answer = await client.answer()
        assert (answer.status, answer.closes) == (200, True)
        assert await client.ends()


async def test_an_idle_connection_ends_in_silence_and_a_slow_one_is_told(
    admin: Admin, autojump_clock: MockClock
) -> None:
    async with admin.client() as client:
        assert await client.ends()
    async with admin.client() as client:
        await client.send(get("/healthz")[:-1])
        assert (await client.answer()).status == 408


async def test_a_client_that_leaves_is_no_error(admin: Admin) -> None:
    async with admin.client() as client:
        await client.send(get("/healthz")[:-1])
    async with admin.client() as client:
        await client.send(get("/healthz"))


async def test_a_bug_in_a_page_is_a_500_and_its_reader_hears_nothing_of_what_it_was(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Iterator[Metric]:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Admin, "metrics", fail)
    client, stream = memory_stream_pair()
    await client.send_all(get("/metrics") + get("/healthz"))
    with pytest.raises(ZeroDivisionError):
        await Admin().handler.serve(stream, PEER)
    await stream.aclose()
    answer = await MemoryClient(client).answer()
    assert (answer.status, answer.json()["code"]) == (500, "internal-error")
    assert answer.closes
    assert b"secret" not in answer.body
    # It is logged by whoever serves connections, and this one ends; others go on.
    assert (await admin.get("/healthz")).status == 200
