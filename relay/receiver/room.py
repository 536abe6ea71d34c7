"""Whether a directory has room, for who has just found it full.

It knows numbers of bytes and files, not what they are for.
"""

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

import trio

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors that go away when somebody makes room."""

FIRST: Final = 1.0
LAST: Final = 10.0
FUTILE: Final = 600.0
"""Seconds between two looks: doubled each time, up to ``LAST``. And before the first look, at most,
where there was room each time, and then was not, as some quotas have it."""


async def wait_for_room(directory: Path, size: int, files: int, *, futile: int = 0) -> None:
    """Wait until so many bytes, in so many files, fit.

    Args:
        directory: where to.
        size: in bytes.
        files: directories included.
        futile: how often, in a row, there was said to be room and then was not.

    Raises:
        OSError: it cannot be told.
    """
    if futile:
        await trio.sleep(min(FIRST * 2.0**futile, FUTILE))
    wait = FIRST
    while not await trio.to_thread.run_sync(has_room, directory, size, files):
        await trio.sleep(wait)
        wait = min(wait * 2, LAST)


def has_room(directory: Path, size: int, files: int) -> bool:
    """Whether so many bytes, in so many files, fit into ``directory``. It may take some time.

    What counts is its nearest parent if it does not exist.

    statvfs knows nothing of quotas, so the bytes are claimed for a moment, too.

    Raises:
        OSError: it cannot be told, for another reason than that there is no room.
    """
    directory = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    found = os.statvfs(directory)
    # Some filesystems make inodes as they need them, and say that they have none at all.
    if found.f_bavail * found.f_frsize < size or (found.f_files and found.f_favail < files):
        return False
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as exc:
        if exc.errno in NO_ROOM:
            return False
        if exc.errno != errno.EOPNOTSUPP:
            raise
    return True
