"""``relay receive``: a queue consumed into a directory, for as long as it takes.

One consumer on one channel, with manual acknowledgements. The network is trio's, the disk a worker
thread's, a batch at a time, so that heartbeats go on while a disk is slow. A lost connection comes
back by itself. Which deliveries may be acked is ``Receiver``'s decision, where bytes go
``FileSink``'s; what a transfer is, this module does not know.
"""

import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Final

import pika.exceptions
import trio

from relay.broker.connect import Connector, backoff
from relay.broker.session import translate
from relay.config import AmqpConfig, ConfigError, parse_amqp_url
from relay.errors import BrokerUnavailable
from relay.receiver import Receiver, Settlement
from relay.receiver.files import FileSink, OutputInUse
from relay.receiver.link import Delivery, Link

PREFETCH: Final = 128
"""Unacked deliveries: 16 MiB of frames of the default size. Half of it is one batch on disk."""

PREFETCH_MAX: Final = 2000
"""What RabbitMQ allows on quorum queues."""

LINGER: Final = 0.005
"""Seconds a batch that is not full waits for more, because each costs the disk a sync or two."""

IDLE: Final = 1.0
"""Seconds between two looks at what has expired while nothing comes."""

OPEN_TIMEOUT: Final = 15.0
"""Seconds from a stream to the broker to the first delivery being possible."""

_FATAL: Final = (
    pika.exceptions.ProbableAuthenticationError,
    pika.exceptions.ProbableAccessDeniedError,
    pika.exceptions.AuthenticationError,
    pika.exceptions.IncompatibleProtocolError,
)
"""Ends of a connection after which the next attempt would end likewise."""

_NOT_ALLOWED: Final = 530
"""AMQP's reply code for, among others, a virtual host that does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``relay receive`` is asked for.

    Attributes:
        url: of the broker, amqp or amqps.
        queue: must exist.
        output: a directory, made if it is missing; one receiver at a time.
        count: transfers after which it is done; None for no end.
        prefetch: deliveries to hold unacked, 2 to PREFETCH_MAX.
        ca_file: as ``[amqp]`` has it, and so the next two.
        certificate_file: a client certificate.
        key_file: its key.
    """

    url: str
    queue: str
    output: Path
    count: int | None = None
    prefetch: int = PREFETCH
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""


def receive(options: Options) -> int:
    """Write the transfers that come from a queue into directories.

    One line on standard output for each, problems on standard error. Ends after ``count``
    transfers, or on SIGINT or SIGTERM, whose handlers it takes over: call it from the main thread.

    Returns:
        The exit code: 0 for success, also when a signal ended it; 1 if it failed, or was stopped
        before ``count`` was reached.

    Raises:
        ConfigError: the URL or a file for TLS cannot be used.
    """
    connector = _connector(options)
    try:
        sink = FileSink(options.output)
    except (OutputInUse, OSError) as exc:
        _say(str(exc))
        return 1
    try:
        return trio.run(_Consumer(connector, Receiver(sink), options).run)
    finally:
        sink.close()


def _connector(options: Options) -> Connector:
    try:
        parse_amqp_url(options.url)
    except ValueError as exc:
        raise ConfigError(f"--amqp: must be {exc}") from exc
    config = AmqpConfig(
        urls=(options.url,),
        ca_file=options.ca_file,
        certificate_file=options.certificate_file,
        key_file=options.key_file,
    )
    return Connector(config, name="relay receive", naming=_flag)


class _Consumer:
    """Connects, consumes, reconnects, until there is a reason to stop."""

    def __init__(self, connector: Connector, receiver: Receiver, options: Options) -> None:
        self._connector = connector
        self._receiver = receiver
        self._queue = options.queue
        self._count = options.count
        self._prefetch = min(max(options.prefetch, 2), PREFETCH_MAX)
        self._failed = False
        self._attempt = 0

    async def run(self) -> int:
        """Returns the exit code."""
        with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
                await self._keep_consuming()
                nursery.cancel_scope.cancel()
        unmet = self._count is not None and not self._is_complete()
        return 1 if self._failed or unmet else 0

    async def _keep_consuming(self) -> None:
        said = ""
        while (reason := await self._consume_once()) is not None:
            # Once per change: a broker that is away for a night is not worth a line a minute.
            if reason != said or self._attempt == 0:
                _say(f"{reason}; trying again until it works")
                said = reason
            # Jitter, not secrecy.
            await trio.sleep(backoff(self._attempt, random.random()))  # noqa: S311
            self._attempt += 1

    async def _consume_once(self) -> str | None:
        """One connection. Returns why there must be another, None if there must not."""
        (broker,) = self._connector.brokers
        try:
            stream = await self._connector.open(broker)
        except BrokerUnavailable as exc:
            return str(exc)
        link = Link(broker, stream, self._queue, self._prefetch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            try:
                return await self._consume(link)
            finally:
                with trio.CancelScope(shield=True):
                    await link.close()

    async def _consume(self, link: Link) -> str | None:
        with trio.move_on_after(OPEN_TIMEOUT):
            await link.wait_until(lambda: link.consuming)
        if link.error is None and not link.consuming:
            return "no answer from the broker"
        batch_size = self._prefetch // 2
        while link.error is None:
            with trio.move_on_after(IDLE):
                await link.wait_until(lambda: bool(link.deliveries))
            with trio.move_on_after(LINGER):
                await link.wait_until(lambda: len(link.deliveries) >= batch_size)
            batch = link.take(batch_size)
            try:
                settlement = await trio.to_thread.run_sync(self._work, batch)
                _report(settlement)
            except OSError as exc:
                self._fail(f"{exc}; what was not saved stays in the queue")
                return None
            link.settle(settlement)
            self._attempt = 0
            if self._is_complete():
                return None
        return self._after(link.error, consuming=link.consuming)

    def _work(self, batch: list[Delivery]) -> Settlement:
        """In a worker thread: no more than one at a time."""
        for delivery in batch:
            if self._is_complete():
                break
            properties = delivery.properties
            self._receiver.feed(
                delivery.tag,
                app_id=properties.app_id,
                type=properties.type,
                correlation_id=properties.correlation_id,
                timestamp=properties.timestamp,
                headers=properties.headers,
                body=delivery.body,
            )
        return self._receiver.settle()

    def _is_complete(self) -> bool:
        return self._count is not None and self._receiver.delivered >= self._count

    def _after(self, error: Exception, *, consuming: bool) -> str | None:
        """What follows from the end of a connection: another attempt, or failure."""
        reason = str(translate(error))
        refused = isinstance(error, pika.exceptions.ChannelClosedByBroker) and not consuming
        not_allowed = (
            isinstance(error, pika.exceptions.ConnectionClosedByBroker)
            and error.reply_code == _NOT_ALLOWED
        )
        if refused or not_allowed or isinstance(error, _FATAL):
            self._fail(reason)
            return None
        return reason

    def _fail(self, reason: str) -> None:
        _say(reason)
        self._failed = True


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
        return


def _report(settlement: Settlement) -> None:
    for problem in settlement.problems:
        _say(str(problem))
    for delivered in settlement.delivered:
        totals = delivered.totals
        print(
            f"transfer {delivered.transfer.id}  parts {totals.parts}  bytes {totals.bytes}"
            f"  {delivered.where}",
            flush=True,
        )


def _flag(key: str) -> str:
    return "--amqp" if key == "urls" else "--" + key.replace("_", "-")


def _say(text: str) -> None:
    print(f"relay receive: {text}", file=sys.stderr, flush=True)
