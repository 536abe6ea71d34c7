from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pika
import pytest
import trio
from pika import frame as amqp
from pika import spec
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from relay.broker.session import RPC_TIMEOUT, Address, ConfirmChannel, Session
from relay.config import QueueConfig
from relay.errors import BrokerError, BrokerRefused, BrokerUnavailable
from relay.model import Frame, Transfer
from relay.protocol.confirms import Outcome
from relay.protocol.wire import Message, encode_frame
from relay.transfer import new_transfer_id
from tests.scripted_broker import RelayGone, ScriptedBroker, patience

ADDRESS = Address(exchange="ex", routing_key="key", mandatory=True, delivery_mode=2)


@dataclass
class Owner:
    """Notes what a channel tells."""

    settled: list[tuple[int, Outcome]] = field(default_factory=list)
    lost: list[int] | None = None
    error: BrokerError | None = None

    def on_settled(self, message: Message, outcome: Outcome) -> None:
        self.settled.append((seq(message), outcome))

    def on_channel_lost(self, unknown: list[Message], error: BrokerError) -> None:
        assert self.lost is None, "lost twice"
        self.lost = [seq(message) for message in unknown]
        self.error = error


def seq(message: Message) -> int:
    value = message.headers["seq"]
    assert isinstance(value, int)
    return value


def message(number: int, body: bytes = b"x") -> Message:
    transfer = Transfer(id=TRANSFER, began=1, route="default")
    return encode_frame(Frame(transfer, number, 0, 7, body, 0))


TRANSFER = new_transfer_id()


def ends(channel_max: int = 2047) -> tuple[Session, ScriptedBroker]:
    """A session that does not run yet, and the broker's end."""
    ours, theirs = memory_stream_pair()
    parameters = pika.ConnectionParameters(heartbeat=0)
    return Session(parameters, ours), ScriptedBroker(theirs, channel_max=channel_max)


@asynccontextmanager
async def opened(channel_max: int = 2047) -> AsyncGenerator[tuple[Session, ScriptedBroker], None]:
    """An open session and its broker, for the length of the block."""
    session, broker = ends(channel_max)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            nursery.start_soon(broker.handshake)
            await session.wait_open()
            yield session, broker
            nursery.cancel_scope.cancel()


class Call:
    """An awaited call in the background, whose result or BrokerError is kept."""

    def __init__(self) -> None:
        self.result: ConfirmChannel | None = None
        self.owner = Owner()
        self.error: BrokerError | None = None
        self.scope = trio.CancelScope()
        self.over = trio.Event()

    async def acquire(self, session: Session) -> None:
        with self.scope:
            try:
                self.result = await session.acquire()
                self.result.assign(self.owner, ADDRESS)
            except BrokerError as exc:
                self.error = exc
        self.over.set()

    async def declare(self, session: Session) -> None:
        with self.scope:
            try:
                await session.declare(QueueConfig(name="q"))
            except BrokerError as exc:
                self.error = exc
        self.over.set()


async def acquire(session: Session, broker: ScriptedBroker) -> ConfirmChannel:
    """A new channel, with the broker's consent."""
    call = Call()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.acquire, session)
        await broker.accept_channel()
    assert call.result is not None
    return call.result


# --- opening -----------------------------------------------------------------------------------


async def test_a_session_is_open_between_handshake_and_end() -> None:
    async with opened() as (session, broker):
        states = [session.is_open]
        await broker.cut()
        await session.closed.wait()
        states.append(session.is_open)
        assert states == [True, False]
        assert isinstance(session.error, BrokerUnavailable)


async def test_a_handshake_that_takes_too_long_fails(autojump_clock: MockClock) -> None:
    session, broker = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        with pytest.raises(BrokerUnavailable):
            await session.wait_open()
        assert trio.current_time() == RPC_TIMEOUT
        await broker.wait_gone()
    assert session.closed.is_set()


async def test_wrong_credentials_are_named() -> None:
    session, broker = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        await broker.accept_protocol()
        await broker.send(spec.Connection.Close(403, "ACCESS_REFUSED", 0, 0))
        with pytest.raises(BrokerUnavailable, match="user name or password"):
            await session.wait_open()


async def test_a_forbidden_virtual_host_is_named() -> None:
    session, broker = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        await broker.accept_protocol()
        await broker.send(spec.Connection.Tune(2047, 131072, 0))
        await broker.expect(spec.Connection.TuneOk)
        await broker.send(spec.Connection.Close(530, "NOT_ALLOWED", 0, 0))
        with pytest.raises(BrokerUnavailable, match="virtual host"):
            await session.wait_open()


