"""Frames into the broker: keeps a session alive, and carries each upload's frames to safety.

``Publisher`` connects, declares the routes' queues and connects again. ``Publication`` is what an
upload sends its frames to: it waits for room in the windows, sees every confirm, and, when a
connection is lost, publishes what is unconfirmed again on the next one, same ``seq``, in order.
It knows nothing of HTTP, and of pika only what ``session.py`` lets through.

Nothing waits for ever: each wait of a publication ends with a confirm, with an error, or at a
deadline (``confirm_timeout``, ``reconnect_grace``, ``blocked_grace``). The one wait without a
deadline of its own is for room in the shared window, and whoever holds that room has one.
"""

import itertools
import logging
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio
from pika.connection import Parameters

from relay.broker.connect import Connect, Connector
from relay.broker.session import Address, ConfirmChannel, Session
from relay.broker.window import Window
from relay.config import AmqpConfig, RouteConfig
from relay.errors import (
    BrokerBlocked,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ConfirmTimeout,
    OutcomeUnknown,
    QueueFull,
    Unroutable,
)
from relay.model import Frame, Transfer
from relay.protocol.confirms import Outcome
from relay.protocol.wire import TYPE_ABORT, Message, encode_abort, encode_frame

log = logging.getLogger(__name__)

DECLARE_TIMEOUT: Final = 30.0
"""Seconds for the AMQP handshake and the routes' queues."""

CHANNEL_TIMEOUT: Final = 20.0
"""Seconds in which a new upload gets its channel: more than a silent connection is kept for."""

MESSAGE_COST: Final = 2048
CHARACTER_COST: Final = 5
"""Bytes that a message takes beside its body, and for each character of its headers: in memory as
text (up to 4) and marshalled."""

ABORT_TIMEOUT: Final = 15.0
"""Seconds in which a failed upload's abort frame finds a channel, if its own is closed."""

