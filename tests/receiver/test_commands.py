"""Commands for delivered transfers: real processes, and trio's clock for what waits."""

import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from relay.config import ConfigError
from relay.receiver.commands import Command, Commands, split
from tests.memory_work import MemoryWork


class Bench:
    """Commands, what they remember, and what they told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.work = MemoryWork(directory)
        self.told: list[str] = []

    @asynccontextmanager
    async def running(
        self, script: str, *, tries: int = 5, jobs: int = 1, limit: int | None = None
    ) -> AsyncGenerator[Commands, None]:
        """``script`` for a shell, as one word of its own."""
        command = Command(
            arguments=("/bin/sh", "-c", script), directory=self.directory, tries=tries, jobs=jobs
        )
        commands = Commands(self.work, command, self.told.append, limit=limit, chance=lambda: 0.5)
        async with trio.open_nursery() as nursery:
            await nursery.start(commands.run)
            await commands.look()
            yield commands
            nursery.cancel_scope.cancel()

    async def run(
        self, script: str, *, tries: int = 5, jobs: int = 1, limit: int | None = None
    ) -> Commands:
        """Until nothing is due."""
        async with self.running(script, tries=tries, jobs=jobs, limit=limit) as commands:
            await commands.wait_due(below=1)
        return commands

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def wait_for(condition: Callable[[], bool]) -> None:
    """Until another process has done something, whatever trio's clock says."""
    for _ in range(6000):
        if condition():
            return
        await trio.to_thread.run_sync(time.sleep, 0.01)
    pytest.fail("not within a minute")


def lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


async def test_a_command_is_told_everything_about_its_transfer(bench: Bench) -> None:
    due = bench.work.deliver("t1", route="invoices", client="zoë & co")
    commands = await bench.run('env > env; cat > stdin; pwd > pwd; echo "$0 $#" > arguments')
    assert set(bench.lines("env")) >= {
        "RELAY_TRANSFER=t1",
        "RELAY_ROUTE=invoices",
        "RELAY_CLIENT=zoë & co",
        f"RELAY_WHERE={due.where}",
        f"RELAY_RECEIPT={due.receipt}",
    }
    assert (bench.directory / "stdin").read_bytes() == due.receipt.read_bytes()
    assert bench.lines("pwd") == [str(bench.directory)]
    assert bench.lines("arguments") == ["/bin/sh 0"]
    assert bench.work.due == []
    assert bench.told == []
    assert commands.figures.results == {"succeeded": 1, "failed": 0}
    assert commands.figures.due == commands.figures.running == 0


async def test_what_strangers_wrote_reaches_the_environment_as_text_or_not_at_all(
    bench: Bench,
) -> None:
    bench.work.deliver("t1", route="a\0b\n$(touch evil)\ud800")
    await bench.run('printf "%s|%s" "$RELAY_ROUTE" "$RELAY_CLIENT" > out')
    assert (bench.directory / "out").read_text() == "ab\n$(touch evil)?|"
    assert not (bench.directory / "evil").exists()


async def test_commands_run_one_after_the_other_in_the_order_of_delivery(bench: Bench) -> None:
    names = [f"t{number}" for number in range(8)]
    for name in names:
        bench.work.deliver(name)
    await bench.run('mkdir alone && echo "$RELAY_TRANSFER" >> order && rmdir alone')
    assert bench.lines("order") == names
    assert bench.told == []


async def test_as_many_run_at_a_time_as_were_asked_for(bench: Bench) -> None:
    for name in ("t1", "t2", "t3"):
        bench.work.deliver(name)
    # Each waits until there are two of them; the third one runs when one of them is gone.
    script = 'echo >> begun; until [ "$(wc -l < begun)" -ge 2 ]; do sleep 0.01; done; read x < go'
    os.mkfifo(bench.directory / "go")
    async with bench.running(script, jobs=2) as commands:
        await wait_for(lambda: len(bench.lines("begun")) == 2)
        assert commands.figures.running == 2
        assert commands.figures.due == 3
        for left in (3, 2, 1):
            await trio.to_thread.run_sync((bench.directory / "go").write_text, "\n")
            await commands.wait_due(below=left)


