"""Room on a disk: bytes and files, as far as a filesystem tells."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from relay.receiver import room


def test_there_is_room_for_little_and_none_for_more_than_all(tmp_path: Path) -> None:
    assert room.has_room(tmp_path, 4096, 1)
    assert not room.has_room(tmp_path, 2**60, 1)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_missing_is_made_where_its_parent_is(tmp_path: Path) -> None:
    assert room.has_room(tmp_path / "a" / "b", 4096, 1)


@pytest.mark.parametrize("code", sorted(room.NO_ROOM))
def test_bytes_that_cannot_be_claimed_are_no_room_whatever_statvfs_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    assert not room.has_room(tmp_path, 4096, 1)


def test_a_filesystem_that_cannot_claim_bytes_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    assert room.has_room(tmp_path, 4096, 1)


def failing(code: int) -> Callable[..., None]:
    def fallocate(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fallocate


async def test_it_looks_again_and_again_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    looks: list[float] = []

    def has_room(*_: object) -> bool:
        looks.append(0)
        return len(looks) == 8

    monkeypatch.setattr(room, "has_room", has_room)
    began = trio.current_time()
    await room.wait_for_room(Path("/"), 1, 1)
    assert trio.current_time() - began == pytest.approx(1 + 2 + 4 + 8 + 3 * room.LAST)


async def test_room_that_proved_to_be_none_is_waited_for_longer_each_time(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(room, "has_room", lambda *_: True)
    waits = []
    for futile in (0, 1, 5, 100):
        began = trio.current_time()
        await room.wait_for_room(Path("/"), 1, 1, futile=futile)
        waits.append(trio.current_time() - began)
    assert waits == pytest.approx([0, 2, 32, room.FUTILE])
