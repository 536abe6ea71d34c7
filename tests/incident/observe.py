"""What a process holds and writes, read from /proc: memory, bytes to disk, open files.

It observes only; it neither knows nor cares which service the process is.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenFile:
    """A regular file that a process has open; `size` in bytes, `links` 0 if it has no name."""

    descriptor: int
    path: str
    inode: int
    size: int
    links: int
    writable: bool


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process in bytes (VmRSS)."""
    return _status_bytes(pid, "VmRSS")


def peak_resident_bytes(pid: int) -> int:
    """Returns the most resident memory the process ever had, in bytes (VmHWM)."""
    return _status_bytes(pid, "VmHWM")


def written_bytes(pid: int) -> int:
    """Returns the bytes a process caused to be written to storage (write_bytes, proc(5)).

    The kernel books metadata too: on a file system with access times (relatime), a process
    that reads a file for the first time since it changed has "written" a few KiB. Take
    differences, between moments after everything is loaded.
    """
    return int(_field(Path(f"/proc/{pid}/io"), "write_bytes"))


def open_files(pid: int) -> list[OpenFile]:
    """Returns the regular files a process has open, unlinked ones included."""
    return list(_open_files(pid))


def temporary_bytes(pid: int, directory: Path) -> int:
    """Returns the bytes in a process's temporary files.

    Counts what lies in `directory` and what the process has open there without a name:
    Python makes its temporary files with O_TMPFILE, so that no listing ever shows them.
    """
    named = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    prefix = f"{directory}/"
    unnamed = {
        file.inode: file.size
        for file in _open_files(pid)
        if file.links == 0 and file.path.startswith(prefix)
    }
    return named + sum(unnamed.values())


def _open_files(pid: int) -> Iterator[OpenFile]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = link.stat()
            path = os.readlink(link)
            flags = int(_field(Path(f"/proc/{pid}/fdinfo/{link.name}"), "flags"), 8)
        except FileNotFoundError:
            # Closed between the listing and the look.
            continue
        if stat.S_ISREG(found.st_mode):
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            yield OpenFile(
                descriptor=int(link.name),
                path=path,
                inode=found.st_ino,
                size=found.st_size,
                links=found.st_nlink,
                writable=writable,
            )


def _status_bytes(pid: int, name: str) -> int:
    kibibytes, unit = _field(Path(f"/proc/{pid}/status"), name).split()
    assert unit == "kB"
    return int(kibibytes) * 1024


def _field(path: Path, name: str) -> str:
    """Returns the value of one `name: value` line."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise LookupError(f"{path} has no {name}")
