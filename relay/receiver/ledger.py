"""What became of the transfers that were complete lately: the commit log of an output directory.

Records of one size, appended and synced, the latest last; the older half of the file goes when
there are twice as many as are wanted. It does not know what a transfer consists of, nor where it
is: whoever takes what was delivered may do with it as they like.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from relay.receiver import disk

NAME: Final = "ledger"
NEW_NAME: Final = f"{NAME}.new"
"""The file, and what is to replace it."""

MAX_RECORDS: Final = 10_000

RECORD_SIZE: Final = 72
_RECORD: Final = re.compile(rb"([0-9a-f-]{36}) ([0-9a-f]{32}|-{32}) ([DR])\n")
_NO_KEY: Final = "-" * 32
_DELIVERED: Final = b"D"
_REPEATED: Final = b"R"

_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Record:
    """The end of a transfer that was complete.

    Attributes:
        transfer_id: the transfer.
        key: its ``reassembly.key_digest``; None if it had no key.
        repeated: it was dropped, because another with that key had been delivered before.
    """

    transfer_id: str
    key: str | None = None
    repeated: bool = False


class Ledger:
    """The file ``ledger`` in a directory, and the same in memory."""

    def __init__(self, directory: int, *, max_records: int = MAX_RECORDS) -> None:
        """``directory`` is open, and stays its owner's. The file is made if it is missing."""
        self._directory = directory
        self._max_records = max_records
        self._file = os.open(NAME, _APPEND, 0o600, dir_fd=directory)
        try:
            self._records = self._load()
        except OSError:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Let go of what is open."""
        os.close(self._file)

    def __iter__(self) -> Iterator[Record]:
        """The latest records, oldest first."""
        return iter([*self._records.values()])

    def get(self, transfer_id: str) -> Record | None:
        """What is known of a transfer."""
        return self._records.get(transfer_id)

    def append(self, records: Iterable[Record]) -> None:
        """Add records; they survive a crash when this returns."""
        new = [*records]
        if not new:
            return
        size = os.fstat(self._file).st_size
        # A write that failed may have left half a record.
        os.ftruncate(self._file, size - size % RECORD_SIZE)
        disk.write_all(self._file, b"".join(map(_encode, new)))
        os.fdatasync(self._file)
        self._remember(new, self._records)
        if size > 2 * self._max_records * RECORD_SIZE:
            self._rewrite()

    def _load(self) -> "OrderedDict[str, Record]":
        records: OrderedDict[str, Record] = OrderedDict()
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            while text := file.read(RECORD_SIZE):
                # What a crash left may be no record; nothing was acked that relied upon it.
                if match := _RECORD.fullmatch(text):
                    transfer_id, key = match[1].decode("ascii"), match[2].decode("ascii")
                    known = None if key == _NO_KEY else key
                    self._remember([Record(transfer_id, known, match[3] == _REPEATED)], records)
        return records

    def _remember(self, new: list[Record], records: "OrderedDict[str, Record]") -> None:
        for record in new:
            records[record.transfer_id] = record
            records.move_to_end(record.transfer_id)
            if len(records) > self._max_records:
                records.popitem(last=False)

    def _rewrite(self) -> None:
        text = b"".join(map(_encode, self._records.values()))
        disk.replace_file(NAME, self._directory, text, sync=True)
        os.fsync(self._directory)
        file = os.open(NAME, _APPEND, 0o600, dir_fd=self._directory)
        os.close(self._file)
        self._file = file


def _encode(record: Record) -> bytes:
    what = _REPEATED if record.repeated else _DELIVERED
    key = record.key or _NO_KEY
    return b"%b %b %b\n" % (record.transfer_id.encode("ascii"), key.encode("ascii"), what)
