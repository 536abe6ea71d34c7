"""The daemon's way to the broker: connects, declares, and connects again.

``Publisher`` keeps one session alive and hands out its channels; what an upload does with one is
``publication.py``. It knows nothing of HTTP, and of pika only what ``session.py`` lets through.
"""

import logging
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio
from pika.connection import Parameters

from relay.broker.connect import Connect, Connector, backoff
from relay.broker.figures import Figures
from relay.broker.publication import Publication
from relay.broker.session import ConfirmChannel, Session
from relay.broker.window import Window
from relay.config import AmqpConfig, RouteConfig
from relay.errors import BrokerBlocked, BrokerError, BrokerRefused, BrokerUnavailable
from relay.model import Transfer
from relay.waits import Wait, Waits

log = logging.getLogger(__name__)

DECLARE_TIMEOUT: Final = 30.0
"""Seconds for the AMQP handshake and the routes' queues."""

CHANNEL_TIMEOUT: Final = 20.0
"""Seconds in which a new upload gets its channel: more than a silent connection is kept for."""

RECONNECT_PATIENCE: Final = 2.0
"""Seconds after a loss in which new uploads are admitted all the same, and for which each waits for
the next connection before its body is asked for. Reconnecting to another node takes a tenth."""

Refusals = Mapping[str, BrokerRefused]
"""Why queues could not be declared, by the name of the route."""

Verify = Callable[[Session, Refusals], Awaitable[None]]
"""Looks at the routes on a session that is in use, and tells of what it finds."""


async def log_refusals(_session: Session, refusals: Refusals) -> None:
    """The least there is to say of routes."""
    for route, error in refusals.items():
        log.warning("route %s: its queue is not declared: %s", route, error)


