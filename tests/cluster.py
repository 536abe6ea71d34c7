"""Three private RabbitMQ nodes that form a cluster. It knows nothing of relay."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from relay.demo.rabbitmq import RabbitMQFailed, RabbitMQNode

WAIT: Final = 60.0
"""Seconds for the cluster to come to a state that a test waits for."""


class Cluster:
    """A cluster; a context manager that starts it.

    Attributes:
        nodes: its members; the first one has the port mapper of all.
    """

    def __init__(self, size: int = 3) -> None:
        first = RabbitMQNode()
        self._stack = ExitStack()
        self._stack.callback(first.close)
        self.nodes = [first]
        for _ in range(size - 1):
            node = RabbitMQNode(peer=first)
            self._stack.callback(node.close)
            self.nodes.append(node)

    @property
    def urls(self) -> list[str]:
        """AMQP URLs of all nodes."""
        return [node.url for node in self.nodes]

    def members_online(self, queue: str) -> int:
        """How many members of a quorum queue take part, as the first node sees it."""
        for line in self.nodes[0].ctl("list_queues", "name", "online").splitlines():
            name, _, online = line.partition("\t")
            if name == queue:
                return online.count("@")
        return 0

    def wait_whole(self, queue: str) -> None:
        """Wait until every node takes part in ``queue``, so that one of them can be spared."""
        deadline = time.monotonic() + WAIT
        while self.members_online(queue) < len(self.nodes):
            assert time.monotonic() < deadline, f"{queue} lacks members"

    def restart_in_turn(self, queue: str) -> None:
        """A rolling restart as an operator does it: a node at a time, and none before its turn."""
        for node in self.nodes:
            node.restart()
            self.wait_whole(queue)

    @staticmethod
    def at_once(action: Callable[[RabbitMQNode], None], nodes: Iterable[RabbitMQNode]) -> None:
        """Do something to several nodes at the same time."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(action, nodes))

    def __enter__(self) -> Self:
        try:
            self.nodes[0].start()
            self.at_once(RabbitMQNode.start, self.nodes[1:])
            running = self.nodes[0].ctl("cluster_status")
            if not all(node.name in running for node in self.nodes):
                raise RabbitMQFailed(f"not all nodes have joined:\n{running}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
