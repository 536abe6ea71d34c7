"""One upload's frames on their way into the broker.

A ``Publication`` is what an upload sends its frames to: it waits for room in the windows, sees
every confirm, and, when a connection is lost, publishes what is unconfirmed again on the next one,
same ``seq``, in order. It knows nothing of HTTP, of connecting, or of pika.

Nothing waits for ever: each wait of a publication ends with a confirm, with an error, or at a
deadline (``confirm_timeout``, ``reconnect_grace``, ``blocked_grace``). The one wait without a
deadline of its own is for room in the shared window, and whoever holds that room has one.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import trio

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
from relay.protocol.wire import PLAIN_HEADERS, TYPE_ABORT, Message, encode_abort, encode_frame

log = logging.getLogger(__name__)

MESSAGE_COST: Final = 2048
CHARACTER_COST: Final = 5
"""Bytes that a message takes beside its body, and for each character of its headers: in memory as
text (up to 4) and marshalled."""

REJECTED_GRACE: Final = 10.0
REJECTED_PAUSE: Final = 0.25
"""Seconds for which frames are published again that a channel rejected before it took any, and
between two attempts.

RabbitMQ's channels nack what they are given first for a quorum queue, while the node of its leader
is down, until the others have agreed on a new one; only to those that have spoken to the queue do
they keep their word. A queue that is full nacks likewise, and nothing tells the two apart."""

REJECTED: Final = "the broker rejected a frame: the queue is full, or has no leader"

ABORT_TIMEOUT: Final = 15.0
"""Seconds in which a failed upload's abort frame finds a channel, if its own is closed."""


