"""Delivered transfers with which something is yet to be done, noted so that no crash forgets them.

One small file for each below ``pending`` in the staging directory. It does not know what is to be
done, nor who does it.
"""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from relay.receiver import disk

NAME: Final = "pending"


@dataclass(frozen=True, slots=True)
class Pending:
    """A delivered transfer that waits.

    Attributes:
        transfer_id: the transfer.
        where: its directory; with a template that makes none for it, its receipt.
        receipt: its receipt, which names its files relative to the receipt's own directory.
        since: when it was delivered, in seconds since 1970.
        tries: how often ``note_try`` was called for it.
    """

    transfer_id: str
    where: Path
    receipt: Path
    since: float
    tries: int = 0


class PendingNotes:
    """The notes of one output directory.

    Any thread may call any method: a lock guards the list, and is never held while a file is
    touched. The file of one transfer is touched by one thread at a time as long as its callers
    are: ``add`` and ``show`` come before anybody else can know the transfer.
    """

    def __init__(self, staging: int, output: Path) -> None:
        """Load what earlier processes left. ``staging`` is open, and stays its owner's.

        Raises:
            OSError: the notes cannot be read.
        """
        self._output = output
        self._lock = threading.Lock()
        disk.make_directory(NAME, staging, 0o700)
        self._directory = os.open(NAME, disk.DIRECTORY, dir_fd=staging)
        try:
            self._waiting = self._load()
        except BaseException:
            os.close(self._directory)
            raise

    def close(self) -> None:
        """Let go of what is open."""
        os.close(self._directory)

    def add(self, waiting: Sequence[Pending]) -> None:
        """Note them; they survive a crash when this returns. ``show`` is what lists them."""
        if not waiting:
            return
        for pending in waiting:
            self._write(pending, sync=True)
        os.fsync(self._directory)

    def show(self, waiting: Sequence[Pending]) -> None:
        """List them, now that their files are where the notes say."""
        with self._lock:
            self._waiting.update((pending.transfer_id, pending) for pending in waiting)

    def list(self) -> list[Pending]:
        """Those that wait, oldest first."""
        with self._lock:
            return [*self._waiting.values()]

    def get(self, transfer_id: str) -> Pending:
        """Raises KeyError if it does not wait."""
        with self._lock:
            return self._waiting[transfer_id]

    def note_try(self, transfer_id: str) -> None:
        """Count a try. Not synced: a power failure may forget it."""
        with self._lock:
            waiting = self._waiting[transfer_id]
            pending = self._waiting[transfer_id] = replace(waiting, tries=waiting.tries + 1)
        self._write(pending, sync=False)

    def remove(self, transfer_id: str) -> None:
        """Forget it, if it waits. Not synced: after a power failure it may wait again."""
        # The file first: if that fails, it waits still.
        disk.remove_file(transfer_id, self._directory)
        with self._lock:
            self._waiting.pop(transfer_id, None)

    def _write(self, pending: Pending, *, sync: bool) -> None:
        # Relative: the output may be moved, or be called something else by the next process.
        note = {
            "where": str(pending.where.relative_to(self._output)),
            "receipt": str(pending.receipt.relative_to(self._output)),
            "tries": pending.tries,
            "since": pending.since,
        }
        text = json.dumps(note).encode("ascii")
        disk.replace_file(pending.transfer_id, self._directory, text, sync=sync)

    def _load(self) -> dict[str, Pending]:
        found = []
        for name in os.listdir(self._directory):
            if name.endswith(".new"):
                disk.remove_file(name, self._directory)
            else:
                found.append(self._read(name))
        found.sort(key=lambda pending: pending.since)
        return {pending.transfer_id: pending for pending in found}

    def _read(self, name: str) -> Pending:
        with os.fdopen(os.open(name, disk.READ, dir_fd=self._directory), "rb") as file:
            try:
                note = json.load(file)
                where, receipt = self._output / note["where"], self._output / note["receipt"]
                return Pending(name, where, receipt, float(note["since"]), int(note["tries"]))
            except (ValueError, LookupError, TypeError) as exc:
                raise OSError(f"the note {NAME}/{name} cannot be read") from exc
