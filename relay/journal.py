"""The systemd journal's native protocol: one datagram of fields for each entry.

Its own few lines, because the protocol is that small (systemd.io/JOURNAL_NATIVE_PROTOCOL) and the
libraries for it are bindings to libsystemd. It knows nothing of log records.
"""

import os
import socket
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

SOCKET: Final = "/run/systemd/journal/socket"

_NAME_MAX: Final = 64


def is_standard_error(stream: str, descriptor: int = 2) -> bool:
    """Whether JOURNAL_STREAM, ``device:inode``, is what standard error still is.

    A process inherits the variable also when its output was redirected (systemd.exec(5)).
    """
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


class Journal:
    """Entries to journald."""

    def __init__(self, path: str = SOCKET) -> None:
        """``path``: of journald's socket."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A journald that does not read must not stop the event loop.
        self._socket.setblocking(False)

    def send(self, entry: Mapping[str, str]) -> bool:
        """Send an entry. Returns whether journald took it.

        Names become what journald accepts: ``client`` is the field ``CLIENT``.
        """
        data = b"".join(_field(name, value) for name, value in entry.items())
        try:
            # Not connected once and for all: journald may have been restarted.
            self._socket.sendto(data, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@lru_cache(maxsize=64)
def _key(name: str) -> bytes:
    """What journald knows a field by. The names are relay's own, and few."""
    letters = (char if char.isascii() and char.isalnum() else "_" for char in name.upper())
    return "".join(letters).lstrip("_0123456789")[:_NAME_MAX].encode()


def _field(name: str, value: str) -> bytes:
    key = _key(name)
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return key + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return key + b"=" + data + b"\n"
