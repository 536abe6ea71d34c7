"""A queue consumed into a directory, for as long as it takes: the loop of ``relay receive``.

One consumer on one channel, with manual acknowledgements. The network is trio's, the disk a worker
thread's, a batch at a time, so that heartbeats go on while a disk is slow. A lost connection comes
back by itself. Which deliveries may be acked is ``Receiver``'s decision, where bytes go
``FileSink``'s; what a transfer is, this module does not know.
"""

import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from signal import SIGINT, SIGTERM
from typing import Final, TypeVar

import pika.exceptions
import trio

from relay.broker.connect import Connector, backoff
from relay.broker.session import translate
from relay.errors import BrokerUnavailable
from relay.receiver import Settlement
from relay.receiver.commands import Commands
from relay.receiver.console import say as _say
from relay.receiver.dead_letters import DeadLetters, DeadLettersLost, Letter, NoDeadLetterQueue
from relay.receiver.files import STAGING, OutputInUse
from relay.receiver.intake import Intake
from relay.receiver.link import HELD_MAX, Delivery, Link, OneChannel
from relay.receiver.offsets import OffsetFile
from relay.receiver.operations import Operations
from relay.receiver.options import PREFETCH_MAX, Options
from relay.receiver.room import NO_ROOM, wait_for_room
from relay.receiver.stream_offset import AnotherStream, StreamOffset

LINGER: Final = 0.005
"""Seconds a batch that is not full waits for more, because each costs the disk a sync or two."""

IDLE: Final = 1.0
"""Seconds between two looks at what has expired while nothing comes."""

STDOUT_GRACE: Final = 2.0
"""Seconds for which a reader of standard output that reads nothing can put off the end."""

OPEN_TIMEOUT: Final = 15.0
"""Seconds from a stream to the broker to the first delivery being possible."""

CLAIM_INTERVAL: Final = 1.0
"""Seconds between two attempts to claim a directory that another receiver has."""

FILES_PER_FRAME: Final = 4
"""What a frame that is a whole transfer makes: a directory, a part, a journal, a receipt."""

DEFAULT_FRAME_SIZE: Final = 131064
"""Bytes that frames have if nobody says otherwise; until one was seen."""

_FATAL: Final = (
    pika.exceptions.ProbableAuthenticationError,
    pika.exceptions.ProbableAccessDeniedError,
    pika.exceptions.AuthenticationError,
    pika.exceptions.IncompatibleProtocolError,
)
"""Ends of a connection after which the next attempt would end likewise."""

_NOT_ALLOWED: Final = 530
"""AMQP's reply code for, among others, a virtual host that does not exist."""

_Result = TypeVar("_Result")


