"""Where complete transfers go: a directory each, files one by one, or standard output.

A transfer is put there from its staging, which holds its receipt, after the ledger says that it is
delivered. ``put`` can be stopped at any system call and called again, by another process too: it
goes on where it was. For that, whatever is moved disappears from staging in the same step in which
it appears elsewhere, and a receipt, the sign that something is left to do, goes last, when all
before it is synced. This module knows no journal and no ledger.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from relay.model import PartHead, Transfer
from relay.receiver import Refused, disk
from relay.receiver.names import NAME_MAX, RECEIPT, Template, alternatives, numbered, shorten
from relay.receiver.receipts import Part, document, read_head, read_parts, transfer_of
from relay.receiver.staging import replace_receipt, verify

_NUMBERS_MAX: Final = 1_000
"""Names whose next free number is remembered, so that the ten thousandth is not searched for."""

_READ_SIZE: Final = 1024 * 1024


REPLACED: Final = ".replaced"
"""What a directory in staging ends with that was overwritten and is to be removed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one transfer goes.

    Attributes:
        transfer_id: the transfer.
        path: its directory, or else its receipt, below the output; () for standard output.
        receipt: its receipt below the output; () if it is not kept.
    """

    transfer_id: str
    path: disk.Path
    receipt: disk.Path


class Places(ABC):
    """A kind of place. Used by one thread at a time, but for ``withdraw``."""

    def __init__(self, root: int) -> None:
        """``root`` is the output, open, and stays its owner's."""
        self._root = root
        # Directories to be synced, because others were made in them.
        self._touched: set[disk.Path] = set()

    @abstractmethod
    def staged_names(self, transfer: Transfer, part: int, head: PartHead) -> Iterator[str]:
        """Names for a part's file while it is staged, the best first, without end."""

    @abstractmethod
    def choose(self, transfer: Transfer) -> Place:
        """Choose a place where nothing is.

        Raises:
            Refused: there can be none.
        """

    @abstractmethod
    def locate(self, transfer: Transfer, part: Part) -> str:
        """What the receipt says where a part's file is, relative to itself; now promised to it.

        Raises:
            Refused: it can be nowhere.
        """

    @abstractmethod
    def put(self, places: Sequence[Place]) -> None:
        """Move what is staged of these transfers to its places, and sync.

        Raises:
            OSError: it did not work, or not yet.
        """

    @abstractmethod
    def withdraw(self, place: Place, directory: int) -> None:
        """Move into ``directory`` what is still there of what was put; any thread may call it."""

    @contextmanager
    def _parents(self, path: Sequence[str]) -> Iterator[int]:
        """The directory at ``path``, made if it is missing."""
        try:
            with disk.descend(tuple(path), self._root, self._touched) as directory:
                yield directory
        except NotADirectoryError:
            raise Refused(f"{'/'.join(path)} in the output is not a directory") from None

    def _sync(self) -> None:
        disk.sync_directories(self._touched, self._root)
        self._touched.clear()


class Directories(Places):
    """Each transfer a directory, which appears by one rename, its receipt in it.

    The rename cannot destroy anything: it fails unless its target is missing or an empty directory.
    """

    def __init__(self, root: int, staging: int, template: Template, *, overwrite: bool) -> None:
        """Both directories are open, and stay their owner's."""
        super().__init__(root)
        self._staging = staging
        self._template = template
        self._overwrite = overwrite
        self._chosen: set[disk.Path] = set()

    def staged_names(self, transfer: Transfer, part: int, head: PartHead) -> Iterator[str]:
        """The final names: the directory is complete before it moves."""
        # The part's number differs from all others': hardly ever is a second attempt needed.
        return alternatives(self._template.path(transfer, part, head)[-1], part + 1)

    def choose(self, transfer: Transfer) -> Place:
        """The template's directory, or a numbered one beside it."""
        *parents, last = self._template.directory(transfer)
        with self._parents(parents) as directory:
            for name in alternatives(last):
                path = (*parents, name)
                if path not in self._chosen and self._is_free(name, directory):
                    break
        self._chosen.add(path)
        return Place(transfer.id, path, (*path, RECEIPT))

    def locate(self, transfer: Transfer, part: Part) -> str:
        """Beside the receipt, where it is staged."""
        return str(part["file"])

    def put(self, places: Sequence[Place]) -> None:
        """Rename each directory, then sync those above."""
        for place in places:
            if disk.exists(place.transfer_id, self._staging):
                self._touched.add(place.path[:-1])
                with disk.descend(place.path[:-1], self._root, self._touched) as parent:
                    self._put(place, parent)
        self._sync()
        self._chosen.clear()

    def withdraw(self, place: Place, directory: int) -> None:
        """Move what is in the directory, and remove it."""
        try:
            with disk.descend(place.path, self._root) as delivered:
                for name in os.listdir(delivered):
                    os.rename(name, name, src_dir_fd=delivered, dst_dir_fd=directory)
            with disk.descend(place.path[:-1], self._root) as parent:
                os.rmdir(place.path[-1], dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            # Whoever took it may have it.
            return

    def _put(self, place: Place, parent: int) -> None:
        name, transfer_id = place.path[-1], place.transfer_id
        replaced = f"{transfer_id}{REPLACED}"
        if disk.exists(name, parent):
            if not self._overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "/".join(place.path))
            os.rename(name, replaced, src_dir_fd=parent, dst_dir_fd=self._staging)
        os.rename(transfer_id, name, src_dir_fd=self._staging, dst_dir_fd=parent)
        if self._overwrite:
            disk.remove_tree(replaced, self._staging)

    def _is_free(self, name: str, directory: int) -> bool:
        return not disk.exists(name, directory) or (
            self._overwrite and disk.is_directory(name, directory)
        )


