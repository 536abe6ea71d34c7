"""A command of the user's for each delivered transfer, until it succeeds or is given up.

Which commands are due is kept on disk by whoever stores the transfers, so that it survives a crash:
at least once each, in the order of delivery. A transfer is acked long before, so that no timeout of
the broker's counts how long a command takes. What a queue is, this module does not know.
"""

import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from relay.config import ConfigError
from relay.receiver.figures import CommandFigures
from relay.receiver.receipts import read_head, transfer_of

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0
"""Seconds between a command's failure and its next try, doubling from one to the other."""

STOP_GRACE: Final = 10.0
"""Seconds from SIGTERM to SIGKILL for the commands that run when the receiver ends."""

_DISK_PAUSE: Final = 5.0
"""Seconds between attempts to note a result on a disk that takes nothing."""

_STDERR: Final = 2


class Due(Protocol):
    """A delivered transfer whose command has yet to succeed."""

    @property
    def transfer_id(self) -> str:
        """The transfer."""

    @property
    def where(self) -> Path:
        """The path of what was delivered."""

    @property
    def receipt(self) -> Path:
        """The receipt's path."""

    @property
    def tries(self) -> int:
        """Tries that failed so far."""


class Work(Protocol):
    """Remembers across crashes what is due.

    Called by one thread at a time, also while another one writes transfers. Whatever cannot be
    noted now is an OSError.
    """

    def pending(self) -> Sequence[Due]:
        """What is due, the oldest first."""

    def done(self, transfer_id: str) -> None:
        """The command has succeeded."""

    def note_try(self, transfer_id: str) -> None:
        """The command has failed, and will be tried again."""

    def give_up(self, transfer_id: str, reason: str) -> None:
        """The command has failed for the last time: put the transfer into quarantine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run, and how.

    Attributes:
        arguments: the program's path and its arguments.
        directory: where it runs.
        tries: after so many failures it is given up; 0 for never.
        jobs: how many run at a time.
    """

    arguments: tuple[str, ...]
    directory: Path
    tries: int = 5
    jobs: int = 1


