"""What operators see of the receiver: figures, lines, pages, and what systemd hears."""

import json
import os
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from relay.model import Totals, Transfer
from relay.protocol.wire import APP_ID, encode_frame
from relay.receiver import Delivered, Problem, Receiver, Settlement
from relay.receiver.admin import Admin
from relay.receiver.console import Console, say
from relay.receiver.figures import CommandFigures, Figures
from relay.receiver.files import FileSink
from relay.receiver.operations import DUE_MAX, DUE_RESUME, HOLD, Operations
from relay.receiver.operations import commands as make_commands
from relay.receiver.options import OperationOptions
from tests.memory_work import MemoryWork
from tests.notify_socket import Manager
from tests.receiving import FRAME, cut

README = Path(__file__).parents[2] / "relay/receiver/README.md"


def delivered(number: int = 1, **about: str) -> Delivered:
    transfer = Transfer(id=f"id-{number}", began=1, route="default", **about)
    return Delivered(transfer, Totals(frames=3, parts=2, bytes=5000), f"/out/id-{number}")


def settled(*transfers: Delivered) -> Settlement:
    problems = (Problem("gap", "failed: a gap"), Problem("not-a-frame", "is none"))
    return Settlement((1, 2), {3: "a", 4: "b"}, transfers, problems, {"gap": 1, "late": 1})


def samples(figures: Figures) -> dict[str, float]:
    """By name and labels, as Prometheus writes them."""
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for metric in figures.metrics()
        for sample in metric.samples
    }


async def get(address: str, path: str) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        text = b"".join([data async for data in stream]).decode()
    head, _, body = text.partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_a_batch_is_counted_in_every_way() -> None:
    operations = Operations(OperationOptions(quiet=True))
    operations.holds(11)
    transfers = settled(delivered(1), delivered(2))
    operations.settled(transfers, [100, 28, 0, 1], 0.015, open_transfers=9)
    operations.settled(Settlement((), {}, (), ()), [], 0.0, open_transfers=2)
    operations.consuming()
    found = samples(operations.figures)
    assert found.pop("relay_receive_last_delivery_timestamp_seconds") > 1.7e9
    assert found.pop("relay_receive_settle_seconds_bucket{0.01}") == 0
    assert found.pop("relay_receive_settle_seconds_bucket{0.02}") == 1
    # What has not happened is counted, too: as 0.
    kinds = [name for name in found if "{" in name and "settle_seconds" not in name]
    assert len(kinds) == 10 + 12
    for name in kinds:
        if not found[name]:
            del found[name]
    assert {name: value for name, value in found.items() if "settle_seconds_b" not in name} == {
        "relay_receive_transfers_total": 2,
        "relay_receive_frames_total": 4,
        "relay_receive_bytes_total": 129,
        "relay_receive_reconnects_total": 0,
        "relay_receive_rejected_total{gap}": 1,
        "relay_receive_rejected_total{late}": 1,
        "relay_receive_problems_total{gap}": 1,
        "relay_receive_problems_total{not-a-frame}": 1,
        "relay_receive_up": 1,
        "relay_receive_open_transfers": 2,
        "relay_receive_unsettled": 7,
        "relay_receive_settle_seconds_count": 1,
        "relay_receive_settle_seconds_sum": 0.015,
    } | {name: value for name, value in found.items() if name.endswith("_created")}


def test_every_metric_is_in_the_readme() -> None:
    readme = README.read_text()
    for metric in Figures(commands=CommandFigures()).metrics():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        assert f"`{name}" in readme, name


