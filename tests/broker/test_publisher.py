import dataclasses
from collections.abc import Callable, Coroutine
from types import TracebackType

import pytest
import trio
from pika.spec import Channel
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from relay.broker.adapter import STAGE_SIZE
from relay.errors import BrokerRefused, ClientGone, ConfirmTimeout, QueueFull, Unroutable
from relay.model import Abort, Frame
from tests.broker.attempt import FRAME, ROUTE, Relay, running, seqs
from tests.scripted_broker import Network, ScriptedBroker

Script = Callable[[ScriptedBroker], Coroutine[None, None, None]]


async def abort_of(broker: ScriptedBroker) -> Abort:
    """The next message, which must be an abort that nobody has to take."""
    (message,) = await broker.published()
    abort = message.decode()
    assert isinstance(abort, Abort)
    assert not message.method.mandatory
    await broker.confirm(message)
    return abort


# --- an upload that goes well ------------------------------------------------------------------


async def test_frames_go_out_in_order_and_the_commit_frame_after_all_confirms() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        messages = await broker.published(4)
        assert [message.decode() for message in messages] == carried(upload.frames[:4])
        for message in (messages[3], messages[0], messages[2]):
            await broker.confirm(message)
            await broker.silence()
        await broker.confirm(messages[1])
        (commit,) = await broker.published()
        assert commit.decode() == upload.frames[4]
        await broker.silence()
        assert not upload.is_over
        await broker.confirm(commit)
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


def carried(frames: list[Frame]) -> list[Frame]:
    """Frames as the wire has them: the route is on the first and the last only."""
    return [
        frame
        if frame.seq == 0 or frame.commit
        else frame._replace(transfer=dataclasses.replace(frame.transfer, route=""))
        for frame in frames
    ]


async def test_a_transfer_of_one_frame_is_one_message() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        (commit,) = await broker.published()
        await broker.confirm(commit)
        assert await upload.outcome() is None
        await broker.silence()


async def test_messages_go_where_the_route_says() -> None:
    route = dataclasses.replace(
        ROUTE, routing_key="{route}.{transfer}.{client}", mandatory=False, persistent=False
    )
    async with running(Network(), route) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1, route=route)
        (message,) = await broker.published()
        assert message.method.exchange == "ex"
        assert message.method.routing_key == f"default.{upload.transfer.id}."
        assert not message.method.mandatory
        assert message.properties.delivery_mode == 1


async def test_uploads_in_parallel_have_channels_of_their_own() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        one, two = relay.attempt(3), relay.attempt(3)
        messages = await broker.published(4)
        for upload in (one, two):
            own = [message for message in messages if upload.is_of(message)]
            assert seqs(own) == [0, 1]
            assert len({message.channel for message in own}) == 1
        assert len({message.channel for message in messages}) == 2


async def test_a_channel_serves_one_upload_after_the_other() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        for tag in (1, 2, 3):
            upload = relay.attempt(1)
            (message,) = await broker.published()
            assert (message.channel, message.tag) == (1, tag)
            await broker.confirm(message)
            assert await upload.outcome() is None


# --- backpressure ------------------------------------------------------------------------------


async def test_an_upload_has_no_more_out_than_its_window() -> None:
    async with running(Network(), upload_window=3 * FRAME) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        messages = await broker.published(3)
        await broker.silence()
        assert upload.sent == 3
        for seq in range(3, 8):
            await broker.confirm(messages.pop(0))
            messages += await broker.published()
            assert seqs(messages)[-1] == seq
            await broker.silence()


async def test_all_uploads_together_have_no_more_out_than_the_window() -> None:
    async with running(Network(), window=4 * FRAME, upload_window=3 * FRAME) as relay:
        broker = await relay.broker()
        one, two = relay.attempt(9), relay.attempt(9)
        messages = await broker.published(4)
        await broker.silence()
        assert relay.publisher.window.taken == 4 * FRAME
        # Whoever has come first gets the room, wherever it comes from.
        await broker.confirm(*messages)
        await broker.published(4)
        await broker.silence()
        assert one.sent + two.sent == 8


