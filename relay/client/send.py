"""``relay send``: which transfers, and each of them tried until it is safe or hopeless.

Each transfer has a key of its own that all its tries carry, so that it counts once however often
it was sent. One transfer after the other, each try on a connection of its own. What bytes there
are and what answers mean, other modules know.
"""

import random
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from http import HTTPStatus
from signal import SIGINT, SIGTERM
from typing import Any, Final

import trio

from relay.backoff import delay
from relay.client.answers import Trouble, check, receipt_of, trouble_of
from relay.client.endpoint import Endpoint, parse_url, read_token
from relay.client.exchange import Answer, Lost, Request, Unsendable, Unusable, exchange
from relay.client.report import Report
from relay.client.source import STDIN, Item, Payload, Reading, find
from relay.config import ConfigError

BACKOFF_FIRST: Final = 0.5
BACKOFF_LAST: Final = 30.0
"""Seconds between tries: doubled each time, then jittered; more if the server asks for it."""

DEFAULT_FIELD: Final = "file"

_KEY: Final = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for; ``relay send --help`` has each flag."""

    files: Sequence[str]
    to: str
    unix_socket: str = ""
    name: str | None = None
    together: bool = False
    filename: str | None = None
    digest: str | None = None
    key: str | None = None
    retry_for: float = 3600.0
    token_file: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    as_json: bool = False
    is_quiet: bool = False


def send(options: Options) -> int:
    """Send what the options name. Takes over SIGINT and SIGTERM: call it from the main thread.

    Returns:
        The exit code: 0 if all was sent, 1 if anything was not, 128 and the number of a signal.

    Raises:
        ConfigError: nothing was sent, because of what the options say.
    """
    endpoint = replace(
        parse_url(options.to),
        unix_socket=options.unix_socket,
        token_file=options.token_file,
        ca_file=options.ca_file,
        certificate_file=options.certificate_file,
        key_file=options.key_file,
    )
    endpoint.check()
    if options.filename is not None and STDIN not in options.files:
        raise ConfigError("--filename: is for standard input (-)")
    items = find(options.files, stdin_name=options.filename)
    jobs = plan(items, options)
    sizes = [item.size for item in items if item.size is not None]
    total = sum(sizes) if len(sizes) == len(items) else None
    with Report(total=total, as_json=options.as_json, is_quiet=options.is_quiet) as report:
        sender = Sender(endpoint, report, retry_for=options.retry_for)
        return trio.run(sender.run, jobs)


@dataclass(slots=True, kw_only=True)
class Job:
    """One transfer to be made.

    Attributes:
        label: what its user knows it as.
        about: the same for programs.
        payload: its body.
        key: what makes its tries one.
        tries: begun so far.
        is_done: it is safe, or given up.
    """

    label: str
    about: dict[str, object]
    payload: Payload
    key: str
    tries: int = 0
    is_done: bool = False


def plan(items: Sequence[Item], options: Options) -> list[Job]:
    """The transfers that items are sent as.

    Raises:
        ConfigError: the key is none, or not for so many.
    """
    groups = [list(items)] if options.together else [[item] for item in items]
    if options.key is not None and len(groups) > 1:
        raise ConfigError("--key: is for one transfer: one file, or --together")
    if options.key is not None and not _KEY.fullmatch(options.key):
        raise ConfigError('--key: must be 1 to 255 visible ASCII characters, none of " , ; \\')
    field = DEFAULT_FIELD if options.together and options.name is None else options.name
    wanted = () if options.digest is None else (options.digest,)
    jobs = []
    for group in groups:
        paths = [item.path for item in group]
        others = len(paths) - 1
        jobs.append(
            Job(
                label=paths[0] + (f" and {others} more" if others else ""),
                about={"files": paths} if options.together else {"file": paths[0]},
                payload=Payload(group, form_field=field, wanted=wanted),
                key=options.key or str(uuid.uuid4()),
            )
        )
    return jobs


class Sender:
    """Sends transfers to one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        report: Report,
        *,
        retry_for: float,
        connect: Callable[[], Awaitable[trio.abc.Stream]] | None = None,
    ) -> None:
        """``retry_for``: seconds to go on for while nothing succeeds. ``connect``: for tests."""
        self._endpoint = endpoint
        self._report = report
        self._retry_for = retry_for
        self._connect = connect or endpoint.open
        # Of all transfers together: a server that is away is away for each of them.
        self._failing_since: float | None = None
        self._failures = 0

    async def run(self, jobs: Sequence[Job]) -> int:
        """Send them all. Returns the exit code."""
        all_sent = True
        signal_numbers: list[int] = []
        with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope, signal_numbers)
                for job in jobs:
                    all_sent &= await self.send(job)
                nursery.cancel_scope.cancel()
        if unfinished := [job for job in jobs if not job.is_done]:
            self._report.interrupted([(job.label, self._about(job)) for job in unfinished])
            return 128 + signal_numbers[0]
        return 0 if all_sent else 1

    async def send(self, job: Job) -> bool:
        """Send one, and report what came of it. Returns whether it is safe."""
        try:
            receipt, is_replay = await self._deliver(job)
        except Trouble as trouble:
            self._report.failed(job.label, self._about(job), trouble.problem)
            job.is_done = True
            return False
        about = self._about(job) | {"replayed": is_replay}
        self._report.sent(job.label, about, receipt)
        job.is_done = True
        return True

    def _about(self, job: Job) -> dict[str, object]:
        return {**job.about, "key": job.key, "tries": job.tries}

    async def _deliver(self, job: Job) -> tuple[dict[str, Any], bool]:
        """Try until it is safe. Returns the receipt, and whether an earlier try had made it.

        Raises:
            Trouble: it is not, or other bytes are.
        """
        try:
            await job.payload.prepare()
        except Unsendable as exc:
            raise Trouble("unsendable", str(exc)) from exc
        said = None
        while True:
            job.tries += 1
            try:
                delivered = await self._try(job)
            except Trouble as trouble:
                seconds = self._pause(job, trouble)
                # Once per change: a server that is away for an hour is not worth a line a try.
                if trouble.reason != said:
                    said = trouble.reason
                    self._report.retrying(job.label, trouble.problem, self._retry_for)
                await trio.sleep(seconds)
            else:
                self._failing_since = None
                self._failures = 0
                return delivered

    def _pause(self, job: Job, trouble: Trouble) -> float:
        """Seconds until the next try. Raises ``trouble`` if there is to be none."""
        if trouble.is_final:
            raise trouble
        if job.payload.is_spent:
            trouble.detail += "; standard input cannot be read again"
            raise trouble
        now = trio.current_time()
        if self._failing_since is None:
            self._failing_since = now
        # Jitter, not secrecy.
        jitter = random.random()  # noqa: S311
        backoff = delay(self._failures, jitter, first=BACKOFF_FIRST, last=BACKOFF_LAST)
        seconds = max(trouble.retry_after, backoff)
        self._failures += 1
        if now + seconds > self._failing_since + self._retry_for:
            trouble.detail += f" (tries: {job.tries})"
            raise trouble
        return seconds

    async def _try(self, job: Job) -> tuple[dict[str, Any], bool]:
        payload = job.payload
        with closing(payload.open()) as reading:
            progress = _Progress(self._report, reading)
            try:
                answer = await self._exchange(job, reading, progress)
                if answer.status != HTTPStatus.CREATED:
                    raise trouble_of(answer)
                receipt = receipt_of(answer)
                # A replayed receipt comes before the body, and is compared with it all the same.
                while await reading.read():
                    progress.update()
                    await trio.lowlevel.checkpoint()
                check(receipt, payload.sent(reading), payload.wanted)
            except Trouble:
                progress.undo()
                raise
            except Lost as exc:
                progress.undo()
                raise Trouble("connection-lost", str(exc), is_final=False) from exc
            except Unusable as exc:
                raise Trouble("unusable-server", str(exc)) from exc
            except Unsendable as exc:
                raise Trouble("unsendable", str(exc)) from exc
        return receipt, answer.fields.get("idempotency-replayed") == "true"

    async def _exchange(self, job: Job, reading: Reading, progress: "_Progress") -> Answer:
        endpoint, payload = self._endpoint, job.payload
        fields = [*payload.fields, ("Idempotency-Key", job.key)]
        if endpoint.token_file:
            # Anew for each try, so that a token may be changed meanwhile.
            try:
                fields.append(("Authorization", f"Bearer {read_token(endpoint.token_file)}"))
            except ConfigError as exc:
                raise Trouble("no-token", str(exc), is_final=False) from exc
        request = Request(
            target=endpoint.target, host=endpoint.authority, fields=fields, length=payload.length
        )
        stream = await self._connect()
        try:
            return await exchange(stream, request, reading.read, progress.update)
        finally:
            await trio.aclose_forcefully(stream)


class _Progress:
    """The share of one try in what is shown."""

    def __init__(self, report: Report, reading: Reading) -> None:
        self._report = report
        self._reading = reading
        self._shown = 0

    def update(self) -> None:
        self._show(self._reading.size)

    def undo(self) -> None:
        self._show(0)

    def _show(self, size: int) -> None:
        self._report.moved(size - self._shown)
        self._shown = size


async def _cancel_on_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, numbers: list[int]
) -> None:
    async for number in signals:
        numbers.append(number)
        scope.cancel()
        return
