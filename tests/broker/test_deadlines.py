"""Every wait for the broker ends: confirms that stay away, alarms, answers that never come."""

import dataclasses

import pytest
import trio
from pika.spec import Confirm, Connection, Queue
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.broker import publisher as publishing
from relay.broker.session import RPC_TIMEOUT
from relay.config import QueueConfig
from relay.errors import BrokerBlocked, BrokerUnavailable, ConfirmTimeout, OutcomeUnknown
from relay.model import Abort
from tests.broker.attempt import FRAME, ROUTE, running
from tests.scripted_broker import Network

WITH_QUEUE = dataclasses.replace(ROUTE, queue=QueueConfig(name="q"))
TIMEOUT = 60
BLOCKED_GRACE = 30

# --- confirms that stay away --------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 20], ids=["before the commit frame", "waiting for room"])
async def test_an_upload_whose_confirms_stay_away_fails(
    count: int, autojump_clock: MockClock
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT, upload_window=9 * FRAME) as relay:
        broker = await relay.broker()
        upload = relay.attempt(count)
        out = min(count - 1, 9)
        messages = await broker.published(out)
        await trio.sleep(TIMEOUT / 2)
        await broker.heartbeat()
        error = await upload.outcome()
        assert isinstance(error, ConfirmTimeout)
        assert trio.current_time() == pytest.approx(TIMEOUT, abs=1)
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, out, "confirm-timeout")
        assert abort.channel == messages[0].channel
        # The channel is closed, for its confirms may stay away for ever and keep their room.
        assert await broker.accept_close() == abort.channel
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_each_confirm_begins_the_wait_anew(autojump_clock: MockClock) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        for message in await broker.published(4):
            await trio.sleep(TIMEOUT - 1)
            await broker.confirm(message)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_the_clock_does_not_run_while_nothing_is_outstanding(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3, pause_before=1)
        await broker.confirm(*await broker.published())
        await trio.sleep(10 * TIMEOUT)
        upload.go_on()
        (message,) = await broker.published()
        await trio.sleep(TIMEOUT - 1)
        await broker.confirm(message)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_waiting_behind_others_is_not_the_brokers_fault(autojump_clock: MockClock) -> None:
    async with running(
        Network(), confirm_timeout=TIMEOUT, window=FRAME, upload_window=FRAME
    ) as relay:
        broker = await relay.broker()
        first = relay.attempt(1)
        (message,) = await broker.published()
        others = []
        for _ in range(3):
            others.append(relay.attempt(1))
            await broker.accept_channel()
        for upload in others:
            await trio.sleep(TIMEOUT - 1)
            await broker.confirm(message)
            (message,) = await broker.published()
            assert upload.is_of(message)
        await broker.confirm(message)
        for upload in (first, *others):
            assert await upload.outcome() is None


