"""Several connections: uploads are spread over those that take them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.broker.pool import RENEW_PATIENCE, Pool
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


# --- another configuration ------------------------------------------------------------------------


async def test_uploads_in_progress_keep_their_connection_when_the_configuration_is_another(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, 1) as (pool, (old,), nursery):
        before = attempt(pool, nursery, 2)
        messages = await old.published(2 - 1)
        renewed = AmqpConfig(urls=("amqp://other",), heartbeat=0.0)
        nursery.start_soon(pool.renew, renewed, {ROUTE.name: ROUTE})
        fresh = await network.accept_ready()
        await wait_all_tasks_blocked()
        assert fresh.address[0] == "other"
        after = attempt(pool, nursery, 1)
        await fresh.confirm(*await fresh.published())
        assert await after.outcome() is None
        # What both have out counts against one window.
        assert pool.publishers[0].window.taken > 0
        await old.confirm(*messages)
        await old.confirm(*await old.published())
        assert await before.outcome() is None
        await old.accept_goodbye()
        await old.wait_gone()
        assert pool.publishers[0].window.taken == 0
        assert pool.refusal() is None


async def test_what_is_counted_never_gets_less(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network, 1) as (pool, (old,), nursery):
        await old.cut()
        second = await network.accept_ready()
        await wait_all_tasks_blocked()
        assert (pool.figures.connects, pool.figures.failures) == (2, 1)
        nursery.start_soon(pool.renew, AmqpConfig(urls=("amqp://other",), heartbeat=0.0), {})
        await network.accept_ready()
        await second.accept_goodbye()
        await second.wait_gone()
        # Those of the connections that are gone are in it; a goodbye is no failure.
        assert (pool.figures.connects, pool.figures.failures) == (3, 1)


async def test_a_configuration_with_which_no_broker_is_found_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, 1) as (pool, (old,), nursery):
        network.is_down = True
        with pytest.raises(BrokerUnavailable):
            await pool.renew(AmqpConfig(urls=("amqp://wrong",), heartbeat=0.0), {})
        assert trio.current_time() == RENEW_PATIENCE
        attempt(pool, nursery, 1)
        await old.confirm(*await old.published())
        # And nobody goes on trying.
        network.is_down = False
        await trio.sleep(60)
        assert [publisher.connects for publisher in pool.publishers] == [1]


async def test_a_broker_that_is_away_does_not_keep_another_configuration_out(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, 1) as (pool, (old,), _):
        network.is_down = True
        await old.cut()
        await trio.sleep(RECONNECT_PATIENCE + 1)
        await pool.renew(AmqpConfig(urls=("amqp://other",), heartbeat=0.0), {})
        network.is_down = False
        fresh = await network.accept_ready()
        assert fresh.address[0] == "other"


async def test_a_pool_is_up_with_its_first_connection(autojump_clock: MockClock) -> None:
    network = Network()
    pool = Pool(AmqpConfig(urls=URLS, connections=3, heartbeat=0.0), {}, connect=network.connect)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.1) as scope:
                await pool.wait_up()
            assert scope.cancelled_caught
            await network.accept_ready()
            await pool.wait_up()
            nursery.cancel_scope.cancel()
