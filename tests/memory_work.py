"""What is due, in memory, with receipts in a directory: the storage as commands see it."""

import errno
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Due:
    transfer_id: str
    where: Path
    receipt: Path
    tries: int = 0


@dataclass
class MemoryWork:
    """What is due, in memory, and a directory with receipts."""

    directory: Path
    due: list[Due] = field(default_factory=list)
    given_up: dict[str, str] = field(default_factory=dict)
    full: bool = False

    def deliver(self, transfer_id: str, *, tries: int = 0, **head: object) -> Due:
        where = self.directory / transfer_id
        where.mkdir()
        document = {"transfer": transfer_id, "route": "default", "client": None, **head}
        document |= {"began": 1, "idempotency_key": None}
        receipt = where / "receipt.json"
        receipt.write_text(json.dumps(document)[:-1] + ', "parts": [\n  {"part": 0}\n]}\n')
        self.due.append(Due(transfer_id, where, receipt, tries))
        return self.due[-1]

    def pending(self) -> list[Due]:
        return list(self.due)

    def done(self, transfer_id: str) -> None:
        self._remove(transfer_id)

    def note_try(self, transfer_id: str) -> None:
        self._check()
        (due,) = (due for due in self.due if due.transfer_id == transfer_id)
        self.due[self.due.index(due)] = replace(due, tries=due.tries + 1)

    def give_up(self, transfer_id: str, reason: str) -> None:
        self._remove(transfer_id)
        self.given_up[transfer_id] = reason

    def _remove(self, transfer_id: str) -> None:
        self._check()
        self.due = [due for due in self.due if due.transfer_id != transfer_id]

    def _check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