async def test_an_upload_waits_its_turn_for_the_window() -> None:
    async with running(Network(), window=2 * FRAME, upload_window=2 * FRAME) as relay:
        broker = await relay.broker()
        greedy = relay.attempt(100)
        out = await broker.published(2)
        waiting = []
        for _ in range(3):
            waiting.append(relay.attempt(2))
            await broker.accept_channel()
        await wait_all_tasks_blocked()
        # Room for one frame at a time: who had some before comes after who is waiting.
        for upload in [*waiting, greedy]:
            await broker.confirm(out.pop(0))
            out += await broker.published()
            assert upload.is_of(out[-1])
            await broker.silence()


async def test_a_small_upload_waits_for_one_frame_of_each_large_one_and_no_more() -> None:
    large, room = 6, 8
    async with running(Network(), window=room * FRAME, upload_window=4 * FRAME) as relay:
        broker = await relay.broker()
        for _ in range(large):
            relay.attempt(1000)
        out = await broker.published(room)
        await broker.silence()
        small = relay.attempt(1)
        await broker.accept_channel()
        await wait_all_tasks_blocked()
        confirms = 0
        while not small.is_of(out[-1]):
            await broker.confirm(out.pop(0))
            confirms += 1
            out += await broker.published()
        assert confirms <= large + 1
        await broker.confirm(out.pop())
        assert await small.outcome() is None


async def test_a_small_upload_does_not_wait_for_all_that_a_large_one_has_queued() -> None:
    size, count = STAGE_SIZE // 8, 64
    network = Network(lockstep_stream_pair)
    async with running(network, window=2 * count * size, upload_window=count * size) as relay:
        broker = await relay.broker()
        # Two channels, so that no message has to wait for one.
        early = [relay.attempt(1), relay.attempt(1)]
        await broker.confirm(*await broker.published(2))
        assert [await upload.outcome() for upload in early] == [None, None]
        greedy = relay.attempt(1000, size=size)
        await wait_all_tasks_blocked()
        assert greedy.sent == count
        small = relay.attempt(1)
        await wait_all_tasks_blocked()
        before = []
        while not small.is_of(message := (await broker.published())[0]):
            before.append(message)
        # What was next already, and one in turn.
        assert len(before) <= STAGE_SIZE // size + 2
        await broker.confirm(message)
        assert await small.outcome() is None
        # The large one's are all there, and in order.
        before += await broker.published(count - len(before))
        assert seqs(before) == list(range(count))


async def test_an_upload_that_ends_gives_its_place_in_the_queue_away() -> None:
    async with running(Network(), window=2 * FRAME, upload_window=2 * FRAME) as relay:
        broker = await relay.broker()
        relay.attempt(9)
        out = await broker.published(2)
        waiting = []
        for _ in range(3):
            waiting.append(relay.attempt(2))
            await broker.accept_channel()
        await wait_all_tasks_blocked()
        assert relay.publisher.window.waiting == 3
        waiting[0].scope.cancel()
        await wait_all_tasks_blocked()
        assert relay.publisher.window.waiting == 2
        await broker.confirm(*out)
        for message, upload in zip(await broker.published(2), waiting[1:], strict=True):
            assert upload.is_of(message)


# --- failures ----------------------------------------------------------------------------------


async def nack_the_second(broker: ScriptedBroker) -> None:
    await broker.ack(1)
    await broker.nack(2)


async def nack_between_acks(broker: ScriptedBroker) -> None:
    await broker.nack(1)
    await broker.ack(2)


async def ack_later_tags_then_nack(broker: ScriptedBroker) -> None:
    await broker.ack(3)
    await broker.ack(4)
    await broker.nack(1)


async def nack_several_over_a_gap(broker: ScriptedBroker) -> None:
    await broker.ack(2)
    await broker.nack(3, multiple=True)


@pytest.mark.parametrize(
    "script",
    [nack_the_second, nack_between_acks, ack_later_tags_then_nack, nack_several_over_a_gap],
)
async def test_a_nacked_frame_fails_the_upload(script: Script) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(5)
        await broker.published(4)
        await script(broker)
        assert isinstance(await upload.outcome(), QueueFull)
        abort = await abort_of(broker)
        assert abort == Abort(upload.transfer.id, 4, "queue-full")
        await broker.silence()
        await broker.ack(0, multiple=True)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


