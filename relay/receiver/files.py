"""Transfers as files, complete or not there at all, whatever crashes.

Below the output directory, besides what ``places`` puts there:

    .relay-staging/<transfer>/, <transfer>.journal     see ``staging``
    .relay-staging/ledger                              see ``ledger``
    .relay-staging/pending/                            see ``pending``
    .relay-quarantine/                                 see ``quarantine``

What happens in which order, and what it costs: *n* transfers in a batch, of which *m* are complete.

1. While frames are fed, nothing is synced. Each transfer that is complete gets its receipt.
2. ``flush`` syncs the files of each transfer that were written, and its directory if any were
   created.
3. It syncs the staging directory, if transfers began: from here on their names are safe.
4. Each transfer that goes on gets its position into its journal: one fdatasync each.
5. The ledger gets a record of each that is complete, or was aborted: one fdatasync for all.
   **This is the commit.** What is staged and not in the ledger is gone on with where its journal
   ends; what is staged and in the ledger is delivered, or removed, by whoever opens the directory
   next.
6. What waits for a command is noted: a fdatasync each and one fsync.
7. The files are moved, each directory that got a name is synced once, then, if there are any,
   receipts and their directory likewise. Only after that may the deliveries be acked: not because
   anything could be lost (step 5 is enough for that), but because otherwise a power failure could
   undo a rename whose result somebody had taken already, and it would be delivered twice.
8. Journals, and what else is left, are removed, without a sync: what a power failure brings back
   has no receipt, so that it is removed again.

A small transfer that comes in one batch costs three syncs of its own, and its share of three. The
syncs of different transfers in steps 2 and 4 go on at the same time, in threads: they wait for the
same commits of the file system's journal, which on a busy disk takes a tenth of the time.
"""

import fcntl
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from relay.model import PartHead, Totals, Transfer
from relay.protocol.reassembly import PartEnded, Past, Position, key_digest
from relay.receiver import Earlier, KnownKey, Sink, disk, staging
from relay.receiver.handover import Handover
from relay.receiver.ledger import End, Ledger, Record
from relay.receiver.names import DEFAULT_TEMPLATE, RECEIPT, Template
from relay.receiver.pending import PendingNotes
from relay.receiver.places import REPLACED, Directories, Files, Place, Places, StandardOutput
from relay.receiver.quarantine import KEEP, Quarantine
from relay.receiver.staging import Staged

STAGING: Final = ".relay-staging"

SYNCS: Final = 8
"""At the same time; more make no difference."""

MAX_STAGED: Final = 10_000
"""Transfers on disk that are not complete, unless told otherwise."""

_STAGED: Final = re.compile(r"([0-9a-f-]{36})(\.journal)?")


class OutputInUse(Exception):
    """Another receiver writes to the same directory."""


