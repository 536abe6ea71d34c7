"""Keys of delivered transfers survive a restart, and a crash; the file stays small."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.receiver import KnownKey
from relay.receiver.keys import NAME, RECORD_SIZE, KeyFile


def known(number: int, *, repeated: bool = False) -> KnownKey:
    return KnownKey(f"{number:032x}", f"0199c0de-0000-7000-8000-{number:012x}", repeated)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_what_was_appended_is_loaded_in_that_order(directory: int) -> None:
    KeyFile(directory).append([known(1), known(2, repeated=True)])
    KeyFile(directory).append([known(3)])
    assert KeyFile(directory).load() == [known(1), known(2, repeated=True), known(3)]


def test_there_is_no_file_before_the_first_key(tmp_path: Path, directory: int) -> None:
    keys = KeyFile(directory)
    assert keys.load() == []
    keys.append([])
    assert os.listdir(tmp_path) == []


def test_only_the_latest_keys_are_kept(tmp_path: Path, directory: int) -> None:
    keys = KeyFile(directory, max_keys=3)
    for number in range(100):
        keys.append([known(number)])
        assert keys.load() == [known(n) for n in range(max(0, number - 2), number + 1)]
        assert (tmp_path / NAME).stat().st_size <= (2 * 3 + 2) * RECORD_SIZE
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("cut", [1, RECORD_SIZE // 2, RECORD_SIZE - 1])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_record_that_a_crash_cut_short_costs_no_other(
    tmp_path: Path, directory: int, cut: int, zeroed: bool
) -> None:
    keys = KeyFile(directory)
    keys.append([known(1), known(2)])
    path = tmp_path / NAME
    os.truncate(path, 2 * RECORD_SIZE - cut)
    if zeroed:
        os.truncate(path, 2 * RECORD_SIZE)
    assert keys.load() == [known(1)]
    keys.append([known(3)])
    assert keys.load() == [known(1), known(3)]


def test_what_a_crash_left_of_a_replacement_is_in_nobodys_way(
    tmp_path: Path, directory: int
) -> None:
    (tmp_path / "keys.new").write_bytes(b"x" * 1000)
    keys = KeyFile(directory, max_keys=1)
    for number in range(5):
        keys.append([known(number)])
    assert keys.load() == [known(4)]
    assert os.listdir(tmp_path) == [NAME]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, directory: int) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / NAME).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        KeyFile(directory).append([known(1)])
    assert victim.read_bytes() == b"precious"