@pytest.mark.parametrize("able", ["basic.nack", "publisher_confirms"])
async def test_a_broker_without_confirms_is_no_broker(able: str) -> None:
    session, broker = ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        nursery.start_soon(broker.handshake, able)
        with pytest.raises(BrokerUnavailable, match="confirm"):
            await session.wait_open()


# --- channels ----------------------------------------------------------------------------------


async def test_a_released_channel_is_used_again() -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        session.release(channel)
        assert session.channels == 1
        assert await session.acquire() is channel
        assert session.channels == 0


async def test_a_channel_with_something_outstanding_is_not_used_again() -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        channel.assign(Owner(), ADDRESS)
        channel.publish(message(0), mandatory=True)
        session.release(channel)
        assert session.channels == 0


@pytest.mark.parametrize("has_taken", [True, False])
async def test_a_channel_that_has_rejected_is_closed_and_not_used_again(has_taken: bool) -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        owner = Owner()
        channel.assign(owner, ADDRESS)
        for number in range(2):
            channel.publish(message(number), mandatory=True)
        first, second = await broker.published(2)
        await (broker.confirm(first) if has_taken else broker.reject(first))
        await broker.reject(second)
        await wait_all_tasks_blocked()
        session.release(channel)
        assert await broker.accept_close() == second.channel
        await wait_all_tasks_blocked()
        assert session.channels == 0
        assert owner.lost is None


async def test_a_channel_that_the_broker_closed_while_idle_is_not_used_again() -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        session.release(channel)
        await broker.close_channel(1, 406, "idle")
        assert await acquire(session, broker) is not channel


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
@pytest.mark.parametrize(
    ("code", "text"), [(404, "NOT_FOUND"), (403, "ACCESS_REFUSED"), (406, "PRECONDITION_FAILED")]
)
async def test_a_channel_that_is_refused_raises_the_brokers_reason(
    at: str, code: int, text: str
) -> None:
    call = Call()
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        nursery.start_soon(call.acquire, session)
        if at == "confirm.select":
            await broker.accept_open()
            await broker.expect(spec.Confirm.Select)
        else:
            await broker.expect(spec.Channel.Open)
        await broker.close_channel(1, code, text)
        await call.over.wait()
        assert isinstance(call.error, BrokerRefused)
        assert f"{code} {text}" in call.error.detail
        # The connection is none the worse for it.
        await acquire(session, broker)


async def test_no_more_channels_than_the_broker_allows() -> None:
    async with opened(channel_max=2) as (session, broker):
        await acquire(session, broker)
        await acquire(session, broker)
        with pytest.raises(BrokerRefused, match="no further channel"):
            await session.acquire()


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
async def test_a_broker_that_does_not_answer_loses_the_connection(
    at: str, autojump_clock: MockClock
) -> None:
    call = Call()
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        nursery.start_soon(call.acquire, session)
        if at == "confirm.select":
            await broker.accept_open()
        await call.over.wait()
        assert isinstance(call.error, BrokerUnavailable)
        assert trio.current_time() == RPC_TIMEOUT
        await session.closed.wait()


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
async def test_a_connection_lost_while_a_channel_opens_is_told(at: str) -> None:
    call = Call()
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        nursery.start_soon(call.acquire, session)
        if at == "confirm.select":
            await broker.accept_open()
        await wait_all_tasks_blocked()
        await broker.cut()
        await call.over.wait()
        assert isinstance(call.error, BrokerUnavailable)


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
@pytest.mark.parametrize("scope", ["channel", "connection"])
async def test_a_channel_that_opens_and_closes_in_one_read_is_not_taken_for_open(
    at: str, scope: str
) -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.acquire, session)
        answer: spec.Channel.OpenOk | spec.Confirm.SelectOk
        if at == "confirm.select":
            await broker.accept_open()
            await broker.expect(spec.Confirm.Select)
            answer = spec.Confirm.SelectOk()
        else:
            await broker.expect(spec.Channel.Open)
            answer = spec.Channel.OpenOk()
        end = (
            amqp.Method(1, spec.Channel.Close(504, "CHANNEL_ERROR", 0, 0))
            if scope == "channel"
            else amqp.Method(0, spec.Connection.Close(320, "CONNECTION_FORCED", 0, 0))
        )
        await broker.send_bytes(amqp.Method(1, answer).marshal() + end.marshal())
        await call.over.wait()
        if scope == "channel":
            assert isinstance(call.error, BrokerRefused)
        else:
            await session.closed.wait()
            assert call.error is not None or call.owner.lost == []


