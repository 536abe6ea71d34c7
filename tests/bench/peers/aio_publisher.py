"""Confirmed uploads by aio-pika, for the servers on asyncio.

As its users have it: a robust connection, one channel in confirm mode for the whole process
(aio-pika tells confirms and returned messages apart by themselves), and ``publish``, which waits
for the confirm. The window is as many such waits at once.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractExchange
from aio_pika.exceptions import AMQPError

from tests.bench.peers.destination import WINDOW, Destination, NotConfirmed


class Broker:
    """A connection, and the exchange to publish to. Made by ``connected``."""

    def __init__(self, exchange: AbstractExchange, destination: Destination) -> None:
        self._exchange = exchange
        self._destination = destination

    @asynccontextmanager
    async def upload(self) -> AsyncIterator["Upload"]:
        """An upload; left when all of its messages are confirmed.

        Raises:
            NotConfirmed: on leaving, or early at any wait within: one of them was not.
        """
        upload = Upload(self._exchange, self._destination)
        try:
            yield upload
        finally:
            await upload.wait_settled()
        upload.raise_failure()


@asynccontextmanager
async def connected(destination: Destination) -> AsyncIterator[Broker]:
    """Connects, and closes the connection in the end."""
    connection = await aio_pika.connect_robust(destination.url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange: AbstractExchange = channel.default_exchange
        if destination.exchange:
            exchange = await channel.get_exchange(destination.exchange, ensure=False)
        yield Broker(exchange, destination)


class Upload:
    """Publishes what one request brought.

    What has begun to be published is never cancelled, as a TaskGroup would after a failure: the
    channel is everybody's, and aiormq closes it then.
    """

    def __init__(self, exchange: AbstractExchange, destination: Destination) -> None:
        self._exchange = exchange
        self._destination = destination
        self._id = str(uuid.uuid4())
        self._free = asyncio.Semaphore(WINDOW)
        self._unconfirmed: set[asyncio.Task[object]] = set()
        self._failure: BaseException | None = None
        self.messages = 0

    async def publish(self, name: str, body: bytes) -> None:
        """Has one message published, when there is room in the window. Raises NotConfirmed."""
        await self._free.acquire()
        self.raise_failure()
        message = aio_pika.Message(
            body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            correlation_id=self._id,
            headers={"name": name, "piece": self.messages},
        )
        self.messages += 1
        destination = self._destination
        task: asyncio.Task[object] = asyncio.create_task(
            self._exchange.publish(
                message, destination.routing_key, mandatory=destination.mandatory
            )
        )
        self._unconfirmed.add(task)
        task.add_done_callback(self._settle)

    async def wait_settled(self) -> None:
        """Returns when each message is confirmed or has failed."""
        if self._unconfirmed:
            await asyncio.wait(self._unconfirmed)

    def raise_failure(self) -> None:
        """Raises NotConfirmed if a message has failed, or what is no failure of the broker's."""
        if isinstance(self._failure, AMQPError | OSError):
            raise NotConfirmed(str(self._failure)) from self._failure
        if self._failure is not None:
            raise self._failure

    def _settle(self, task: asyncio.Task[object]) -> None:
        self._unconfirmed.discard(task)
        self._failure = self._failure or task.exception()
        self._free.release()
