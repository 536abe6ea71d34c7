"""What makes a consumer a program to operate: figures, lines, systemd, and commands.

The consumer tells it what happens; it decides nothing about deliveries and knows no connection.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

import trio

from relay.receiver import Settlement, problems
from relay.receiver.admin import Admin
from relay.receiver.commands import STOP_GRACE, Command, Commands, Work, split
from relay.receiver.console import Console, say
from relay.receiver.figures import Figures
from relay.receiver.options import OperationOptions
from relay.systemd import Notifier, Rate

DUE_MAX: Final = 100
"""Transfers whose command is due: with as many, nothing more is received."""

DUE_RESUME: Final = 50
"""As few there must be before a connection is made again."""

HOLD: Final = 60.0
"""Seconds for which a connection is kept while nothing is received. Brokers close it after half an
hour, and count deliveries made in vain."""

_STOP_TIME: Final = STOP_GRACE + 10.0
"""Seconds until the last acks have been taken and the last command has been killed, with some to
spare."""


def commands(
    options: OperationOptions, work: Work, directory: Path, *, limit: int | None
) -> Commands | None:
    """The commands that are asked for, if any.

    Args:
        options: what is asked for.
        work: where due commands are kept.
        directory: where they run.
        limit: transfers after which the consumer ends.

    Raises:
        ConfigError: there is no such program.
    """
    if options.command is None:
        return None
    command = Command(
        arguments=split(options.command),
        directory=directory,
        tries=options.command_tries,
        jobs=options.command_jobs,
    )
    return Commands(work, command, say, limit=limit)


class Operations:
    """Accompanies one consumer from its start to its end."""

    def __init__(
        self,
        options: OperationOptions,
        *,
        lines: TextIO | None = None,
        commands: Commands | None = None,
    ) -> None:
        """``lines``: where there is one for each transfer; None: standard output."""
        self.figures = Figures()
        self._console = Console(lines, as_json=options.as_json, quiet=options.quiet)
        self._address = options.admin
        self._admin = Admin(self.figures)
        self._systemd = Notifier()
        self._rate = Rate()
        self.paused = False
        """Whether ``wait_room`` had the connection given up: ``wait_to_resume`` must follow."""
        self._commands = commands
        if commands is not None:
            self.figures.commands = commands.figures

    async def open(self) -> None:
        """Listen, if that is asked for.

        Raises:
            ListenError: the address cannot be listened on.
        """
        if self._address is not None:
            for address in await self._admin.open(self._address):
                self._console.note(f"health and metrics at {address}")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, tell systemd and run commands until cancelled, which ends commands that run."""
        try:
            async with trio.open_nursery() as nursery:
                if self._address is not None:
                    nursery.start_soon(self._admin.run)
                nursery.start_soon(self._tell_systemd)
                if self._commands is not None:
                    await nursery.start(self._commands.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._console.close()

    # --- what the consumer tells ---------------------------------------------------------------

    def consuming(self) -> None:
        """Deliveries come, or would come if there were any."""
        self.figures.idle_because = None

    def idle(self, reason: str) -> None:
        """Nothing is consumed for now; ``reason`` is for people."""
        self.figures.idle_because = reason

    def holds(self, unsettled: int) -> None:
        """So many deliveries have been taken from the broker, and neither acked nor rejected."""
        self.figures.unsettled = unsettled

    def settled(
        self, settlement: Settlement, sizes: Sequence[int], seconds: float, *, open_transfers: int
    ) -> None:
        """A batch has been made safe.

        Args:
            settlement: what became of it.
            sizes: bytes of each delivery's body.
            seconds: for how long it was worked on.
            open_transfers: begun and not complete, after it.
        """
        figures = self.figures
        figures.frames += len(sizes)
        figures.bytes += sum(sizes)
        figures.unsettled -= len(sizes)
        figures.open_transfers = open_transfers
        figures.transfers += len(settlement.delivered)
        figures.rejected.update(settlement.rejected)
        figures.problems.update(problem.kind for problem in settlement.problems)
        if sizes:
            figures.settle_seconds.observe(seconds)
        if settlement.delivered:
            figures.last_delivery = time.time()
        for line in problems.lines(settlement.problems):
            say(line)
        for delivered in settlement.delivered:
            self._console.delivered(delivered)
        self._console.progress(figures)

    # --- commands ------------------------------------------------------------------------------

    @property
    def given_up(self) -> int:
        """Transfers whose command was given up."""
        return 0 if self._commands is None else self._commands.figures.given_up

    @property
    def due(self) -> int:
        """Transfers taken up whose command has neither succeeded nor was given up."""
        return 0 if self._commands is None else self._commands.figures.due

    async def take_up(self) -> None:
        """Have the commands run that have become due.

        Raises:
            OSError: the disk does not tell which.
        """
        if self._commands is not None:
            await self._commands.look()

    async def wait_room(self) -> str | None:
        """While a connection is held: wait until not too many commands are due.

        Returns:
            None when that is so; after HOLD seconds, the reason to give the connection up.
        """
        if self._commands is None or self.due < DUE_MAX:
            return None
        reason = f"{self.due} commands are due"
        self.idle(reason)
        with trio.move_on_after(HOLD):
            await self._commands.wait_due(below=DUE_MAX)
            self.consuming()
            return None
        self.paused = True
        return reason

    async def wait_to_resume(self) -> None:
        """While no connection is held: wait until there is work for one."""
        if self._commands is None or not (self.paused or self.due >= DUE_MAX):
            return
        reason = f"{self.due} commands are due; receiving no more until there are fewer"
        self.idle(reason)
        say(reason)
        await self._commands.wait_due(below=DUE_RESUME)
        self.paused = False

    async def finish(self) -> None:
        """Wait until every command taken up has succeeded or was given up."""
        if self._commands is not None:
            self.idle("the last commands are due")
            await self._commands.wait_due(below=1)

    # --- systemd -------------------------------------------------------------------------------

    def stopping(self) -> None:
        """The end has begun."""
        self._systemd.stopping(_STOP_TIME)

    async def _tell_systemd(self) -> None:
        await self._systemd.run(
            ready=lambda: self.figures.idle_because is None, status=self._status
        )

    def _status(self) -> str:
        figures = self.figures
        rate = self._rate.per_second(figures.bytes, trio.current_time()) / 2**20
        due = "" if figures.commands is None else f", {figures.commands.due} commands due"
        return (
            f"{figures.transfers} transfers delivered, {figures.open_transfers} open{due},"
            f" {rate:.1f} MiB/s; {figures.idle_because or 'consuming'}"
        )
