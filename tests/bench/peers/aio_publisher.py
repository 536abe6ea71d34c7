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
        try:
            async with asyncio.TaskGroup() as tasks:
                yield Upload(tasks, self._exchange, self._destination)
        except ExceptionGroup as failures:
            others = failures.split((AMQPError, OSError))[1]
            if others is not None:
                raise
            raise NotConfirmed(str(failures.exceptions[0])) from failures


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
    """Publishes what one request brought."""

    def __init__(
        self, tasks: asyncio.TaskGroup, exchange: AbstractExchange, destination: Destination
    ) -> None:
        self._tasks = tasks
        self._exchange = exchange
        self._destination = destination
        self._id = str(uuid.uuid4())
        self._free = asyncio.Semaphore(WINDOW)
        self.messages = 0

    async def publish(self, name: str, body: bytes) -> None:
        """Has one message published, when there is room in the window."""
        await self._free.acquire()
        message = aio_pika.Message(
            body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            correlation_id=self._id,
            headers={"name": name, "piece": self.messages},
        )
        self.messages += 1
        self._tasks.create_task(self._until_confirmed(message))

    async def _until_confirmed(self, message: aio_pika.Message) -> None:
        destination = self._destination
        await self._exchange.publish(
            message, destination.routing_key, mandatory=destination.mandatory
        )
        self._free.release()