@pytest.mark.parametrize("at", ["channel.open", "confirm.select"])
async def test_a_cancelled_acquire_leaves_no_channel_behind(at: str) -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.acquire, session)
        if at == "confirm.select":
            await broker.accept_open()
            await broker.expect(spec.Confirm.Select)
        else:
            await broker.expect(spec.Channel.Open)
        await wait_all_tasks_blocked()
        call.scope.cancel()
        await call.over.wait()
        assert call.result is None
        if at == "confirm.select":
            await broker.send(spec.Confirm.SelectOk(), channel=1)
        else:
            await broker.send(spec.Channel.OpenOk(), channel=1)
        await broker.expect(spec.Channel.Close)
        await broker.send(spec.Channel.CloseOk(), channel=1)
        assert session.channels == 0
        # Its number is free again.
        await acquire(session, broker)


# --- confirms ----------------------------------------------------------------------------------


async def publish(
    session: Session, broker: ScriptedBroker, count: int
) -> tuple[ConfirmChannel, Owner]:
    """A channel on which ``count`` messages are published."""
    channel, owner = await acquire(session, broker), Owner()
    channel.assign(owner, ADDRESS)
    for number in range(count):
        channel.publish(message(number), mandatory=True)
    assert [m.tag for m in await broker.published(count)] == [*range(1, count + 1)]
    return channel, owner


async def test_a_message_arrives_as_it_was_published() -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        channel.assign(Owner(), ADDRESS)
        sent = message(5, b"body")
        channel.publish(sent, mandatory=True)
        channel.publish(message(6, b""), mandatory=False)
        first, second = await broker.published(2)
    assert (first.method.exchange, first.method.routing_key) == ("ex", "key")
    assert (first.method.mandatory, second.method.mandatory) == (True, False)
    assert (first.body, second.body) == (b"body", b"")
    assert first.properties.delivery_mode == 2
    assert first.properties.headers == sent.headers
    assert first.properties.message_id == f"{TRANSFER}.5"


async def test_confirms_settle_what_they_name_in_any_order() -> None:
    acked, nacked = Outcome.ACKED, Outcome.NACKED
    async with opened() as (session, broker):
        channel, owner = await publish(session, broker, 7)
        await broker.ack(3)
        await broker.ack(1)
        await wait_all_tasks_blocked()
        assert owner.settled == [(2, acked), (0, acked)]
        # A range over what is settled already; then a nack below a tag that was acked.
        await broker.ack(4, multiple=True)
        await broker.ack(7)
        await broker.nack(5)
        await broker.nack(6)
        await wait_all_tasks_blocked()
        assert owner.settled[2:] == [
            (1, acked),
            (3, acked),
            (6, acked),
            (4, nacked),
            (5, nacked),
        ]
        assert channel.outstanding == 0


async def test_a_multiple_nack_settles_the_whole_range() -> None:
    async with opened() as (session, broker):
        _, owner = await publish(session, broker, 3)
        await broker.nack(2, multiple=True)
        await wait_all_tasks_blocked()
        assert owner.settled == [(0, Outcome.NACKED), (1, Outcome.NACKED)]


async def test_a_returned_message_is_settled_by_its_ack_and_not_as_acked() -> None:
    async with opened() as (session, broker):
        channel, owner = await publish(session, broker, 2)
        messages = [message(2), message(3)]
        for one in messages:
            channel.publish(one, mandatory=True)
        _, returned = await broker.published(2)
        await broker.give_back(returned)
        await wait_all_tasks_blocked()
        assert owner.settled == []
        await broker.ack(4, multiple=True)
        await wait_all_tasks_blocked()
        assert [outcome for _, outcome in owner.settled] == [
            Outcome.ACKED,
            Outcome.ACKED,
            Outcome.ACKED,
            Outcome.RETURNED,
        ]


@pytest.mark.parametrize("tag", [0, 3, 99])
async def test_a_confirm_of_what_was_never_published_ends_the_connection(tag: int) -> None:
    async with opened() as (session, broker):
        _, owner = await publish(session, broker, 2)
        await broker.ack(tag)
        await session.closed.wait()
        assert owner.lost == [0, 1]
        assert isinstance(owner.error, BrokerUnavailable)
        assert "out of step" in owner.error.detail


async def test_a_confirm_that_comes_twice_ends_the_connection() -> None:
    async with opened() as (session, broker):
        _, owner = await publish(session, broker, 2)
        await broker.ack(1, 1)
        await session.closed.wait()
        assert owner.lost == [1]


