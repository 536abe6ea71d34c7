"""sd_notify(3), heard by a real datagram socket."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from relay.systemd import READY_GRACE, Notifier, Rate
from tests.notify_socket import Manager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    manager = Manager(f"@relay-test-{os.getpid()}" if abstract else f"{tmp_path}/notify")
    yield manager
    manager.close()


async def test_ready_is_said_once_then_the_status_every_few_seconds(
    manager: Manager, autojump_clock: MockClock
) -> None:
    state = {"ready": False, "status": "starting"}
    notifier = Notifier(manager.environ)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: notifier.run(ready=lambda: bool(state["ready"]), status=lambda: str(state))
        )
        await trio.sleep(2)
        assert manager.heard() == []
        state["ready"] = True
        await trio.sleep(1)
        assert manager.heard() == [["READY=1"], [f"STATUS={state}"]]
        state["status"] = "3 uploads"
        await trio.sleep(5)
        assert manager.heard() == [[f"STATUS={state}"]]
        nursery.cancel_scope.cancel()


async def test_what_does_not_get_ready_starts_all_the_same_after_a_while(
    manager: Manager, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(READY_GRACE + 1):
        await Notifier(manager.environ).run(ready=lambda: False, status=lambda: "no broker")
    assert manager.heard() == [["READY=1"], ["STATUS=no broker"]]


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["any", "ours"])
async def test_the_watchdog_is_fed_twice_in_its_interval(
    manager: Manager, autojump_clock: MockClock, pid: int | None
) -> None:
    manager.environ["WATCHDOG_USEC"] = "2000000"
    if pid is not None:
        manager.environ["WATCHDOG_PID"] = str(pid)
    with trio.move_on_after(2.5):
        await Notifier(manager.environ).run(ready=lambda: True, status=lambda: "up")
    assert manager.heard() == [["READY=1"], *[["STATUS=up", "WATCHDOG=1"]] * 3]


@pytest.mark.parametrize(
    ("usec", "pid"), [("1000000", "1"), ("0", None), ("", None), ("nonsense", None)]
)
async def test_a_watchdog_for_another_process_or_none_is_not_fed(
    manager: Manager, autojump_clock: MockClock, usec: str, pid: str | None
) -> None:
    manager.environ["WATCHDOG_USEC"] = usec
    if pid is not None:
        manager.environ["WATCHDOG_PID"] = pid
    with trio.move_on_after(1):
        await Notifier(manager.environ).run(ready=lambda: True, status=lambda: "up")
    assert manager.heard() == [["READY=1"], ["STATUS=up"]]


def test_stopping_says_how_long_it_may_take(manager: Manager) -> None:
    Notifier(manager.environ).stopping(34.0)
    assert manager.heard() == [["STOPPING=1", "EXTEND_TIMEOUT_USEC=34000000"]]


async def test_what_is_stopped_before_it_was_ready_never_says_ready(
    manager: Manager, autojump_clock: MockClock
) -> None:
    notifier = Notifier(manager.environ)
    notifier.stopping(1)
    with trio.move_on_after(READY_GRACE + 1):
        await notifier.run(ready=lambda: False, status=lambda: "draining")
    assert ["READY=1"] not in manager.heard()


async def test_a_status_is_one_line_whatever_is_in_it(
    manager: Manager, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1):
        await Notifier(manager.environ).run(ready=lambda: True, status=lambda: "a\nSTOPPING=1")
    assert manager.heard()[-1] == ["STATUS=a STOPPING=1"]


def test_reloading_says_when_it_began(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    notifier.reloaded("up")
    ((reloading, began), ready) = manager.heard()
    assert (reloading, ready) == ("RELOADING=1", ["READY=1", "STATUS=up"])
    assert before <= int(began.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


async def test_without_a_socket_nothing_happens() -> None:
    environ: dict[str, str] = {}
    notifier = Notifier(environ)
    notifier.stopping(1)
    await notifier.run(ready=lambda: True, status=lambda: "up")


def test_a_manager_that_is_gone_is_no_error(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    manager.close()
    notifier.stopping(1)


def test_commands_that_are_run_do_not_inherit_the_socket(manager: Manager) -> None:
    manager.environ |= {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/root"}
    Notifier(manager.environ)
    assert manager.environ == {"HOME": "/root"}


def test_a_rate_is_what_came_since_the_last_look() -> None:
    rate = Rate()
    assert rate.per_second(1000, 50.0) == 0
    assert rate.per_second(3000, 54.0) == 500
    assert rate.per_second(3000, 54.0) == 0
