"""Copies of rejected messages, with the reason, in a queue for people to look at.

basic.reject cannot carry a reason. So the copy is published to the queue, with what the broker
would refuse, obey or be misled by left out, and the original may be acked once the broker has
confirmed its copy. On a connection of its own: RabbitMQ may stop one that publishes, and one that
consumes may have to stop reading, confirms included.

It does not know why a message was rejected, nor what a transfer is.
"""

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pika.exceptions
import trio
from pika.channel import Channel
from pika.connection import Parameters
from pika.frame import Header, Method
from pika.spec import Basic, BasicProperties

from relay.broker.connect import backoff
from relay.protocol.confirms import Confirms, Outcome
from relay.receiver.link import Delivery, OneChannel

REASON: Final = "relay-reason"
QUEUE: Final = "relay-queue"
AT: Final = "relay-at"
CUT: Final = "relay-headers"
"""Headers of a copy: why, from which queue, when (RFC 3339), and whether others were left out."""

_LEFT_OUT: Final = ("user_id", "reply_to", "expiration")
"""Properties that make a broker refuse the copy, direct it, or delete it."""

_OBEYED: Final = frozenset({"CC", "BCC"})
"""Headers that RabbitMQ routes by: whoever wrote them would choose where the copy goes as well."""

_UNSENDABLE: Final = (pika.exceptions.AMQPError, struct.error, RecursionError)
"""What pika raises on headers that it could read, but cannot write."""


class DeadLettersLost(Exception):
    """The connection has ended: what became of the copies, nobody knows; ``error`` tells why."""


class NoDeadLetterQueue(Exception):
    """There is no such queue any more; the text names it."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was rejected, and why."""

    delivery: Delivery
    reason: str


def copy_properties(letter: Letter, queue: str, at: datetime, frame_max: int) -> BasicProperties:
    """Properties of the copy: the message's own and the three headers, if they fit in one frame.

    Args:
        letter: what was rejected, and why.
        queue: where it came from.
        at: when it was rejected.
        frame_max: bytes that the AMQP frame of the properties may have.
    """
    original = letter.delivery.properties
    kept = {key: value for key, value in vars(original).items() if key not in _LEFT_OUT}
    ours: dict[str, Any] = {
        REASON: letter.reason,
        QUEUE: queue,
        AT: at.astimezone(UTC).isoformat(timespec="seconds"),
    }
    theirs = {k: v for k, v in (original.headers or {}).items() if k not in _OBEYED}
    copy = BasicProperties(**kept | {"headers": theirs | ours})
    try:
        fits = len(Header(1, len(letter.delivery.body), copy).marshal()) <= frame_max
    except _UNSENDABLE:
        fits = False
    if fits:
        return copy
    return BasicProperties(**kept | {"headers": ours | {CUT: "left out: too large to be copied"}})


class DeadLetters(OneChannel):
    """One connection that publishes to the queue for dead letters."""

    def __init__(
        self, parameters: Parameters, stream: trio.abc.Stream, queue: str, source: str
    ) -> None:
        """``queue`` takes them; ``source`` is where they come from."""
        super().__init__(parameters, stream)
        self.ready = False
        self._queue = queue
        self._source = source
        self._confirms: Confirms[Letter] = Confirms()
        self._returned = ""
        self._nacked: list[Letter] = []

    async def publish_all(self, letters: Sequence[Letter], say: Callable[[str], None]) -> None:
        """Publish copies, again and again if the queue rejects them; all are safe afterwards.

        Raises:
            NoDeadLetterQueue: it has been deleted.
            DeadLettersLost: what became of the copies is not known.
        """
        attempt = 0
        while letters := await self.publish(letters):
            if attempt == 0:
                say(f"queue {self._queue!r} rejects dead letters, as a full one does; trying again")
            # Not with a new connection: RabbitMQ 4 drops what it has delivered 20 times in vain.
            with trio.move_on_after(backoff(attempt, random.random())):  # noqa: S311  jitter
                await self.wait_until(lambda: False)
            attempt += 1

    async def publish(self, letters: Sequence[Letter]) -> list[Letter]:
        """Publish copies; all are safe in the queue when this returns, but for some.

        Returns:
            Those that the queue rejected, as a full one may do; they can be published again.

        Raises:
            NoDeadLetterQueue: it has been deleted.
            DeadLettersLost: what became of the copies is not known.
        """
        self._nacked = []
        for letter in letters:
            if self.error is not None or self._channel is None or not self._channel.is_open:
                raise DeadLettersLost
            properties = copy_properties(
                letter, self._source, datetime.now(UTC), self._connection.params.frame_max
            )
            # Booked first: the confirm can be back before the next line has run.
            self._confirms.register(letter)
            self._channel.basic_publish(
                "", self._queue, letter.delivery.body, properties, mandatory=True
            )
        await self.wait_until(lambda: not len(self._confirms))
        if self._returned:
            raise NoDeadLetterQueue(f"no queue {self._queue!r}: {self._returned}")
        if len(self._confirms):
            raise DeadLettersLost
        return self._nacked

    async def close(self) -> None:
        """End the connection; nobody waits for a confirm."""
        self.drop("relay receive is done")

    def _on_channel_open(self, channel: Channel) -> None:
        channel.add_on_return_callback(self._on_return)
        channel.queue_declare(self._queue, passive=True, callback=self._on_found)

    def _on_found(self, _frame: object) -> None:
        assert self._channel is not None
        self._channel.confirm_delivery(self._on_confirm, callback=self._on_ready)

    def _on_ready(self, _frame: object) -> None:
        self.ready = True
        self._changed.unpark_all()

    def _on_return(
        self, _channel: Channel, method: Basic.Return, _properties: BasicProperties, _body: bytes
    ) -> None:
        # All go to one queue: which of them came back makes no difference.
        self._returned = f"{method.reply_code} {method.reply_text}"

    def _on_confirm(self, frame: Method[Basic.Ack | Basic.Nack]) -> None:
        method = frame.method
        settled = self._confirms.settle(
            int(method.delivery_tag or 0),
            multiple=bool(method.multiple),
            acked=isinstance(method, Basic.Ack),
        )
        self._nacked += [letter for letter, outcome in settled if outcome is Outcome.NACKED]
        self._changed.unpark_all()
