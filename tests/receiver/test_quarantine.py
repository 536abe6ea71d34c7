"""What came of a transfer that failed is kept for people, for a while, and not for ever."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from relay.model import PartHead
from relay.protocol.wire import encode_abort
from relay.receiver import Receiver
from relay.receiver.quarantine import NAME, Quarantine
from tests.fed_receiver import (
    cut,
    give,
    give_frames,
    one,
    open_sink,
    receive,
    receiving,
    staged,
    transfer,
    transfer_id,
)

PARTS = [(PartHead(name="a", filename="a.txt"), b"123456789"), (PartHead(name="b"), b"abcdefghij")]


def fail(output: Path, number: int = 0, **options: Any) -> str:
    """A transfer with a gap in its second part, two frames of it saved. Returns what is told."""
    frames = cut(PARTS, number)
    with receiving(output, **options) as receiver:
        give_frames(receiver, frames[:2])
        receiver.settle()
        give_frames(receiver, [frames[2], frames[3], frames[5]])
        settlement = receiver.settle()
    assert sorted(settlement.reject) == [1, 2, 3]
    return settlement.problems[0].detail


@pytest.mark.parametrize(
    ("name", "files"),
    [("{transfer}/{part}-{filename}", ("0-a.txt", "1-b")), ("{filename}", ("0", "1"))],
)
def test_a_failed_transfer_is_kept_with_what_was_wrong(
    tmp_path: Path, name: str, files: tuple[str, str]
) -> None:
    reason = fail(tmp_path, name=name)
    directory = tmp_path / NAME / transfer_id(0)
    problem = json.loads((directory / "problem.json").read_text())
    assert problem["transfer"] == transfer_id(0)
    assert problem["reason"] == reason == "failed: frame 5 came where 4 was due (gap)"
    assert problem["time"].endswith("+00:00")
    assert (problem["route"], problem["client"]) == ("default", "ann")
    assert problem["position"] == {
        "seq": 2,
        "part": 0,
        "offset": 8,
        "part_frames": 2,
        "bytes": 8,
    }
    assert [(p["file"], p["name"], p.get("bytes")) for p in problem["parts"]] == [
        (files[0], "a", 9),
        (files[1], "b", None),
    ]
    assert (directory / files[0]).read_bytes() == b"123456789"
    assert (directory / files[1]).read_bytes() == b"abcd"
    assert len(os.listdir(directory)) == 3
    assert staged(tmp_path) == []


def test_nothing_is_kept_if_so_told(tmp_path: Path) -> None:
    fail(tmp_path, quarantine_keep=0.0)
    assert not (tmp_path / NAME).exists()
    assert staged(tmp_path) == []


def test_what_was_aborted_or_has_left_nothing_is_not_kept(tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        give_frames(receiver, one(b"123456789")[:2])
        give(receiver, 3, encode_abort(transfer(0), 2, "client-gone"))
        give_frames(receiver, one(b"123456789", 1)[1:], first_tag=4)
        receiver.settle()
    assert not (tmp_path / NAME).exists()


def test_what_lost_bytes_on_disk_is_kept(tmp_path: Path) -> None:
    frames = one(b"123456789")
    receive(tmp_path, frames[:2])
    part = next((tmp_path / ".relay-staging" / transfer_id(0)).iterdir())
    os.truncate(part, 3)
    receive(tmp_path, frames[2:])
    kept = tmp_path / NAME / transfer_id(0)
    assert (kept / part.name).read_bytes() == b"123"
    assert "has lost bytes" in json.loads((kept / "problem.json").read_text())["reason"]


def test_it_is_removed_when_it_was_kept_for_long_enough(tmp_path: Path) -> None:
    for number in (0, 1):
        fail(tmp_path, number)
    os.utime(tmp_path / NAME / transfer_id(0), (0, 0))
    with closing(open_sink(tmp_path)) as sink:
        Receiver(sink).settle()
    assert os.listdir(tmp_path / NAME) == [transfer_id(1)]


def test_people_may_remove_it_themselves(tmp_path: Path) -> None:
    with closing(open_sink(tmp_path, quarantine_keep=1e-9)) as sink:
        receiver = Receiver(sink)
        frames = one(b"123456789")
        give_frames(receiver, [frames[0], frames[2]])
        for path in sorted((tmp_path / NAME).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / NAME).rmdir()
        receiver.settle()
    assert os.listdir(tmp_path / NAME) == []


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        quarantine = Quarantine(root, max_kept=3)
        for number in range(10):
            quarantine.take(transfer_id(number), "why", {}, [], lambda _: None)
    finally:
        os.close(root)
    assert sorted(os.listdir(tmp_path / NAME)) == [transfer_id(n) for n in (7, 8, 9)]
