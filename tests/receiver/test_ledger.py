"""What became of transfers survives a restart, and a crash; the file stays small."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay.receiver.ledger import NAME, RECORD_SIZE, End, Ledger, Record


def record(number: int, *, end: End = End.DELIVERED, keyed: bool = True) -> Record:
    key = f"{number:032x}" if keyed else None
    return Record(f"0199c0de-0000-7000-8000-{number:012x}", key, end)


def append(directory: int, *records: Record, max_records: int = 10) -> None:
    with closing(Ledger(directory, max_records=max_records)) as ledger:
        ledger.append(records)


def load(directory: int, max_records: int = 10) -> list[Record]:
    with closing(Ledger(directory, max_records=max_records)) as ledger:
        return [*ledger]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_what_was_appended_is_loaded_in_that_order(directory: int) -> None:
    append(directory, record(1), record(2, end=End.REPEATED))
    append(directory)
    append(directory, record(3, keyed=False))
    assert load(directory) == [record(1), record(2, end=End.REPEATED), record(3, keyed=False)]


def test_what_was_appended_is_known_at_once(directory: int) -> None:
    with closing(Ledger(directory)) as ledger:
        assert ledger.get(record(1).transfer_id) is None
        ledger.append([record(1)])
        assert ledger.get(record(1).transfer_id) == record(1)


def test_only_the_latest_records_are_kept(tmp_path: Path, directory: int) -> None:
    with closing(Ledger(directory, max_records=3)) as ledger:
        for number in range(100):
            ledger.append([record(number)])
            latest = [record(n) for n in range(max(0, number - 2), number + 1)]
            assert [*ledger] == latest == load(directory, 3)
            assert (tmp_path / NAME).stat().st_size <= (2 * 3 + 2) * RECORD_SIZE
    assert os.listdir(tmp_path) == [NAME]


def test_aborts_push_nothing_out_that_was_delivered(tmp_path: Path, directory: int) -> None:
    delivered = [record(number) for number in range(10)]
    append(directory, *delivered)
    for number in range(100, 200):
        append(directory, record(number, end=End.ABORTED, keyed=False))
    aborted = [record(number, end=End.ABORTED, keyed=False) for number in (198, 199)]
    assert load(directory) == [*aborted, *delivered]
    with closing(Ledger(directory, max_records=10)) as ledger:
        assert ledger.get(aborted[0].transfer_id) == aborted[0]
    assert (tmp_path / NAME).stat().st_size <= (2 * 10 + 2) * RECORD_SIZE


@pytest.mark.parametrize("cut", [1, RECORD_SIZE // 2, RECORD_SIZE - 1])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_record_that_a_crash_cut_short_costs_no_other(
    tmp_path: Path, directory: int, cut: int, zeroed: bool
) -> None:
    append(directory, record(1), record(2))
    path = tmp_path / NAME
    os.truncate(path, 2 * RECORD_SIZE - cut)
    if zeroed:
        os.truncate(path, 2 * RECORD_SIZE)
    assert load(directory) == [record(1)]
    append(directory, record(3))
    assert load(directory) == [record(1), record(3)]


def test_what_a_crash_left_of_a_replacement_is_in_nobodys_way(
    tmp_path: Path, directory: int
) -> None:
    (tmp_path / f"{NAME}.new").write_bytes(b"x" * 1000)
    for number in range(5):
        append(directory, record(number), max_records=1)
    assert load(directory, 1) == [record(4)]
    assert os.listdir(tmp_path) == [NAME]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, directory: int) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / NAME).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        Ledger(directory)
    assert victim.read_bytes() == b"precious"