class Files(Places):
    """Each part's file at its own place, moved one by one; the receipt last, beside all others."""

    def __init__(self, root: int, staging: int, template: Template, *, overwrite: bool) -> None:
        """Both directories are open, and stay their owner's.

        Raises:
            OSError: the file system lacks something.
        """
        super().__init__(root)
        self._staging = staging
        self._template = template
        self._overwrite = overwrite
        # Which transfer each place is promised to that is yet to be filled.
        self._promised: dict[disk.Path, str] = {}
        self._numbers: dict[disk.Path, int] = {}
        if not overwrite:
            self._try_moving()

    def staged_names(self, transfer: Transfer, part: int, head: PartHead) -> Iterator[str]:
        """The part's number."""
        return alternatives(str(part))

    def choose(self, transfer: Transfer) -> Place:
        """A name for the receipt, in the output itself."""
        name = self._free((), f"{transfer.id}.{RECEIPT}", transfer.id, self._root)
        return Place(transfer.id, (name,), (name,))

    def locate(self, transfer: Transfer, part: Part) -> str:
        """A name that nothing has, and that no other file is promised."""
        head = PartHead(name=part["name"], filename=part["filename"])
        *parents, last = self._template.path(transfer, part["part"], head)
        with self._parents(parents) as directory:
            return "/".join((*parents, self._free(tuple(parents), last, transfer.id, directory)))

    def put(self, places: Sequence[Place]) -> None:
        """Move each file, sync, move the receipts, sync."""
        left = [p for p in places if disk.exists(f"{p.transfer_id}/{RECEIPT}", self._staging)]
        for place in left:
            self._put_parts(place.transfer_id)
        self._sync()
        for place in left:
            with disk.directory(place.transfer_id, self._staging) as staged:
                self._move(RECEIPT, staged, place.receipt[-1], self._root)
        os.fsync(self._root)
        self._promised.clear()

    def withdraw(self, place: Place, directory: int) -> None:
        """Move those of its files that are still there, and the receipt."""
        try:
            with _receipt(place.receipt[-1], self._root) as (_, parts):
                for part in parts:
                    self._withdraw_part(part, directory)
            os.rename(place.receipt[-1], RECEIPT, src_dir_fd=self._root, dst_dir_fd=directory)
        except FileNotFoundError:
            return

    def _withdraw_part(self, part: Part, directory: int) -> None:
        *parents, name = part["file"].split("/")
        new = f"{part['part']}-"
        new += shorten(name, NAME_MAX - len(new))
        gone = suppress(FileNotFoundError, NotADirectoryError, Refused)
        with gone, disk.descend(tuple(parents), self._root) as parent:
            file = os.open(name, disk.READ, dir_fd=parent)
            try:
                # By now the name may be that of another transfer's file.
                verify(file, part["part"], {"crc32c": part["digest"]["crc32c"]})
            finally:
                os.close(file)
            os.rename(name, new, src_dir_fd=parent, dst_dir_fd=directory)

    def _put_parts(self, transfer_id: str) -> None:
        with disk.directory(transfer_id, self._staging) as staged:
            while True:
                try:
                    with _receipt(RECEIPT, staged) as (_, parts):
                        for part in parts:
                            self._put_part(part, staged)
                except FileExistsError:
                    # Since the place was promised, somebody else has taken it.
                    self._promise_again(transfer_id, staged)
                else:
                    return

    def _put_part(self, part: Part, staged: int) -> None:
        source = str(part["part"])
        *parents, name = part["file"].split("/")
        # Whether or not it was moved before: that may not have been synced.
        self._touched.add(tuple(parents))
        with disk.descend(tuple(parents), self._root, self._touched) as directory:
            if disk.exists(source, staged):
                self._move(source, staged, name, directory)

    def _move(self, source: str, staged: int, name: str, directory: int) -> None:
        if not self._overwrite:
            disk.move_new(source, staged, name, directory)
            return
        try:
            os.rename(source, name, src_dir_fd=staged, dst_dir_fd=directory)
        except IsADirectoryError as exc:
            raise FileExistsError(*exc.args) from exc

    def _promise_again(self, transfer_id: str, staged: int) -> None:
        """Write the staged receipt anew, with other places for those parts that are still here."""
        self._promised = {p: of for p, of in self._promised.items() if of != transfer_id}
        with _receipt(RECEIPT, staged) as (head, parts):
            transfer = transfer_of(head)
            changed = (
                {**part, "file": self.locate(transfer, part)}
                if disk.exists(str(part["part"]), staged)
                else part
                for part in parts
            )
            replace_receipt(staged, document(head, changed))

    def _free(self, parents: disk.Path, last: str, transfer_id: str, directory: int) -> str:
        best = (*parents, last)
        name, number = last, self._numbers.get(best, 2)
        while not self._is_free((*parents, name), transfer_id, directory):
            name = numbered(last, number)
            number += 1
        if name != last:
            self._numbers[best] = number
            while len(self._numbers) > _NUMBERS_MAX:
                del self._numbers[next(iter(self._numbers))]
        self._promised[(*parents, name)] = transfer_id
        return name

    def _is_free(self, path: disk.Path, transfer_id: str, directory: int) -> bool:
        if self._overwrite:
            mine = self._promised.get(path) == transfer_id
            return not mine and not disk.is_directory(path[-1], directory)
        return path not in self._promised and not disk.exists(path[-1], directory)

    def _try_moving(self) -> None:
        """Find out at the start, and not at the first delivery, what the file system can do."""
        os.close(os.open("probe", disk.REPLACE, 0o600, dir_fd=self._staging))
        disk.remove_file("probed", self._staging)
        try:
            disk.move_new("probe", self._staging, "probed", self._staging)
        except OSError as exc:
            if exc.errno != errno.ENOTSUP:
                raise
            raise OSError(
                f"{exc.strerror}; needed unless --overwrite is given, or the template has a "
                "directory for each {transfer}"
            ) from exc
        finally:
            disk.remove_file("probe", self._staging)
            disk.remove_file("probed", self._staging)


