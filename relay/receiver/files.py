"""Transfers as directories of files, complete or not there at all, whatever crashes.

A transfer is staged below ``DIR/.relay-staging`` and appears as ``DIR/<transfer>/`` by one rename:

    .relay-staging/<transfer>/<part>-<name>   the parts, as they grow
    .relay-staging/<transfer>.journal         what was staged, and how much of it is safe
    .relay-staging/keys                       idempotency keys of what was delivered
    .relay-staging/offset                     how far streams have been received
    <transfer>/<part>-<name>                  the result
    <transfer>/receipt.json                   what it consists of

The journal is one JSON object per line: a part's beginning, a part's end, or a position. A position
is written, and synced, only after the bytes before it are; what follows the last position is what a
crash left, is dropped when the transfer is recalled, and comes again from the broker.

Names that clients send are never paths: only a cleaned last component becomes part of a file's
name. Everything is opened relative to directories that are open already, files are created
exclusively, links are not followed, and nothing that exists is overwritten.
"""

import fcntl
import json
import os
import re
import shutil
import stat
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import google_crc32c

from relay.model import PartHead, Totals, Transfer
from relay.protocol.framing import ALGORITHMS
from relay.protocol.reassembly import PartEnded, Position, key_digest
from relay.receiver import Earlier, KnownKey, Refused, Sink, keys, offsets

STAGING: Final = ".relay-staging"
RECEIPT: Final = "receipt.json"

NAME_MAX: Final = 255
"""Bytes of a file name on Linux (NAME_MAX, limits.h)."""

_SUFFIX_MAX: Final = 32
"""Bytes of a suffix, such as ``.tar.gz``, that a name too long keeps."""

_READ_SIZE: Final = 1024 * 1024

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REOPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC

_NOT_STAGED: Final = frozenset({keys.NAME, keys.NEW_NAME, offsets.NAME, offsets.NEW_NAME})
"""Files among what is staged that belong to no transfer."""

# Not allowed in names by Windows, which may well share the directory; "/" by anybody.
_RESERVED: Final = frozenset('<>:"|?*/\\')


class OutputInUse(Exception):
    """Another receiver writes to the same directory."""


def part_filename(part: int, head: PartHead) -> str:
    """A name for a part's file: its number, then what is harmless of what the client called it.

    Never empty, never hidden, without separators, controls or text-direction overrides, at most
    NAME_MAX bytes of UTF-8; unique within the transfer because it begins with the number.
    """
    prefix = f"{part}-"
    for given in (head.filename, head.name):
        components = [c for c in re.split(r"[/\\]", given or "") if c.strip(". ")]
        if components:
            name = "".join(map(_harmless, components[-1])).strip(". ")
            return prefix + _shorten(name, NAME_MAX - len(prefix))
    return prefix + "body"


def _harmless(character: str) -> str:
    # Cc, Cf, Cs, Co, Cn (controls, overrides, surrogates, unassigned); Zl, Zp (line separators).
    category = unicodedata.category(character)
    bad = category[0] == "C" or category in ("Zl", "Zp") or character in _RESERVED
    return "_" if bad else character


def _shorten(name: str, limit: int) -> str:
    """Cut to ``limit`` bytes of UTF-8, between code points, keeping a short suffix."""
    encoded = name.encode()
    if len(encoded) <= limit:
        return name
    suffix = "".join(Path(name).suffixes[-2:]).encode()
    if len(suffix) > _SUFFIX_MAX:
        suffix = b""
    stem = encoded[: limit - len(suffix)].decode(errors="ignore")
    return stem.rstrip(". ") + suffix.decode()