def split(text: str) -> tuple[str, ...]:
    """A command line's words, as a shell splits them, the first one the program's full path.

    Raises:
        ConfigError: there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(f"--exec: {exc}") from exc
    # Now, because later it would be found missing once for each transfer.
    program = shutil.which(words[0]) if words else None
    if program is None:
        raise ConfigError(f"--exec: no such program: {words[0] if words else text!r}")
    return (str(Path(program).absolute()), *words[1:])


class Commands:
    """Runs what is due; ``look`` after each delivery."""

    def __init__(
        self,
        work: Work,
        command: Command,
        tell: Callable[[str], None],
        *,
        limit: int | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``tell`` gets a line for people about each failure; ``limit``: transfers to take up."""
        self.figures = CommandFigures()
        self._work = work
        self._command = command
        self._tell = tell
        self._limit = limit
        self._chance = chance
        self._finished = 0
        self._due: set[str] = set()
        self._slots = trio.CapacityLimiter(command.jobs)
        self._disk = trio.Lock()
        self._changed = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None

    @property
    def known(self) -> int:
        """Transfers taken up so far, finished or due."""
        return self._finished + len(self._due)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run commands until cancelled, which ends those that run: they stay due."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def look(self) -> None:
        """Take up what has become due.

        Raises:
            OSError: the disk does not tell.
        """
        assert self._nursery is not None, "it runs"
        async with self._disk:
            for due in await trio.to_thread.run_sync(self._work.pending):
                if due.transfer_id not in self._due and self.known != self._limit:
                    self._due.add(due.transfer_id)
                    # Returns once it has queued up, so that the order of delivery is kept.
                    await self._nursery.start(self._see_through, due)
        self._update()

    async def wait_due(self, below: int) -> None:
        """Wait until fewer than ``below`` transfers are due."""
        while len(self._due) >= below:
            await self._changed.park()

    async def _see_through(
        self, due: Due, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        task_status.started()
        failures = due.tries
        while (problem := await self._try(due)) is not None:
            failures += 1
            of = f"transfer {due.transfer_id}: {problem}"
            if self._command.tries and failures >= self._command.tries:
                self._tell(f"{of}; given up after {failures} tries")
                self.figures.given_up += 1
                give_up = partial(self._work.give_up, due.transfer_id, problem)
                await self._note(give_up, finishes=due.transfer_id)
                return
            pause = self._pause(failures)
            self._tell(f"{of}; try {failures}, again in {pause:.0f} s")
            await self._note(partial(self._work.note_try, due.transfer_id))
            await trio.sleep(pause)
        await self._note(partial(self._work.done, due.transfer_id), finishes=due.transfer_id)

    def _pause(self, failures: int) -> float:
        doubled = FIRST_PAUSE * 2.0 ** min(failures - 1, 20)
        return min(doubled, LONGEST_PAUSE) * (0.75 + 0.5 * self._chance())

    async def _try(self, due: Due) -> str | None:
        """Run the command once, when it is its turn. Returns what went wrong."""
        async with self._slots:
            self.figures.running += 1
            try:
                status = await self._run(due)
            except OSError as exc:
                problem: str | None = f"the command cannot be run: {exc}"
            except ValueError as exc:
                problem = f"the receipt is none: {exc}"
            else:
                problem = _problem(status)
            finally:
                self.figures.running -= 1
        self.figures.results["succeeded" if problem is None else "failed"] += 1
        return problem

    async def _run(self, due: Due) -> int:
        receipt, environment = await trio.to_thread.run_sync(_prepare, due)
        try:
            ended = await trio.run_process(
                self._command.arguments,
                stdin=receipt,
                # Its output is for people; our standard output is for programs.
                stdout=_STDERR,
                check=False,
                deliver_cancel=_stop,
                cwd=self._command.directory,
                env=environment,
                # Of its own, so that Ctrl-C reaches only us and we reach all that it has started.
                process_group=0,
            )
        finally:
            os.close(receipt)
        return ended.returncode

    async def _note(self, note: Callable[[], None], *, finishes: str | None = None) -> None:
        """Have a result noted, however long the disk takes to take it."""
        said = False
        while True:
            async with self._disk:
                try:
                    await trio.to_thread.run_sync(note)
                except OSError as exc:
                    if not said:
                        self._tell(f"a command's result cannot be noted yet: {exc}")
                        said = True
                else:
                    # Within the lock: what is noted as done must not be taken up again.
                    if finishes is not None:
                        self._due.discard(finishes)
                        self._finished += 1
                        self._update()
                    return
            await trio.sleep(_DISK_PAUSE)

    def _update(self) -> None:
        self.figures.due = len(self._due)
        self._changed.unpark_all()


def _problem(status: int) -> str | None:
    if status < 0:
        return f"the command was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the command failed with exit code {status}" if status else None


def _prepare(due: Due) -> tuple[int, dict[str, str]]:
    """The receipt, opened for the command, and the command's environment.

    Raises:
        OSError: the receipt cannot be opened.
        ValueError: it is none.
    """
    with due.receipt.open("rb") as file:
        transfer = transfer_of(read_head(file))
    # What was delivered is its owner's to change: these may be anything by now.
    told = {
        "RELAY_TRANSFER": due.transfer_id,
        "RELAY_ROUTE": str(transfer.route),
        "RELAY_CLIENT": str(transfer.client or ""),
        "RELAY_WHERE": os.path.abspath(due.where),
        "RELAY_RECEIPT": os.path.abspath(due.receipt),
    }
    environment = os.environ | {name: _without_zeros(value) for name, value in told.items()}
    return os.open(due.receipt, os.O_RDONLY | os.O_CLOEXEC), environment


def _without_zeros(value: str) -> str:
    """Whoever sent it may have put in what no environment takes."""
    return value.replace("\0", "").encode(errors="replace").decode()


async def _stop(process: trio.Process) -> None:
    for number, grace in ((signal.SIGTERM, STOP_GRACE), (signal.SIGKILL, 0.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        await trio.sleep(grace)