class Consumer:
    """Connects, consumes, reconnects, until there is a reason to stop."""

    def __init__(
        self,
        connector: Connector,
        intake: Intake,
        options: Options,
        commands: Commands | None,
    ) -> None:
        (self._broker,) = connector.brokers
        self._connector = connector
        self._intake = intake
        self._options = options
        self._prefetch = min(max(options.prefetch, 2), PREFETCH_MAX)
        self._offset = StreamOffset(
            OffsetFile(options.output / STAGING),
            f"{self._broker.virtual_host}/{options.queue}",
            options.begin,
            _say,
        )
        self._operations = Operations(
            options.operation,
            lines=sys.stderr if options.storage.stdout else sys.stdout,
            commands=commands,
        )
        self._working = trio.Lock()
        self._largest = 0
        self._full: OSError | None = None
        self._futile = 0
        self._failed = False
        self._attempt = 0

    async def run(self) -> int:
        """Returns the exit code."""
        await self._operations.open()
        with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._operations.run)
                nursery.start_soon(self._stop_on_signal, signals, nursery.cancel_scope)
                await self._keep_consuming()
                if not self._failed:
                    await self._operations.finish()
                    self._failed = self._operations.given_up > 0
                self._operations.stopping()
                nursery.cancel_scope.cancel()
        done = self._intake.is_complete and not self._operations.due
        unmet = self._options.count is not None and not done
        return 1 if self._failed or unmet else 0

    async def _stop_on_signal(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        await anext(signals)
        self._operations.stopping()
        # Let a batch be settled; without end only if none can wait for a reader.
        with trio.move_on_after(STDOUT_GRACE):
            await self._working.acquire()
        scope.cancel()

    async def _keep_consuming(self) -> None:
        said = ""
        while await self._open_output() and not self._intake.is_complete:
            await self._operations.wait_to_resume()
            reason = await self._consume_once()
            if self._full is not None:
                await self._wait_for_room(self._full)
                continue
            if reason is None:
                return
            if self._operations.paused:
                continue
            self._operations.idle(reason)
            # Once per change: a broker that is away for a night is not worth a line a minute.
            if reason != said or self._attempt == 0:
                _say(f"{reason}; trying again until it works")
                said = reason
            # Jitter, not secrecy.
            await trio.sleep(backoff(self._attempt, random.random()))  # noqa: S311
            self._attempt += 1
            self._operations.figures.reconnects += 1

    async def _open_output(self) -> bool:
        """Claim the directory, when there is room in it. False if that cannot be."""
        said = False
        while True:
            try:
                await self._work(self._intake.open)
                await self._operations.take_up()
                return True
            except OutputInUse as exc:
                if not self._options.wait:
                    self._fail(str(exc))
                    return False
                self._operations.idle(str(exc))
                if not said:
                    _say(f"{exc}; waiting until it ends")
                    said = True
                await trio.sleep(CLAIM_INTERVAL)
            except OSError as exc:
                if exc.errno not in NO_ROOM:
                    self._fail(str(exc))
                    return False
                await self._wait_for_room(exc)

    async def _consume_once(self) -> str | None:
        """One connection. Returns why there must be another, None if there must not."""
        queue, dead_letter = self._options.queue, self._options.dead_letter
        try:
            offset = await self._offset.load()
        except (OSError, ValueError) as exc:
            self._fail(f"{self._offset.path}: {exc}")
            return None
        async with AsyncExitStack() as stack:
            try:
                streams = [
                    await stack.enter_async_context(await self._connector.open(self._broker))
                    for _ in range(1 if dead_letter is None else 2)
                ]
            except BrokerUnavailable as exc:
                return str(exc)
            link = Link(
                self._broker,
                streams[0],
                queue,
                self._prefetch,
                offset=offset,
                acks_rejected=dead_letter is not None,
            )
            letters = None
            if dead_letter is not None:
                letters = DeadLetters(self._broker, streams[1], dead_letter, queue)
            return await self._consume(link, letters)

    async def _consume(self, link: Link, letters: DeadLetters | None) -> str | None:
        async with trio.open_nursery() as nursery:
            try:
                if letters is not None:
                    # Before anything is delivered: RabbitMQ 4 counts deliveries made in vain.
                    nursery.start_soon(letters.run)
                    if not await _opened(letters, lambda: letters.ready):
                        return self._after(letters.error, opened=letters.ready)
                    nursery.start_soon(_end_with, letters, link)
                    nursery.start_soon(_end_with, link, letters)
                nursery.start_soon(link.run)
                if not await _opened(link, lambda: link.consuming):
                    return self._after(link.error, opened=link.consuming)
                self._operations.consuming()
                if link.is_stream:
                    await self._offset.find(link, OPEN_TIMEOUT)
                await self._take_in(link, letters)
                return self._outcome(link, letters)
            except AnotherStream as exc:
                self._fail(str(exc))
                return None
            finally:
                self._largest = max(self._largest, link.largest)
                with trio.CancelScope(shield=True):
                    await link.close()
                    if letters is not None:
                        await letters.close()

    async def _take_in(self, link: Link, letters: DeadLetters | None) -> None:
        """Write what comes, and answer for it, until there is a reason to stop."""
        batch_size = self._prefetch // 2
        quiet_since = trio.current_time()
        while link.error is None:
            with trio.move_on_after(IDLE):
                await link.wait_until(lambda: bool(link.deliveries))
            with trio.move_on_after(LINGER):
                await link.wait_until(lambda: len(link.deliveries) >= batch_size)
            batch = link.take(batch_size)
            if batch:
                quiet_since = trio.current_time()
                self._offset.see(batch[0])
            self._operations.holds(len(batch) + len(link.deliveries))
            began = trio.current_time()
            try:
                work = await self._work(partial(self._intake.work, batch))
                fed = batch[: work.fed]
                self._operations.settled(
                    work.settlement,
                    [len(delivery.body) for delivery in fed],
                    trio.current_time() - began,
                    open_transfers=self._intake.open_transfers,
                )
                await self._operations.take_up()
                if letters is not None and not await self._bury(letters, fed, work.settlement):
                    return
                if link.is_stream:
                    await self._offset.note(fed)
            except OSError as exc:
                self._stop_for(exc)
                return
            link.put_back(batch[work.fed :])
            link.settle(fed, work.settlement)
            self._attempt = self._futile = 0
            if self._intake.is_complete or self._is_quiet(trio.current_time() - quiet_since):
                return
            if (reason := await self._operations.wait_room()) is not None:
                link.drop(reason)

    async def _work(self, work: Callable[[], _Result]) -> _Result:
        """Have the intake do something, in a thread.

        A write to standard output may never end. To abandon it is a crash, which what is staged
        survives.
        """
        async with self._working:
            stdout = self._options.storage.stdout
            return await trio.to_thread.run_sync(work, abandon_on_cancel=stdout)

    async def _bury(
        self, letters: DeadLetters, fed: list[Delivery], settlement: Settlement
    ) -> bool:
        """Put copies of what is rejected where people find them. False if that failed."""
        rejected = [
            Letter(delivery, settlement.reject[delivery.tag])
            for delivery in fed
            if delivery.tag in settlement.reject
        ]
        try:
            await letters.publish_all(rejected, _say)
        except DeadLettersLost:
            return False
        except NoDeadLetterQueue as exc:
            self._fail(f"--dead-letter: {exc}; what was not saved stays in the queue")
            return False
        return True

    def _stop_for(self, error: OSError) -> None:
        if error.errno in NO_ROOM:
            self._full = error
        else:
            self._fail(f"{error}; what was not saved stays in the queue")

    async def _wait_for_room(self, error: OSError) -> None:
        """Let go of everything, and hold no connection, until the disk has room again.

        A connection without room would have the broker deliver in vain again and again, and
        RabbitMQ 4 drops from a quorum queue what it has delivered 20 times.
        """
        self._full = None
        await trio.to_thread.run_sync(self._intake.discard)
        frames = 2 * (self._prefetch // 2)
        size = min(frames * (self._largest or DEFAULT_FRAME_SIZE), HELD_MAX)
        _say(f"no room in {self._options.output}: {error.strerror}; waiting")
        self._operations.idle(f"no room in {self._options.output}")
        await wait_for_room(
            self._options.output, size, frames * FILES_PER_FRAME, futile=self._futile
        )
        self._futile += 1
        _say(f"there is room in {self._options.output} again; going on")

    def _is_quiet(self, seconds: float) -> bool:
        idle_exit = self._options.idle_exit
        if idle_exit is None or seconds < idle_exit:
            return False
        if self._intake.open_transfers:
            _say(
                f"{self._intake.open_transfers} transfers are incomplete;"
                " the next receiver with this directory goes on with them"
            )
        return True

    def _outcome(self, link: Link, letters: DeadLetters | None) -> str | None:
        """Why there must be another connection after this one; None if there must not."""
        if self._failed or link.error is None:
            return None
        if letters is not None and letters.error is not None and not letters.dropped:
            return self._after(letters.error, opened=False)
        if link.is_paused:
            # It took too long over frames this large: next time fewer are on their way.
            self._prefetch = max(2, min(self._prefetch, HELD_MAX // link.largest))
        return self._after(link.error, opened=True)

    def _after(self, error: Exception | None, *, opened: bool) -> str | None:
        """What follows from the end of a connection: another attempt, or failure."""
        if error is None:
            return "no answer from the broker"
        reason = str(translate(error))
        refused = isinstance(error, pika.exceptions.ChannelClosedByBroker) and not opened
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


async def _opened(channel: OneChannel, ready: Callable[[], bool]) -> bool:
    """Whether it becomes ready before its end, and in time."""
    with trio.move_on_after(OPEN_TIMEOUT):
        await channel.wait_until(ready)
    return channel.error is None and ready()


async def _end_with(first: OneChannel, second: OneChannel) -> None:
    await first.wait_until(lambda: False)
    second.drop("the other connection has ended")
