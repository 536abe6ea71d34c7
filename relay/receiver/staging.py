"""One transfer's staged files, and the journal that says how much of them is safe.

    <transfer>/…            the parts, as they grow; at the end the receipt
    <transfer>.journal      what was staged

The journal is one JSON object per line: the transfer, then a part's beginning, a part's end, or a
position. A position is written, and synced, only after the bytes before it are, and the names that
lead to them; what follows the last position is what a crash left, is dropped when the transfer is
recalled, and comes again from the broker.

It does not know where the files go when the transfer is complete.
"""

import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, astuple
from typing import Any, BinaryIO, Final

from relay.model import PartHead, Totals, Transfer
from relay.protocol.crc import extend
from relay.protocol.framing import ALGORITHMS
from relay.protocol.reassembly import PartEnded, Position
from relay.receiver import Refused, disk
from relay.receiver.names import RECEIPT, RESERVED
from relay.receiver.receipts import Part, document, receipt_head

_READ_SIZE: Final = 1024 * 1024


def journal_name(transfer_id: str) -> str:
    """The journal's name in the staging directory."""
    return f"{transfer_id}.journal"


def remove(transfer_id: str, staging: int) -> None:
    """Remove all that is staged of a transfer."""
    # The journal first: staged bytes without a journal are a fresh start, a journal without its
    # bytes is a loss.
    disk.remove_file(journal_name(transfer_id), staging)
    disk.remove_tree(transfer_id, staging)