class FileSink(Sink):
    """Writes each transfer into a directory of its own; close it when done.

    Holds two open files per open transfer.
    """

    rereads: ClassVar[bool] = True

    def __init__(self, output: Path) -> None:
        """Makes ``output`` if it is missing, and claims it for this process.

        Raises:
            OutputInUse: another receiver has claimed it.
            OSError: it cannot be made or written.
        """
        output.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._open: dict[str, _Staged] = {}
        # Since the last flush; with the digest of its key, if it has one.
        self._committed: dict[str, str | None] = {}
        self._repeated: dict[str, str | None] = {}
        self._root = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileExistsError):
                os.mkdir(STAGING, 0o700, dir_fd=self._root)
            self._staging = os.open(STAGING, _DIRECTORY, dir_fd=self._root)
        except OSError:
            os.close(self._root)
            raise
        try:
            # Kept for as long as the directory is open, so a killed process leaves no claim.
            fcntl.flock(self._staging, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close_directories()
            raise OutputInUse(f"another receiver writes to {output}") from None
        self._keys = keys.KeyFile(self._staging)
        try:
            self._remove_repeated()
        except OSError:
            self._close_directories()
            raise

    def close(self) -> None:
        """Let go of everything; what is staged stays, for ``recall``."""
        for staged in self._open.values():
            staged.close()
        self._open.clear()
        self._close_directories()

    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        """Create the part's file, and before its first part the transfer's directory."""
        staged = self._open.get(transfer_id)
        if staged is None:
            if _exists(transfer_id, self._root):
                raise Refused(f"{self._output / transfer_id} exists already")
            staged = self._open[transfer_id] = _Staged.create(transfer_id, self._staging)
        staged.open_part(part, head)

    def write(self, transfer_id: str, body: bytes) -> None:
        """Write to the part's file; it is not synced yet."""
        self._open[transfer_id].write(body)

    def end_part(self, ended: PartEnded) -> None:
        """Sync the part's file, and read it again if digests have to be verified."""
        self._open[ended.transfer_id].end_part(ended)

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        """Write the receipt and rename the directory to its final place."""
        where = self._output / transfer.id
        staged = self._open[transfer.id]
        staged.write_receipt(transfer, totals)
        # A rename onto an empty directory would succeed.
        if _exists(transfer.id, self._root):
            raise Refused(f"{where} exists already")
        os.rename(transfer.id, transfer.id, src_dir_fd=self._staging, dst_dir_fd=self._root)
        del self._open[transfer.id]
        staged.close()
        self._committed[transfer.id] = key_digest(transfer)
        return str(where)

    def repeated(self, transfer: Transfer) -> None:
        """Remove what is staged of it, once the transfer that it repeats is safe."""
        self._repeated[transfer.id] = key_digest(transfer)

    def known_keys(self) -> Sequence[KnownKey]:
        """Keys that earlier processes have noted."""
        return self._keys.load()

    def abort(self, transfer_id: str) -> None:
        """Remove what is staged of the transfer."""
        staged = self._open.pop(transfer_id, None)
        if staged is not None:
            staged.close()
        self._remove(transfer_id)

    def save(self, transfer_id: str, position: Position) -> None:
        """Sync the part in progress, then note in the journal how far it goes."""
        self._open[transfer_id].save(position)

    def flush(self) -> None:
        """Sync the renames; only then are the journals of what was renamed of no use.

        And only then are keys noted: a key in the file is a promise that its transfer is safe.
        """
        if not self._committed and not self._repeated:
            return
        os.fsync(self._root)
        os.fsync(self._staging)
        self._keys.append(
            [KnownKey(key, of) for of, key in self._committed.items() if key is not None]
            + [KnownKey(key, of, True) for of, key in self._repeated.items() if key is not None]
        )
        for transfer_id in self._committed:
            self._remove_journal(transfer_id)
        for transfer_id in self._repeated:
            self.abort(transfer_id)
        self._committed.clear()
        self._repeated.clear()

    def recall(self, transfer_id: str) -> Position | Earlier | None:
        """Open again what a crash, or ``park``, left of the transfer.

        Raises:
            Refused: bytes that had been saved are no longer there.
        """
        if _exists(f"{transfer_id}/{RECEIPT}", self._root):
            # The crash may have come between the rename and its sync.
            key = self._committed[transfer_id] = self._delivered_key(transfer_id)
            return Earlier(str(self._output / transfer_id), key)
        if not _exists(_journal_name(transfer_id), self._staging):
            self._remove(transfer_id)
            return None
        staged = _Staged.reopen(transfer_id, self._staging)
        try:
            position = staged.resume()
        except Refused:
            staged.close()
            raise
        if position is None:
            staged.close()
            self._remove(transfer_id)
        else:
            self._open[transfer_id] = staged
        return position

    def park(self, transfer_id: str, position: Position) -> None:
        """Save the transfer and close its files."""
        staged = self._open.pop(transfer_id)
        staged.save(position)
        staged.close()

    def sweep(self, expire_after: float) -> list[str]:
        """Remove what earlier processes, or ``park``, left and nobody has asked for since."""
        touched: dict[str, float] = {}
        for entry in set(os.listdir(self._staging)) - _NOT_STAGED:
            transfer_id = entry.removesuffix(".journal")
            if transfer_id not in self._open and transfer_id not in self._committed:
                modified = os.stat(entry, dir_fd=self._staging, follow_symlinks=False).st_mtime
                touched[transfer_id] = max(modified, touched.get(transfer_id, 0.0))
        limit = time.time() - expire_after
        expired = [transfer_id for transfer_id, when in touched.items() if when <= limit]
        for transfer_id in expired:
            self._remove(transfer_id)
        return [i for i in expired if not _exists(f"{i}/{RECEIPT}", self._root)]

    def _remove_repeated(self) -> None:
        """Remove what a crash left of transfers that were about to be dropped."""
        staged = {entry.removesuffix(".journal") for entry in os.listdir(self._staging)}
        for known in self._keys.load():
            if known.repeated and known.transfer_id in staged:
                self._remove(known.transfer_id)

    def _delivered_key(self, transfer_id: str) -> str | None:
        """The digest of a delivered transfer's key, from its receipt; None if it has none."""
        path = f"{transfer_id}/{RECEIPT}"
        try:
            receipt = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
            with os.fdopen(receipt, encoding="utf-8") as file:
                # Its parts may be very many; they begin with the second line.
                head = json.loads(file.readline(_READ_SIZE) + "]}")
            route, client, key = head["route"], head["client"], head["idempotency_key"]
        except (OSError, ValueError, LookupError, TypeError):
            # Whoever it was delivered to may do with it as they like.
            return None
        return key_digest(
            Transfer(id=transfer_id, began=0, route=route, client=client, idempotency_key=key)
        )

    def _remove(self, transfer_id: str) -> None:
        # The journal first: staged bytes without a journal are a fresh start, a journal
        # without its bytes is a loss.
        self._remove_journal(transfer_id)
        with suppress(FileNotFoundError):
            shutil.rmtree(transfer_id, dir_fd=self._staging)

    def _remove_journal(self, transfer_id: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(_journal_name(transfer_id), dir_fd=self._staging)

    def _close_directories(self) -> None:
        os.close(self._staging)
        os.close(self._root)


class _Staged:
    """What is staged of one transfer: its journal, and the file of the part in progress."""

    def __init__(self, transfer_id: str, staging: int, journal: int) -> None:
        """``staging`` is the directory of all staging, ``journal`` a file to be owned."""
        self._id = transfer_id
        self._staging = staging
        self._journal: BinaryIO = os.fdopen(journal, "r+b")
        self._saved: Position | None = None
        # Whether files were created since the directory was last synced.
        self._created = False
        self._file: int | None = None

    @classmethod
    def create(cls, transfer_id: str, staging: int) -> "_Staged":
        os.mkdir(transfer_id, dir_fd=staging)
        journal = os.open(_journal_name(transfer_id), _CREATE, 0o600, dir_fd=staging)
        return cls(transfer_id, staging, journal)

    @classmethod
    def reopen(cls, transfer_id: str, staging: int) -> "_Staged":
        journal = os.open(_journal_name(transfer_id), _REOPEN, dir_fd=staging)
        return cls(transfer_id, staging, journal)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        # On a full disk it may hold lines that cannot be written; nobody has relied upon them.
        with suppress(OSError):
            self._journal.close()

    def open_part(self, part: int, head: PartHead) -> None:
        name = part_filename(part, head)
        with self._directory() as directory:
            self._file = os.open(name, _CREATE, 0o666, dir_fd=directory)
        self._created = True
        self._note(
            part=part,
            file=name,
            name=head.name,
            filename=head.filename,
            content_type=head.content_type,
        )

    def write(self, body: bytes) -> None:
        file = self._part_file()
        rest = memoryview(body)
        while rest:
            rest = rest[os.write(file, rest) :]

    def end_part(self, ended: PartEnded) -> None:
        file = self._part_file()
        _verify(file, ended.part, ended.unchecked)
        os.fdatasync(file)
        os.close(file)
        self._file = None
        tail = ended.tail
        self._note(end=ended.part, bytes=tail.size, frames=ended.frames, digest=dict(tail.digest))

    def save(self, position: Position) -> None:
        if position == self._saved:
            return
        if self._file is not None:
            os.fdatasync(self._file)
        if self._created:
            with self._directory() as directory:
                os.fsync(directory)
            os.fsync(self._staging)
            self._created = False
        self._note(at=astuple(position))
        self._journal.flush()
        os.fdatasync(self._journal.fileno())
        self._saved = position

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
        self._saved = position
        return position

    def _cut_back(self, position: Position, directory: int) -> None:
        begun = position.part + (position.offset > 0)
        for name in os.listdir(directory):
            number = name.partition("-")[0]
            if not number.isdecimal() or int(number) >= begun:
                os.unlink(name, dir_fd=directory)
        for entry in self._parts():
            # At least what was saved must be there: it was acked, nobody will send it again.
            found = os.stat(entry["file"], dir_fd=directory, follow_symlinks=False)
            size = entry.get("bytes", position.offset)
            if not stat.S_ISREG(found.st_mode) or found.st_size < size:
                raise Refused("what was staged of it has lost bytes")
            if "bytes" not in entry:
                self._file = os.open(entry["file"], _REOPEN, dir_fd=directory)
                os.ftruncate(self._file, position.offset)
                os.lseek(self._file, 0, os.SEEK_END)

    def write_receipt(self, transfer: Transfer, totals: Totals) -> None:
        with self._directory() as directory:
            receipt = os.open(RECEIPT, _CREATE, 0o666, dir_fd=directory)
            with os.fdopen(receipt, "w", encoding="utf-8") as file:
                file.writelines(_receipt(transfer, totals, self._parts()))
                file.flush()
                os.fsync(file.fileno())
            os.fsync(directory)

    def _last_position(self) -> tuple[Position | None, int]:
        """The last position in the journal, and the offset in bytes where it ends there."""
        position, end, read = None, 0, 0
        self._journal.seek(0)
        for line in self._journal:
            # A crash may have left half a line, or zeros; nothing behind them was relied upon.
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
            except ValueError:
                break
            read += len(line)
            if "at" in entry:
                position, end = Position(*entry["at"]), read
        return position, end

    def _parts(self) -> Iterator[dict[str, Any]]:
        """The parts in the journal, each beginning joined with its end; the last may have none."""
        begun: dict[str, Any] | None = None
        self._journal.seek(0)
        for line in self._journal:
            entry = json.loads(line)
            if "part" in entry:
                begun = entry
            elif "end" in entry and begun is not None:
                yield begun | {key: entry[key] for key in ("bytes", "frames", "digest")}
                begun = None
        if begun is not None:
            yield begun

    def _part_file(self) -> int:
        assert self._file is not None, "a part is open"
        return self._file

    def _note(self, **entry: object) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")

    @contextmanager
    def _directory(self) -> Iterator[int]:
        directory = os.open(self._id, _DIRECTORY, dir_fd=self._staging)
        try:
            yield directory
        finally:
            os.close(directory)


def _journal_name(transfer_id: str) -> str:
    return f"{transfer_id}.journal"


def _exists(path: str, directory: int) -> bool:
    try:
        os.stat(path, dir_fd=directory, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _verify(file: int, part: int, digests: Mapping[str, str]) -> None:
    """Read a file from its start and compare ``digests``, which may be none."""
    if not digests:
        return
    crc = 0
    hashes = {name: ALGORITHMS[name]() for name in digests if name != "crc32c"}
    position = 0
    while block := os.pread(file, _READ_SIZE, position):
        position += len(block)
        crc = google_crc32c.extend(crc, block)
        for hash_ in hashes.values():
            hash_.update(block)
    found = {name: hash_.hexdigest() for name, hash_ in hashes.items()}
    found["crc32c"] = f"{crc:08x}"
    for name, digest in digests.items():
        if found[name] != digest:
            raise Refused(f"{name} of part {part} does not match")


def _receipt(transfer: Transfer, totals: Totals, parts: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The HTTP receipt as JSON text, all parts listed, each with the file that holds it."""
    head = {
        "transfer": transfer.id,
        "route": transfer.route,
        "client": transfer.client,
        "idempotency_key": transfer.idempotency_key,
        "frames": totals.frames,
        "bytes": totals.bytes,
    }
    yield json.dumps(head)[:-1] + ', "parts": ['
    separator = "\n  "
    for part in parts:
        yield separator + json.dumps(part)
        separator = ",\n  "
    yield "\n]}\n"