class StandardOutput(Places):
    """The parts' bytes, one transfer after the other, and nothing else; at least once."""

    def __init__(self, root: int, staging: int, descriptor: int) -> None:
        """All three are open, and stay their owner's."""
        super().__init__(root)
        self._staging = staging
        self._descriptor = descriptor

    def staged_names(self, transfer: Transfer, part: int, head: PartHead) -> Iterator[str]:
        """The part's number."""
        return alternatives(str(part))

    def choose(self, transfer: Transfer) -> Place:
        """There is no choice."""
        return Place(transfer.id, (), ())

    def locate(self, transfer: Transfer, part: Part) -> str:
        """The staged name: nobody gets to see the receipt."""
        return str(part["file"])

    def put(self, places: Sequence[Place]) -> None:
        """Write each transfer; it is done with when its receipt is gone."""
        for place in places:
            if disk.exists(f"{place.transfer_id}/{RECEIPT}", self._staging):
                with disk.directory(place.transfer_id, self._staging) as staged:
                    with _receipt(RECEIPT, staged) as (_, parts):
                        for part in parts:
                            self._copy(str(part["part"]), staged)
                    disk.remove_file(RECEIPT, staged)

    def withdraw(self, place: Place, directory: int) -> None:
        """Nothing can be taken back."""

    def _copy(self, name: str, staged: int) -> None:
        with os.fdopen(os.open(name, disk.READ, dir_fd=staged), "rb", buffering=0) as file:
            while block := file.read(_READ_SIZE):
                disk.write_all(self._descriptor, block)


@contextmanager
def _receipt(name: str, directory: int) -> Iterator[tuple[Mapping[str, Any], Iterator[Part]]]:
    """A receipt's head and its parts."""
    with os.fdopen(os.open(name, disk.READ, dir_fd=directory), "rb") as file:
        head = read_head(file)
        yield head, read_parts(file)