class Staged:
    """What is staged of one transfer: its journal, and the file of the part in progress.

    Attributes:
        transfer: as its first frame told it.
        saved: the position in the journal that is safe; None if there is none yet.
        touched: when that was, in seconds since 1970.
    """

    def __init__(self, transfer: Transfer, staging: int, journal: BinaryIO) -> None:
        """``staging`` is the directory of all staging, ``journal`` a file to be owned."""
        self.transfer = transfer
        self.saved: Position | None = None
        self.touched = time.time()
        self._staging = staging
        self._journal = journal
        # Since the last sync: files that were closed, and whether any were created.
        self._unsynced: list[str] = []
        self._created = False
        self._file: int | None = None
        self._name = ""

    @classmethod
    def create(cls, transfer: Transfer, staging: int) -> "Staged":
        """Begin. The two new names in ``staging`` are yet to be synced."""
        os.mkdir(transfer.id, dir_fd=staging)
        journal = os.open(journal_name(transfer.id), disk.CREATE, 0o600, dir_fd=staging)
        staged = cls(transfer, staging, os.fdopen(journal, "r+b"))
        staged._note(transfer=asdict(transfer))
        return staged

    @classmethod
    def reopen(cls, transfer_id: str, staging: int) -> "Staged | None":
        """What there is; None if there is nothing, or nothing that was ever saved."""
        try:
            journal = os.open(journal_name(transfer_id), disk.REOPEN, dir_fd=staging)
        except FileNotFoundError:
            return None
        file = os.fdopen(journal, "r+b")
        try:
            transfer = Transfer(**json.loads(file.readline())["transfer"])
        except (ValueError, LookupError, TypeError):
            file.close()
            return None
        return cls(transfer, staging, file)

    def close(self) -> None:
        """Let go of its files, which stay."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        # On a full disk it may hold lines that cannot be written; nobody has relied upon them.
        with suppress(OSError):
            self._journal.close()

    def open_part(self, part: int, head: PartHead, names: Iterable[str]) -> None:
        """Create the part's file, under the first of ``names`` that is free."""
        with self._directory() as directory:
            for name in names:
                try:
                    if name in RESERVED:
                        continue
                    self._file = os.open(name, disk.CREATE, 0o666, dir_fd=directory)
                    self._name = name
                    break
                except FileExistsError:
                    continue
        self._created = True
        self._note(
            part=part,
            file=self._name,
            name=head.name,
            filename=head.filename,
            content_type=head.content_type,
        )

    def write(self, body: bytes) -> None:
        """Write to the part's file; it is not synced yet."""
        disk.write_all(self._part_file(), body)

    def end_part(self, ended: PartEnded) -> None:
        """Close the part's file, and read it before that if digests have to be verified.

        Raises:
            Refused: a digest does not match.
        """
        file = self._part_file()
        verify(file, ended.part, ended.unchecked)
        os.close(file)
        self._file = None
        self._unsynced.append(self._name)
        tail = ended.tail
        self._note(end=ended.part, bytes=tail.size, frames=ended.frames, digest=dict(tail.digest))

    def sync(self) -> None:
        """Make the bytes safe, and their names in the transfer's directory; also when closed."""
        if self._file is not None:
            os.fdatasync(self._file)
        if self._unsynced or self._created:
            with self._directory() as directory:
                for name in self._unsynced:
                    disk.sync_file(name, directory)
                if self._created:
                    os.fsync(directory)
            self._unsynced.clear()
            self._created = False

    def save(self, position: Position) -> None:
        """Note how far it goes. All before, and the names in staging, must be synced."""
        self._note(at=astuple(position))
        self._journal.flush()
        os.fdatasync(self._journal.fileno())
        self.saved = position
        self.touched = time.time()

    def resume(self) -> Position | None:
        """Cut everything back to the last position that was saved; None if none was.

        Raises:
            Refused: there is less than was saved.
        """
        position, end = self._last_position()
        if position is None:
            return None
        self._journal.truncate(end)
        try:
            with self._directory() as directory:
                self._cut_back(position, directory)
        except FileNotFoundError:
            raise Refused("what was staged of it has disappeared") from None
        self._journal.seek(0, os.SEEK_END)
        self.saved = position
        return position

    def write_receipt(
        self, transfer: Transfer, totals: Totals, locate: Callable[[Part], str]
    ) -> None:
        """Add the receipt; it is not synced yet.

        Args:
            transfer: as its commit frame told it.
            totals: likewise.
            locate: says where a part's file will be, for the receipt.
        """
        parts = ({**part, "file": locate(part)} for part in self.parts())
        with self._directory() as directory:
            receipt = os.open(RECEIPT, disk.REPLACE, 0o666, dir_fd=directory)
            with os.fdopen(receipt, "wb") as file:
                file.writelines(document(receipt_head(transfer, totals), parts))
        self._unsynced.append(RECEIPT)
        self._created = True

    def parts(self) -> Iterator[Part]:
        """The parts in the journal, each beginning joined with its end; the last may have none."""
        begun: Part | None = None
        for entry, _ in self._entries():
            if "part" in entry:
                begun = entry
            elif "end" in entry and begun is not None:
                yield begun | {key: entry[key] for key in ("bytes", "frames", "digest")}
                begun = None
        if begun is not None:
            yield begun

    def _cut_back(self, position: Position, directory: int) -> None:
        known = set()
        for entry in self.parts():
            known.add(entry["file"])
            # At least what was saved must be there: it was acked, nobody will send it again.
            found = os.stat(entry["file"], dir_fd=directory, follow_symlinks=False)
            size = entry.get("bytes", position.offset)
            if not stat.S_ISREG(found.st_mode) or found.st_size < size:
                raise Refused("what was staged of it has lost bytes")
            if "bytes" not in entry:
                self._name = entry["file"]
                self._file = os.open(self._name, disk.REOPEN, dir_fd=directory)
                os.ftruncate(self._file, position.offset)
                os.lseek(self._file, 0, os.SEEK_END)
        for name in os.listdir(directory):
            if name not in known:
                os.unlink(name, dir_fd=directory)

    def _last_position(self) -> tuple[Position | None, int]:
        """The last position in the journal, and the offset in bytes where it ends there."""
        position, end = None, 0
        for entry, read in self._entries():
            if "at" in entry:
                position, end = Position(*entry["at"]), read
        return position, end

    def _entries(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Each entry of the journal, and the offset in bytes behind it."""
        read = 0
        self._journal.seek(0)
        for line in self._journal:
            # A crash may have left half a line, or zeros; nothing behind them was relied upon.
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError:
                return
            read += len(line)
            yield entry, read

    def _part_file(self) -> int:
        assert self._file is not None, "a part is open"
        return self._file

    def _note(self, **entry: object) -> None:
        self._journal.write(json.dumps(entry).encode("ascii") + b"\n")

    def _directory(self) -> AbstractContextManager[int]:
        return disk.directory(self.transfer.id, self._staging)


def replace_receipt(directory: int, lines: Iterable[bytes]) -> None:
    """Replace a transfer's receipt: after a crash there is the one or the other."""
    new = f".{RECEIPT}"
    with os.fdopen(os.open(new, disk.REPLACE, 0o666, dir_fd=directory), "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fdatasync(file.fileno())
    os.rename(new, RECEIPT, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def move_aside(transfer_id: str, staging: int, directory: int) -> None:
    """Move a transfer's files into another directory that is open; its journal stays."""
    with disk.directory(transfer_id, staging) as staged:
        for name in os.listdir(staged):
            os.rename(name, name, src_dir_fd=staged, dst_dir_fd=directory)


def describe(transfer_id: str, staging: int) -> tuple[dict[str, object], list[Part]]:
    """What the journal tells of a transfer that is not open, and of its parts."""
    staged = Staged.reopen(transfer_id, staging)
    if staged is None:
        return {}, []
    try:
        position, _ = staged._last_position()
        saved = None if position is None else asdict(position)
        transfer = staged.transfer
        about: dict[str, object] = {
            "route": transfer.route,
            "client": transfer.client,
            "position": saved,
        }
        return about, [*staged.parts()]
    finally:
        staged.close()


def verify(file: int, part: int, digests: Mapping[str, str]) -> None:
    """Read a file from its start and compare ``digests``, which may be none.

    Raises:
        Refused: one does not match.
    """
    if not digests:
        return
    crc = 0
    hashes = {name: ALGORITHMS[name]() for name in digests if name != "crc32c"}
    position = 0
    while block := os.pread(file, _READ_SIZE, position):
        position += len(block)
        crc = extend(crc, block)
        for hash_ in hashes.values():
            hash_.update(block)
    found = {name: hash_.hexdigest() for name, hash_ in hashes.items()}
    found["crc32c"] = f"{crc:08x}"
    for name, digest in digests.items():
        if found[name] != digest:
            raise Refused(f"{name} of part {part} does not match")