async def test_confirms_in_any_order_make_a_success() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        await broker.published(8)
        await broker.ack(6, 2)
        await broker.ack(4, multiple=True)  # 1, 3, 4
        await broker.silence()
        await broker.ack(8, 5)
        await broker.silence()
        await broker.ack(7, multiple=True)
        await broker.confirm(*await broker.published())
        assert await upload.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_returned_frame_is_not_a_success() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(3)
        messages = await broker.published(2)
        for message in messages:
            await broker.give_back(message)
            await broker.confirm(message)
        error = await upload.outcome()
        assert isinstance(error, Unroutable)
        assert await abort_of(broker) == Abort(upload.transfer.id, 2, "unroutable")
        await broker.silence()
        relay.assert_nothing_is_held()


async def test_a_returned_frame_without_an_ack_is_not_a_success(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=60) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        (message,) = await broker.published()
        await broker.give_back(message)
        await trio.sleep(30)
        await broker.heartbeat()
        assert isinstance(await upload.outcome(), ConfirmTimeout)
        assert trio.current_time() == pytest.approx(60, abs=1)


@pytest.mark.parametrize("how", ["nacked", "returned"])
async def test_a_commit_frame_that_the_broker_does_not_take_is_no_success(how: str) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(2)
        await broker.confirm(*await broker.published())
        (commit,) = await broker.published()
        if how == "nacked":
            await broker.reject(commit)
            await broker.accept_close()
        else:
            await broker.give_back(commit)
            await broker.confirm(commit)
        expected = QueueFull if how == "nacked" else Unroutable
        assert isinstance(await upload.outcome(), expected)
        # An abort behind a commit frame would be a contradiction.
        await broker.silence()
        relay.assert_nothing_is_held()


REFUSALS = [
    (404, "NOT_FOUND - no exchange 'ex' in vhost '/'"),
    (403, "ACCESS_REFUSED - access to exchange 'ex' refused"),
    (406, "PRECONDITION_FAILED - message size 131064 is larger than configured max size"),
    (311, "CONTENT_TOO_LARGE"),
]


@pytest.mark.parametrize(("code", "text"), REFUSALS)
async def test_a_refused_channel_fails_its_upload_and_no_other(code: int, text: str) -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        sibling = relay.attempt(3)
        messages = await broker.published(2)
        refused = relay.attempt(3)
        (lost, _) = await broker.published(2)
        await broker.close_channel(lost.channel, code, text)
        error = await refused.outcome()
        assert isinstance(error, BrokerRefused)
        assert f"{code} {text}" in error.detail
        # Its own channel is gone: another one takes the abort.
        assert await abort_of(broker) == Abort(refused.transfer.id, 2, "broker-refused")
        await broker.confirm(*messages)
        await broker.confirm(*await broker.published())
        assert await sibling.outcome() is None
        relay.assert_nothing_is_held()


async def test_a_refused_commit_frame_is_not_followed_by_an_abort() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1)
        (commit,) = await broker.published()
        await broker.close_channel(commit.channel, 404, "NOT_FOUND")
        assert isinstance(await upload.outcome(), BrokerRefused)
        await broker.silence()


async def test_a_refusal_fails_an_upload_that_waits_for_the_window() -> None:
    async with running(Network(), window=2 * FRAME, upload_window=2 * FRAME) as relay:
        broker = await relay.broker()
        uploads = [relay.attempt(9), relay.attempt(9)]
        # Each has a frame out and waits for room, which the other holds.
        messages = await broker.published(2)
        if messages[0].channel == messages[1].channel:
            await broker.confirm(messages[0])
            messages = [messages[1], *await broker.published()]
        await wait_all_tasks_blocked()
        assert relay.publisher.window.waiting == 2
        for message in messages:
            await broker.close_channel(message.channel, 404, "NOT_FOUND")
        for upload in uploads:
            assert isinstance(await upload.outcome(), BrokerRefused)
        relay.assert_nothing_is_held()


async def test_a_failure_is_noticed_while_the_client_is_slow() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=3)
        (message, *_) = await broker.published(3)
        await broker.close_channel(message.channel, 404, "NOT_FOUND")
        await wait_all_tasks_blocked()
        # It holds nothing, although its client has not yet heard of it.
        relay.assert_nothing_is_held()
        upload.go_on()
        assert isinstance(await upload.outcome(), BrokerRefused)
        assert upload.sent == 3


# --- abort frames ------------------------------------------------------------------------------


async def test_an_upload_that_its_client_gives_up_is_aborted_on_its_own_channel() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=3)
        messages = await broker.published(3)
        upload.go_on(ClientGone("gone"))
        (message,) = await broker.published()
        assert message.channel == messages[0].channel
        assert message.decode() == Abort(upload.transfer.id, 3, "client-gone")
        assert message.body == b""