async def test_a_commit_frame_whose_confirm_stays_away_leaves_the_outcome_unknown(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        (commit,) = await broker.published()
        await trio.sleep(TIMEOUT / 2)
        await broker.heartbeat()
        assert isinstance(await upload.outcome(), OutcomeUnknown)
        assert trio.current_time() == pytest.approx(TIMEOUT, abs=1)
        # No abort, only the end of the channel.
        assert await broker.accept_close() == commit.channel
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


# --- a broker that says nothing at all ----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 20], ids=["commit frame", "before it", "room"])
async def test_a_silent_broker_is_left_and_the_upload_goes_on_elsewhere(
    count: int, autojump_clock: MockClock
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT, upload_window=9 * FRAME) as relay:
        silent = await relay.broker()
        upload = relay.attempt(count)
        out = min(max(count - 1, 1), 9)
        first = [message.decode() for message in await silent.published(out)]
        broker = await relay.broker()
        assert trio.current_time() == pytest.approx(TIMEOUT, abs=1)
        again = await broker.published(out)
        assert [message.decode() for message in again] == first
        await broker.confirm(*again)
        for _ in range(count - out):
            await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_a_silent_broker_that_stays_silent_is_an_error_after_the_grace(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, confirm_timeout=TIMEOUT, reconnect_grace=BLOCKED_GRACE) as relay:
        silent = await relay.broker()
        upload = relay.attempt(3)
        await silent.published(2)
        network.is_down = True
        assert isinstance(await upload.outcome(), BrokerUnavailable)
        assert trio.current_time() == pytest.approx(TIMEOUT + BLOCKED_GRACE, abs=1)
        relay.assert_nothing_is_held()


# --- alarms -------------------------------------------------------------------------------------


async def test_an_alarm_that_lasts_fails_the_uploads_and_refuses_new_ones(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT, blocked_grace=BLOCKED_GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(4)
        messages = await broker.published(3)
        await trio.sleep(1)
        await broker.block("low on disk")
        await wait_all_tasks_blocked()
        refusal = relay.publisher.refusal()
        assert isinstance(refusal, BrokerBlocked)
        assert "low on disk" in refusal.detail
        assert isinstance(await relay.attempt(1).outcome(), BrokerBlocked)
        assert isinstance(await upload.outcome(), BrokerBlocked)
        assert trio.current_time() == pytest.approx(1 + BLOCKED_GRACE, abs=0.1)
        # The broker will read all that when the alarm is over; until then it is in the window.
        assert relay.publisher.window.taken == 3 * FRAME
        await broker.unblock()
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 3, "broker-blocked")
        await broker.confirm(*messages, abort)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()
        assert relay.publisher.refusal() is None


async def test_no_confirm_is_overdue_during_an_alarm(autojump_clock: MockClock) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT, blocked_grace=5 * TIMEOUT) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        messages = await broker.published(2)
        await trio.sleep(TIMEOUT - 1)
        await broker.block()
        await trio.sleep(4 * TIMEOUT)
        await broker.unblock()
        # Nor right after it: the broker begins to read now.
        await trio.sleep(TIMEOUT - 1)
        await broker.confirm(*messages)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_a_second_alarm_does_not_begin_the_grace_anew(autojump_clock: MockClock) -> None:
    async with running(Network(), blocked_grace=BLOCKED_GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        await broker.published(2)
        await broker.block("low on memory")
        await trio.sleep(BLOCKED_GRACE - 1)
        await broker.block("low on disk")
        assert isinstance(await upload.outcome(), BrokerBlocked)
        assert trio.current_time() == pytest.approx(BLOCKED_GRACE, abs=0.1)


async def test_the_end_of_an_alarm_that_never_began_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=TIMEOUT) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        await broker.published(2)
        await trio.sleep(TIMEOUT / 2)
        await broker.unblock()
        assert isinstance(await upload.outcome(), ConfirmTimeout)
        assert trio.current_time() == pytest.approx(TIMEOUT, abs=1)


async def test_a_commit_frame_that_an_alarm_holds_up_leaves_the_outcome_unknown(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), blocked_grace=BLOCKED_GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        await broker.published()
        await broker.block()
        assert isinstance(await upload.outcome(), OutcomeUnknown)
        assert trio.current_time() == pytest.approx(BLOCKED_GRACE, abs=0.1)