async def test_one_that_fails_is_tried_again_with_growing_pauses(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.work.deliver("t1")
    began = trio.current_time()
    commands = await bench.run('echo >> tries; [ "$(wc -l < tries)" -eq 4 ] || exit 3')
    assert trio.current_time() - began == pytest.approx(1 + 2 + 4)
    assert commands.figures.results == {"succeeded": 1, "failed": 3}
    assert bench.told == [
        f"transfer t1: the command failed with exit code 3; try {tries}, again in {pause} s"
        for tries, pause in ((1, 1), (2, 2), (3, 4))
    ]


async def test_while_one_waits_for_its_next_try_others_run(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for name in ("t1", "t2", "t3"):
        bench.work.deliver(name)
    script = 'echo "$RELAY_TRANSFER" >> order; [ "$RELAY_TRANSFER$(wc -l < order)" != t11 ]'
    await bench.run(script)
    assert bench.lines("order") == ["t1", "t2", "t3", "t1"]


async def test_one_that_fails_too_often_is_given_up_with_the_reason(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.work.deliver("t1")
    bench.work.deliver("t2")
    commands = await bench.run('[ "$RELAY_TRANSFER" = t2 ] || kill -9 $$', tries=2)
    assert bench.work.given_up == {"t1": "the command was ended by signal 9 (Killed)"}
    assert bench.work.due == []
    assert commands.figures.given_up == 1
    assert bench.told[-1].endswith("signal 9 (Killed); given up after 2 tries")


async def test_tries_of_an_earlier_process_count(bench: Bench) -> None:
    bench.work.deliver("t1", tries=7)
    await bench.run("exit 1", tries=5)
    assert list(bench.work.given_up) == ["t1"]


async def test_without_a_limit_it_goes_on_for_ever_and_never_waits_long(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.work.deliver("t1")
    began = trio.current_time()
    await bench.run('echo >> tries; [ "$(wc -l < tries)" -eq 15 ]', tries=0)
    assert trio.current_time() - began == pytest.approx(511 + 5 * 300)
    assert bench.work.given_up == {}


async def test_a_receipt_that_is_gone_or_none_is_a_failure_like_others(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.work.deliver("gone").receipt.unlink()
    bench.work.deliver("none").receipt.write_text("none")
    bench.work.deliver("else").receipt.write_text('{"parts": [')
    await bench.run("true", tries=2)
    assert "cannot be run: [Errno 2]" in bench.work.given_up["gone"]
    assert "the receipt is none: " in bench.work.given_up["none"]
    assert "the receipt is none: " in bench.work.given_up["else"]


async def test_a_result_that_the_disk_does_not_take_is_noted_later(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.work.deliver("t1")
    bench.work.full = True
    async with bench.running("echo >> runs") as commands:
        await wait_for(lambda: bool(bench.told))
        assert commands.figures.due == 1
        bench.work.full = False
        await commands.wait_due(below=1)
    assert bench.lines("runs") == [""]
    assert len(bench.told) == 1
    assert "No space left" in bench.told[0]


async def test_what_is_taken_up_already_does_not_run_twice(bench: Bench) -> None:
    bench.work.deliver("t1")
    async with bench.running('echo "$RELAY_TRANSFER" >> order') as commands:
        for name in ("t2", "t3", "t4"):
            bench.work.deliver(name)
            await commands.look()
            await commands.look()
        await commands.wait_due(below=1)
        assert commands.known == 4
    assert bench.lines("order") == ["t1", "t2", "t3", "t4"]


async def test_no_more_than_the_limit_is_taken_up(bench: Bench) -> None:
    for name in ("t1", "t2", "t3"):
        bench.work.deliver(name)
    commands = await bench.run('echo "$RELAY_TRANSFER" >> order', limit=2)
    assert bench.lines("order") == ["t1", "t2"]
    assert commands.known == 2
    assert [due.transfer_id for due in bench.work.due] == ["t3"]


async def test_commands_that_run_at_the_end_are_told_and_stay_due(bench: Bench) -> None:
    due = bench.work.deliver("t1")
    script = "trap 'echo TERM >> told; exit 1' TERM; echo >> begun; while :; do sleep 0.01; done"
    async with bench.running(script):
        await wait_for(lambda: len(bench.lines("begun")) == 1)
    assert bench.lines("told") == ["TERM"]
    assert bench.work.due == [due]
    assert bench.told == []


async def test_one_that_does_not_listen_is_killed_with_all_that_it_started(
    bench: Bench, mock_clock: MockClock
) -> None:
    due = bench.work.deliver("t1")
    script = "trap '' TERM; sh -c 'echo $$ > child; while :; do sleep 0.1; done' & wait"
    async with bench.running(script):
        await wait_for(lambda: bool(bench.lines("child")))
        child = int(bench.lines("child")[0])
        mock_clock.autojump_threshold = 0
    assert bench.work.due == [due]
    await wait_for(lambda: not lives(child))


@pytest.mark.parametrize("text", ["", "  ", "no-such-program --flag", "'unfinished", "/tmp"])  # noqa: S108
def test_a_command_that_cannot_be_one_is_told_at_once(text: str) -> None:
    with pytest.raises(ConfigError, match="--exec: "):
        split(text)


def test_words_are_split_as_a_shell_does_and_no_more() -> None:
    program, *arguments = split("sh -c 'exit $1' \"a b\" *")
    assert Path(program).is_absolute()
    assert arguments == ["-c", "exit $1", "a b", "*"]


def test_a_program_beside_us_is_found_from_wherever_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hook").write_text("#!/bin/sh\n")
    (tmp_path / "hook").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert split("./hook")[0] == f"{tmp_path}/hook"
