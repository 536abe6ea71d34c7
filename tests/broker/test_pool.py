"""Several connections: uploads are spread over those that take them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.broker.pool import Pool
from relay.broker.publisher import RECONNECT_PATIENCE
from relay.config import AmqpConfig
from relay.errors import BrokerUnavailable
from tests.broker.attempt import FRAME, ROUTE, Attempt
from tests.scripted_broker import Network, ScriptedBroker, patience

URLS = ("amqp://a", "amqp://b", "amqp://c")


@asynccontextmanager
async def running(
    network: Network, connections: int, **config: float
) -> AsyncGenerator[tuple[Pool, list[ScriptedBroker], trio.Nursery], None]:
    """A pool that runs for the length of the block, its connections made, in the pool's order."""
    amqp = AmqpConfig(urls=URLS, connections=connections, heartbeat=0.0, **config)  # type: ignore[arg-type]
    pool = Pool(amqp, {ROUTE.name: ROUTE}, connect=network.connect)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run)
            brokers = [await network.accept_ready() for _ in range(connections)]
            await wait_all_tasks_blocked()
            yield pool, sorted(brokers, key=lambda broker: broker.address), nursery
            nursery.cancel_scope.cancel()


def attempt(pool: Pool, nursery: trio.Nursery, count: int) -> Attempt:
    upload = Attempt(pool, count)
    nursery.start_soon(upload.run)
    return upload


async def test_connections_begin_with_different_brokers(autojump_clock: MockClock) -> None:
    async with running(Network(), 3) as (_, brokers, _):
        assert [broker.address[0] for broker in brokers] == ["a", "b", "c"]


async def test_uploads_go_to_the_connection_with_the_fewest(autojump_clock: MockClock) -> None:
    async with running(Network(), 3) as (pool, brokers, nursery):
        for broker in [*brokers, *brokers]:
            upload = attempt(pool, nursery, 1)
            (message,) = await broker.published()
            assert upload.is_of(message)
        assert [publisher.publications for publisher in pool.publishers] == [2, 2, 2]


async def test_a_lost_connection_takes_no_uploads_and_keeps_those_it_has(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, 2) as (pool, (first, second), nursery):
        before = attempt(pool, nursery, 1)
        (message,) = await first.published()
        network.is_down = True
        await first.cut()
        await wait_all_tasks_blocked()
        # The second takes what comes, and the pool is ready as long as one is.
        assert pool.refusal() is None
        for _ in range(2):
            upload = attempt(pool, nursery, 1)
            await second.confirm(*await second.published())
            assert await upload.outcome() is None
        network.is_down = False
        again = await network.accept_ready()
        (repeated,) = await again.published()
        assert repeated.decode() == message.decode()
        await again.confirm(repeated)
        assert await before.outcome() is None


async def test_uploads_are_refused_when_no_connection_is_left(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network, 2) as (pool, brokers, nursery):
        network.is_down = True
        for broker in brokers:
            await broker.cut()
        await trio.sleep(RECONNECT_PATIENCE + 1)
        assert isinstance(pool.refusal(), BrokerUnavailable)
        assert isinstance(await attempt(pool, nursery, 1).outcome(), BrokerUnavailable)


async def test_each_connection_has_its_share_of_the_window(autojump_clock: MockClock) -> None:
    async with running(Network(), 2, window=6 * FRAME, upload_window=3 * FRAME) as (
        pool,
        brokers,
        nursery,
    ):
        for broker in brokers:
            attempt(pool, nursery, 9)
            await broker.published(3)
            await broker.silence()
        assert [publisher.window.taken for publisher in pool.publishers] == [3 * FRAME, 3 * FRAME]


async def test_goodbye_is_said_on_each_connection(autojump_clock: MockClock) -> None:
    async with running(Network(), 2) as (pool, brokers, nursery):
        nursery.start_soon(pool.close)
        for broker in brokers:
            await broker.accept_goodbye()
            await broker.wait_gone()