async def test_an_alarm_ends_with_its_connection(autojump_clock: MockClock) -> None:
    async with running(Network(), blocked_grace=BLOCKED_GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        await broker.published(2)
        await broker.block()
        await wait_all_tasks_blocked()
        await broker.cut()
        broker = await relay.broker()
        messages = await broker.published(2)
        await trio.sleep(BLOCKED_GRACE + 1)
        await broker.confirm(*messages)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


# --- answers that never come --------------------------------------------------------------------


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
async def test_an_upload_that_gets_no_channel_is_refused(
    at: str, autojump_clock: MockClock
) -> None:
    network = Network()
    async with running(network) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        if at == "confirm.select":
            await broker.accept_open()
            await broker.expect(Confirm.Select)
        # A broker that says nothing at all is as good as lost; the next one may be quicker.
        await broker.wait_gone()
        assert trio.current_time() == pytest.approx(RPC_TIMEOUT, abs=1)
        await network.accept()
        assert isinstance(await upload.outcome(), BrokerUnavailable)
        assert trio.current_time() == pytest.approx(publishing.CHANNEL_TIMEOUT, abs=1)


async def test_a_slow_broker_that_still_confirms_does_not_lose_its_connection(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        busy = relay.attempt(9)
        messages = await broker.published(8)
        refused = relay.attempt(1)
        await wait_all_tasks_blocked()
        for message in messages:
            await trio.sleep(RPC_TIMEOUT - 1)
            await broker.confirm(message)
        # The channel came too late for its upload, and not too late to be closed in good order.
        assert isinstance(await refused.outcome(), BrokerUnavailable)
        await broker.accept_open()
        await broker.confirm(*await broker.published())
        assert await broker.accept_close() == 2
        assert await busy.outcome() is None
        assert relay.publisher.connects == 1


async def test_a_broker_that_only_talks_while_queues_are_declared_is_given_up(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, WITH_QUEUE) as relay:
        broker = await network.accept()
        await broker.handshake()
        await broker.accept_open()
        for _ in range(3):
            await broker.unblock()
            await trio.sleep(RPC_TIMEOUT - 1)
        await broker.wait_gone()
        assert trio.current_time() == pytest.approx(publishing.DECLARE_TIMEOUT, abs=15)
        assert "declared" in str(relay.publisher.refusal())


async def test_a_connection_lost_before_the_upload_has_its_channel_is_replaced(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        await broker.accept_open()
        await broker.cut()
        broker = await relay.broker()
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


# --- queues -------------------------------------------------------------------------------------


async def test_queues_are_declared_on_each_connection_before_uploads(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, WITH_QUEUE) as relay:
        for _ in range(2):
            broker = await network.accept()
            await broker.handshake()
            await wait_all_tasks_blocked()
            assert isinstance(relay.publisher.fault(), BrokerUnavailable)
            declare = await broker.accept_declare()
            assert declare.queue == "q"
            await wait_all_tasks_blocked()
            assert relay.publisher.fault() is None
            await broker.cut()
            await wait_all_tasks_blocked()


async def test_a_queue_that_exists_otherwise_does_not_keep_uploads_out(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, WITH_QUEUE) as relay:
        broker = await network.accept()
        await broker.handshake()
        channel = await broker.accept_open()
        await broker.expect(Queue.Declare)
        await broker.close_channel(channel, 406, "PRECONDITION_FAILED")
        await wait_all_tasks_blocked()
        assert relay.publisher.refusal() is None


@pytest.mark.parametrize("ending", ["cut", "close", "silence"])
async def test_a_connection_that_ends_while_queues_are_declared_is_replaced(
    ending: str, autojump_clock: MockClock
) -> None:
    network = Network()
    async with running(network, WITH_QUEUE) as relay:
        broker = await network.accept()
        await broker.handshake()
        await broker.accept_open()
        await broker.expect(Queue.Declare)
        if ending == "cut":
            await broker.cut()
        elif ending == "close":
            await broker.send(Connection.Close(541, "INTERNAL_ERROR", 0, 0))
        broker = await network.accept()
        await broker.handshake()
        await broker.accept_declare()
        await wait_all_tasks_blocked()
        assert relay.publisher.refusal() is None


async def test_an_alarm_that_is_told_while_queues_are_declared_is_not_forgotten(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(
        network, WITH_QUEUE, confirm_timeout=TIMEOUT, blocked_grace=BLOCKED_GRACE
    ) as relay:
        broker = await network.accept()
        await broker.handshake()
        await broker.accept_declare()
        await wait_all_tasks_blocked()
        upload = relay.attempt(3)
        await broker.published(2)
        await broker.cut()
        broker = await network.accept()
        await broker.handshake()
        began = trio.current_time()
        await broker.block()
        await broker.accept_declare()
        await broker.published(2)
        assert isinstance(await upload.outcome(), BrokerBlocked)
        assert trio.current_time() - began == pytest.approx(BLOCKED_GRACE, abs=0.1)
