"""``relay receive --exec``: a real receiver, a real broker, and what the commands have seen."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from relay.model import Frame
from tests.receiver_admin import admin_url, ready, scrape
from tests.receiving import FRAME, MakeQueue, Queue, Start, check, cut, eventually

BODY = Random(12).randbytes(3 * FRAME)


class Scripts:
    """Shell scripts as commands, and the files that they write."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def option(self, script: str) -> tuple[str, str]:
        """``--exec`` for a script that runs beside its files."""
        return "--exec", f"sh -c {shlex.quote(f'cd {self._directory} && {script}')}"

    def lines(self, name: str) -> list[str]:
        path = self._directory / name
        return path.read_text().splitlines() if path.exists() else []

    def make_pipe(self, name: str) -> Path:
        path = self._directory / name
        os.mkfifo(path)
        return path


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    (tmp_path / "scripts").mkdir()
    return Scripts(tmp_path / "scripts")


def publish(queue: Queue, number: int) -> list[list[Frame]]:
    transfers = [cut(("x", BODY)) for _ in range(number)]
    for frames in transfers:
        queue.publish_frames(frames)
    return transfers


def ids(transfers: list[list[Frame]]) -> list[str]:
    return [frames[0].transfer.id for frames in transfers]


def quarantined(output: Path) -> list[str]:
    directory = output / ".relay-quarantine"
    return sorted(os.listdir(directory)) if directory.exists() else []


def test_each_transfer_has_its_command_which_sees_it_whole(
    make_queue: MakeQueue, start: Start, output: Path, scripts: Scripts
) -> None:
    queue = make_queue()
    transfers = publish(queue, 5)
    script = (
        'echo "$RELAY_TRANSFER" >> order && cat > "$RELAY_TRANSFER.receipt" && cmp "$RELAY_RECEIPT"'
        ' "$RELAY_TRANSFER.receipt" && cat "$RELAY_WHERE"/0-x | wc -c >> sizes && echo told'
    )

    receiver = start(queue.name, "--count", "5", *scripts.option(script))

    assert receiver.wait() == 0
    assert scripts.lines("order") == ids(transfers)
    assert [int(line) for line in scripts.lines("sizes")] == [len(BODY)] * 5
    for frames in transfers:
        check(output, frames, ("0-x", BODY))
        receipt = "\n".join(scripts.lines(f"{frames[0].transfer.id}.receipt"))
        assert json.loads(receipt)["bytes"] == len(BODY)
    assert receiver.err == "told\n" * 5
    assert len(receiver.out.splitlines()) == 5
    queue.wait_for(0)


def test_a_command_that_fails_twice_is_tried_until_it_succeeds(
    make_queue: MakeQueue, start: Start, output: Path, scripts: Scripts
) -> None:
    queue = make_queue()
    (frames,) = publish(queue, 1)
    script = 'echo >> tries; [ "$(wc -l < tries)" -gt 2 ] || exit 7'

    receiver = start(queue.name, "--count", "1", *scripts.option(script))

    assert receiver.wait() == 0
    assert len(scripts.lines("tries")) == 3
    assert receiver.err.count("failed with exit code 7") == 2
    check(output, frames, ("0-x", BODY))
    assert quarantined(output) == []


def test_a_transfer_whose_command_is_given_up_goes_into_quarantine(
    make_queue: MakeQueue, start: Start, output: Path, scripts: Scripts
) -> None:
    queue = make_queue()
    bad, good = publish(queue, 2)
    script = f'[ "$RELAY_TRANSFER" != {bad[0].transfer.id} ]'

    receiver = start(queue.name, "--count", "2", "--exec-tries", "2", *scripts.option(script))

    assert receiver.wait() == 1
    check(output, good, ("0-x", BODY))
    assert not (output / bad[0].transfer.id).exists()
    (name,) = quarantined(output)
    assert bad[0].transfer.id in name
    assert "given up after 2 tries" in receiver.err
    # Nothing is due any more.
    again = start(queue.name, "--idle-exit", "1 s", *scripts.option("echo >> again"))
    assert again.wait() == 0
    assert scripts.lines("again") == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_due_when_it_ended_runs_after_the_restart(
    make_queue: MakeQueue, start: Start, output: Path, scripts: Scripts, how: signal.Signals
) -> None:
    queue = make_queue()
    transfers = publish(queue, 3)
    gate = scripts.make_pipe("gate")
    script = 'echo "$RELAY_TRANSFER" >> begun; read go < gate; echo "$RELAY_TRANSFER" >> ended'
    receiver = start(queue.name, "--count", "3", *scripts.option(script))
    eventually(lambda: len(scripts.lines("begun")) == 1, "the first command runs")
    # All are delivered and acked, though no command has ended.
    queue.wait_for(0)
    eventually(lambda: len(receiver.out.splitlines()) == 3, "three transfers")
    assert receiver.stop(how) == (1 if how == signal.SIGTERM else -how)
    assert scripts.lines("ended") == []

    again = start(
        queue.name, "--count", "3", *scripts.option(script.replace("read go < gate; ", ""))
    )

    assert again.wait() == 0
    assert scripts.lines("begun") == [ids(transfers)[0], *ids(transfers)]
    assert scripts.lines("ended") == ids(transfers)
    if how == signal.SIGKILL:
        # The command survived its receiver; it is ours to end.
        gate.write_text("go\n")
        eventually(lambda: len(scripts.lines("ended")) == 4, "the first run has ended, too")


def test_reception_pauses_while_many_commands_are_due(
    make_queue: MakeQueue, start: Start, scripts: Scripts
) -> None:
    queue = make_queue()
    for frames in [cut(("x", b"x")) for _ in range(250)]:
        queue.publish_frames(frames)
    gate = scripts.make_pipe("gate")
    options = ("--count", "250", "--exec-jobs", "4", "--admin", "127.0.0.1:0")
    # The usual program, but that it does not hold its connection for a minute meanwhile.
    program = (
        "import sys; from relay import cli; from relay.receiver import operations;"
        " operations.HOLD = 0.2; sys.exit(cli.main(sys.argv[4:]))"
    )
    receiver = start(
        queue.name,
        *options,
        *scripts.option("read go < gate"),
        under=[sys.executable, "-c", program],
    )
    url = admin_url(receiver)
    eventually(lambda: "commands are due" in receiver.err, "the connection is given up")
    status, body = ready(url)
    assert (status, "commands are due" in body) == (503, True)
    found = scrape(url)
    # The last batch, half a prefetch, may have brought more than one.
    assert 100 <= found["relay_receive_commands_due"] < 100 + 64
    assert found["relay_receive_commands_running"] == 4
    queue.wait_for(250 - int(found["relay_receive_transfers_total"]))

    # One line for each command, whoever reads its bytes.
    pipe = os.open(gate, os.O_RDWR)
    os.write(pipe, b"\n" * 250)
    assert receiver.wait() == 0
    os.close(pipe)

    assert len(receiver.out.splitlines()) == 250
    queue.wait_for(0)


def test_without_such_a_program_it_does_not_begin(start: Start, output: Path) -> None:
    receiver = start("x", "--exec", "no-such-program")
    assert receiver.wait() == 2
    assert receiver.err == "relay: --exec: no such program: 'no-such-program'\n"
    assert not output.exists()
