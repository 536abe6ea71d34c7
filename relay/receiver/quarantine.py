"""What is left of transfers that failed, kept for a while for people to look at.

    .relay-quarantine/<transfer>/…               the files
    .relay-quarantine/<transfer>/problem.json    what was wrong

How much is kept is bounded by number and age, not in bytes. It does not know what can be wrong with
a transfer.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from relay.receiver import disk, staging
from relay.receiver.names import PROBLEM
from relay.receiver.receipts import Part, document

NAME: Final = ".relay-quarantine"

KEEP: Final = 7 * 86_400.0
"""Seconds, unless told otherwise."""

MAX_KEPT: Final = 1_000


class Quarantine:
    """The directory ``.relay-quarantine``; it comes into being with the first entry.

    Any thread may call any method.
    """

    def __init__(self, root: int, *, keep: float = KEEP, max_kept: int = MAX_KEPT) -> None:
        """``root`` is the output, open, and stays its owner's. ``keep`` 0 keeps nothing."""
        self._root = root
        self._keep = keep
        self._max_kept = max_kept
        self._kept = self._load()
        self._dirty = False
        self._lock = threading.Lock()

    def take(
        self,
        transfer_id: str,
        reason: str,
        details: Mapping[str, object],
        parts: Iterable[Part],
        move: Callable[[int], None],
    ) -> None:
        """Keep what ``move`` moves into the open directory that it is given.

        Not safe from a power failure before ``sync``; ``problem.json``, which is for people, not
        even then.
        """
        with self._lock:
            self._take(transfer_id, reason, details, parts, move)

    def take_staged(self, transfer_id: str, reason: str, directory: int) -> None:
        """Keep what is staged, in that directory of all staging, of a transfer that is not open."""
        about, parts = staging.describe(transfer_id, directory)
        self.take(
            transfer_id,
            reason,
            about,
            parts,
            lambda kept: staging.move_aside(transfer_id, directory, kept),
        )

    def _take(
        self,
        transfer_id: str,
        reason: str,
        details: Mapping[str, object],
        parts: Iterable[Part],
        move: Callable[[int], None],
    ) -> None:
        disk.make_directory(NAME, self._root, 0o700)
        with disk.directory(NAME, self._root) as quarantine:
            disk.make_directory(transfer_id, quarantine, 0o700)
            with disk.directory(transfer_id, quarantine) as directory:
                move(directory)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                head = {"transfer": transfer_id, "reason": reason, "time": now, **details}
                file = os.open(PROBLEM, disk.REPLACE, 0o600, dir_fd=directory)
                with os.fdopen(file, "wb") as problem:
                    problem.writelines(document(head, parts))
            self._kept[transfer_id] = time.time()
            self._kept.move_to_end(transfer_id)
            self._dirty = True
            while len(self._kept) > self._max_kept:
                self._remove_oldest(quarantine)

    @property
    def keeps(self) -> bool:
        """Whether it keeps anything at all."""
        return self._keep > 0

    def sync(self) -> None:
        """Make the names safe of what was taken since the last time."""
        with self._lock:
            if self._dirty:
                disk.make_directory(NAME, self._root, 0o700)
                disk.sync_directories([(NAME,), ()], self._root)
                self._dirty = False

    def sweep(self) -> None:
        """Remove what was kept for long enough."""
        limit = time.time() - self._keep
        with self._lock:
            while self._kept and next(iter(self._kept.values())) <= limit:
                # People may have removed all of it.
                disk.make_directory(NAME, self._root, 0o700)
                with disk.directory(NAME, self._root) as quarantine:
                    self._remove_oldest(quarantine)

    def _remove_oldest(self, quarantine: int) -> None:
        transfer_id, _ = self._kept.popitem(last=False)
        disk.remove_tree(transfer_id, quarantine)

    def _load(self) -> "OrderedDict[str, float]":
        """What earlier processes left, oldest first."""
        found: list[tuple[float, str]] = []
        if disk.exists(NAME, self._root):
            with disk.directory(NAME, self._root) as quarantine:
                for name in os.listdir(quarantine):
                    status = os.stat(name, dir_fd=quarantine, follow_symlinks=False)
                    found.append((status.st_mtime, name))
        return OrderedDict((name, modified) for modified, name in sorted(found))
