"""Where complete transfers go: by template, never over what exists unless told, and once."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
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
    receiving,
    staged,
    transfer_id,
    visible,
)

FLAT = "{filename}"


def upload(number: int, *files: tuple[str, bytes]) -> list[Frame]:
    return cut([(PartHead(name="f", filename=name), body) for name, body in files], number)


def receipt(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def files_in(path: Path) -> list[str]:
    """What a receipt says where the files are, relative to its own directory."""
    return [part["file"] for part in receipt(path)["parts"]]


# --- by template ---------------------------------------------------------------------------------


def test_a_template_whose_directory_is_the_transfers_own_makes_it_appear_at_once(
    tmp_path: Path,
) -> None:
    frames = upload(0, ("a", b"123456789"), ("b", b"x"))
    settlement = receive(tmp_path, frames, name="{date}/{client}/{transfer}/{name}-{filename}")
    directory = tmp_path / "1970-01-01" / "ann" / transfer_id(0)
    assert [d.where for d in settlement.delivered] == [str(directory)]
    assert visible(tmp_path) == {
        f"1970-01-01/ann/{transfer_id(0)}/{name}" for name in ("f-a", "f-b", "receipt.json")
    }
    assert files_in(directory / "receipt.json") == ["f-a", "f-b"]


def test_any_other_template_puts_files_one_by_one_and_the_receipt_beside_them(
    tmp_path: Path,
) -> None:
    frames = upload(0, ("a", b"123456789"), ("b", b""))
    settlement = receive(tmp_path, frames, name="{route}/{part}/{filename}")
    where = tmp_path / f"{transfer_id(0)}.receipt.json"
    assert [d.where for d in settlement.delivered] == [str(where)]
    assert visible(tmp_path) == {"default/0/a", "default/1/b", where.name}
    assert files_in(where) == ["default/0/a", "default/1/b"]
    assert (tmp_path / "default/0/a").read_bytes() == b"123456789"
    assert receipt(where)["bytes"] == 9
    assert staged(tmp_path) == []


@pytest.mark.parametrize("name", [FLAT, "{transfer}/{filename}"])
def test_nothing_is_visible_before_the_commit(tmp_path: Path, name: str) -> None:
    with receiving(tmp_path, name=name) as receiver:
        give_frames(receiver, upload(0, ("a", b"123456789"), ("b", b"x"))[:-1])
        assert receiver.settle().ack == (1, 2, 3)
        assert os.listdir(tmp_path) == [STAGING]


@pytest.mark.parametrize("name", [FLAT, "{transfer}/{filename}"])
def test_a_transfer_goes_on_where_it_was_saved_whatever_the_template(
    tmp_path: Path, name: str
) -> None:
    frames = upload(0, ("same", b"123456789"), ("same", b"abcdef"), ("other", b"x"))
    for frame in frames:
        assert receive(tmp_path, [frame], name=name).ack == (1,)
    directory = tmp_path / transfer_id(0) if name != FLAT else tmp_path
    assert (directory / "same").read_bytes() == b"123456789"
    assert (directory / "same-2").read_bytes() == b"abcdef"
    assert (directory / "other").read_bytes() == b"x"


def test_something_else_where_a_directory_belongs_fails_that_transfer_only(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    output = tmp_path / "out"
    output.mkdir()
    (output / "link").symlink_to(elsewhere)
    with receiving(output, name="{filename}/{part}") as receiver:
        give_frames(receiver, [*upload(0, ("link", b"1")), *upload(1, ("fine", b"2"))])
        settlement = receiver.settle()
    assert (settlement.ack, [*settlement.reject]) == ((2,), [1])
    assert "link in the output is not a directory" in str(settlement.problems[0])
    assert os.listdir(elsewhere) == []
    assert (output / "fine" / "0").read_bytes() == b"2"


# --- collisions ----------------------------------------------------------------------------------


def test_a_name_that_exists_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "report.tar.gz").write_bytes(b"mine")
    for number in range(3):
        receive(tmp_path, upload(number, ("report.tar.gz", b"%d" % number)), name=FLAT)
    assert (tmp_path / "report.tar.gz").read_bytes() == b"mine"
    for number in range(3):
        name = f"report-{number + 2}.tar.gz"
        assert (tmp_path / name).read_bytes() == b"%d" % number
        assert files_in(tmp_path / f"{transfer_id(number)}.receipt.json") == [name]


def test_names_that_are_given_away_in_one_batch_differ(tmp_path: Path) -> None:
    with receiving(tmp_path, name=FLAT) as receiver:
        for number in range(3):
            give_frames(receiver, upload(number, ("x", b"a%d" % number), ("x", b"b%d" % number)))
        assert len(receiver.settle().delivered) == 3
    found = {}
    for number in range(3):
        for part, name in enumerate(files_in(tmp_path / f"{transfer_id(number)}.receipt.json")):
            found[name] = (tmp_path / name).read_bytes()
            assert found[name] == b"%c%d" % (b"ab"[part], number)
    assert set(found) == {"x", "x-2", "x-3", "x-4", "x-5", "x-6"}


def test_overwriting_replaces_what_exists_but_no_part_of_the_same_transfer(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "d").mkdir()
    with receiving(tmp_path, name=FLAT, overwrite=True) as receiver:
        give_frames(receiver, upload(0, ("x", b"1"), ("x", b"2"), ("d", b"3")))
        give_frames(receiver, upload(1, ("x", b"4")))
        assert len(receiver.settle().delivered) == 2
    assert (tmp_path / "x").read_bytes() == b"4"
    assert (tmp_path / "x-2").read_bytes() == b"2"
    assert (tmp_path / "d-2").read_bytes() == b"3"
    assert files_in(tmp_path / f"{transfer_id(0)}.receipt.json") == ["x", "x-2", "d-2"]


def test_overwriting_replaces_a_transfers_whole_directory(tmp_path: Path) -> None:
    directory = tmp_path / transfer_id(0)
    directory.mkdir()
    (directory / "old").touch()
    receive(tmp_path, one(b"x"), overwrite=True)
    assert sorted(os.listdir(directory)) == ["0-x.bin", "receipt.json"]
    assert staged(tmp_path) == []


def test_a_file_cannot_pass_for_a_receipt_or_take_its_place(tmp_path: Path) -> None:
    name = f"{transfer_id(1)}.receipt.json"
    receive(tmp_path, upload(0, (name, b"forged")), name=FLAT)
    receive(tmp_path, upload(1, ("receipt.json", b"x"), ("problem.json", b"y")), name=FLAT)
    assert receipt(tmp_path / name)["transfer"] == transfer_id(1)
    assert (tmp_path / f"{transfer_id(1)}_receipt.json").read_bytes() == b"forged"

    frames = upload(2, ("receipt.json", b"x"), ("problem.json", b"y"))
    receive(tmp_path, frames, name="{transfer}/{filename}")
    directory = tmp_path / transfer_id(2)
    assert receipt(directory / "receipt.json")["transfer"] == transfer_id(2)
    assert files_in(directory / "receipt.json") == ["receipt-1.json", "problem-2.json"]


def test_a_name_that_is_taken_between_the_plan_and_the_move_is_given_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = disk.move_new

    def taken(source: str, source_parent: int, name: str, parent: int) -> None:
        if name == "b":
            with open(tmp_path / "b", "xb") as file:
                file.write(b"theirs")
            monkeypatch.setattr(disk, "move_new", move)
        move(source, source_parent, name, parent)

    with receiving(tmp_path, name=FLAT) as receiver:
        monkeypatch.setattr(disk, "move_new", taken)
        give_frames(receiver, upload(0, ("a", b"1"), ("b", b"2"), ("c", b"3")))
        assert receiver.settle().ack == (1, 2, 3)
    assert (tmp_path / "b").read_bytes() == b"theirs"
    names = files_in(tmp_path / f"{transfer_id(0)}.receipt.json")
    assert names == ["a", "b-2", "c"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"1", b"2", b"3"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_that_rename_is_told_of_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(disk, "_renameat2", lambda *_: code)
    with pytest.raises(OSError, match=r"^the file system cannot rename without replacing .*"):
        open_sink(tmp_path, FLAT)
    assert staged(tmp_path) == []
    # Whoever does not need it is not bothered, and the failure has left no claim.
    receive(tmp_path, one(b"x"))
    receive(tmp_path, upload(1, ("y", b"y")), name=FLAT, overwrite=True)
    assert (tmp_path / "y").read_bytes() == b"y"


# --- whoever takes what was delivered may have it ------------------------------------------------


@pytest.mark.parametrize("name", [FLAT, "{transfer}/{filename}"])
@pytest.mark.parametrize("together", [True, False])
def test_output_that_was_moved_away_is_not_delivered_again(
    tmp_path: Path, name: str, together: bool
) -> None:
    frames = upload(0, ("a", b"123456789"), ("b", b"x"))
    receive(tmp_path, frames, name=name)
    for path in tmp_path.iterdir():
        if path.name != STAGING:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = [frames] if together else [[frame] for frame in frames]
    for some in again:
        settlement = receive(tmp_path, some, name=name)
        assert settlement.ack == tuple(range(1, len(some) + 1))
    assert [d.where for d in settlement.delivered] == ["delivered before"]
    assert visible(tmp_path) == set()
    assert staged(tmp_path) == []


# --- standard output -----------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Callable[[], tuple[int, int]]:
    return os.pipe


def test_standard_output_gets_complete_transfers_one_after_the_other(tmp_path: Path) -> None:
    output, out = tmp_path / "output", tmp_path / "out"
    good, bad = upload(0, ("a", b"123456789"), ("b", b"abc")), upload(1, ("c", b"bad frames"))
    with open(out, "wb") as file, receiving(output, stdout=file.fileno()) as receiver:
        give_frames(receiver, [bad[0], good[0], bad[2], *good[1:], *upload(2, ("d", b"!"))])
        settlement = receiver.settle()
        assert {d.where for d in settlement.delivered} == {"standard output"}
        give_frames(receiver, good)
        receiver.settle()
    assert out.read_bytes() == b"123456789abc!"
    assert visible(output) == set()
    assert staged(output) == []


def test_what_a_reader_that_is_gone_did_not_get_stays_staged_for_the_next(tmp_path: Path) -> None:
    output, out = tmp_path / "output", tmp_path / "out"
    reading, writing = os.pipe()
    os.close(reading)
    with closing(open_sink(output, stdout=writing)) as sink:
        receiver = Receiver(sink)
        give_frames(receiver, upload(0, ("a", b"123456789")))
        with pytest.raises(BrokenPipeError):
            receiver.settle()
    with pytest.raises(BrokenPipeError):
        open_sink(output, stdout=writing)
    os.close(writing)
    assert transfer_id(0) in staged(output)
    with open(out, "wb") as file:
        open_sink(output, stdout=file.fileno()).close()
    assert out.read_bytes() == b"123456789"
    assert staged(output) == []


# --- bounded staging -----------------------------------------------------------------------------


def test_beyond_the_limit_the_transfer_that_was_silent_longest_is_dropped_and_told(
    tmp_path: Path,
) -> None:
    lines = [one(b"123456789", number) for number in range(12)]
    with closing(FileSink(tmp_path, max_staged=6)) as sink:
        receiver = Receiver(sink, max_open=2)
        give_frames(receiver, [line[0] for line in lines[:4]])
        receiver.settle()
    with closing(FileSink(tmp_path, max_staged=6)) as sink:
        receiver = Receiver(sink, max_open=2)
        give_frames(receiver, lines[0][1:2])
        give_frames(receiver, [line[0] for line in lines[4:]], first_tag=2)
        settlement = receiver.settle()
        assert settlement.ack == tuple(range(1, 10))
        # The first one was heard of again, but then too long ago.
        dropped = [p.transfer_id for p in settlement.problems if p.kind == "expired"]
        assert sorted(map(str, dropped)) == [transfer_id(n) for n in range(6)]
        assert len(staged(tmp_path)) == 2 * 6
        give_frames(receiver, lines[11][1:])
        assert len(receiver.settle().delivered) == 1
        give_frames(receiver, lines[0][2:])
        assert len(receiver.settle().reject) == 1


def test_a_parked_transfer_that_was_saved_costs_no_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving(tmp_path, max_open=1) as receiver:
        give_frames(receiver, one(b"123456789", 0)[:1])
        receiver.settle()
        syncs: list[int] = []
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, syncs.append)
        give_frames(receiver, one(b"123456789", 1)[:1])
        assert syncs == []
        monkeypatch.undo()
        receiver.settle()
    assert len(staged(tmp_path)) == 4
