"""One upload's frames on their way into the broker.

A ``Publication`` is what an upload sends its frames to: it waits for room in the windows, sees
every confirm, and, when a connection is lost, publishes what is unconfirmed again on the next one,
same ``seq``, in order. It knows nothing of HTTP, of connecting, or of pika.

Nothing waits for ever: each wait of a publication ends with a confirm, with an error, or at a
deadline (``confirm_timeout``, ``reconnect_grace``, ``blocked_grace``). The one wait without a
deadline of its own is for room in the shared window, and whoever holds that room has one.
"""

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import trio

from relay.broker.abort import LateAbort
from relay.broker.figures import Figures
from relay.broker.rejection import FULL, Rejection
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
from relay.waits import Wait, Waits

MESSAGE_COST: Final = 2048
CHARACTER_COST: Final = 5
"""Bytes that a message takes beside its body, and for each character of its headers: in memory as
text (up to 4) and marshalled."""

TIMED_EACH: Final = 16
"""Of so many frames one is timed: the first, so that small uploads are seen, too."""

MESSAGES_MAX: Final = 512
"""Messages of one upload that are out at once. Once a slow queue has too many of one channel to
catch up with, RabbitMQ reads the whole connection no more: seen with 2,048, and not with 512."""


class Line(Protocol):
    """What a publication needs of its publisher: the way to whichever session there is."""

    config: AmqpConfig
    window: Window
    figures: Figures
    blocked_since: float | None

    async def acquire(self, *, fresh: bool = False) -> tuple[Session, ConfirmChannel]:
        """A channel, if need be a fresh one, waiting for a session if there is none."""

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run an async function that may outlive the upload."""

    def fault(self) -> BrokerError | None:
        """What is wrong with the broker now, or None."""


class Publication:
    """One upload's frames on their way into the broker; a ``transfer.FrameSink``.

    Used by one task at a time. It owns a channel while it is open, and the part of the windows
    that its unconfirmed frames take, until each of them is settled or given up.
    """

    def __init__(
        self,
        publisher: Line,
        transfer: Transfer,
        route: RouteConfig,
        waits: Waits | None = None,
    ) -> None:
        """``waits`` is told what the upload waits for here."""
        self._publisher = publisher
        self._config = publisher.config
        self._figures = publisher.figures
        self._waits = waits or Waits()
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
        self._rejection = Rejection(route, self._address)
        self._session: Session | None = None
        self._channel: ConfirmChannel | None = None
        self._unconfirmed = 0
        self._published = 0
        self._commit: Message | None = None
        self._abort: LateAbort | None = None
        self._is_committed = False
        self._closed = False
        self._failure: BrokerError | None = None
        # What was outstanding when the channel was lost, or was rejected: to be published again.
        self._again: list[Message] = []
        self._recovery = trio.CancelScope()
        self._lost_since: float | None = None
        self._is_in_doubt = False
        self._progress = trio.current_time()
        # The one message whose confirm is timed, and since when: all would cost 1 % of the CPU.
        self._timed: Message | None = None
        self._timed_since = 0.0
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
        await self._until(lambda: not self._outstanding, Wait.BROKER)
        await self._publish(encode_frame(frame), commit=True)
        await self._until(lambda: not self._outstanding, Wait.BROKER)

    def abort(self, reason: str) -> None:
        """Tell consumers that the transfer failed, if they may have seen any of it.

        Synchronous, so that it works while the upload is being cancelled. ``reason`` is an error
        code. After the commit frame nothing is said: it may have been the truth.
        """
        if not self._published or self._commit is not None:
            return
        message = encode_abort(self._transfer, self._published, reason)
        self._abort = LateAbort(
            message,
            self._address,
            self._publisher.acquire,
            confirm_timeout=self._config.confirm_timeout,
        )
        if self._channel is not None and self._channel.is_open:
            if not self._outstanding:
                self._progress = trio.current_time()
            self._channel.publish(message, mandatory=False)
        else:
            self._publisher.spawn(self._abort.tell)

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
        # Mostly there is nothing to wait for, and for each frame it shows which way that is found.
        if not (self._is_clear and self._has_room(size)):
            await self._until(lambda: self._has_room(size), Wait.WINDOW)
        window = self._publisher.window
        route = self._transfer.route
        if not window.take(route, size):
            await self._take_when_granted(window, size)
        try:
            assert self._channel is not None
            if not self._unconfirmed:
                self._progress = trio.current_time()
            if self._timed is None and self._published % TIMED_EACH == 0:
                self._timed, self._timed_since = message, trio.current_time()
            self._channel.publish(message, mandatory=self._mandatory)
        except BaseException:
            window.release(route, size)
            raise
        self._unconfirmed += size
        self._published += 1
        if commit:
            self._commit = message

    async def _take_when_granted(self, window: Window, size: int) -> None:
        request = window.request(self._transfer.route, size, self._changed.unpark_all)
        try:
            await self._until(lambda: request.granted, Wait.WINDOW)
        except BaseException:
            window.withdraw(request)
            raise

    @property
    def _is_clear(self) -> bool:
        """Whether nothing is wrong that ``_until`` would mind."""
        return self._channel is not None and self._failure is None and not self._again

    def _has_room(self, size: int) -> bool:
        return (
            self._unconfirmed + size <= self._config.upload_window
            and self._outstanding < MESSAGES_MAX
        )

    @property
    def _outstanding(self) -> int:
        return self._channel.outstanding if self._channel is not None else 0

    async def _until(self, ready: Callable[[], bool], what: Wait) -> None:
        """Wait for ``ready`` and a channel; meanwhile mind failures and deadlines."""
        while not self._is_committed:
            if self._failure is not None:
                raise self._failure
            if self._is_clear and ready():
                return
            self._waits.begin(Wait.BROKER if self._is_interrupted else what)
            with trio.move_on_at(self._deadline()) as scope:
                await self._changed.park()
            self._waits.end()
            if scope.cancelled_caught:
                await self._give_up_waiting()

    @property
    def _is_interrupted(self) -> bool:
        """Whether the broker is lost, blocked or rejecting, so that room is not what is missing."""
        is_blocked = self._publisher.blocked_since is not None
        return self._channel is None or bool(self._again) or is_blocked

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
        seconds = self._config.confirm_timeout
        return ConfirmTimeout(f"the broker confirmed nothing for {seconds:g} s")

    def _start_recovery(self) -> None:
        self._recovery.cancel()
        self._recovery = trio.CancelScope()
        if self._lost_since is None:
            self._lost_since = trio.current_time()
        self._publisher.spawn(partial(self._recover, self._recovery, self._lost_since))

    async def _recover(self, recovery: trio.CancelScope, since: float) -> None:
        """Publish again what is unconfirmed: on the next connection, or when a queue takes it.

        A task of its own, because the upload may be waiting for its client, for long, and must
        not keep its share of the window from others meanwhile.
        """
        with recovery:
            # Of several nacks in one read, the last one's.
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                with trio.move_on_at(since + self._config.reconnect_grace) as scope:
                    await self._publish_again()
                if scope.cancelled_caught:
                    self._fail(self._lost() if self._channel is None else self._rejection.overdue)
            except BrokerError as exc:
                self._fail(exc)
        if self._failure is not None:
            self._give_up()
        self._changed.unpark_all()

    async def _publish_again(self) -> None:
        is_rejected = self._channel is not None
        if self._channel is not None and self._session is not None:
            await self._rejection.wait(self._session)
            # It would go on rejecting for as long as the node is away that had the leader.
            self._channel.retire()
            self._channel = None
        session, channel = await self._publisher.acquire(fresh=is_rejected)
        if self._closed:
            session.release(channel)
            return
        if session is not self._session:
            self._rejection.forget()
        self.attach(session, channel)
        self._publish_all()

    def _publish_all(self) -> None:
        self._progress = trio.current_time()
        if not self._again:  # this loss is over, and what comes later is another
            self._lost_since = None
        self._again.sort(key=_seq)
        # Without a channel, it was lost at the very moment: the next recovery has begun.
        while self._again and self._channel is not None:
            self._channel.publish(self._again[0], mandatory=self._mandatory)
            self._figures.republished += 1
            del self._again[0]

    def _lost(self) -> BrokerError:
        seconds = self._config.reconnect_grace
        text = f"the broker was lost and did not come back within {seconds:g} s"
        # A login that is refused by now is another matter than a node that is still away.
        reason = self._publisher.fault()
        return BrokerUnavailable(text if reason is None else f"{text}: {reason.detail}")

    async def _see_off(self) -> None:
        """After ``close``: have the broker settle what is outstanding, if need be by force.

        Nobody waits for it any more, but it still takes room in the window. A broker that still
        sends heartbeats, but reads no more, would keep the room for ever, and with it every upload
        that waits for some. During an alarm that is how it should be.
        """
        seconds = self._config.confirm_timeout
        closed_at = -math.inf
        while self._outstanding:
            with trio.move_on_at(max(self._progress, closed_at) + seconds) as scope:
                await self._changed.park()
            if not scope.cancelled_caught or self._channel is None or self._session is None:
                continue
            if closed_at == -math.inf:
                self._channel.close()
            elif self._publisher.blocked_since is None:
                self._session.abort(f"it did not close a channel within {seconds:g} s")
                return
            closed_at = trio.current_time()

    # --- what the channel calls ----------------------------------------------------------------

    def on_settled(self, message: Message, outcome: Outcome) -> None:
        """Free the message's room; note what went wrong."""
        now = self._progress = trio.current_time()
        if message is self._timed:
            if outcome is Outcome.ACKED:
                self._figures.confirm_seconds.observe(now - self._timed_since)
            self._timed = None
        if outcome is not Outcome.ACKED:
            self._figures.unacked[outcome] += 1
        if outcome is Outcome.NACKED and self._may_be_taken_later():
            self._again.append(message)
            if not self._outstanding:
                self._start_recovery()
            return
        self._lost_since = None
        self._free(message)
        if outcome is Outcome.ACKED and message is self._commit and self._failure is None:
            # Whatever becomes of the channel before the upload's task gets to know of it.
            self._is_committed = True
        elif outcome is Outcome.NACKED:
            self._fail(QueueFull(FULL))
        elif self._again:
            # A frame that is taken after one that was not makes a gap that nothing can fill. One
            # before it, whose ack is only late, tells that the channel has spoken to the queue.
            is_gap = min(map(_seq, self._again)) < _seq(message)
            self._fail(self._rejection.gap if is_gap else QueueFull(FULL))
        elif outcome is Outcome.RETURNED:
            self._fail(Unroutable("no queue is bound where this route publishes"))
        if self._changed:
            self._changed.unpark_all()
        if self._closed:
            self._release_channel()

    def on_channel_lost(self, unknown: list[Message], error: BrokerError) -> None:
        """Keep what is unconfirmed for the next connection, unless the broker refused it."""
        self._channel = None
        self._timed = None
        self._again += unknown
        self._rejection.forget()
        if isinstance(error, BrokerRefused):
            self._fail(error)
        elif self._commit is not None:
            self._is_in_doubt = True
        if self._closed or self._failure is not None:
            self._give_up()
            is_untold = any(message.type == TYPE_ABORT for message in unknown)
            if self._abort is not None and is_untold and not isinstance(error, BrokerRefused):
                self._publisher.spawn(self._abort.tell)
        else:
            self._start_recovery()
        self._changed.unpark_all()

    def on_blocked_changed(self) -> None:
        """The broker stopped or resumed reading: confirms cannot be expected meanwhile."""
        self._progress = trio.current_time()
        self._changed.unpark_all()

    def _may_be_taken_later(self) -> bool:
        """Whether a nack may be of a queue that has no leader now, and not of one that is full."""
        channel = self._channel
        is_over = self._closed or self._failure is not None
        return channel is not None and not channel.has_taken and not is_over

    def _fail(self, error: BrokerError) -> None:
        if self._is_in_doubt and not isinstance(error, OutcomeUnknown):
            # Whatever became of its second copy, the first may have been taken.
            error = OutcomeUnknown(
                f"the broker was lost before it confirmed the commit frame; then {error.detail}"
            )
        if self._failure is None:
            self._failure = error

    def _give_up(self) -> None:
        again, self._again = self._again, []
        for message in again:
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
        return min(size, self._config.upload_window, self._publisher.window.largest)

    def _free(self, message: Message) -> None:
        size = self._room(message)
        self._unconfirmed -= size
        self._publisher.window.release(self._transfer.route, size)

    def _release_channel(self) -> None:
        if self._session is not None and self._channel is not None and not self._outstanding:
            self._session.release(self._channel)
            self._channel = None


def _seq(message: Message) -> int:
    return int(str(message.headers["seq"]))
