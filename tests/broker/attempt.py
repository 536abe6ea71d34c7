"""The publisher on a scripted network, and uploads to it as the server's handler makes them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio
from trio.testing import wait_all_tasks_blocked

from relay.broker.pool import Pool
from relay.broker.publication import Publication
from relay.broker.publisher import Publisher, Verify, log_refusals
from relay.config import AmqpConfig, RouteConfig
from relay.errors import RelayError
from relay.model import Frame, PartHead, Transfer
from relay.protocol.framing import Framer
from relay.transfer import new_transfer_id
from tests.scripted_broker import Network, Published, ScriptedBroker, patience

FRAME = 4096
"""Bytes of each frame, by default."""

ROUTE = RouteConfig(name="default", exchange="ex", routing_key="key")


def frames_of(transfer: Transfer, count: int, size: int = FRAME) -> list[Frame]:
    """``count`` frames of ``size`` bytes, each with a content of its own; the last commits."""
    framer = Framer(transfer, frame_size=size)
    frames = [*framer.start_part(PartHead(filename="f"))]
    for seq in range(count):
        frames += framer.feed(seq.to_bytes(4, "big") * (size // 4))
    framer.end_part()
    commit, _ = framer.finish()
    return [*frames, commit]


class Attempt:
    """One upload. ``Relay.upload`` makes and runs it.

    Attributes:
        frames: all it consists of, the commit frame last.
        sent: how many the publication has taken.
        publication: None until it has one.
        scope: cancels it.
        task: what runs it.
    """

    def __init__(
        self,
        publisher: Publisher | Pool,
        count: int,
        *,
        size: int = FRAME,
        route: RouteConfig = ROUTE,
        pause_before: int | None = None,
    ) -> None:
        """``pause_before``: the frame that the client does not send before ``go_on``."""
        self.transfer = Transfer(id=new_transfer_id(), began=1, route=route.name)
        self.frames = frames_of(self.transfer, count, size)
        self.sent = 0
        self.publication: Publication | None = None
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self._publisher = publisher
        self._route = route
        self._pause_before = pause_before
        self._go_on = trio.Event()
        self._client_error: RelayError | None = None
        self._error: RelayError | None = None
        self._over = trio.Event()

    async def run(self) -> None:
        """Upload. RelayErrors are kept for ``outcome``; what else is raised is a bug."""
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope:
                async with self._publisher.open(self.transfer, self._route) as publication:
                    self.publication = publication
                    await self._send_all(publication)
        except RelayError as exc:
            self._error = exc
        finally:
            self._over.set()

    async def _send_all(self, publication: Publication) -> None:
        try:
            for frame in self.frames:
                if frame.seq == self._pause_before:
                    await self._go_on.wait()
                    if self._client_error is not None:
                        raise self._client_error
                if frame.commit is None:
                    await publication.send(frame)
                else:
                    await publication.commit(frame)
                self.sent += 1
        except BaseException as exc:
            publication.abort(exc.code if isinstance(exc, RelayError) else "cancelled")
            raise

    def go_on(self, error: RelayError | None = None) -> None:
        """End the client's pause, with more frames or with an error."""
        self._client_error = error
        self._go_on.set()

    @property
    def is_over(self) -> bool:
        """Whether it has come to an end."""
        return self._over.is_set()

    async def outcome(self) -> RelayError | None:
        """Wait for its end: None if it is committed, else the error."""
        await self._over.wait()
        return self._error

    def is_of(self, message: Published) -> bool:
        """Whether a message belongs to this upload."""
        return message.correlation_id == self.transfer.id


class Relay:
    """What a test has in hand: the publisher, the network it is on, uploads to it."""

    def __init__(self, publisher: Publisher, network: Network, nursery: trio.Nursery) -> None:
        self.publisher = publisher
        self.nursery = nursery
        self.attempts: list[Attempt] = []
        self._network = network

    async def broker(self) -> ScriptedBroker:
        """The next connection that the publisher makes, when both sides are ready."""
        broker = await self._network.accept()
        await broker.handshake()
        await wait_all_tasks_blocked()
        return broker

    def attempt(
        self,
        count: int,
        *,
        size: int = FRAME,
        route: RouteConfig = ROUTE,
        pause_before: int | None = None,
    ) -> Attempt:
        """An upload, begun. The arguments are Attempt's."""
        attempt = Attempt(self.publisher, count, size=size, route=route, pause_before=pause_before)
        self.attempts.append(attempt)
        self.nursery.start_soon(attempt.run)
        return attempt

    def assert_nothing_is_held(self) -> None:
        """When all uploads are over and all messages settled, nothing is left of them."""
        assert self.publisher.window.taken == 0
        assert self.publisher.window.waiting == 0


@asynccontextmanager
async def running(
    network: Network,
    *routes: RouteConfig,
    verify: Verify = log_refusals,
    **config: float | tuple[str, ...],
) -> AsyncGenerator[Relay, None]:
    """A publisher that runs for the length of the block, without heartbeats unless asked for.

    ``config`` are keys of AmqpConfig.
    """
    amqp = AmqpConfig(**{"heartbeat": 0.0, **config})  # type: ignore[arg-type]
    by_name = {route.name: route for route in routes or (ROUTE,)}
    publisher = Publisher(amqp, by_name, connect=network.connect, verify=verify)
    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publisher.run)
            yield Relay(publisher, network, nursery)
            nursery.cancel_scope.cancel()


def seqs(messages: list[Published]) -> list[int]:
    """The ``seq`` of each message."""
    return [message.seq for message in messages]