async def test_the_pages_tell_whether_it_consumes_and_why_not() -> None:
    figures = Figures(commands=CommandFigures(due=3))
    admin = Admin(figures)
    (address,) = await admin.open("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admin.run)
        assert await get(address, "/healthz") == (200, '{"status": "alive"}\n')
        status, body = await get(address, "/readyz")
        assert status == 503
        assert json.loads(body)["detail"] == "no connection to the broker yet"
        figures.idle_because = None
        assert (await get(address, "/readyz"))[0] == 200
        status, body = await get(address, "/metrics")
        names = {family.name for family in text_string_to_metric_families(body)}
        assert {"relay_receive_up", "relay_receive_commands_due"} <= names
        assert (await get(address, "/transfers"))[0] == 404
        nursery.cancel_scope.cancel()


async def test_systemd_hears_ready_once_it_consumes_and_how_it_goes(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(f"{tmp_path}/notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    operations = Operations(OperationOptions(quiet=True))
    assert "NOTIFY_SOCKET" not in os.environ
    async with trio.open_nursery() as nursery:
        await nursery.start(operations.run)
        await trio.sleep(1)
        assert manager.heard() == []
        operations.consuming()
        await trio.sleep(4)
        operations.settled(settled(delivered()), [10 << 20], 1.0, open_transfers=0)
        operations.idle("the broker is away")
        await trio.sleep(2)
        operations.stopping()
        nursery.cancel_scope.cancel()
    assert manager.heard() == [
        ["READY=1"],
        ["STATUS=0 transfers delivered, 0 open, 0.0 MiB/s; consuming"],
        ["STATUS=1 transfers delivered, 0 open, 2.0 MiB/s; the broker is away"],
        ["STOPPING=1", "EXTEND_TIMEOUT_USEC=20000000"],
    ]
    manager.close()


async def test_reception_waits_while_many_commands_are_due_but_holds_no_connection_for_long(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    work = MemoryWork(tmp_path)
    for number in range(DUE_MAX):
        work.deliver(f"t{number}")
    options = OperationOptions(quiet=True, command="false", command_tries=1, command_jobs=8)
    commands = make_commands(options, work, tmp_path, limit=None)
    assert commands is not None
    operations = Operations(options, commands=commands)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(operations.run)
        operations.consuming()
        assert await operations.wait_room() is None
        # What fails for good is noted when the disk takes it, and is due meanwhile.
        work.full = True
        await operations.take_up()
        reason = await operations.wait_room()
        assert reason == "100 commands are due"
        assert trio.current_time() - began == pytest.approx(HOLD)
        assert (operations.paused, operations.figures.idle_because) == (True, reason)
        work.full = False
        await operations.wait_to_resume()
        assert operations.due < DUE_RESUME
        assert not operations.paused
        assert await operations.wait_room() is None
        await operations.finish()
        assert (operations.due, operations.given_up) == (0, DUE_MAX)
        nursery.cancel_scope.cancel()


def test_what_is_rejected_is_counted_by_kind(tmp_path: Path) -> None:
    gap, stray = (cut(("x", b"x" * 4 * FRAME)) for _ in range(2))
    receiver = Receiver(FileSink(tmp_path / "output"))
    for tag, frame in enumerate([gap[0], gap[2], gap[3], stray[1]], 1):
        message = encode_frame(frame)
        receiver.feed(
            tag,
            app_id=APP_ID,
            type=message.type,
            correlation_id=message.correlation_id,
            timestamp=message.timestamp,
            headers=message.headers,
            body=message.body,
        )
    receiver.feed(
        5, app_id=None, type=None, correlation_id=None, timestamp=None, headers=None, body=b""
    )
    settlement = receiver.settle()
    assert len(settlement.reject) == 5
    # The first frame, good as it was, is rejected with the one behind the gap.
    assert settlement.rejected == {"gap": 2, "late": 1, "stray": 1, "not-a-frame": 1}


def test_lines_are_for_people_or_for_programs_or_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().delivered(delivered())
    assert capsys.readouterr().out == "transfer id-1  parts 2  bytes 5000  /out/id-1\n"
    Console(as_json=True).delivered(delivered(2, client="zoë", idempotency_key="k\n"))
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "transfer": "id-2",
        "route": "default",
        "client": "zoë",
        "idempotency_key": "k\n",
        "parts": 2,
        "frames": 3,
        "bytes": 5000,
        "where": "/out/id-2",
    }
    Console(quiet=True).delivered(delivered())
    say("something")
    assert capsys.readouterr() == ("", "relay receive: something\n")


class Terminal:
    """One in the place of standard error; all that is written to it is kept."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        os.set_blocking(self._master, False)
        termios.tcsetwinsize(slave, (24, 80))
        self._stderr = open(slave, "w")  # noqa: SIM115
        self._shown = ""

    @property
    def shown(self) -> str:
        with suppress(BlockingIOError):
            while True:
                self._shown += os.read(self._master, 65536).decode()
        return self._shown

    def __enter__(self) -> Self:
        self._replaced, sys.stderr = sys.stderr, self._stderr
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._replaced
        self._stderr.close()
        os.close(self._master)


def test_on_a_terminal_there_is_progress_and_lines_stay_whole() -> None:
    figures = Figures(transfers=3, open_transfers=2, bytes=5 << 20)
    figures.commands = CommandFigures(due=4)
    with Terminal() as terminal:
        console = Console()
        for _ in range(1000):
            console.progress(figures)
            if "5.00M" in terminal.shown:
                break
            time.sleep(0.01)
        say("a problem")
        assert "3 delivered, 2 open, 4 commands due" in terminal.shown
        assert "\rrelay receive: a problem\r\n" in terminal.shown
        console.close()
        assert terminal.shown.endswith("\r")


def test_who_asks_for_quiet_sees_problems_only() -> None:
    with Terminal() as terminal:
        quiet = Console(quiet=True)
        quiet.progress(Figures(bytes=5))
        quiet.delivered(delivered())
        say("a problem")
        quiet.close()
        assert terminal.shown == "relay receive: a problem\r\n"
