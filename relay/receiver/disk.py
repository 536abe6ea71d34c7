"""Files below directories that are open already: what ``os`` leaves to be done by hand.

Names are single components, links are not followed. It does not know what any file is for.
"""

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
REOPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
REPLACE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

_NO_REPLACE: Final = 1
"""RENAME_NOREPLACE, linux/fs.h."""


@contextmanager
def directory(name: str, parent: int) -> Iterator[int]:
    """The directory ``name``, open for as long as the block runs."""
    descriptor = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


Path = tuple[str, ...]
"""Components below a directory that is open; () is that directory itself."""


@contextmanager
def descend(path: Path, parent: int, made_in: set[Path] | None = None) -> Iterator[int]:
    """The directory at ``path``, open for as long as the block runs.

    Args:
        path: below ``parent``.
        parent: an open directory.
        made_in: if given, what is missing is made, and this gets the directories to be synced.

    Raises:
        NotADirectoryError: there is something else on the way, perhaps a link.
        FileNotFoundError: it is missing, and is not to be made.
    """
    here = os.dup(parent)
    try:
        for depth, name in enumerate(path):
            if made_in is not None and make_directory(name, here):
                made_in.add(path[:depth])
            there = os.open(name, DIRECTORY, dir_fd=here)
            os.close(here)
            here = there
        yield here
    finally:
        os.close(here)


def sync_directories(paths: Iterable[Path], parent: int) -> None:
    """Make names safe that were made in these directories; those deepest down first."""
    for path in sorted(paths, key=len, reverse=True):
        with descend(path, parent) as here:
            os.fsync(here)


def make_directory(name: str, parent: int, mode: int = 0o777) -> bool:
    """Make sure that there is one. Returns whether it was made, and ``parent`` needs a sync."""
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def exists(path: str, parent: int) -> bool:
    """Whether anything has that name, be it a link that leads nowhere."""
    try:
        os.stat(path, dir_fd=parent, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_directory(path: str, parent: int) -> bool:
    """Whether that is a directory, and not a link to one."""
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=parent, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write all of it, however little the system takes at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync_file(name: str, parent: int) -> None:
    """Make the file's bytes safe."""
    file = os.open(name, READ, dir_fd=parent)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


def replace_file(name: str, parent: int, data: bytes, *, sync: bool) -> None:
    """Give the file this content, all of it or none; with ``sync``, ``parent`` is yet to be."""
    new = f"{name}.new"
    file = os.open(new, REPLACE, 0o600, dir_fd=parent)
    try:
        write_all(file, data)
        if sync:
            os.fdatasync(file)
    finally:
        os.close(file)
    os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)


def remove_file(name: str, parent: int) -> None:
    """Remove the file, if there is one."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def remove_tree(name: str, parent: int) -> None:
    """Remove the directory and what is in it, if there is one."""
    with suppress(FileNotFoundError):
        shutil.rmtree(name, dir_fd=parent)


def move_new(source: str, source_parent: int, name: str, parent: int) -> None:
    """Rename, unless ``name`` exists.

    Not link and unlink: between the two, a crash would leave the file under both names, and
    whoever takes the new one at once would be given it again.

    Raises:
        FileExistsError: ``name`` exists.
        OSError: among others, the file system has no such operation.
    """
    code = _renameat2(source_parent, os.fsencode(source), parent, os.fsencode(name))
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(
            errno.ENOTSUP,
            "the file system cannot rename without replacing (renameat2, RENAME_NOREPLACE)",
        )
    if code:
        raise OSError(code, os.strerror(code), name)


def _load() -> Callable[[int, bytes, int, bytes], int]:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # musl before 1.2.6 and glibc before 2.28
        return lambda *_: errno.ENOSYS
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )

    def call(source_parent: int, source: bytes, parent: int, name: bytes) -> int:
        failed = function(source_parent, source, parent, name, _NO_REPLACE)
        return ctypes.get_errno() if failed else 0

    return call


_renameat2: Final = _load()