@pytest.mark.parametrize("ending", ["cut", "close", "cancel", "abort"])
async def test_a_lost_connection_hands_back_what_is_unknown_in_order(ending: str) -> None:
    async with opened() as (session, broker):
        _, owner = await publish(session, broker, 5)
        await broker.ack(2)
        await wait_all_tasks_blocked()
        if ending == "cut":
            await broker.cut()
        elif ending == "close":
            await broker.send(spec.Connection.Close(320, "CONNECTION_FORCED", 0, 0))
        elif ending == "abort":
            session.abort("enough")
        if ending != "cancel":
            await session.closed.wait()
    assert owner.lost == [0, 2, 3, 4]
    assert isinstance(owner.error, BrokerUnavailable)


async def test_a_refused_channel_hands_back_what_is_unknown_and_spares_its_siblings() -> None:
    async with opened() as (session, broker):
        _, refused = await publish(session, broker, 3)
        sibling, other = await acquire(session, broker), Owner()
        sibling.assign(other, ADDRESS)
        sibling.publish(message(0), mandatory=True)
        await broker.published()
        await broker.ack(1)
        await broker.close_channel(1, 404, "NOT_FOUND - no exchange 'ex'")
        await broker.ack(1, channel=2)
        await wait_all_tasks_blocked()
        assert refused.settled == [(0, Outcome.ACKED)]
        assert refused.lost == [1, 2]
        assert isinstance(refused.error, BrokerRefused)
        assert "404 NOT_FOUND - no exchange 'ex'" in refused.error.detail
        assert other.lost is None
        assert other.settled == [(0, Outcome.ACKED)]


async def test_a_reused_channel_publishes_to_its_new_address() -> None:
    async with opened() as (session, broker):
        channel = await acquire(session, broker)
        for exchange, mode in (("one", 2), ("two", 1), ("two", 1)):
            address = Address(
                exchange=exchange, routing_key="key", mandatory=True, delivery_mode=mode
            )
            channel.assign(Owner(), address)
            channel.publish(message(0), mandatory=True)
            (published,) = await broker.published()
            assert published.method.exchange == exchange
            assert published.properties.delivery_mode == mode
            await broker.ack(published.tag)
            await wait_all_tasks_blocked()
            session.release(channel)
            assert await session.acquire() is channel


# --- declaring ---------------------------------------------------------------------------------


async def test_a_queue_is_declared_on_a_channel_that_is_closed_again() -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.declare, session)
        declare = await broker.accept_declare()
        await call.over.wait()
        assert call.error is None
        assert (declare.queue, declare.durable) == ("q", True)
        assert declare.arguments["x-queue-type"] == "quorum"


async def test_a_queue_that_exists_otherwise_is_refused_with_the_reason() -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.declare, session)
        await broker.accept_open()
        await broker.expect(spec.Queue.Declare)
        await broker.close_channel(1, 406, "PRECONDITION_FAILED - inequivalent arg")
        await call.over.wait()
        assert isinstance(call.error, BrokerRefused)
        assert "inequivalent arg" in call.error.detail
        assert session.is_open


@pytest.mark.parametrize("scope", ["channel", "connection"])
async def test_a_declaration_that_is_answered_and_cut_off_in_one_read_ends(scope: str) -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        call = Call()
        nursery.start_soon(call.declare, session)
        await broker.accept_open()
        await broker.expect(spec.Queue.Declare)
        end = (
            amqp.Method(1, spec.Channel.Close(504, "CHANNEL_ERROR", 0, 0))
            if scope == "channel"
            else amqp.Method(0, spec.Connection.Close(320, "CONNECTION_FORCED", 0, 0))
        )
        answer = amqp.Method(1, spec.Queue.DeclareOk("q", 0, 0))
        await broker.send_bytes(answer.marshal() + end.marshal())
        await call.over.wait()
        if scope == "channel":
            assert isinstance(call.error, BrokerRefused)
        else:
            await session.closed.wait()


# --- alarms and the end ------------------------------------------------------------------------


async def test_alarms_are_told_when_they_come_and_go() -> None:
    async with opened() as (session, broker):
        reasons: list[str | None] = []
        session.on_blocked_changed = lambda: reasons.append(session.blocked_reason)
        await broker.unblock()
        await broker.block("low on disk")
        await broker.unblock()
        await wait_all_tasks_blocked()
        assert reasons == [None, "low on disk", None]


async def test_goodbye_waits_for_the_brokers_answer(autojump_clock: MockClock) -> None:
    async with opened() as (session, broker), trio.open_nursery() as nursery:
        await acquire(session, broker)
        nursery.start_soon(session.close)
        await broker.accept_goodbye()
        await session.closed.wait()
        assert trio.current_time() == 0
        with pytest.raises(RelayGone):
            await broker.receive()


async def test_goodbye_does_not_wait_for_ever(autojump_clock: MockClock) -> None:
    async with opened() as (session, _broker):
        await session.close()
        assert trio.current_time() == RPC_TIMEOUT
        await session.closed.wait()
