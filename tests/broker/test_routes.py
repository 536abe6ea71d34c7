"""Verifying routes at a broker that is silent, blocked, or goes away in the middle."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pika
import pytest
import trio
from pika.spec import Exchange
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from relay.broker.publisher import Refusals
from relay.broker.routes import PROBE_TIMEOUT, Finding, Severity, verify_routes
from relay.broker.session import Session
from relay.config import Config, RouteConfig
from relay.daemon import VERIFY_PAUSE, Daemon
from relay.errors import BrokerUnavailable
from relay.transfer import new_transfer_id
from tests.broker.attempt import running
from tests.scripted_broker import Network, ScriptedBroker, patience

ROUTE = RouteConfig(name="r", exchange="ex", routing_key="key")


class Verification:
    """One that runs in the background."""

    def __init__(self, session: Session) -> None:
        self.findings: list[Finding] | None = None
        self.error: BrokerUnavailable | None = None
        self._session = session

    async def run(self) -> None:
        try:
            self.findings = await verify_routes(self._session, [ROUTE], {}, new_transfer_id())
        except BrokerUnavailable as exc:
            self.error = exc

    def error_found(self) -> str:
        """The text of the only error."""
        assert self.findings is not None
        (error,) = [f for f in self.findings if f.severity is Severity.ERROR]
        return str(error)


@asynccontextmanager
async def opened() -> AsyncGenerator[tuple[Session, ScriptedBroker, trio.Nursery], None]:
    """An open session, its broker, and room for tasks, for the length of the block."""
    ours, theirs = memory_stream_pair()
    session = Session(pika.ConnectionParameters(heartbeat=0), ours)
    broker = ScriptedBroker(theirs)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            nursery.start_soon(broker.handshake)
            await session.wait_open()
            yield session, broker, nursery
            nursery.cancel_scope.cancel()


async def accept_exchange(broker: ScriptedBroker) -> None:
    """Say that the exchange exists."""
    channel = await broker.accept_open()
    _, declare = await broker.expect(Exchange.Declare)
    assert declare.passive
    await broker.send(Exchange.DeclareOk(), channel=channel)
    await broker.accept_close()


async def test_a_probe_is_an_abort_of_a_transfer_that_nobody_knows() -> None:
    async with opened() as (session, broker, nursery):
        verification = Verification(session)
        nursery.start_soon(verification.run)
        await accept_exchange(broker)
        (probe,) = await broker.published()
        assert probe.properties.type == "abort"
        assert (probe.method.exchange, probe.method.routing_key) == ("ex", "key")
        assert probe.method.mandatory
        assert (probe.seq, probe.body) == (0, b"")
        await broker.confirm(probe)
        await wait_all_tasks_blocked()
        assert verification.findings is not None
        assert [f.severity for f in verification.findings] == [Severity.NOTE]
        # Its channel is there for uploads.
        assert session.channels == 1


async def test_nothing_is_published_to_a_blocked_broker(autojump_clock: MockClock) -> None:
    async with opened() as (session, broker, nursery):
        await broker.block("low on disk")
        verification = Verification(session)
        nursery.start_soon(verification.run)
        await accept_exchange(broker)
        await broker.silence()
        assert "takes no messages (low on disk)" in verification.error_found()


async def test_a_broker_that_a_probe_finds_blocked_keeps_its_connection(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (session, broker, nursery):
        verification = Verification(session)
        nursery.start_soon(verification.run)
        await accept_exchange(broker)
        await broker.published()
        await broker.block("low on memory")
        await trio.sleep(PROBE_TIMEOUT + 1)
        assert "takes no messages (low on memory)" in verification.error_found()
        assert session.is_open


async def test_a_probe_that_is_not_confirmed_in_time_is_an_error_and_no_more(
    autojump_clock: MockClock,
) -> None:
    async with opened() as (session, broker, nursery):
        verification = Verification(session)
        nursery.start_soon(verification.run)
        await accept_exchange(broker)
        await broker.published()
        await broker.accept_close()
        assert trio.current_time() == PROBE_TIMEOUT
        assert "confirmed nothing" in verification.error_found()
        assert session.is_open


@pytest.mark.parametrize("probed", [False, True])
async def test_a_connection_that_is_lost_ends_it(probed: bool) -> None:
    async with opened() as (session, broker, nursery):
        verification = Verification(session)
        nursery.start_soon(verification.run)
        if probed:
            await accept_exchange(broker)
            await broker.published()
        else:
            await broker.accept_open()
        await broker.cut()
        await wait_all_tasks_blocked()
        assert verification.error is not None


async def test_each_connection_is_verified_and_the_next_one_does_not_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    seen: list[Session] = []

    async def verify(session: Session, refusals: Refusals) -> None:
        assert refusals == {}
        seen.append(session)
        await trio.sleep_forever()

    async with running(Network(), verify=verify) as relay:
        for _ in range(3):
            broker = await relay.broker()
            upload = relay.attempt(1)
            await broker.confirm(*await broker.published())
            assert await upload.outcome() is None
            await broker.cut()
        await wait_all_tasks_blocked()
        assert len(set(seen)) == 3
        assert trio.current_time() < 3


async def test_the_daemon_does_not_probe_at_the_pace_of_a_connection_that_comes_and_goes(
    autojump_clock: MockClock,
) -> None:
    daemon = Daemon(Config(routes={"r": ROUTE}))
    began = []
    for _ in range(3):
        async with opened() as (session, broker, nursery):
            nursery.start_soon(daemon.verify, session, {})
            await accept_exchange(broker)
            began.append(trio.current_time())
            await broker.cut()
            await session.closed.wait()
    assert began == [0, VERIFY_PAUSE, 2 * VERIFY_PAUSE]
