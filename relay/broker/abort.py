"""An abort frame whose upload has no channel any more: told on another one, if there is a broker.

It outlives its upload, of which it knows nothing but where the frames went.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from relay.broker.session import Address, ConfirmChannel, Session
from relay.errors import BrokerError, BrokerRefused
from relay.protocol.confirms import Outcome
from relay.protocol.wire import Message

log = logging.getLogger(__name__)

ABORT_TIMEOUT: Final = 15.0
"""Seconds in which a failed upload's abort frame finds a channel, if its own is closed."""


class LateAbort:
    """An abort frame and its deadline; a ``session.ChannelOwner``."""

    def __init__(
        self,
        message: Message,
        address: Address,
        acquire: Callable[[], Awaitable[tuple[Session, ConfirmChannel]]],
        *,
        confirm_timeout: float,
    ) -> None:
        """The time for ``tell`` runs from now. ``acquire`` waits for a channel."""
        self._message = message
        self._address = address
        self._acquire = acquire
        self._confirm_timeout = confirm_timeout
        self._deadline = trio.current_time() + ABORT_TIMEOUT
        self._is_over = False
        self._changed = trio.Event()

    async def tell(self) -> None:
        """Publish it, and again if the connection is lost; the log has it if that fails."""
        try:
            while not self._is_over:
                with trio.fail_at(self._deadline):
                    session, channel = await self._acquire()
                await self._tell_on(session, channel)
        except BrokerError as exc:
            log.info("%s: abort frame not sent: %s", self._message.message_id, exc)
        except trio.TooSlowError:
            log.info("%s: abort frame not sent: no connection", self._message.message_id)

    async def _tell_on(self, session: Session, channel: ConfirmChannel) -> None:
        self._changed = trio.Event()
        channel.assign(self, self._address)
        channel.publish(self._message, mandatory=False)
        with trio.move_on_after(self._confirm_timeout) as scope:
            await self._changed.wait()
        if scope.cancelled_caught:
            self._is_over = True
            channel.close()
        else:
            session.release(channel)

    def on_settled(self, _message: Message, _outcome: Outcome) -> None:
        """The broker knows; whether it took it or not, nothing more can be done."""
        self._is_over = True
        self._changed.set()

    def on_channel_lost(self, _unknown: list[Message], error: BrokerError) -> None:
        """It may be told on the next connection, unless the broker refused it."""
        self._is_over = self._is_over or isinstance(error, BrokerRefused)
        self._changed.set()
