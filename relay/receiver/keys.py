"""The idempotency keys of delivered transfers, in a file, so that a restart does not forget them.

Records of one size, appended and synced, the latest last; the older half goes when there are twice
as many as are wanted. It does not know what a key stands for, nor when a transfer is delivered.
"""

import os
import re
from collections.abc import Sequence
from typing import Final

from relay.receiver import KnownKey

NAME: Final = "keys"
NEW_NAME: Final = "keys.new"
"""The file, and what is to replace it."""

MAX_KEYS: Final = 10_000

RECORD_SIZE: Final = 72
_RECORD: Final = re.compile(rb"([0-9a-f]{32}) ([0-9a-f-]{36}) ([DR])\n")
_DELIVERED: Final = b"D"
_REPEATED: Final = b"R"

_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_REPLACE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class KeyFile:
    """The file ``keys`` in a directory; it comes into being with the first key."""

    def __init__(self, directory: int, *, max_keys: int = MAX_KEYS) -> None:
        """``directory`` is open, and stays its owner's."""
        self._directory = directory
        self._max_keys = max_keys

    def load(self) -> list[KnownKey]:
        """The latest keys, oldest first."""
        try:
            file = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return []
        try:
            text = self._latest(file)
        finally:
            os.close(file)
        keys = []
        for start in range(0, len(text), RECORD_SIZE):
            # What a crash left may be no record; nothing was acked that relied upon it.
            if match := _RECORD.fullmatch(text, start, start + RECORD_SIZE):
                key, transfer_id = match[1].decode("ascii"), match[2].decode("ascii")
                keys.append(KnownKey(key, transfer_id, repeated=match[3] == _REPEATED))
        return keys

    def append(self, keys: Sequence[KnownKey]) -> None:
        """Add ``keys``; they survive a crash when this returns."""
        if not keys:
            return
        file = os.open(NAME, _APPEND, 0o600, dir_fd=self._directory)
        try:
            size = os.fstat(file).st_size
            os.ftruncate(file, size - size % RECORD_SIZE)
            _write(file, b"".join(map(_record, keys)))
            os.fdatasync(file)
            if size == 0:
                os.fsync(self._directory)
            if size > 2 * self._max_keys * RECORD_SIZE:
                self._replace(self._latest(file))
        finally:
            os.close(file)

    def _latest(self, file: int) -> bytes:
        end = os.fstat(file).st_size // RECORD_SIZE
        first = max(0, end - self._max_keys)
        return os.pread(file, (end - first) * RECORD_SIZE, first * RECORD_SIZE)

    def _replace(self, text: bytes) -> None:
        file = os.open(NEW_NAME, _REPLACE, 0o600, dir_fd=self._directory)
        try:
            _write(file, text)
            os.fdatasync(file)
        finally:
            os.close(file)
        os.rename(NEW_NAME, NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)


def _record(known: KnownKey) -> bytes:
    what = _REPEATED if known.repeated else _DELIVERED
    return b"%b %b %b\n" % (known.key.encode("ascii"), known.transfer_id.encode("ascii"), what)


def _write(file: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(file, rest) :]
