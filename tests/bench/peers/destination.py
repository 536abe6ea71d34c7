"""What every peer publishes, and where to: told by the environment, as services are configured.

``node/server.js`` and ``go/main.go`` read the same variables and hold the same two numbers.
"""

import os
from dataclasses import dataclass
from typing import Final, Self

MESSAGE_BYTES: Final = 131064
"""Bytes of every message but the last of a part: relay's own, one AMQP body frame."""

WINDOW: Final = 64
"""Messages of one upload that may be unconfirmed at a time: relay's 8 MiB."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to publish.

    Attributes:
        url: the broker.
        mandatory: whether the broker shall return what no queue takes.
    """

    url: str
    exchange: str
    routing_key: str
    mandatory: bool

    @classmethod
    def from_environment(cls) -> Self:
        """The inverse of ``environment``. Raises KeyError if a variable is missing."""
        return cls(
            url=os.environ["AMQP_URL"],
            exchange=os.environ["AMQP_EXCHANGE"],
            routing_key=os.environ["AMQP_ROUTING_KEY"],
            mandatory=os.environ["AMQP_MANDATORY"] == "true",
        )

    def environment(self) -> dict[str, str]:
        """The variables that a peer is started with."""
        return {
            "AMQP_URL": self.url,
            "AMQP_EXCHANGE": self.exchange,
            "AMQP_ROUTING_KEY": self.routing_key,
            "AMQP_MANDATORY": "true" if self.mandatory else "false",
        }


class NotConfirmed(Exception):
    """The broker rejected or returned a message, or went away; the text says which."""