BACKOFF_FIRST: Final = 0.25
BACKOFF_LAST: Final = 10.0
"""Seconds between attempts to connect: doubled each time, then jittered by half."""


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to wait before attempt number ``attempt`` (0: the first after a failure).

    ``jitter`` in [0, 1) spreads a fleet that lost its broker at the same moment.
    """
    longest: float = min(BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(attempt, 16))
    return longest * (0.5 + jitter / 2)


class Publisher:
    """The daemon's way to the broker."""

    def __init__(
        self,
        config: AmqpConfig,
        routes: Mapping[str, RouteConfig],
        *,
        connect: Connect = trio.open_tcp_stream,
    ) -> None:
        """Publish for ``routes``, whose queues it declares on each connection it makes.

        Raises:
            ConfigError: a URL or a TLS file cannot be used.
        """
        self.config = config
        self.window = Window(config.window)
        self.connects = 0
        self._routes = routes
        self._connector = Connector(config, name="relay", connect=connect)
        self._session: Session | None = None
        self._error: BrokerError = BrokerUnavailable("not connected to the broker yet")
        self._changed = trio.lowlevel.ParkingLot()
        self._publications: set[Publication] = set()
        self._nursery: trio.Nursery | None = None
        self._is_closing = False
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
        attempt = 0
        for broker in itertools.cycle(self._connector.brokers):
            connects = self.connects
            await self._run_session(broker)
            attempt = attempt + 1 if connects == self.connects else 0
            # Jitter, not secrecy.
            await trio.sleep(backoff(attempt, random.random()))  # noqa: S311

    async def close(self) -> None:
        """Say goodbye to the broker. Call it before cancelling ``run``."""
        self._is_closing = True
        if self._session is not None:
            await self._session.close()

    def refusal(self) -> BrokerError | None:
        """Why an upload would not be admitted now, or None if it would."""
        session = self._session
        if session is None or not session.is_open:
            # A new one each time: raising an exception adds to its traceback, for ever.
            return type(self._error)(self._error.detail)
        if session.blocked_reason is not None:
            return BrokerBlocked(f"the broker does not take messages: {session.blocked_reason}")
        return None

    @property
    def queued(self) -> int:
        """Bytes waiting to be written to the broker's socket."""
        return self._session.queued if self._session is not None else 0

    @asynccontextmanager
    async def open(
        self, transfer: Transfer, route: RouteConfig
    ) -> AsyncGenerator["Publication", None]:
        """A publication with a channel of its own, for the length of the block.

        Raises:
            BrokerError: there is no channel to be had.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        publication = Publication(self, transfer, route)
        with trio.move_on_after(CHANNEL_TIMEOUT) as scope:
            publication.attach(*await self.acquire())
        if scope.cancelled_caught:
            raise BrokerUnavailable(f"no channel to the broker within {CHANNEL_TIMEOUT:g} s")
        self._publications.add(publication)
        try:
            yield publication
        finally:
            self._publications.discard(publication)
            publication.close()

    async def acquire(self) -> tuple[Session, ConfirmChannel]:
        """A channel of the current session, waiting for a session if there is none.

        Raises:
            BrokerRefused: the broker will not open a channel.
        """
        while True:
            session = await self._wait_session()
            try:
                return session, await session.acquire()
            except BrokerUnavailable:
                # The session is dead or dying. The next one is awaited under the caller's deadline.
                await session.closed.wait()

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run an async function in the publisher's nursery: it outlives the upload.

        It does not run if the publisher has ended.
        """
        if self._nursery is not None:
            self._nursery.start_soon(function)

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
                    await self._declare(session)
            except (BrokerUnavailable, trio.TooSlowError) as exc:
                session.abort(str(exc) or f"queues not declared within {DECLARE_TIMEOUT:g} s")
            else:
                self._up(session, parameters)
            await session.closed.wait()
        assert session.error is not None
        self._down(session.error, parameters)

    async def _declare(self, session: Session) -> None:
        for route in self._routes.values():
            if route.queue is None:
                continue
            try:
                await session.declare(route.queue)
            except BrokerRefused as exc:
                # Its operator may have declared it otherwise on purpose; uploads may well work.
                log.warning("route %s: queue %s: %s", route.name, route.queue.name, exc)

    def _up(self, session: Session, parameters: Parameters) -> None:
        self._session = session
        self.connects += 1
        log.info("connected to the broker at %s:%s", parameters.host, parameters.port)
        if session.blocked_reason is not None:
            self._on_blocked_changed()
        self._changed.unpark_all()

    def _down(self, error: BrokerError, parameters: Parameters) -> None:
        if self._is_closing:
            log.info("disconnected from the broker")
        elif self._session is not None or str(error) != str(self._error):
            # Once per change: a broker that is away for a night is not worth a line a second.
            log.warning("broker %s:%s: %s", parameters.host, parameters.port, error)
        self._error = error
        self.blocked_since = None
        self._session = None

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