class Publisher:
    """The daemon's way to the broker."""

    def __init__(
        self,
        config: AmqpConfig,
        routes: Mapping[str, RouteConfig],
        *,
        connect: Connect = trio.open_tcp_stream,
        verify: Verify = log_refusals,
        window: Window | None = None,
        figures: Figures | None = None,
    ) -> None:
        """Publish for ``routes``, whose queues it declares on each connection it makes.

        ``verify`` is run on each connection, beside the uploads, and cancelled when it ends.
        ``window`` may be one that is in use already.
        ``on_down`` may be set to be told of each connection that is lost or did not come about.
        ``figures`` may be shared with other publishers.

        Raises:
            ConfigError: a URL or a TLS file cannot be used.
        """
        self.config = config
        self.window = window or Window(config.window, routes)
        self.connects = 0
        self.figures = figures or Figures()
        self.broker: str | None = None
        self._routes = routes
        self._connector = Connector(config, name="relay", connect=connect)
        self._verify = verify
        self.on_down: Callable[[BrokerError], None] = lambda _: None
        self._session: Session | None = None
        self._error: BrokerError = BrokerUnavailable("not connected to the broker yet")
        # What the log has of each broker that failed since there was a connection.
        self._told: dict[tuple[str, int, str], str] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._publications: set[Publication] = set()
        self._users = 0
        self._nursery: trio.Nursery | None = None
        self._is_closing = False
        self._patient_until = -math.inf
        self.blocked_since: float | None = None

    async def run(self) -> None:
        """Keep a session to one of the brokers. Ends only by cancellation."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._stay_connected()
            finally:
                # Uploads that are cancelled at the same time still tell of their failure.
                self._nursery = None

    async def _stay_connected(self) -> None:
        brokers = self._connector.brokers
        attempt = turn = 0
        while True:
            connects = self.connects
            await self._run_session(brokers[turn % len(brokers)])
            if connects == self.connects:
                attempt, turn = attempt + 1, turn + 1
            else:
                # Home to the first, where it is not the one that was lost: in a rolling restart
                # the connections of a pool would else gather on one node, and be lost together.
                attempt, turn = 0, 0 if turn % len(brokers) else 1
            # Jitter, not secrecy.
            await trio.sleep(backoff(attempt, random.random()))  # noqa: S311

    async def close(self) -> None:
        """Say goodbye to the broker. Call it before cancelling ``run``."""
        self._is_closing = True
        if self._session is not None:
            await self._session.close()

    def refusal(self) -> BrokerError | None:
        """Why an upload would not be admitted now, or None if it would, if need be after a wait."""
        # A session that is there and not open has ended so recently that nobody has noted it yet.
        is_lost = self._session is not None and not self._session.is_open
        if is_lost or trio.current_time() < self._patient_until:
            return None
        return self.fault()

    def fault(self) -> BrokerError | None:
        """What is wrong with the broker now, or None."""
        session = self._session
        if session is None or not session.is_open:
            # Of a connection that has just been lost, only the session knows why.
            error = (session.error if session is not None else None) or self._error
            # A new one each time: raising an exception adds to its traceback, for ever.
            return type(error)(error.detail)
        if session.blocked_reason is not None:
            return BrokerBlocked(f"the broker does not take messages: {session.blocked_reason}")
        return None

    @property
    def publications(self) -> int:
        """Number of uploads that publish through it."""
        return len(self._publications)

    @property
    def queued(self) -> int:
        """Bytes waiting to be written to the broker's socket."""
        return self._session.queued if self._session is not None else 0

    @asynccontextmanager
    async def open(
        self, transfer: Transfer, route: RouteConfig, waits: Waits | None = None
    ) -> AsyncGenerator[Publication, None]:
        """A publication with a channel of its own, for the length of the block.

        ``waits`` is told what the upload waits for here.

        Raises:
            BrokerError: there is no channel to be had.
        """
        self._users += 1
        try:
            publication = await self._begin(transfer, route, waits or Waits())
            self._publications.add(publication)
            try:
                yield publication
            finally:
                self._publications.discard(publication)
                publication.close()
        finally:
            self._users -= 1
            self._changed.unpark_all()

    async def _begin(self, transfer: Transfer, route: RouteConfig, waits: Waits) -> Publication:
        waits.begin(Wait.BROKER)
        await self._wait_admitted()
        publication = Publication(self, transfer, route, waits)
        session = self._session
        channel = session.take_idle() if session is not None else None
        if session is None or channel is None:
            with trio.move_on_after(CHANNEL_TIMEOUT) as scope:
                session, channel = await self.acquire()
            if scope.cancelled_caught or session is None or channel is None:
                raise BrokerUnavailable(f"no channel to the broker within {CHANNEL_TIMEOUT:g} s")
        publication.attach(session, channel)
        waits.end()
        return publication

    async def _wait_admitted(self) -> None:
        """Wait a moment for the connection that follows one just lost.

        Raises:
            BrokerError: there is none, or it is blocked.
        """
        fault = self.fault()
        if fault is not None and self.refusal() is None:
            with trio.move_on_after(RECONNECT_PATIENCE):
                await self._wait_session()
            fault = self.fault()
        if fault is not None:
            raise fault

    async def acquire(self, *, fresh: bool = False) -> tuple[Session, ConfirmChannel]:
        """A channel of the current session, waiting for a session if there is none.

        With ``fresh``, one that nobody has used before.

        Raises:
            BrokerRefused: the broker will not open a channel.
        """
        while True:
            session = await self._wait_session()
            try:
                channel = await (session.open_confirm_channel() if fresh else session.acquire())
                return session, channel
            except BrokerUnavailable:
                # The session is dead or dying. The next one is awaited under the caller's deadline.
                await session.closed.wait()

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run an async function in the publisher's nursery: it outlives the upload.

        It does not run if the publisher has ended.
        """
        if self._nursery is not None:
            self._nursery.start_soon(function)

    async def wait_up(self) -> None:
        """Return once there is a connection."""
        await self._wait_session()

    async def wait_unused(self) -> None:
        """Return once no upload publishes through it, nor waits to."""
        while self._users:
            await self._changed.park()

    async def _wait_session(self) -> Session:
        while self._session is None or not self._session.is_open:
            await self._changed.park()
        return self._session

    async def _run_session(self, parameters: Parameters) -> None:
        """Connect and stay until the connection ends."""
        try:
            stream = await self._connector.open(parameters)
        except BrokerUnavailable as exc:
            self._down(exc, parameters)
            return
        session = Session(parameters, stream)
        session.on_blocked_changed = self._on_blocked_changed
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            try:
                with trio.fail_after(DECLARE_TIMEOUT):
                    await session.wait_open()
                    refusals = await self._declare(session)
            except (BrokerUnavailable, trio.TooSlowError) as exc:
                session.abort(str(exc) or f"queues not declared within {DECLARE_TIMEOUT:g} s")
            else:
                self._up(session, parameters)
                nursery.start_soon(self._verify, session, refusals)
            await session.closed.wait()
            nursery.cancel_scope.cancel()
        assert session.error is not None
        self._down(session.error, parameters)

    async def _declare(self, session: Session) -> Refusals:
        refusals = {}
        for route in self._routes.values():
            if route.queue is None:
                continue
            try:
                await session.declare(route.queue)
            except BrokerRefused as exc:
                # Its operator may have declared it otherwise on purpose; uploads may well work.
                refusals[route.name] = exc
        return refusals

    def _up(self, session: Session, parameters: Parameters) -> None:
        self._session = session
        self._patient_until = -math.inf
        self.connects += 1
        self.figures.connects += 1
        self.broker = f"{parameters.host}:{parameters.port}"
        self._told.clear()
        log.info("connected to the broker at %s:%s", parameters.host, parameters.port)
        if session.blocked_reason is not None:
            self._on_blocked_changed()
        self._changed.unpark_all()

    def _down(self, error: BrokerError, parameters: Parameters) -> None:
        broker = (parameters.host, parameters.port, parameters.virtual_host)
        if self._is_closing:
            log.info("disconnected from the broker")
        elif self._session is not None or str(error) != self._told.get(broker):
            # Once per change: a broker that is away for a night is not worth a line a second.
            log.warning("broker %s:%s: %s", parameters.host, parameters.port, error)
        if self._session is not None and not self._is_closing:
            self._patient_until = trio.current_time() + RECONNECT_PATIENCE
        self._told[broker] = str(error)
        self._error = error
        self.blocked_since = None
        self._session = None
        self.broker = None
        self.figures.failures += not self._is_closing
        self.on_down(error)

    def _on_blocked_changed(self) -> None:
        if self._session is None:  # not up yet
            return
        blocked = self._session.blocked_reason is not None
        if blocked == (self.blocked_since is not None):  # another alarm, or none that we knew of
            return
        self.blocked_since = trio.current_time() if blocked else None
        state = "is blocked by an alarm" if blocked else "takes messages again"
        log.warning("the broker %s", state)
        for publication in self._publications:
            publication.on_blocked_changed()
