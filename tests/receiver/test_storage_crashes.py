"""Interrupted at any system call, the receiver goes on and delivers each transfer once."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.model import Frame, PartHead
from relay.receiver import Receiver, disk
from relay.receiver.files import STAGING, FileSink
from tests.fed_receiver import (
    cut,
    give_frames,
    one,
    open_sink,
    receive,
    staged,
    transfer_id,
    visible,
)

CALLS = (
    *("open", "mkdir", "rmdir", "rename", "unlink", "write", "fsync", "fdatasync"),
    *("ftruncate", "stat", "listdir"),
)
"""Functions of ``os`` through which all is done, besides renameat2."""

PRECIOUS = b"was here before"


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@contextmanager
def interrupted_at(call: int, error: BaseException) -> Iterator[None]:
    """Raise ``error`` instead of the n-th system call of the block; a kill goes on for ever."""
    left = call

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1 or (left < 0 and isinstance(error, Killed)):
                raise error
            return function(*arguments, **keywords)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, interrupted(getattr(os, name)))
        patch.setattr(disk, "_renameat2", interrupted(disk._renameat2))
        yield


def close_as_the_kernel_does(sink: FileSink) -> None:
    """Close files without writing what is in buffers."""
    for opened in sink._open.values():
        opened._journal.raw.close()  # type: ignore[attr-defined]
        if opened._file is not None:
            os.close(opened._file)
    sink._open.clear()
    sink.close()


def run(
    output: Path,
    frames: Sequence[Frame],
    acked: int,
    options: dict[str, Any],
    call: int = sys.maxsize,
    error: BaseException | None = None,
) -> tuple[int, bool]:
    """Receive from the first frame that was not acked, three at a time, until interrupted.

    Returns how many frames are acked after that, and whether it was interrupted.
    """
    sink = None
    error = error or Killed()
    try:
        with interrupted_at(call, error):
            sink = open_sink(output, **options)
            receiver = Receiver(sink, max_open=2)
            for start in range(acked, len(frames), 3):
                give_frames(receiver, frames[start : start + 3], first_tag=start + 1)
                settlement = receiver.settle()
                assert not settlement.reject
                acked = max(settlement.ack)
    except (Killed, OSError) as exc:
        assert exc is error  # noqa: PT017
        return acked, True
    finally:
        if sink is not None and isinstance(error, Killed):
            close_as_the_kernel_does(sink)
        elif sink is not None:
            sink.close()
    return acked, False


def crash_everywhere(
    directory: Path,
    lines: Sequence[Sequence[Frame]],
    meanwhile: Callable[[Path], None],
    check: Callable[[Path], None],
    error: BaseException | None = None,
    **options: Any,
) -> None:
    """Receive interleaved transfers, in a new place for each call to be interrupted at."""
    frames = [line[i] for i in range(4) for line in lines if i < len(line)]
    # Not at the first, which makes a directory that exists: that it fails goes unnoticed.
    crash, crashed = 1, True
    while crashed:
        output = directory / str(crash)
        output.mkdir()
        (output / "same").write_bytes(PRECIOUS)
        acked, crashed = run(output, frames, 0, options, crash, error)
        meanwhile(output)
        # Once more on the way, elsewhere; and acks may be lost, so some frames come twice.
        again, second = max(0, acked - crash % 3), 30 + crash % 67
        acked, _ = run(output, frames, again, options, second, error)
        meanwhile(output)
        end = run(output, frames, max(0, acked - crash % 2), options)
        assert end == (len(frames), False)
        check(output)
        crash += 1
    assert crash > 50


def deliveries(output: Path) -> dict[str, list[bytes]]:
    """The bytes of the parts of each transfer, as the receipts have it, which leave out nothing."""
    found: dict[str, list[bytes]] = {}
    files = {"same"}
    for path in output.rglob("*receipt.json"):
        receipt = json.loads(path.read_text())
        assert receipt["transfer"] not in found
        paths = [path.parent / part["file"] for part in receipt["parts"]]
        found[receipt["transfer"]] = [path.read_bytes() for path in paths]
        files |= {str(file.relative_to(output)) for file in (path, *paths)}
    assert visible(output) == files
    assert (output / "same").read_bytes() == PRECIOUS
    return found


def take(output: Path) -> None:
    """Be a consumer of the output: take what is complete, at once."""
    for path in [*output.rglob("*receipt.json")]:
        if path.relative_to(output).parts[0] in ("taken", STAGING):
            continue
        receipt = json.loads(path.read_text())
        taken = output / "taken" / receipt["transfer"]
        # Never delivered before.
        taken.mkdir(parents=True)
        for part in receipt["parts"]:
            part["file"] = (path.parent / part["file"]).rename(taken / str(part["part"])).name
        (taken / "receipt.json").write_text(json.dumps(receipt))
        path.unlink()
        if path.parent != output:
            path.parent.rmdir()


def leave(output: Path) -> None:
    """Take nothing."""


SAME = PartHead(name="f", filename="same")
LINES = [
    cut([(SAME, b"123456789"), (SAME, b"")], 0),
    cut([(SAME, b"abcdefghij")], 1, digests=["sha-256"]),
    cut([(SAME, b"x")], 2),
]
BODIES = {
    transfer_id(0): [b"123456789", b""],
    transfer_id(1): [b"abcdefghij"],
    transfer_id(2): [b"x"],
}


FULL = OSError(errno.ENOSPC, "a full disk")


@pytest.mark.parametrize(
    ("name", "meanwhile", "error"),
    [
        ("{transfer}/{filename}", leave, None),
        ("{transfer}/{filename}", take, None),
        ("{filename}", leave, None),
        ("{filename}", take, None),
        ("{filename}", take, FULL),
    ],
)
def test_wherever_it_is_interrupted_each_transfer_is_delivered_once(
    memory_path: Path,
    name: str,
    meanwhile: Callable[[Path], None],
    error: OSError | None,
) -> None:
    def check(output: Path) -> None:
        with closing(open_sink(output, name, pending=True)) as sink:
            Receiver(sink).settle()
            assert {pending.transfer_id for pending in sink.handover.pending()} == set(BODIES)
        meanwhile(output)
        assert staged(output) == []
        assert deliveries(output) == BODIES

    crash_everywhere(memory_path, LINES, meanwhile, check, error, name=name, pending=True)


def test_wherever_it_is_killed_it_delivers_the_same_upload_once(memory_path: Path) -> None:
    lines = [one(b"12345678", 0, key="k"), one(b"123456789", 1, key="k"), one(b"x", 2, key="l")]

    def check(output: Path) -> None:
        # Much later, in another process: the keys were not lost either.
        assert receive(output, one(b"y", 3, key="k")).ack == (1,)
        assert receive(output, one(b"y", 4, key="l")).ack == (1,)
        assert staged(output) == []
        found = sorted(os.listdir(output))
        assert found == [STAGING, transfer_id(0), transfer_id(2), "same"]
        assert (output / transfer_id(0) / "0-x.bin").read_bytes() == b"12345678"

    crash_everywhere(memory_path, lines, leave, check)


def test_wherever_it_is_killed_standard_output_gets_each_transfer_whole_at_least_once(
    memory_path: Path,
) -> None:
    frames = [cut([(SAME, b"<0"), (SAME, b"0>")], 0), cut([(SAME, b"<1>")], 1)]
    crash, crashed = 0, True
    while crashed:
        output, out = memory_path / str(crash), memory_path / f"{crash}.out"
        with open(out, "wb") as file:
            options = {"stdout": file.fileno()}
            acked, crashed = run(output, frames[0] + frames[1], 0, options, crash)
            # What a kill cuts short is a transfer's beginning, and the whole comes again.
            file.write(b"|")
            file.flush()
            assert run(output, frames[0] + frames[1], acked, options) == (3, False)
        before, _, after = out.read_bytes().partition(b"|")
        assert b"<00><1>".startswith(before)
        assert after in (b"<00><1>", b"<1>", b"")
        assert b"<00>" in before + after
        assert b"<1>" in before or b"<1>" in after
        assert staged(output) == []
        crash += 1
    assert crash > 40
