"""What a nack means, of a channel that has taken nothing yet: is the queue full, or without leader?

RabbitMQ's channels nack what they are given first for a quorum queue, while the node of its leader
is down; only to those that have spoken to the queue do they keep their word (``enqueue`` in
rabbit_fifo_client). Up to 3.12.4, a channel that has nacked so nacks on when the others have long
agreed on a new leader: until it is back, it asks the node that had the leader when the channel was
first used (``pick_server``: the head of ``servers``, which nothing changes before the first
success). So another attempt takes a fresh channel, which looks for the leader anew; the old one is
closed.

A queue that is full nacks likewise. What tells them apart is how many messages it has ready:
RabbitMQ asks the very process whose absence makes it nack, and says 0 if that does not answer
(``stat`` in rabbit_quorum_queue), while what is full has at least one (``is_over_limit`` in
rabbit_fifo). That it has some is no proof by itself: a fresh channel must have been nacked between
two such answers. The exception is a queue that is full of what it keeps until it is dead-lettered:
it is taken for one without a leader.

A leader that has lost its majority answers, but nacks only after 65 s (net_ticktime and 5): by then
an upload has failed, with the default ``confirm_timeout``.

It knows nothing of frames, nor when to stop.
"""

from typing import Final

import trio

from relay.broker.session import Address, Session
from relay.config import RouteConfig
from relay.errors import BrokerError, BrokerUnavailable, QueueFull

REJECTED_GRACE: Final = 10.0
"""Seconds after which a queue whose name is not known is taken for full."""

PAUSE_MIN: Final = 0.25
PAUSE_MAX: Final = 1.0
"""Seconds between two attempts: at first, and when several seconds have passed."""

FULL: Final = "the broker rejected a frame: the queue is full"
FULL_OR_LEADERLESS: Final = "the broker rejected a frame: the queue is full, or has no leader"
WAS_FULL_OR_LEADERLESS: Final = (
    "the broker rejected a frame and took a later one: the queue was full, or had no leader"
)
LEADERLESS: Final = "the queue takes no frame, and is not full: it has no leader"


class Rejection:
    """Rejections by one queue, of one upload."""

    def __init__(self, route: RouteConfig, address: Address) -> None:
        """Through an exchange, only a queue that the route declares is known."""
        self._queue = address.routing_key if not address.exchange else None
        if address.exchange and route.queue is not None:
            self._queue = route.queue.name
        self._since: float | None = None
        self._was_full = False

    @property
    def overdue(self) -> BrokerError:
        """What an upload gets that has waited for long enough."""
        if self._queue is None:
            return QueueFull(FULL_OR_LEADERLESS)
        return BrokerUnavailable(LEADERLESS)

    @property
    def gap(self) -> BrokerError:
        """What an upload gets of which a frame was taken after one that was not."""
        if self._queue is None:
            return QueueFull(FULL_OR_LEADERLESS)
        return BrokerUnavailable(WAS_FULL_OR_LEADERLESS)

    def forget(self) -> None:
        """Begin anew, on another connection."""
        self._since = None
        self._was_full = False

    async def wait(self, session: Session) -> None:
        """After all that was published has been rejected: wait until it is worth another attempt.

        That is to be made on a fresh channel.

        Raises:
            QueueFull: it is not.
        """
        now = trio.current_time()
        self._since = now if self._since is None else self._since
        was_full, self._was_full = self._was_full, await self._has_messages(session)
        # It had a leader before a fresh channel was nacked, and has one now. Once would not tell:
        # the others may have agreed on one since the first channel was, and the next goes well.
        if was_full and self._was_full:
            raise QueueFull(FULL)
        if self._queue is None and now >= self._since + REJECTED_GRACE:
            raise QueueFull(FULL_OR_LEADERLESS)
        if not self._was_full:
            await trio.sleep(min(PAUSE_MAX, max(PAUSE_MIN, (now - self._since) / 4)))

    async def _has_messages(self, session: Session) -> bool:
        if self._queue is None:
            return False
        try:
            return await session.find_queue(self._queue) > 0
        except BrokerError:  # whoever publishes will learn why
            return False
