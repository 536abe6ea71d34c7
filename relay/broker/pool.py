"""Several connections to the broker, with uploads spread over them.

One connection is one TCP stream and, in RabbitMQ, a few Erlang processes: with many uploads, more
than one connection takes more of a node, or of several. Each has a publisher of its own, its share
of the window, and begins with another of the URLs. An upload stays with the publisher that it was
given. It knows nothing of HTTP or pika.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import trio

from relay.broker.connect import Connect
from relay.broker.publication import Publication
from relay.broker.publisher import Publisher, Refusals, Verify, log_refusals
from relay.broker.session import Session
from relay.config import AmqpConfig, RouteConfig
from relay.errors import BrokerError
from relay.model import Transfer


class Pool:
    """The daemon's way to the broker, over ``connections`` publishers."""

    def __init__(
        self,
        config: AmqpConfig,
        routes: Mapping[str, RouteConfig],
        *,
        connect: Connect = trio.open_tcp_stream,
        verify: Verify = log_refusals,
    ) -> None:
        """Publish for ``routes``. ``verify`` is run on each connection of the first publisher.

        Raises:
            ConfigError: a URL or a TLS file cannot be used.
        """
        share = config.window // config.connections
        self.publishers: Sequence[Publisher] = [
            Publisher(
                replace(config, window=share, urls=_begin_with(config.urls, number)),
                routes,
                connect=connect,
                # One is enough: what it finds is true of the broker, not of the connection.
                verify=verify if number == 0 else _say_nothing,
            )
            for number in range(config.connections)
        ]

    async def run(self) -> None:
        """Keep the connections. Ends only by cancellation."""
        async with trio.open_nursery() as nursery:
            for publisher in self.publishers:
                nursery.start_soon(publisher.run)

    async def wait_up(self) -> None:
        """Return once one of the connections takes uploads."""
        async with trio.open_nursery() as nursery:

            async def wait(publisher: Publisher) -> None:
                await publisher.wait_up()
                nursery.cancel_scope.cancel()

            for publisher in self.publishers:
                nursery.start_soon(wait, publisher)

    async def close(self) -> None:
        """Say goodbye on every connection. Call it before cancelling ``run``."""
        async with trio.open_nursery() as nursery:
            for publisher in self.publishers:
                nursery.start_soon(publisher.close)

    def refusal(self) -> BrokerError | None:
        """Why an upload would not be admitted now, or None if one of the connections takes it."""
        return self._least_busy().refusal()

    def open(
        self, transfer: Transfer, route: RouteConfig
    ) -> AbstractAsyncContextManager[Publication]:
        """A publication on the connection that has the fewest. Raises as ``Publisher.open``."""
        return self._least_busy().open(transfer, route)

    def _least_busy(self) -> Publisher:
        def order(publisher: Publisher) -> tuple[bool, bool, int]:
            # One that is reconnecting takes uploads, too, but makes them wait.
            is_refusing = publisher.refusal() is not None
            return is_refusing, publisher.fault() is not None, publisher.publications

        return min(self.publishers, key=order)


def _begin_with(urls: tuple[str, ...], number: int) -> tuple[str, ...]:
    start = number % len(urls)
    return urls[start:] + urls[:start]


async def _say_nothing(_session: Session, _refusals: Refusals) -> None:
    """Verify nothing."""
