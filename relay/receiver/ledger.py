"""What became of the transfers that ended lately: the commit log of an output directory.

Records of one size, appended and synced, the latest last; the older half of the file goes when
there are twice as many as are wanted. Aborts are counted apart: anybody who may publish can begin
transfers and give them up, and must not make it forget what was delivered. It does not know what a
transfer consists of, nor where it is: whoever takes what was delivered may do with it as they like.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from relay.receiver import disk

NAME: Final = "ledger"
NEW_NAME: Final = f"{NAME}.new"
"""The file, and what is to replace it."""

MAX_RECORDS: Final = 10_000

ABORTED_SHARE: Final = 5
"""One aborted transfer is remembered for so many others. 2,000 are as many as can have unacked
frames (RabbitMQ), and nobody asks for any other."""

RECORD_SIZE: Final = 72
_RECORD: Final = re.compile(rb"([0-9a-f-]{36}) ([0-9a-f]{32}|-{32}) ([DRA])\n")
_NO_KEY: Final = "-" * 32

_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class End(Enum):
    """What became of a transfer."""

    DELIVERED = b"D"
    REPEATED = b"R"
    """It was dropped, because another with its key had been delivered before."""
    ABORTED = b"A"
    """Its sender gave it up."""


@dataclass(frozen=True, slots=True)
class Record:
    """The end of a transfer.

    Attributes:
        transfer_id: the transfer.
        key: its ``reassembly.key_digest``; None if it had no key, or was aborted.
        end: what became of it.
    """

    transfer_id: str
    key: str | None = None
    end: End = End.DELIVERED


class _Latest:
    """Records in memory, as many as are wanted."""

    def __init__(self, limit: int) -> None:
        self._complete: OrderedDict[str, Record] = OrderedDict()
        self._aborted: OrderedDict[str, Record] = OrderedDict()
        self._limit = limit

    def __iter__(self) -> Iterator[Record]:
        """The aborted ones first; of either kind the oldest first."""
        return iter([*self._aborted.values(), *self._complete.values()])

    def get(self, transfer_id: str) -> Record | None:
        return self._complete.get(transfer_id) or self._aborted.get(transfer_id)

    def add(self, record: Record) -> None:
        aborted = record.end is End.ABORTED
        kind = self._aborted if aborted else self._complete
        kind[record.transfer_id] = record
        kind.move_to_end(record.transfer_id)
        if len(kind) > (max(1, self._limit // ABORTED_SHARE) if aborted else self._limit):
            kind.popitem(last=False)


class Ledger:
    """The file ``ledger`` in a directory, and the same in memory."""

    def __init__(self, directory: int, *, max_records: int = MAX_RECORDS) -> None:
        """``directory`` is open, and stays its owner's. The file is made if it is missing."""
        self._directory = directory
        self._max_records = max_records
        self._file = os.open(NAME, _APPEND, 0o600, dir_fd=directory)
        try:
            self._records = _Latest(max_records)
            self._load()
        except OSError:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Let go of what is open."""
        os.close(self._file)

    def __iter__(self) -> Iterator[Record]:
        """The latest records: the aborted ones first; of either kind the oldest first."""
        return iter(self._records)

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
        for record in new:
            self._records.add(record)
        if size > 2 * self._max_records * RECORD_SIZE:
            self._rewrite()

    def _load(self) -> None:
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            while text := file.read(RECORD_SIZE):
                # What a crash left may be no record; nothing was acked that relied upon it.
                if match := _RECORD.fullmatch(text):
                    transfer_id, key = match[1].decode("ascii"), match[2].decode("ascii")
                    known = None if key == _NO_KEY else key
                    self._records.add(Record(transfer_id, known, End(match[3])))

    def _rewrite(self) -> None:
        text = b"".join(map(_encode, self._records))
        disk.replace_file(NAME, self._directory, text, sync=True)
        os.fsync(self._directory)
        file = os.open(NAME, _APPEND, 0o600, dir_fd=self._directory)
        os.close(self._file)
        self._file = file


def _encode(record: Record) -> bytes:
    transfer_id, key = record.transfer_id, record.key or _NO_KEY
    return b"%b %b %b\n" % (transfer_id.encode("ascii"), key.encode("ascii"), record.end.value)