class Publication:
    """One upload's frames on their way into the broker; a ``transfer.FrameSink``.

    Used by one task at a time. It owns a channel while it is open, and the part of the windows
    that its unconfirmed frames take, until each of them is settled or given up.
    """

    def __init__(self, publisher: Publisher, transfer: Transfer, route: RouteConfig) -> None:
        self._publisher = publisher
        self._config = publisher.config
        self._transfer = transfer
        self._mandatory = route.mandatory
        self._address = Address(
            exchange=route.exchange,
            routing_key=route.routing_key.format(
                transfer=transfer.id, route=route.name, client=transfer.client or ""
            ),
            mandatory=route.mandatory,
            delivery_mode=2 if route.persistent else 1,
        )
        self._session: Session | None = None
        self._channel: ConfirmChannel | None = None
        self._unconfirmed = 0
        self._published = 0
        self._commit_sent = False
        self._closed = False
        self._failure: BrokerError | None = None
        # What was outstanding when the channel was lost, until it is published again.
        self._unknown: list[Message] = []
        self._recovery = trio.CancelScope()
        self._lost_since: float | None = None
        self._is_in_doubt = False
        self._progress = trio.current_time()
        self._abort_deadline = math.inf
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def unconfirmed(self) -> int:
        """Bytes published and not yet confirmed."""
        return self._unconfirmed

    @property
    def may_be_committed(self) -> bool:
        """Whether the commit frame is out, so that no abort frame can be true any more."""
        return self._commit_sent

    # --- what the upload calls -----------------------------------------------------------------

    async def send(self, frame: Frame) -> None:
        """Publish a frame, waiting for room. Returns before it is confirmed.

        Raises:
            BrokerError: this or an earlier frame of the upload has failed.
        """
        await self._publish(encode_frame(frame))

    async def commit(self, frame: Frame) -> None:
        """Wait until every frame is confirmed, publish the commit frame, wait for its confirm.

        Raises:
            BrokerError: the upload is not committed, or (OutcomeUnknown) may be.
        """
        await self._until(lambda: not self._outstanding)
        await self._publish(encode_frame(frame), commit=True)
        await self._until(lambda: not self._outstanding)

    def abort(self, reason: str) -> None:
        """Tell consumers that the transfer failed, if they may have seen any of it.

        Synchronous, so that it works while the upload is being cancelled. ``reason`` is an error
        code. After the commit frame nothing is said: it may have been the truth.
        """
        if not self._published or self._commit_sent:
            return
        message = encode_abort(self._transfer, self._published, reason)
        self._abort_deadline = trio.current_time() + ABORT_TIMEOUT
        if self._channel is not None and self._channel.is_open:
            if not self._outstanding:
                self._progress = trio.current_time()
            self._channel.publish(message, mandatory=False)
        else:
            self._publisher.spawn(partial(self._abort_elsewhere, message))

    def close(self) -> None:
        """Give the channel back as soon as all that was published on it is settled."""
        self._closed = True
        self._recovery.cancel()
        self._give_up()
        self._release_channel()
        if self._channel is not None:
            self._publisher.spawn(self._see_off)

    # --- publishing ----------------------------------------------------------------------------

    def attach(self, session: Session, channel: ConfirmChannel) -> None:
        """Use ``channel`` from now on.

        Raises:
            BrokerRefused: AMQP cannot express the route's address.
        """
        try:
            channel.assign(self, self._address)
        except BrokerRefused:
            session.release(channel)
            raise
        self._session = session
        self._channel = channel

    async def _publish(self, message: Message, *, commit: bool = False) -> None:
        size = self._room(message)
        await self._until(lambda: self._unconfirmed + size <= self._config.upload_window)
        window = self._publisher.window
        request = window.request(size, self._changed.unpark_all)
        try:
            await self._until(lambda: request.granted)
            assert self._channel is not None
            if not self._outstanding:
                self._progress = trio.current_time()
            self._channel.publish(message, mandatory=self._mandatory)
        except BaseException:
            window.withdraw(request)
            raise
        self._unconfirmed += size
        self._published += 1
        self._commit_sent = commit

    @property
    def _outstanding(self) -> int:
        return self._channel.outstanding if self._channel is not None else 0

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait for ``ready`` and a channel; meanwhile mind failures and deadlines."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._channel is not None and ready():
                return
            with trio.move_on_at(self._deadline()) as scope:
                await self._changed.park()
            if scope.cancelled_caught:
                self._fail(self._overdue())

    def _deadline(self) -> float:
        if self._channel is None:
            return math.inf  # _recover has its own
        blocked_since = self._publisher.blocked_since
        if blocked_since is not None:
            return blocked_since + self._config.blocked_grace
        if not self._outstanding:
            return math.inf  # others hold the window, and each of them has a deadline
        return self._progress + self._config.confirm_timeout

    def _overdue(self) -> BrokerError:
        if self._commit_sent:
            return OutcomeUnknown("the commit frame's confirm is overdue: it may be committed")
        if self._publisher.blocked_since is not None:
            return BrokerBlocked("the broker has been blocked by an alarm for too long")
        seconds = self._config.confirm_timeout
        return ConfirmTimeout(f"the broker confirmed nothing for {seconds:g} s")

    async def _recover(self) -> None:
        """The connection is lost: on the next one, publish again what is unconfirmed.

        A task of its own, because the upload may be waiting for its client, for long, and must
        not keep its share of the window from others meanwhile.
        """
        assert self._lost_since is not None
        with self._recovery:
            try:
                with trio.move_on_at(self._lost_since + self._config.reconnect_grace) as scope:
                    self._publish_again(*await self._publisher.acquire())
                if scope.cancelled_caught:
                    self._fail(self._lost())
            except BrokerError as exc:
                self._fail(exc)
        if self._failure is not None:
            self._give_up()
        self._changed.unpark_all()

    def _publish_again(self, session: Session, channel: ConfirmChannel) -> None:
        if self._closed:
            session.release(channel)
            return
        self.attach(session, channel)
        self._progress = trio.current_time()
        while self._unknown:
            channel.publish(self._unknown[0], mandatory=self._mandatory)
            del self._unknown[0]

    def _lost(self) -> BrokerError:
        seconds = self._config.reconnect_grace
        return BrokerUnavailable(f"the broker was lost and did not come back within {seconds:g} s")

    async def _abort_elsewhere(self, message: Message) -> None:
        """The upload's channel is gone: tell its abort on another one, if there is a broker."""
        with trio.move_on_at(self._abort_deadline) as scope:
            try:
                self.attach(*await self._publisher.acquire())
            except BrokerError as exc:
                log.info("transfer %s: abort frame not sent: %s", self._transfer.id, exc)
                return
            assert self._channel is not None
            self._progress = trio.current_time()
            self._channel.publish(message, mandatory=False)
        if scope.cancelled_caught:
            log.info("transfer %s: abort frame not sent: no connection", self._transfer.id)
        else:
            await self._see_off()

    def _abort_again(self, unknown: list[Message]) -> None:
        for message in unknown:
            if message.type == TYPE_ABORT:
                self._publisher.spawn(partial(self._abort_elsewhere, message))

    async def _see_off(self) -> None:
        """After ``close``: have the broker settle what is outstanding, if need be by force.

        Nobody waits for it any more, but it still takes room in the window.
        """
        while self._outstanding:
            with trio.move_on_at(self._progress + self._config.confirm_timeout) as scope:
                await self._changed.park()
            if scope.cancelled_caught and self._channel is not None:
                self._channel.close()
                return

    # --- what the channel calls ----------------------------------------------------------------

    def on_settled(self, message: Message, outcome: Outcome) -> None:
        """Free the message's room; note what went wrong."""
        self._progress = trio.current_time()
        self._lost_since = None
        self._free(message)
        if outcome is Outcome.NACKED:
            self._fail(QueueFull("the broker rejected a frame: the queue is full"))
        elif outcome is Outcome.RETURNED:
            self._fail(Unroutable("no queue is bound where this route publishes"))
        self._changed.unpark_all()
        if self._closed:
            self._release_channel()

    def on_channel_lost(self, unknown: list[Message], error: BrokerError) -> None:
        """Keep what is unconfirmed for the next connection, unless the broker refused it."""
        self._channel = None
        self._unknown = unknown + self._unknown
        if isinstance(error, BrokerRefused):
            self._fail(error)
        elif self._commit_sent:
            self._is_in_doubt = True
        if self._closed or self._failure is not None:
            self._give_up()
            if not isinstance(error, BrokerRefused):
                self._abort_again(unknown)
        else:
            if self._lost_since is None:
                self._lost_since = trio.current_time()
            self._recovery = trio.CancelScope()
            self._publisher.spawn(self._recover)
        self._changed.unpark_all()

    def on_blocked_changed(self) -> None:
        """The broker stopped or resumed reading: confirms cannot be expected meanwhile."""
        self._progress = trio.current_time()
        self._changed.unpark_all()

    def _fail(self, error: BrokerError) -> None:
        if self._is_in_doubt and not isinstance(error, OutcomeUnknown):
            # Whatever became of its second copy, the first may have been taken.
            error = OutcomeUnknown(
                f"the broker was lost before it confirmed the commit frame; then {error.detail}"
            )
        if self._failure is None:
            self._failure = error

    def _give_up(self) -> None:
        unknown, self._unknown = self._unknown, []
        for message in unknown:
            self._free(message)

    def _room(self, message: Message) -> int:
        """Bytes of the windows that the message takes while it is unconfirmed.

        A part may be empty and its names long: counted by bodies alone, a form of many such parts
        would have the windows to itself and never fill them.
        """
        if message.type == TYPE_ABORT:
            return 0
        text = sum(len(value) for value in message.headers.values() if isinstance(value, str))
        size = max(len(message.body), MESSAGE_COST + CHARACTER_COST * text)
        return min(size, self._config.upload_window)

    def _free(self, message: Message) -> None:
        size = self._room(message)
        self._unconfirmed -= size
        self._publisher.window.release(size)

    def _release_channel(self) -> None:
        if self._session is not None and self._channel is not None and not self._outstanding:
            self._session.release(self._channel)
            self._channel = None
