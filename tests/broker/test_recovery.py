"""Connections lost, and what becomes of the uploads that were on them."""

import itertools

import pytest
import trio
from pika import frame as amqp
from pika.spec import Basic, Channel, Connection, Queue
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.broker.abort import ABORT_TIMEOUT
from relay.broker.connect import BACKOFF_FIRST, BACKOFF_LAST, CONNECT_TIMEOUT, backoff
from relay.broker.publisher import RECONNECT_PATIENCE
from relay.broker.rejection import REJECTED_GRACE
from relay.config import QueueConfig, RouteConfig
from relay.errors import (
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    ClientGone,
    OutcomeUnknown,
    QueueFull,
)
from relay.model import Abort
from tests.broker.attempt import FRAME, Relay, running, seqs
from tests.scripted_broker import Network, Published, ScriptedBroker

GRACE = 30

TO_QUEUE = RouteConfig(name="direct", exchange="", routing_key="q.q")
TO_DECLARED_QUEUE = RouteConfig(
    name="declared", exchange="ex", queue=QueueConfig(name="q.q", type="quorum", arguments={})
)


async def commit_frame(relay: Relay, broker: ScriptedBroker) -> Published:
    """An upload of two frames, of which the second, the commit frame, is out."""
    await broker.confirm(*await broker.published())
    (commit,) = await broker.published()
    return commit


async def reject_all(broker: ScriptedBroker) -> None:
    while True:
        await broker.reject(*await broker.published(1))


# --- rejected -----------------------------------------------------------------------------------


