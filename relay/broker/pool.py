"""Several connections to the broker, with uploads spread over them.

One connection is one TCP stream and, in RabbitMQ, a few Erlang processes: with many uploads, more
than one connection takes more of a node, or of several. Each has a publisher of its own, its share
of the window, and begins with another of the URLs. An upload stays with the publisher that it was
given. It knows nothing of HTTP or pika.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Final

import trio

from relay.broker.connect import Connect
from relay.broker.figures import Figures
from relay.broker.publication import Publication
from relay.broker.publisher import Publisher, Refusals, Verify, log_refusals
from relay.broker.session import Session
from relay.broker.window import Window
from relay.config import AmqpConfig, RouteConfig
from relay.errors import BrokerError, BrokerUnavailable
from relay.model import Transfer
from relay.waits import Waits

RENEW_PATIENCE: Final = 10.0
"""Seconds in which a new configuration must have brought a connection, if the old one has."""


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
        self._connect = connect
        self._verify = verify
        self._nursery: trio.Nursery | None = None
        self._scopes: dict[Publisher, trio.CancelScope] = {}
        self.figures = Figures()
        share = config.window // config.connections
        windows = [Window(share, routes) for _ in range(config.connections)]
        self.publishers: Sequence[Publisher] = self._make(config, routes, windows)

    def _make(
        self, config: AmqpConfig, routes: Mapping[str, RouteConfig], windows: Sequence[Window]
    ) -> Sequence[Publisher]:
        return [
            Publisher(
                replace(config, window=window.size, urls=_begin_with(config.urls, number)),
                routes,
                connect=self._connect,
                # One is enough: what it finds is true of the broker, not of the connection.
                verify=self._verify if number == 0 else _say_nothing,
                window=window,
                figures=self.figures,
            )
            for number, window in enumerate(windows)
        ]

    async def run(self) -> None:
        """Keep the connections. Ends only by cancellation."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._start(self.publishers)
            await trio.sleep_forever()

    def _start(self, publishers: Sequence[Publisher]) -> None:
        for publisher in publishers:
            self._scopes[publisher] = trio.CancelScope()
            self._spawn(self._keep, publisher)

    async def _keep(self, publisher: Publisher) -> None:
        with self._scopes[publisher]:
            await publisher.run()

    def _spawn(self, function: Callable[[Publisher], Awaitable[None]], about: Publisher) -> None:
        assert self._nursery is not None, "it runs"
        self._nursery.start_soon(function, about)

    def _end(self, publisher: Publisher) -> None:
        self._scopes.pop(publisher).cancel()

    async def renew(self, config: AmqpConfig, routes: Mapping[str, RouteConfig]) -> None:
        """Have further uploads published with another configuration, over connections of its own.

        Those in progress go on as they began; their connections end with the last of them. The
        number of connections stays, and so do their windows: together all keep to one bound.

        Raises:
            ConfigError: a URL or a TLS file cannot be used. Nothing has changed.
            BrokerError: no broker takes uploads with it, and one does without. Likewise.
        """
        fresh = self._make(config, routes, [publisher.window for publisher in self.publishers])
        self._start(fresh)
        with trio.move_on_after(RENEW_PATIENCE) as scope:
            await _first_up(fresh)
        if scope.cancelled_caught and self.refusal() is None:
            for publisher in fresh:
                self._end(publisher)
            raise fresh[0].fault() or BrokerUnavailable("no connection")
        old, self.publishers = self.publishers, fresh
        for publisher in fresh:
            publisher.window.configure(routes)
        for publisher in old:
            self._spawn(self._retire, publisher)

    async def _retire(self, publisher: Publisher) -> None:
        await publisher.wait_unused()
        await publisher.close()
        self._end(publisher)

    async def wait_up(self) -> None:
        """Return once one of the connections takes uploads."""
        await _first_up(self.publishers)

    async def close(self) -> None:
        """Say goodbye on every connection. Call it before cancelling ``run``."""
        async with trio.open_nursery() as nursery:
            for publisher in self._scopes:
                nursery.start_soon(publisher.close)

    def refusal(self) -> BrokerError | None:
        """Why an upload would not be admitted now, or None if one of the connections takes it."""
        return self._least_busy().refusal()

    def open(
        self, transfer: Transfer, route: RouteConfig, waits: Waits | None = None
    ) -> AbstractAsyncContextManager[Publication]:
        """A publication on the connection that has the fewest. Raises as ``Publisher.open``."""
        return self._least_busy().open(transfer, route, waits)

    def _least_busy(self) -> Publisher:
        def order(publisher: Publisher) -> tuple[bool, bool, int]:
            # One that is reconnecting takes uploads, too, but makes them wait.
            is_refusing = publisher.refusal() is not None
            return is_refusing, publisher.fault() is not None, publisher.publications

        return min(self.publishers, key=order)


def _begin_with(urls: tuple[str, ...], number: int) -> tuple[str, ...]:
    start = number % len(urls)
    return urls[start:] + urls[:start]


async def _first_up(publishers: Sequence[Publisher]) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(publisher: Publisher) -> None:
            await publisher.wait_up()
            nursery.cancel_scope.cancel()

        for publisher in publishers:
            nursery.start_soon(wait, publisher)


async def _say_nothing(_session: Session, _refusals: Refusals) -> None:
    """Verify nothing."""
