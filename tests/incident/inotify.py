"""What happens to the files of a directory, as the kernel tells it through inotify(7).

An event is queued before the system call that caused it returns: whoever has seen a
service's answer finds here everything the service did before. That holds for unnamed
temporary files too (O_TMPFILE); the kernel calls them `#` and their inode number.

It knows paths and events, not who caused them.
"""

import ctypes
import ctypes.util
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

# <sys/inotify.h>
IN_MODIFY = 0x002
IN_ATTRIB = 0x004
IN_CLOSE_WRITE = 0x008
IN_MOVED_FROM = 0x040
IN_MOVED_TO = 0x080
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_Q_OVERFLOW = 0x4000
NAMES = {
    IN_MODIFY: "modify",
    IN_ATTRIB: "attrib",
    IN_CLOSE_WRITE: "close_write",
    IN_MOVED_FROM: "moved_from",
    IN_MOVED_TO: "moved_to",
    IN_CREATE: "create",
    IN_DELETE: "delete",
}
CHANGES = sum(NAMES)
HEADER = struct.Struct("iIII")
READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class FileEvent:
    """One thing that happened: `kind` is one of `NAMES`, `path` the file it happened to."""

    kind: str
    path: Path


class FileWatch:
    """Collects every change under some directories, their subdirectories of now included."""

    def __init__(self, *directories: Path) -> None:
        """Begins to watch.

        Raises:
            OSError: the kernel refuses (no such directory, limit of watches reached).
        """
        libc = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6", use_errno=True)
        self._descriptor = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._paths: dict[int, Path] = {}
        for directory in directories:
            for path in (directory, *(p for p in directory.rglob("*") if p.is_dir())):
                watch = libc.inotify_add_watch(self._descriptor, os.fsencode(path), CHANGES)
                self._paths[_checked(watch)] = path

    def events(self) -> list[FileEvent]:
        """Takes what has happened since the last call, oldest first.

        Raises:
            OverflowError: more happened than the kernel kept.
        """
        found: list[FileEvent] = []
        while True:
            try:
                queued = os.read(self._descriptor, READ_BYTES)
            except BlockingIOError:
                return found
            found += self._decode(queued)

    def close(self) -> None:
        """Ends the watch."""
        os.close(self._descriptor)

    def _decode(self, queued: bytes) -> list[FileEvent]:
        """Turns `struct inotify_event` records into events."""
        found = []
        position = 0
        while position < len(queued):
            watch, mask, _cookie, length = HEADER.unpack_from(queued, position)
            position += HEADER.size
            name = queued[position : position + length].rstrip(b"\0")
            position += length
            if mask & IN_Q_OVERFLOW:
                raise OverflowError("inotify queue overflow: events were lost")
            kinds = [kind for bit, kind in NAMES.items() if mask & bit]
            path = self._paths[watch] / os.fsdecode(name)
            found += [FileEvent(kind, path) for kind in kinds]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _checked(result: int) -> int:
    """Turns libc's -1 into the exception that errno means."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
