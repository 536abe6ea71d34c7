"""What is yet to be done with delivered transfers is known after a crash, and to any thread."""

import errno
import json
import os
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from relay.model import PartHead
from relay.receiver import Receiver, disk
from relay.receiver.files import STAGING
from relay.receiver.pending import NAME
from relay.receiver.quarantine import NAME as QUARANTINE
from tests.fed_receiver import cut, give_frames, one, open_sink, receive, transfer_id, visible

PARTS = [(PartHead(filename="a"), b"1234"), (PartHead(filename="b"), b"5678")]


def test_delivered_transfers_wait_until_they_are_done(tmp_path: Path) -> None:
    for number in range(3):
        receive(tmp_path, one(b"x", number), pending=True)
    with closing(open_sink(tmp_path, pending=True)) as sink:
        waiting = sink.handover.pending()
        assert [p.transfer_id for p in waiting] == [transfer_id(n) for n in range(3)]
        assert [p.where for p in waiting] == [tmp_path / transfer_id(n) for n in range(3)]
        assert all(p.receipt == p.where / "receipt.json" for p in waiting)
        assert all(p.receipt.exists() for p in waiting)
        sink.handover.note_try(transfer_id(1))
        sink.handover.note_try(transfer_id(1))
        sink.handover.done(transfer_id(0))
    with closing(open_sink(tmp_path, pending=True)) as sink:
        assert [(p.transfer_id, p.tries) for p in sink.handover.pending()] == [
            (transfer_id(1), 2),
            (transfer_id(2), 0),
        ]
        with pytest.raises(KeyError):
            sink.handover.note_try(transfer_id(0))
        with pytest.raises(KeyError):
            sink.handover.give_up(transfer_id(0), "why")
        sink.handover.done(transfer_id(0))


def test_nothing_waits_unless_told(tmp_path: Path) -> None:
    with closing(open_sink(tmp_path)) as sink:
        receiver = Receiver(sink)
        give_frames(receiver, one(b"x"))
        receiver.settle()
        assert sink.handover.pending() == []
    assert not (tmp_path / STAGING / NAME).exists()


def test_the_output_may_be_moved(tmp_path: Path) -> None:
    receive(tmp_path / "a", one(b"x"), pending=True)
    (tmp_path / "a").rename(tmp_path / "b")
    with closing(open_sink(tmp_path / "b", pending=True)) as sink:
        assert [p.where for p in sink.handover.pending()] == [tmp_path / "b" / transfer_id(0)]


@pytest.mark.parametrize(
    ("name", "files"),
    [("{transfer}/{filename}", {"a", "b"}), ("{route}/{filename}", {"0-a", "1-b"})],
)
def test_what_is_given_up_goes_to_the_quarantine(
    tmp_path: Path, name: str, files: set[str]
) -> None:
    with closing(open_sink(tmp_path, name, pending=True)) as sink:
        receiver = Receiver(sink)
        give_frames(receiver, cut(PARTS))
        receiver.settle()
        sink.handover.note_try(transfer_id(0))
        sink.handover.give_up(transfer_id(0), "exit code 1")
        assert sink.handover.pending() == []
    assert visible(tmp_path) == set()
    kept = tmp_path / QUARANTINE / transfer_id(0)
    assert {path.name for path in kept.iterdir()} == {*files, "receipt.json", "problem.json"}
    problem = json.loads((kept / "problem.json").read_text())
    assert (problem["reason"], problem["tries"]) == ("exit code 1", 1)


def test_what_cannot_be_forgotten_now_still_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str, _parent: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    receive(tmp_path, one(b"x"), pending=True)
    with closing(open_sink(tmp_path, pending=True)) as sink:
        for forget in (sink.handover.done, partial(sink.handover.give_up, reason="why")):
            with monkeypatch.context() as patch:
                patch.setattr(disk, "remove_file", broken)
                with pytest.raises(OSError, match="Input/output"):
                    forget(transfer_id(0))
            assert [p.transfer_id for p in sink.handover.pending()] == [transfer_id(0)]
        sink.handover.give_up(transfer_id(0), "why")
        assert sink.handover.pending() == []
    kept = {path.name for path in (tmp_path / QUARANTINE / transfer_id(0)).iterdir()}
    assert kept == {"0-x.bin", "receipt.json", "problem.json"}


@pytest.mark.parametrize("name", ["{transfer}/{filename}", "{filename}"])
def test_giving_up_what_somebody_has_taken_leaves_a_note_and_no_others_files(
    tmp_path: Path, name: str
) -> None:
    with closing(open_sink(tmp_path, name, pending=True)) as sink:
        receiver = Receiver(sink)
        give_frames(receiver, cut(PARTS))
        receiver.settle()
        if name == "{filename}":
            # Taken, and its name has another transfer's content now.
            (tmp_path / "a").write_bytes(b"another")
            (tmp_path / "b").unlink()
        else:
            (tmp_path / transfer_id(0)).rename(tmp_path.parent / f"{tmp_path.name}-taken")
        sink.handover.give_up(transfer_id(0), "exit code 1")
        assert sink.handover.pending() == []
    if name == "{filename}":
        assert (tmp_path / "a").read_bytes() == b"another"
    assert (tmp_path / QUARANTINE / transfer_id(0) / "problem.json").exists()


def test_without_a_quarantine_what_is_given_up_stays_where_it_is(tmp_path: Path) -> None:
    with closing(open_sink(tmp_path, pending=True, quarantine_keep=0.0)) as sink:
        receiver = Receiver(sink)
        give_frames(receiver, one(b"x"))
        receiver.settle()
        sink.handover.give_up(transfer_id(0), "exit code 1")
        assert sink.handover.pending() == []
    assert (tmp_path / transfer_id(0) / "receipt.json").exists()


def test_a_note_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    receive(tmp_path, one(b"x"), pending=True)
    (tmp_path / STAGING / NAME / transfer_id(0)).write_text("{}")
    with pytest.raises(OSError, match="cannot be read"):
        open_sink(tmp_path, pending=True)
    os.unlink(tmp_path / STAGING / NAME / transfer_id(0))
    open_sink(tmp_path, pending=True).close()


def test_another_thread_may_work_them_off_while_more_are_delivered(memory_path: Path) -> None:
    with closing(open_sink(memory_path, "{filename}", pending=True)) as sink:
        receiver = Receiver(sink)
        complete = threading.Event()
        done: list[str] = []

        def work_off() -> None:
            while not complete.is_set() or sink.handover.pending():
                for pending in sink.handover.pending():
                    assert pending.receipt.exists()
                    sink.handover.note_try(pending.transfer_id)
                    if len(done) % 2:
                        sink.handover.give_up(pending.transfer_id, "why")
                    else:
                        sink.handover.done(pending.transfer_id)
                    done.append(pending.transfer_id)

        worker = threading.Thread(target=work_off)
        worker.start()
        for number in range(100):
            bad = one(b"123456789", 1000 + number)
            give_frames(receiver, [bad[0], bad[2], *one(b"x", number)])
            receiver.settle()
        complete.set()
        worker.join(60)
        assert not worker.is_alive()
    assert done == [transfer_id(n) for n in range(100)]
