"""Where benchmarks publish: nowhere, or a queue that is new for each run.

A queue is deleted and declared again before each run, which costs the same for everyone. A limit on
its length would have the broker drop messages while it is measured, and purging leaves a quorum
queue's log, and all of a stream.
"""

import time
from dataclasses import dataclass
from typing import Final

import pika

from relay.demo.rabbitmq import RabbitMQNode
from tests.bench.pump import cpu_seconds

KINDS: Final = ("none", "classic", "quorum", "stream")

NOWHERE: Final = "amq.fanout"
"""An exchange without bindings: the broker confirms, and drops."""

_LOOK: Final = 0.1
"""Seconds over which the broker is watched for whether it has come to rest."""

_AT_REST: Final = 0.2
"""Of a core: what a broker uses that only looks after itself."""

_PATIENCE: Final = 50
"""Looks, at most: a broker that never rests is measured all the same."""


@dataclass(frozen=True)
class Destination:
    """One of KINDS, at a node."""

    node: RabbitMQNode
    kind: str

    @property
    def exchange(self) -> str:
        """Where to publish."""
        return NOWHERE if self.kind == "none" else ""

    @property
    def routing_key(self) -> str:
        """With which key: the queue's name."""
        return f"bench.{self.kind}"

    def renew(self) -> None:
        """Have it empty, and the broker at rest."""
        self.clear()
        if self.kind != "none":
            with pika.BlockingConnection(pika.URLParameters(self.node.url)) as connection:
                arguments = {"x-queue-type": self.kind}
                connection.channel().queue_declare(
                    self.routing_key, durable=True, arguments=arguments
                )
        self._wait_for_rest()

    def clear(self) -> None:
        """Delete the queue, and all that is in it."""
        if self.kind != "none":
            with pika.BlockingConnection(pika.URLParameters(self.node.url)) as connection:
                connection.channel().queue_delete(self.routing_key)

    def _wait_for_rest(self) -> None:
        # What it deletes, it deletes later.
        assert self.node.pid is not None
        for _ in range(_PATIENCE):
            before = cpu_seconds(self.node.pid)
            time.sleep(_LOOK)
            if cpu_seconds(self.node.pid) - before < _AT_REST * _LOOK:
                return
