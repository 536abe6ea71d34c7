"""A broker that lives but neither confirms nor lets channels go: what it keeps is taken from it.

Seen with RabbitMQ when a quorum queue has lost its leader: its connection stops reading, sends
heartbeats all the same, and so never looks dead.
"""

import trio
from pika.spec import Connection
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.errors import BrokerBlocked, ConfirmTimeout
from tests.broker.attempt import FRAME, running
from tests.scripted_broker import Network, ScriptedBroker

TIMEOUT = 60


async def beat(broker: ScriptedBroker) -> None:
    while True:
        await trio.sleep(TIMEOUT / 4)
        await broker.heartbeat()


async def test_room_that_a_broker_never_gives_back_is_taken_with_its_connection(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with (
        running(
            network, confirm_timeout=TIMEOUT, window=2 * FRAME, upload_window=2 * FRAME
        ) as relay,
        trio.open_nursery() as beating,
    ):
        broker = await relay.broker()
        first = relay.attempt(5)
        await broker.published(2)
        beating.start_soon(beat, broker)
        waiting = relay.attempt(5)
        await broker.accept_channel()
        assert isinstance(await first.outcome(), ConfirmTimeout)
        # Neither the confirms nor the end of the channel come, only heartbeats.
        with trio.fail_after(10 * TIMEOUT):
            fresh = await network.accept()
        beating.cancel_scope.cancel()
        await fresh.handshake()
        await fresh.accept_channel()
        for _ in range(5):
            await fresh.confirm(*await fresh.published())
        assert await waiting.outcome() is None
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_a_broker_under_an_alarm_keeps_the_room_and_its_connection(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT, blocked_grace=TIMEOUT / 2) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        messages = await broker.published(4)
        await broker.send(Connection.Blocked("low on memory"))
        assert isinstance(await upload.outcome(), BrokerBlocked)
        await trio.sleep(10 * TIMEOUT)
        assert relay.publisher.window.taken == 4 * FRAME
        await broker.send(Connection.Unblocked())
        (abort,) = await broker.published()
        await broker.confirm(*messages, abort)
        await broker.accept_close()
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()
        assert relay.publisher.connects == 1