class Line(Protocol):
    """What a publication needs of its publisher: the way to whichever session there is."""

    config: AmqpConfig
    window: Window
    blocked_since: float | None

    async def acquire(self) -> tuple[Session, ConfirmChannel]:
        """A channel, waiting for a session if there is none."""

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run an async function that may outlive the upload."""

    def refusal(self) -> BrokerError | None:
        """What is wrong with the broker now, or None."""


class Publication:
    """One upload's frames on their way into the broker; a ``transfer.FrameSink``.

    Used by one task at a time. It owns a channel while it is open, and the part of the windows
    that its unconfirmed frames take, until each of them is settled or given up.
    """

    def __init__(self, publisher: Line, transfer: Transfer, route: RouteConfig) -> None:
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
        self._commit: Message | None = None
        self._is_committed = False
        self._closed = False
        self._failure: BrokerError | None = None
        # What was outstanding when the channel was lost, until it is published again.
        self._unknown: list[Message] = []
        # What was rejected and will be published again, if all that was outstanding is.
        self._rejected: list[Message] = []
        self._rejected_since = math.inf
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
        return self._commit is not None

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
        if not self._published or self._commit is not None:
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
        if commit:
            self._commit = message

    @property
    def _outstanding(self) -> int:
        return self._channel.outstanding if self._channel is not None else 0

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait for ``ready`` and a channel; meanwhile mind failures and deadlines."""
        while not self._is_committed:
            if self._failure is not None:
                raise self._failure
            if self._channel is not None and not self._rejected and ready():
                return
            with trio.move_on_at(self._deadline()) as scope:
                await self._changed.park()
            if scope.cancelled_caught:
                await self._give_up_waiting()

    def _deadline(self) -> float:
        if self._channel is None:
            return math.inf  # _recover has its own
        blocked_since = self._publisher.blocked_since
        if blocked_since is not None:
            return blocked_since + self._config.blocked_grace
        if not self._outstanding:
            return math.inf  # others hold the window, and each of them has a deadline
        return self._progress + self._config.confirm_timeout

    async def _give_up_waiting(self) -> None:
        session = self._session
        is_blocked = self._publisher.blocked_since is not None
        if session is not None and not is_blocked and session.last_heard <= self._progress:
            # Not even a heartbeat: a half-open connection, or a broker that stands still. What was
            # published on it is taken to another connection, as after any loss.
            session.abort(f"nothing was heard of it for {self._config.confirm_timeout:g} s")
            await session.closed.wait()
        else:
            self._fail(self._overdue())

    def _overdue(self) -> BrokerError:
        if self._commit is not None:
            return OutcomeUnknown("the commit frame's confirm is overdue: it may be committed")
        if self._publisher.blocked_since is not None:
            return BrokerBlocked("the broker has been blocked by an alarm for too long")
        if self._rejected:
            return QueueFull(REJECTED)
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
        text = f"the broker was lost and did not come back within {seconds:g} s"
        # A login that is refused by now is another matter than a node that is still away.
        reason = self._publisher.refusal()
        return BrokerUnavailable(text if reason is None else f"{text}: {reason.detail}")

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
                await self._take_back()
                return

    async def _take_back(self) -> None:
        """The channel is closing: have its room in the window back, whatever the broker does.

        One that still sends heartbeats, but reads no more, would keep the room for ever, and with
        it every upload that waits for some. During an alarm that is how it should be.
        """
        seconds = self._config.confirm_timeout
        while self._outstanding:
            with trio.move_on_after(seconds) as scope:
                await self._changed.park()
            if not scope.cancelled_caught or self._publisher.blocked_since is not None:
                continue
            if self._session is not None and self._outstanding:
                self._session.abort(f"it did not close a channel within {seconds:g} s")
                return

    # --- what the channel calls ----------------------------------------------------------------

    def on_settled(self, message: Message, outcome: Outcome) -> None:
        """Free the message's room; note what went wrong."""
        self._progress = trio.current_time()
        self._lost_since = None
        if outcome is Outcome.NACKED and self._may_be_taken_later():
            self._keep_rejected(message)
            return
        self._free(message)
        if outcome is Outcome.ACKED and message is self._commit and self._failure is None:
            # Whatever becomes of the channel before the upload's task gets to know of it.
            self._is_committed = True
        elif outcome is Outcome.NACKED or self._rejected:
            # A frame that is taken after one that was not makes a gap that nothing can fill.
            self._fail(QueueFull(REJECTED))
        elif outcome is Outcome.RETURNED:
            self._fail(Unroutable("no queue is bound where this route publishes"))
        self._changed.unpark_all()
        if self._closed:
            self._release_channel()

    def on_channel_lost(self, unknown: list[Message], error: BrokerError) -> None:
        """Keep what is unconfirmed for the next connection, unless the broker refused it."""
        self._channel = None
        self._unknown = sorted(self._rejected + unknown + self._unknown, key=_seq)
        self._rejected = []
        if isinstance(error, BrokerRefused):
            self._fail(error)
        elif self._commit is not None:
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

    def _may_be_taken_later(self) -> bool:
        """Whether a nack may be of a queue that has no leader now, and not of one that is full."""
        channel = self._channel
        if channel is None or channel.has_taken or self._closed or self._failure is not None:
            return False
        self._rejected_since = min(self._rejected_since, trio.current_time())
        return trio.current_time() < self._rejected_since + REJECTED_GRACE

    def _keep_rejected(self, message: Message) -> None:
        self._rejected.append(message)
        if not self._outstanding:
            self._recovery = trio.CancelScope()
            self._publisher.spawn(self._publish_rejected)

    async def _publish_rejected(self) -> None:
        """Publish again what was rejected; nothing else is outstanding or can be meanwhile."""
        with self._recovery:
            await trio.sleep(REJECTED_PAUSE)
        # It may have been lost, or given up, in between.
        if self._channel is None or self._outstanding:
            return
        self._progress = trio.current_time()
        messages, self._rejected = sorted(self._rejected, key=_seq), []
        for message in messages:
            self._channel.publish(message, mandatory=self._mandatory)
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
        unknown, self._unknown, self._rejected = self._unknown + self._rejected, [], []
        for message in unknown:
            self._free(message)

    def _room(self, message: Message) -> int:
        """Bytes of the windows that the message takes while it is unconfirmed.

        A part may be empty and its names long: counted by bodies alone, a form of many such parts
        would have the windows to itself and never fill them.
        """
        if message.type == TYPE_ABORT:
            return 0
        if len(message.headers) == PLAIN_HEADERS:
            return max(len(message.body), MESSAGE_COST)
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


def _seq(message: Message) -> int:
    return int(str(message.headers["seq"]))