class FileSink(Sink):
    """Writes transfers into files below a directory; close it when done.

    Holds two open files per open transfer, and a few numbers for each that is staged.

    Attributes:
        handover: what is delivered, and what is yet to be done with it, for any thread.
    """

    rereads: ClassVar[bool] = True

    def __init__(
        self,
        output: Path,
        *,
        template: Template | None = None,
        overwrite: bool = False,
        stdout: int | None = None,
        pending: bool = False,
        quarantine_keep: float = KEEP,
        max_staged: int = MAX_STAGED,
    ) -> None:
        """Makes ``output`` if it is missing, claims it for this process, finishes what is due.

        Args:
            output: the directory.
            template: of the files' paths; None for DEFAULT_TEMPLATE.
            overwrite: replace what exists, instead of choosing another name.
            stdout: a descriptor that gets the parts' bytes, instead of files.
            pending: note delivered transfers until they are done, or given up.
            quarantine_keep: seconds for which to keep what failed; 0 keeps nothing.
            max_staged: incomplete transfers on disk; one more drops the most silent one.

        Raises:
            OutputInUse: another receiver has claimed it.
            OSError: it cannot be made or written.
        """
        output.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._max_staged = max_staged
        self._open: dict[str, Staged] = {}
        # Those that are staged and not open, and when they were last heard of, oldest first.
        self._parked: OrderedDict[str, float] = OrderedDict()
        self._dropped: list[str] = []
        # Since the last flush: transfers that are new, that go on, that are complete, and that
        # have ended otherwise.
        self._began = False
        self._saving: dict[str, Position] = {}
        self._committed: dict[str, tuple[Staged, Record, Place]] = {}
        self._unwanted: dict[str, Record] = {}
        self._threads = ThreadPoolExecutor(SYNCS, thread_name_prefix="sync")
        with ExitStack() as stack:
            stack.callback(self._threads.shutdown)
            self._root = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._root)
            disk.make_directory(STAGING, self._root, 0o700)
            self._staging = os.open(STAGING, disk.DIRECTORY, dir_fd=self._root)
            stack.callback(os.close, self._staging)
            self._claim()
            self._ledger = Ledger(self._staging)
            stack.callback(self._ledger.close)
            self._quarantine = Quarantine(self._root, keep=quarantine_keep)
            self._places = self._make_places(
                template or Template(DEFAULT_TEMPLATE), overwrite, stdout
            )
            notes = PendingNotes(self._staging, output) if pending else None
            if notes is not None:
                stack.callback(notes.close)
            self.handover = Handover(output, self._staging, self._places, self._quarantine, notes)
            self._recover()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Let go of everything; what is staged stays, for ``recall``."""
        for staged in self._open.values():
            staged.close()
        self._open.clear()
        self._resources.close()

    # --- a transfer's way --------------------------------------------------------------------

    def begin(self, transfer: Transfer) -> None:
        """Create the transfer's directory and journal, if need be in place of the most silent."""
        while self._parked and len(self._open) + len(self._parked) >= self._max_staged:
            silent, _ = self._parked.popitem(last=False)
            staging.remove(silent, self._staging)
            self._dropped.append(silent)
        self._open[transfer.id] = Staged.create(transfer, self._staging)
        self._began = True

    def open_part(self, transfer_id: str, part: int, head: PartHead) -> None:
        """Create the part's file."""
        staged = self._open[transfer_id]
        names = self._places.staged_names(staged.transfer, part, head)
        staged.open_part(part, head, names)

    def write(self, transfer_id: str, body: bytes) -> None:
        """Write to the part's file; it is not synced yet."""
        self._open[transfer_id].write(body)

    def end_part(self, ended: PartEnded) -> None:
        """Sync the part's file, and read it again if digests have to be verified."""
        self._open[ended.transfer_id].end_part(ended)

    def save(self, transfer_id: str, position: Position) -> None:
        """Have ``flush`` sync what was written, and note the position."""
        if position != self._open[transfer_id].saved:
            self._saving[transfer_id] = position

    def commit(self, transfer: Transfer, totals: Totals) -> str:
        """Choose the transfer's place and stage its receipt; ``flush`` moves it there."""
        staged = self._open[transfer.id]
        place = self._places.choose(transfer)
        staged.write_receipt(transfer, totals, lambda part: self._places.locate(transfer, part))
        self._let_go(transfer.id)
        self._committed[transfer.id] = staged, Record(transfer.id, key_digest(transfer)), place
        return str(self._where(place))

    def repeated(self, transfer: Transfer) -> None:
        """Remove what is staged of it, once the transfer that it repeats is safe."""
        self._let_go(transfer.id)
        self._unwanted[transfer.id] = Record(transfer.id, key_digest(transfer), End.REPEATED)

    def aborted(self, transfer_id: str) -> None:
        """Remove what is staged of it, once the ledger says why."""
        self._let_go(transfer_id)
        self._unwanted[transfer_id] = Record(transfer_id, end=End.ABORTED)

    def flush(self) -> None:
        """Note how far transfers have come; deliver those that are complete."""
        going_on = [(self._open[of], position) for of, position in self._saving.items()]
        complete = [staged for staged, _, _ in self._committed.values()]
        self._together(staged.sync for staged in (*complete, *(staged for staged, _ in going_on)))
        self._sync_staging()
        self._together(partial(staged.save, position) for staged, position in going_on)
        self._saving.clear()
        self._quarantine.sync()
        delivered = [record for _, record, _ in self._committed.values()]
        self._ledger.append([*delivered, *self._unwanted.values()])
        self.handover.add(place for _, _, place in self._committed.values())
        self._committed.clear()
        for transfer_id in self._unwanted:
            staging.remove(transfer_id, self._staging)
        self._unwanted.clear()
        self.handover.finish()

    def abort(self, transfer_id: str) -> None:
        """Remove what is staged of the transfer."""
        self._let_go(transfer_id)
        self._parked.pop(transfer_id, None)
        staging.remove(transfer_id, self._staging)

    def fail(self, transfer_id: str, reason: str) -> None:
        """Move what is staged of the transfer to the quarantine."""
        self._let_go(transfer_id)
        self._parked.pop(transfer_id, None)
        if self._quarantine.keeps and disk.exists(transfer_id, self._staging):
            self._quarantine.take_staged(transfer_id, reason, self._staging)
        staging.remove(transfer_id, self._staging)

    # --- what other processes, or ``park``, left ---------------------------------------------

    def known_keys(self) -> Sequence[KnownKey]:
        """Keys that earlier processes have noted."""
        return [
            KnownKey(record.key, record.transfer_id)
            for record in self._ledger
            if record.key is not None
        ]

    def recall(self, transfer_id: str) -> Position | Earlier | Past | None:
        """Open again what a crash, or ``park``, left of the transfer.

        Raises:
            Refused: bytes that had been saved are no longer there.
        """
        if (record := self._ledger.get(transfer_id)) is not None:
            if record.end is End.DELIVERED:
                return Earlier("delivered before", record.key)
            return Past.ABORTED if record.end is End.ABORTED else Past.REPEATED
        # If it is not parked, a receiver has left it that was discarded.
        left = (self._parked, self._open, self._committed, self._unwanted)
        if not any(transfer_id in some for some in left):
            return None
        self._let_go(transfer_id)
        self._parked.pop(transfer_id, None)
        self._committed.pop(transfer_id, None)
        self._unwanted.pop(transfer_id, None)
        staged = Staged.reopen(transfer_id, self._staging)
        if staged is None:
            staging.remove(transfer_id, self._staging)
            return None
        self._open[transfer_id] = staged
        position = staged.resume()
        if position is None:
            self.abort(transfer_id)
        return position

    def park(self, transfer_id: str, position: Position) -> None:
        """Close the transfer's files; it was saved when it was last heard of, as a rule."""
        staged = self._open[transfer_id]
        if position != staged.saved:
            staged.sync()
            self._sync_staging()
            staged.save(position)
        self._let_go(transfer_id)
        self._parked[transfer_id] = staged.touched

    def sweep(self, expire_after: float) -> list[str]:
        """Remove what nobody has asked for for too long; tells also what ``begin`` dropped."""
        limit = time.time() - expire_after
        while self._parked and next(iter(self._parked.values())) <= limit:
            transfer_id, _ = self._parked.popitem(last=False)
            staging.remove(transfer_id, self._staging)
            self._dropped.append(transfer_id)
        self._quarantine.sweep()
        dropped, self._dropped = self._dropped, []
        return dropped

    # --- how ---------------------------------------------------------------------------------

    def _claim(self) -> None:
        try:
            # Kept for as long as the directory is open, so a killed process leaves no claim.
            fcntl.flock(self._staging, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputInUse(f"another receiver writes to {self._output}") from None

    def _make_places(self, template: Template, overwrite: bool, stdout: int | None) -> Places:
        if stdout is not None:
            return StandardOutput(self._root, self._staging, stdout)
        kind = Directories if template.whole else Files
        return kind(self._root, self._staging, template, overwrite=overwrite)

    def _recover(self) -> None:
        """Finish what the ledger calls delivered, and list what else is staged."""
        touched: dict[str, float] = {}
        for entry in os.listdir(self._staging):
            if match := _STAGED.fullmatch(entry):
                modified = os.stat(entry, dir_fd=self._staging, follow_symlinks=False).st_mtime
                touched[match[1]] = max(modified, touched.get(match[1], 0.0))
            elif entry.endswith(REPLACED):
                disk.remove_tree(entry, self._staging)
        for transfer_id, modified in sorted(touched.items(), key=lambda item: item[1]):
            record = self._ledger.get(transfer_id)
            has_receipt = disk.exists(f"{transfer_id}/{RECEIPT}", self._staging)
            if record is None:
                self._parked[transfer_id] = modified
            elif record.end is End.DELIVERED and has_receipt:
                self.handover.recover(transfer_id)
            else:
                staging.remove(transfer_id, self._staging)
        self.handover.finish()

    def _where(self, place: Place) -> Path | str:
        return self._output.joinpath(*place.path) if place.path else "standard output"

    def _let_go(self, transfer_id: str) -> None:
        """Close the transfer, if it is open."""
        self._saving.pop(transfer_id, None)
        staged = self._open.pop(transfer_id, None)
        if staged is not None:
            staged.close()

    def _together(self, calls: Iterable[Callable[[], None]]) -> None:
        """Make calls that wait for the disk; returns when all have ended."""
        ends = [self._threads.submit(call) for call in calls]
        wait(ends)
        for end in ends:
            end.result()

    def _sync_staging(self) -> None:
        if self._began:
            os.fsync(self._staging)
            self._began = False