async def test_frames_rejected_before_any_was_taken_are_published_again(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        for _ in range(3):
            rejected = await broker.published(4)
            assert seqs(rejected) == [0, 1, 2, 3]
            # In whatever order it tells.
            await broker.reject(*reversed(rejected))
        await broker.confirm(*await broker.published(4))
        (commit,) = await broker.published()
        await broker.confirm(commit)
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_queue_behind_an_exchange_that_takes_nothing_is_full_in_the_end(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        relay.nursery.start_soon(reject_all, broker)
        assert isinstance(await upload.outcome(), QueueFull)
        assert trio.current_time() == pytest.approx(REJECTED_GRACE, abs=1)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def rejected(broker: ScriptedBroker, *, ready: int) -> list[Published]:
    """Reject what an upload of five frames has out; answer what the queue is asked after that."""
    messages = await broker.published(4)
    assert seqs(messages) == [0, 1, 2, 3]
    await broker.nack(messages[-1].tag, multiple=True, channel=messages[-1].channel)
    declare = await broker.accept_declare(ready)
    assert (declare.queue, declare.passive) == ("q.q", True)
    return messages


@pytest.mark.parametrize("route", [TO_QUEUE, TO_DECLARED_QUEUE])
async def test_a_queue_that_rejects_and_has_messages_is_full_at_once(
    route: RouteConfig, autojump_clock: MockClock
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=route)
        for _ in range(2):
            await rejected(broker, ready=7)
        assert isinstance(await upload.outcome(), QueueFull)
        assert trio.current_time() < 0.1
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 4, "queue-full")
        await broker.confirm(abort)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_a_queue_that_has_a_leader_again_when_it_is_asked_is_not_taken_for_full(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        for ready in (7, 0, 7):
            await rejected(broker, ready=ready)
        await broker.confirm(*await broker.published(4))
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_channel_that_goes_on_rejecting_is_replaced_and_never_used_again(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        # RabbitMQ nacks on this one until the node is back that had the leader; the queue, which
        # has messages, has another leader by now, to which only fresh channels speak.
        (bad, *_) = {message.channel for message in await rejected(broker, ready=7)}
        assert bad in broker.channels
        again = await broker.published(4)
        assert seqs(again) == [0, 1, 2, 3]
        assert bad not in broker.channels
        await broker.confirm(*again)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        upload = relay.attempt(1, route=TO_QUEUE)
        (message,) = await broker.published()
        assert message.channel == again[0].channel
        await broker.confirm(message)
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_what_proves_a_queue_full_is_of_one_connection(autojump_clock: MockClock) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        await rejected(broker, ready=7)
        await broker.accept_close()
        # Instead of the fresh channel; what node comes next may know of no new leader yet.
        await broker.expect(Channel.Open)
        await broker.cut()
        broker = await relay.broker()
        await rejected(broker, ready=7)
        await broker.confirm(*await broker.published(4))
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_frame_taken_after_one_that_was_not_does_not_prove_a_queue_full(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        first, *others = await broker.published(4)
        await broker.reject(first)
        await broker.confirm(*others)
        error = await upload.outcome()
        assert isinstance(error, BrokerUnavailable)
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 4, "broker-unavailable")
        await broker.confirm(abort)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_a_late_ack_of_what_was_before_a_nack_proves_a_queue_full(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        *taken, last = await broker.published(4)
        # As RabbitMQ does: it knows at once that the queue takes no more, and waits for the rest.
        await broker.reject(last)
        await broker.confirm(*taken)
        assert isinstance(await upload.outcome(), QueueFull)
        (abort,) = await broker.published()
        await broker.confirm(abort)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_a_queue_that_stays_without_a_leader_is_a_broker_that_is_away(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)

        async def reject() -> None:
            while not upload.is_over:
                await rejected(broker, ready=0)

        with trio.move_on_after(2 * GRACE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reject)
                error = await upload.outcome()
                nursery.cancel_scope.cancel()
        assert isinstance(error, BrokerUnavailable)
        assert "leader" in error.detail
        assert trio.current_time() == pytest.approx(GRACE, abs=0.1)
        relay.assert_nothing_is_held()


async def test_a_queue_of_which_the_broker_says_nothing_is_not_taken_for_full(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2, route=TO_QUEUE)
        await broker.reject(*await broker.published())
        channel = await broker.accept_open()
        await broker.expect(Queue.Declare)
        await broker.close_channel(channel, 404, "NOT_FOUND")
        await broker.confirm(*await broker.published())
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


@pytest.mark.parametrize("is_answered", [True, False])
async def test_a_connection_lost_while_the_queue_is_asked_is_replaced(
    is_answered: bool, autojump_clock: MockClock
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, route=TO_QUEUE)
        await broker.nack((await broker.published(4))[-1].tag, multiple=True)
        channel = await broker.accept_open()
        await broker.expect(Queue.Declare)
        answer = amqp.Method(channel, Queue.DeclareOk("q.q", 7, 0)).marshal()
        goodbye = amqp.Method(0, Connection.Close(320, "CONNECTION_FORCED", 0, 0)).marshal()
        # Both in one read, so that no task runs in between.
        await broker.send_bytes(answer * is_answered + goodbye)
        broker = await relay.broker()
        again = await broker.published(4)
        assert seqs(again) == [0, 1, 2, 3]
        await broker.confirm(*again)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_what_was_rejected_when_the_connection_is_lost_is_published_again_in_order(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        await broker.published(4)
        await broker.nack(3, 2)
        await broker.cut()
        broker = await relay.broker()
        again = await broker.published(4)
        assert seqs(again) == [0, 1, 2, 3]
        await broker.confirm(*again)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_an_upload_given_up_while_it_is_rejected_holds_nothing(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        await broker.reject(*await broker.published(4))
        await wait_all_tasks_blocked()
        upload.scope.cancel()
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


# --- on the next connection ---------------------------------------------------------------------


async def test_unconfirmed_frames_are_published_again_in_order_and_the_upload_goes_on(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), upload_window=5 * FRAME) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        messages = await broker.published(5)
        await broker.ack(4, 2)
        await broker.published(2)  # 5 and 6
        await broker.cut()
        broker = await relay.broker()
        again = await broker.published(5)
        assert seqs(again) == [0, 2, 4, 5, 6]
        assert again[0].body == messages[0].body
        assert again[0].properties == messages[0].properties
        await broker.silence()
        await broker.confirm(*again)
        rest = await broker.published(1)
        await broker.confirm(*rest)
        (commit,) = await broker.published()
        assert seqs([*rest, commit]) == [7, 8]
        await broker.confirm(commit)
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_frames_are_published_again_while_the_client_is_slow(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, pause_before=3)
        await broker.published(3)
        await broker.cut()
        broker = await relay.broker()
        again = await broker.published(3)
        assert seqs(again) == [0, 1, 2]
        await broker.confirm(*again)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()
        upload.go_on()
        await broker.confirm(*await broker.published())
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_an_upload_with_nothing_outstanding_goes_on_where_it_was(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, pause_before=3)
        await broker.confirm(*await broker.published(3))
        await wait_all_tasks_blocked()
        await broker.cut()
        broker = await relay.broker()
        await broker.accept_channel()
        upload.go_on()
        (message,) = await broker.published()
        assert message.seq == 3
        await broker.confirm(message)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


@pytest.mark.parametrize("then", ["lost", "rejected"])
async def test_a_loss_that_cost_an_upload_nothing_takes_nothing_of_its_next_grace(
    then: str, autojump_clock: MockClock
) -> None:
    async with running(Network(), reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5, pause_before=3)
        await broker.confirm(*await broker.published(3))
        await wait_all_tasks_blocked()
        await broker.cut()
        broker = await relay.broker()
        await broker.accept_channel()
        await trio.sleep(GRACE + 1)
        if then == "lost":
            await broker.cut()
            broker = await relay.broker()
            await broker.accept_channel()
        upload.go_on()
        if then == "rejected":
            await broker.reject(*await broker.published())
        await broker.confirm(*await broker.published())
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_uploads_that_all_wait_for_a_full_window_recover(autojump_clock: MockClock) -> None:
    count = 4
    async with running(Network(), window=count * FRAME, upload_window=2 * FRAME) as relay:
        broker = await relay.broker()
        uploads = []
        for _ in range(count):
            uploads.append(relay.attempt(9, pause_before=1))
            await broker.published(1)
        for upload in uploads:
            upload.go_on()
        await wait_all_tasks_blocked()
        # Nobody can get on unless somebody minds what it has published already.
        assert relay.publisher.window.waiting == count
        await broker.cut()
        broker = await relay.broker()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.serve)
            for upload in uploads:
                assert await upload.outcome() is None
            nursery.cancel_scope.cancel()
        relay.assert_nothing_is_held()


async def test_a_connection_that_ends_within_an_ack_leaves_that_frame_unconfirmed(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        relay.attempt(4, pause_before=3)
        await broker.published(3)
        ack = amqp.Method(1, Basic.Ack(1)).marshal()
        await broker.send_bytes(ack + amqp.Method(1, Basic.Ack(2)).marshal()[:-1])
        await broker.cut()
        broker = await relay.broker()
        assert seqs(await broker.published(2)) == [1, 2]


@pytest.mark.parametrize(
    "noise", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9000, b"\x01\x00\x01\x00\x00\x00\x04" * 9]
)
async def test_a_connection_on_which_the_broker_talks_nonsense_is_replaced(
    noise: bytes, autojump_clock: MockClock
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        await broker.published(1)
        await broker.send_bytes(noise)
        broker = await relay.broker()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.serve)
            assert await upload.outcome() is None
            nursery.cancel_scope.cancel()


async def test_a_second_loss_within_the_grace_is_survived(autojump_clock: MockClock) -> None:
    async with running(Network(), reconnect_grace=GRACE) as relay:
        upload = None
        for _ in range(3):
            broker = await relay.broker()
            upload = upload or relay.attempt(4)
            assert seqs(await broker.published(3)) == [0, 1, 2]
            await broker.cut()
        broker = await relay.broker()
        await broker.confirm(*await broker.published(3))
        await broker.confirm(*await broker.published())
        assert upload is not None
        assert await upload.outcome() is None


async def test_a_channel_refused_on_the_next_connection_fails_the_upload(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(4)
        await broker.published(3)
        await broker.cut()
        broker = await relay.broker()
        (message, *_) = await broker.published(3)
        await broker.close_channel(message.channel, 404, "NOT_FOUND")
        assert isinstance(await upload.outcome(), BrokerRefused)
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 3, "broker-refused")
        relay.assert_nothing_is_held()


async def test_an_upload_that_comes_just_after_a_loss_waits_for_the_next_connection(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        await broker.cut()
        await wait_all_tasks_blocked()
        upload = relay.attempt(1)
        assert relay.publisher.refusal() is None
        broker = await relay.broker()
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        assert trio.current_time() < RECONNECT_PATIENCE


async def test_an_upload_that_comes_just_after_a_loss_does_not_wait_for_long(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network) as relay:
        broker = await relay.broker()
        network.is_down = True
        await broker.cut()
        await wait_all_tasks_blocked()
        assert isinstance(await relay.attempt(1).outcome(), BrokerUnavailable)
        assert trio.current_time() == pytest.approx(RECONNECT_PATIENCE)
        # By now it is known to be away.
        assert isinstance(await relay.attempt(1).outcome(), BrokerUnavailable)
        assert trio.current_time() == pytest.approx(RECONNECT_PATIENCE)


async def test_an_upload_that_waited_for_a_connection_is_refused_if_that_is_blocked(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), TO_DECLARED_QUEUE) as relay:
        broker = await relay.broker()
        await broker.accept_declare()
        await wait_all_tasks_blocked()
        await broker.cut()
        await wait_all_tasks_blocked()
        upload = relay.attempt(1)
        broker = await relay.broker()
        await broker.block()
        await broker.accept_declare()
        assert isinstance(await upload.outcome(), BrokerBlocked)


async def test_a_broker_never_reached_is_not_waited_for(autojump_clock: MockClock) -> None:
    network = Network()
    network.is_down = True
    async with running(network) as relay:
        await wait_all_tasks_blocked()
        assert isinstance(relay.publisher.refusal(), BrokerUnavailable)
        assert isinstance(await relay.attempt(1).outcome(), BrokerUnavailable)
        assert trio.current_time() == 0


async def test_a_broker_that_stays_away_has_new_uploads_refused_until_it_is_back(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network) as relay:
        broker = await relay.broker()
        assert relay.publisher.refusal() is None
        network.is_down = True
        await broker.cut()
        await trio.sleep(RECONNECT_PATIENCE + 1)
        assert isinstance(relay.publisher.refusal(), BrokerUnavailable)
        assert isinstance(await relay.attempt(1).outcome(), BrokerUnavailable)
        network.is_down = False
        broker = await relay.broker()
        assert relay.publisher.refusal() is None
        assert relay.publisher.connects == 2


# --- no next connection -------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [0, GRACE])
async def test_an_upload_fails_when_the_broker_stays_away(
    grace: int, autojump_clock: MockClock
) -> None:
    network = Network()
    async with running(network, reconnect_grace=grace) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        await broker.published(8)
        await broker.ack(3)
        network.is_down = True
        await broker.cut()
        error = await upload.outcome()
        assert isinstance(error, BrokerUnavailable)
        # Why it does not come back; without grace, why it went.
        assert ("nobody listens" if grace else "closed the connection") in error.detail
        assert trio.current_time() == pytest.approx(grace, abs=0.1)
        relay.assert_nothing_is_held()


async def test_its_room_is_free_when_the_broker_stays_away_although_the_client_is_slow(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=3)
        await broker.published(3)
        network.is_down = True
        await broker.cut()
        await trio.sleep(GRACE - 1)
        assert relay.publisher.window.taken == 3 * FRAME
        await trio.sleep(2)
        relay.assert_nothing_is_held()
        upload.go_on()
        assert isinstance(await upload.outcome(), BrokerUnavailable)
        assert upload.sent == 3


async def test_the_grace_ends_though_the_broker_comes_back_again_and_again(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), reconnect_grace=GRACE) as relay:
        upload = None
        while upload is None or not upload.is_over:
            broker = await relay.broker()
            upload = upload or relay.attempt(2)
            await broker.published(1)
            # Nothing is ever confirmed: it may be this very frame that kills the broker.
            await broker.cut()
            await wait_all_tasks_blocked()
        assert isinstance(await upload.outcome(), BrokerUnavailable)
        assert trio.current_time() == pytest.approx(GRACE, abs=5)


async def test_no_confirm_is_overdue_while_there_is_no_connection(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, reconnect_grace=10 * GRACE, confirm_timeout=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        await broker.published(2)
        network.is_down = True
        await broker.cut()
        await trio.sleep(5 * GRACE)
        network.is_down = False
        broker = await relay.broker()
        await broker.confirm(*await broker.published(2))
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


async def test_a_confirm_begins_the_grace_anew(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(4)
        await broker.published(3)
        for seq in (0, 1):
            network.is_down = True
            await broker.cut()
            await trio.sleep(GRACE - 12)
            network.is_down = False
            broker = await relay.broker()
            messages = await broker.published(3 - seq)
            await broker.confirm(messages[0])
            await wait_all_tasks_blocked()
        assert trio.current_time() > GRACE
        await broker.confirm(messages[1])
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None


# --- between commit and confirm -----------------------------------------------------------------


async def test_a_commit_frame_is_published_again_and_can_still_succeed(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        first = await commit_frame(relay, broker)
        await broker.cut()
        broker = await relay.broker()
        (second,) = await broker.published()
        assert second.decode() == first.decode()
        await broker.confirm(second)
        assert await upload.outcome() is None


@pytest.mark.parametrize("whole_connection", [True, False])
async def test_a_commit_frame_that_is_confirmed_with_the_last_words_is_safe(
    whole_connection: bool, autojump_clock: MockClock
) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        commit = await commit_frame(relay, broker)
        network.is_down = True
        # Both come in one read, before the upload's task can run in between.
        ack = amqp.Method(commit.channel, Basic.Ack(commit.tag)).marshal()
        if whole_connection:
            goodbye = amqp.Method(0, Connection.Close(320, "CONNECTION_FORCED", 0, 0)).marshal()
        else:
            refusal = Channel.Close(406, "PRECONDITION_FAILED", 0, 0)
            goodbye = amqp.Method(commit.channel, refusal).marshal()
        await broker.send_bytes(ack + goodbye)
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_broker_lost_after_the_commit_frame_leaves_the_outcome_unknown(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        await commit_frame(relay, broker)
        network.is_down = True
        await broker.cut()
        assert isinstance(await upload.outcome(), OutcomeUnknown)
        assert trio.current_time() == pytest.approx(GRACE, abs=0.1)
        # No abort follows, not even later: the commit frame may have been the truth.
        network.is_down = False
        broker = await relay.broker()
        await broker.silence()
        relay.assert_nothing_is_held()


@pytest.mark.parametrize("fate", ["nacked", "returned", "refused"])
async def test_whatever_becomes_of_the_second_copy_the_first_may_be_committed(
    fate: str, autojump_clock: MockClock
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        await commit_frame(relay, broker)
        await broker.cut()
        broker = await relay.broker()
        (second,) = await broker.published()
        # A queue that was full with the first copy, or deleted meanwhile.
        if fate == "nacked":
            await broker.reject(second)
            with trio.move_on_after(REJECTED_GRACE + 1):
                await reject_all(broker)
        elif fate == "returned":
            await broker.give_back(second)
            await broker.confirm(second)
        else:
            await broker.close_channel(second.channel, 404, "NOT_FOUND")
        assert isinstance(await upload.outcome(), OutcomeUnknown)
        await broker.silence()
        relay.assert_nothing_is_held()


async def test_a_connection_lost_just_before_the_commit_frame_leaves_no_doubt(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2, pause_before=1)
        await broker.confirm(*await broker.published())
        await wait_all_tasks_blocked()
        network.is_down = True
        await broker.cut()
        await wait_all_tasks_blocked()
        upload.go_on()
        assert isinstance(await upload.outcome(), BrokerUnavailable)


# --- abort frames -------------------------------------------------------------------------------


async def test_an_upload_given_up_during_an_outage_is_aborted_after_it(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with running(network, reconnect_grace=GRACE) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=3)
        await broker.published(3)
        network.is_down = True
        await broker.cut()
        await wait_all_tasks_blocked()
        upload.go_on(ClientGone("gone"))
        assert isinstance(await upload.outcome(), ClientGone)
        relay.assert_nothing_is_held()
        network.is_down = False
        broker = await relay.broker()
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 3, "client-gone")
        await broker.silence()
        await broker.confirm(abort)
        await wait_all_tasks_blocked()
        # The channel that told it is good for the next upload.
        upload = relay.attempt(1)
        (message,) = await broker.published()
        assert message.channel == abort.channel


async def test_an_abort_that_is_lost_with_its_connection_is_told_on_the_next(
    autojump_clock: MockClock,
) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=3)
        await broker.confirm(*await broker.published(3))
        upload.go_on(ClientGone("gone"))
        await broker.published()
        await broker.cut()
        broker = await relay.broker()
        (abort,) = await broker.published()
        assert abort.decode() == Abort(upload.transfer.id, 3, "client-gone")
        await broker.confirm(abort)
        await broker.silence()


async def test_an_abort_that_finds_no_broker_is_given_up(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network, reconnect_grace=0) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        await broker.published(8)
        network.is_down = True
        await broker.cut()
        await upload.outcome()
        await trio.sleep(ABORT_TIMEOUT + 1)
        network.is_down = False
        broker = await relay.broker()
        await broker.silence()


async def test_an_abort_whose_confirm_never_comes_gives_its_channel_up(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=60) as relay:
        broker = await relay.broker()
        relay.attempt(9)
        (message, *_) = await broker.published(8)
        await broker.close_channel(message.channel, 404, "NOT_FOUND")
        (abort,) = await broker.published()
        channel = await broker.accept_close()
        assert channel == abort.channel
        assert trio.current_time() == pytest.approx(60, abs=1)


async def test_an_upload_that_outlives_the_publisher_ends_without_an_abort(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    async with trio.open_nursery() as uploads:
        async with running(network) as relay:
            relay.nursery = uploads
            broker = await relay.broker()
            upload = relay.attempt(9)
            await broker.published(8)
        assert not upload.is_over
        uploads.cancel_scope.cancel()
    assert upload.is_over
    await broker.wait_gone()


# --- connecting ---------------------------------------------------------------------------------


async def test_a_broker_that_is_down_is_tried_again_ever_more_patiently(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    network.is_down = True
    async with running(network) as relay:
        await trio.sleep(120)
        times = [at for at, _, _ in network.attempts]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        for attempt, pause in enumerate(pauses):
            longest = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** (attempt + 1))
            assert longest / 2 <= pause <= longest
        assert "nobody listens" in str(relay.publisher.refusal())
        assert max(pauses) <= BACKOFF_LAST
        network.is_down = False
        await relay.broker()
        assert relay.publisher.refusal() is None


async def test_a_connection_that_was_made_begins_the_patience_anew(
    autojump_clock: MockClock,
) -> None:
    network = Network()
    network.is_down = True
    async with running(network) as relay:
        await trio.sleep(120)
        network.is_down = False
        broker = await relay.broker()
        lost = trio.current_time()
        await broker.cut()
        await relay.broker()
        assert trio.current_time() - lost <= BACKOFF_FIRST


@pytest.mark.parametrize("jitter", [0, 0.5, 0.999])
def test_backoff_is_bounded_for_ever(jitter: float) -> None:
    waits = [backoff(attempt, jitter) for attempt in (0, 1, 2, 10, 10_000_000)]
    assert waits == sorted(waits)
    assert waits[0] >= BACKOFF_FIRST / 2
    assert waits[-1] <= BACKOFF_LAST


async def test_several_brokers_are_tried_in_turn(autojump_clock: MockClock) -> None:
    network = Network()
    network.is_down = True
    urls = ("amqp://one/", "amqp://two:5673/", "amqp://three/")
    async with running(network, urls=urls) as relay:
        await trio.sleep(60)
        tried = [(host, port) for _, host, port in network.attempts]
        turn = [("one", 5672), ("two", 5673), ("three", 5672)]
        assert tried[:6] == turn + turn
        network.is_down = False
        broker = await relay.broker()
        expected = turn[len(tried) % 3]
        assert broker.address == expected


async def test_a_lost_connection_is_followed_by_one_to_the_first_broker_if_it_is_another(
    autojump_clock: MockClock,
) -> None:
    urls = ("amqp://one/", "amqp://two/", "amqp://three/")
    async with running(Network(), urls=urls) as relay:
        homes = []
        for _ in range(4):
            broker = await relay.broker()
            homes.append(broker.address[0])
            await broker.cut()
        assert homes == ["one", "two", "one", "two"]


async def test_brokers_that_are_away_are_told_of_once_each(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Down(Network):
        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            self.attempts.append((trio.current_time(), host, port))
            raise ConnectionRefusedError(f"nobody listens at {host}")

    network = Down()
    async with running(network, urls=("amqp://one/", "amqp://two/", "amqp://three/")):
        await trio.sleep(120)
        assert len(network.attempts) > 12
        warnings = [record for record in caplog.records if "nobody listens" in record.message]
        assert len(warnings) == 3


async def test_a_connection_that_nobody_answers_is_given_up(autojump_clock: MockClock) -> None:
    class Silent(Network):
        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            self.attempts.append((trio.current_time(), host, port))
            await trio.sleep_forever()
            raise AssertionError

    network = Silent()
    async with running(network) as relay:
        await trio.sleep(CONNECT_TIMEOUT + BACKOFF_FIRST * 2 + 1)
        assert len(network.attempts) == 2
        assert "no answer within 10 s" in str(relay.publisher.refusal())


async def test_a_handshake_that_nobody_answers_is_given_up(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network) as relay:
        silent = await network.accept()
        await silent.wait_gone()
        await relay.broker()
        assert relay.publisher.connects == 1


async def test_the_reason_why_there_is_no_broker_is_told(autojump_clock: MockClock) -> None:
    network = Network()
    async with running(network) as relay:
        assert "not connected" in str(relay.publisher.refusal())
        broker = await network.accept()
        await broker.accept_protocol()
        await broker.send(Connection.Close(403, "ACCESS_REFUSED", 0, 0))
        await wait_all_tasks_blocked()
        assert "user name or password" in str(relay.publisher.refusal())


async def test_goodbye_is_said_to_the_broker(autojump_clock: MockClock) -> None:
    async with running(Network()) as relay, trio.open_nursery() as nursery:
        broker = await relay.broker()
        nursery.start_soon(relay.publisher.close)
        await broker.accept_goodbye()
        await broker.wait_gone()
