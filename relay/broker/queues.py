"""What a queue is like: learnt from a broker that tells it only when it refuses.

AMQP has no method that shows a queue's properties. But RabbitMQ refuses a declaration that is not
equivalent to the queue that exists, and names the first property that differs and its value (406;
https://www.rabbitmq.com/docs/queues#property-equivalence). So whoever declares again and again,
each time with what was learnt, learns them all. What a policy adds stays unseen.
"""

import re
from dataclasses import dataclass, field
from typing import Final

from relay.broker.session import Session
from relay.errors import BrokerRefused

Value = str | int | bool

QUEUE_TYPE: Final = "x-queue-type"
DELIVERY_LIMIT: Final = "x-delivery-limit"
ASKED: Final = (QUEUE_TYPE, "x-max-length", "x-max-length-bytes", "x-overflow")

RIDDLE: Final = "relay asks"
"""A value that RabbitMQ gives to none of ``ASKED`` and with which it creates no queue: a question
to an existing queue stays a question if somebody deletes the queue meanwhile."""

MAX_QUESTIONS: Final = 40
"""Twice what RabbitMQ compares; each refusal costs a channel, and a line in the broker's log."""

_INEQUIVALENT: Final = re.compile(
    r"inequivalent arg '(?P<name>[\w-]+)' for queue .*: received .*"
    r" but current is (?:none|(?:the value )?'(?P<value>.*?)'(?: of type '(?P<type>\w+)')?)$",
    re.DOTALL,
)


class Unreadable(Exception):
    """The broker did not say what was asked; the text is what it said instead."""


@dataclass(slots=True, kw_only=True)
class Properties:
    """What a queue is declared with, as far as it is known. Arguments that are not set are absent.

    Attributes:
        unseen: why not all of it is known; empty if it is.
    """

    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, Value] = field(default_factory=dict)
    unseen: str = ""

    @property
    def type(self) -> str:
        """RabbitMQ's default is classic."""
        return str(self.arguments.get(QUEUE_TYPE, "classic"))

    def get(self, name: str) -> Value | None:
        """A property or argument by the broker's name for it; None if it is not set."""
        if name == "durable":
            return self.durable
        return self.auto_delete if name == "auto_delete" else self.arguments.get(name)

    def set(self, name: str, value: Value | None) -> None:
        """Take over what the broker says of a property or argument."""
        if name == "durable":
            self.durable = bool(value)
        elif name == "auto_delete":
            self.auto_delete = bool(value)
        elif value is None:
            self.arguments.pop(name, None)
        else:
            self.arguments[name] = value


def read_refusal(text: str) -> tuple[str, Value | None]:
    """Which property differs, and what the queue that exists has; None if it has none.

    Raises:
        Unreadable: the text says something else, or is cut off (AMQP allows it 255 bytes).
    """
    match = _INEQUIVALENT.search(text)
    if match is None:
        raise Unreadable(text)
    name, value, kind = match["name"], match["value"], match["type"]
    if value is None:
        return name, None
    # Without a type, both sides have the same one, and the name is all there is to tell it by.
    if kind == "bool" or (kind is None and value in ("true", "false")):
        return name, value == "true"
    if kind in (None, "longstr"):
        is_number = kind is None and re.fullmatch(r"-?\d{1,18}", value, re.ASCII)
        return name, int(value) if is_number else value
    if re.fullmatch(r"-?\d{1,18}", value, re.ASCII):
        return name, int(value)
    raise Unreadable(f"{name} has a value of type {kind}")


async def inquire(session: Session, name: str) -> Properties:
    """Ask for what matters to uploads of a queue that need not be ours. Creates none.

    Raises:
        BrokerRefused: there is no such queue, or it is another connection's.
        BrokerUnavailable: the connection is lost.
    """
    await session.find_queue(name)
    properties = Properties(arguments=dict.fromkeys(ASKED, RIDDLE))
    await _learn(session, name, properties, asked=set(ASKED))
    if properties.type == "quorum" and not properties.unseen:
        # No other type has it, nor says anything of it.
        properties.arguments[DELIVERY_LIMIT] = RIDDLE
        await _learn(session, name, properties, asked={DELIVERY_LIMIT})
    arguments = properties.arguments
    properties.arguments = {key: value for key, value in arguments.items() if value != RIDDLE}
    return properties


async def compare(session: Session, name: str, wanted: Properties) -> Properties:
    """What the queue has, that exists and was not to be declared as ``wanted``.

    Raises:
        BrokerUnavailable: the connection is lost.
    """
    properties = Properties(
        durable=wanted.durable,
        auto_delete=wanted.auto_delete,
        arguments=dict(wanted.arguments),
    )
    await _learn(session, name, properties, asked=set())
    return properties


async def _learn(session: Session, name: str, properties: Properties, asked: set[str]) -> None:
    """Declare until the broker agrees, or all of ``asked`` is answered (and nothing was declared).

    ``properties`` is where to start from, and becomes what was learnt.
    """
    told: set[str] = set()
    for _ in range(MAX_QUESTIONS):
        try:
            await session.declare_as(
                name,
                properties.arguments,
                durable=properties.durable,
                auto_delete=properties.auto_delete,
            )
        except BrokerRefused as exc:
            try:
                differs, value = read_refusal(exc.detail)
            except Unreadable as reason:
                properties.unseen = str(reason)
                return
            if differs in told:
                properties.unseen = f"{differs} cannot be repeated to the broker as it has it"
                return
        else:
            return
        told.add(differs)
        properties.set(differs, value)
        if asked and asked <= told:
            return
    properties.unseen = "the broker has ever more to say"