async def test_an_upload_of_which_nothing_was_published_is_not_aborted() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=0)
        await broker.accept_channel()
        upload.go_on(ClientGone("gone"))
        assert isinstance(await upload.outcome(), ClientGone)
        await broker.silence()


async def test_a_failed_uploads_channel_is_used_again_only_when_all_is_settled() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        failed = relay.attempt(9, pause_before=2)
        one, two = await broker.published(2)
        failed.go_on(ClientGone("gone"))
        (abort,) = await broker.published()
        assert await published_by(relay, broker) == 2
        await broker.confirm(abort, two)
        assert await published_by(relay, broker) == 2
        assert relay.publisher.window.taken == FRAME
        await broker.confirm(one)
        await wait_all_tasks_blocked()
        assert await published_by(relay, broker) == 1
        relay.assert_nothing_is_held()


async def published_by(relay: Relay, broker: ScriptedBroker) -> int:
    """The channel that an upload of one frame gets."""
    upload = relay.attempt(1)
    (message,) = await broker.published()
    await broker.confirm(message)
    assert await upload.outcome() is None
    return message.channel


async def test_an_abort_on_a_channel_that_is_closed_at_once_is_given_up() -> None:
    async with running(Network()) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9)
        (message, *_) = await broker.published(8)
        await broker.close_channel(message.channel, 404, "NOT_FOUND")
        (abort,) = await broker.published()
        await broker.close_channel(abort.channel, 404, "NOT_FOUND")
        assert isinstance(await upload.outcome(), BrokerRefused)
        await broker.silence()
        assert await published_by(relay, broker)
        relay.assert_nothing_is_held()


async def test_a_failed_upload_whose_frames_are_never_confirmed_gives_its_room_back(
    autojump_clock: MockClock,
) -> None:
    async with running(Network(), confirm_timeout=60) as relay:
        broker = await relay.broker()
        upload = relay.attempt(9, pause_before=2)
        await broker.published(2)
        upload.go_on(ClientGone("gone"))
        assert isinstance(await upload.outcome(), ClientGone)
        await broker.published()
        channel, _ = await broker.expect(Channel.Close)
        assert trio.current_time() == pytest.approx(60, abs=1)
        # The broker has read all that was on the channel when it answers.
        assert relay.publisher.window.taken == 2 * FRAME
        await broker.send(Channel.CloseOk(), channel=channel)
        await wait_all_tasks_blocked()
        relay.assert_nothing_is_held()


# --- refusals ----------------------------------------------------------------------------------


async def test_refusing_uploads_again_and_again_keeps_nothing() -> None:
    network = Network()
    network.is_down = True
    async with running(network) as relay:
        await wait_all_tasks_blocked()
        for _ in range(10):
            error = await relay.attempt(1).outcome()
        assert error is not None
        assert depth(error.__traceback__) < 10


def depth(traceback: TracebackType | None) -> int:
    count = 0
    while traceback is not None:
        traceback, count = traceback.tb_next, count + 1
    return count


async def test_headers_that_do_not_fit_into_an_amqp_frame_are_refused_before_they_do_harm() -> None:
    async with running(Network(frame_max=4096)) as relay:
        broker = await relay.broker()
        sibling = relay.attempt(2)
        (message,) = await broker.published()
        upload = relay.attempt(2)
        head = upload.frames[0].head
        assert head is not None
        upload.frames[0] = upload.frames[0]._replace(
            head=dataclasses.replace(head, filename="f" * 5000)
        )
        await broker.accept_channel()
        assert isinstance(await upload.outcome(), BrokerRefused)
        await broker.silence()
        await broker.confirm(message)
        await broker.confirm(*await broker.published())
        assert await sibling.outcome() is None
        assert await published_by(relay, broker)
        relay.assert_nothing_is_held()


async def test_a_routing_key_that_amqp_cannot_carry_is_refused() -> None:
    route = dataclasses.replace(ROUTE, routing_key="k" * 256)
    async with running(Network(), route) as relay:
        broker = await relay.broker()
        upload = relay.attempt(1, route=route)
        await broker.accept_channel()
        assert isinstance(await upload.outcome(), BrokerRefused)
        await wait_all_tasks_blocked()
        assert await published_by(relay, broker) == 1
