"""What becomes of transfers once the ledger says that they are delivered.

Their files are moved to their places, and it is noted with which of them something is yet to be
done. All of it can be stopped anywhere and called again, by the next process too. It does not
decide what is delivered, and runs no commands.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from relay.receiver import Refused, disk, staging
from relay.receiver.names import RECEIPT
from relay.receiver.pending import Pending, PendingNotes
from relay.receiver.places import Place, Places
from relay.receiver.quarantine import Quarantine
from relay.receiver.receipts import check


class Handover:
    """Delivered transfers of one output directory.

    ``add``, ``recover`` and ``finish`` are called by one thread at a time; ``pending``,
    ``note_try``, ``done`` and ``give_up`` by any, also meanwhile.
    """

    def __init__(
        self,
        output: Path,
        staging: int,
        places: Places,
        quarantine: Quarantine,
        notes: PendingNotes | None,
    ) -> None:
        """``staging`` is open, and stays its owner's. ``notes``: None if nothing is to be done."""
        self._output = output
        self._staging = staging
        self._places = places
        self._quarantine = quarantine
        self._notes = notes
        self._unfinished: dict[str, Place] = {}

    # --- to their places ---------------------------------------------------------------------

    def add(self, places: Iterable[Place]) -> None:
        """Have ``finish`` move these, which the ledger has."""
        self._unfinished |= {place.transfer_id: place for place in places}

    def recover(self, transfer_id: str) -> None:
        """Have ``finish`` move one that an earlier process has not moved, or not wholly."""
        try:
            receipt = os.open(f"{transfer_id}/{RECEIPT}", disk.READ, dir_fd=self._staging)
            with os.fdopen(receipt, "rb") as file:
                transfer = check(file)
            self._unfinished[transfer_id] = self._places.choose(transfer)
        except (ValueError, Refused) as exc:
            # It was acked: whatever has become of its receipt since, its bytes must be kept.
            self._quarantine.take_staged(transfer_id, str(exc), self._staging)
            staging.remove(transfer_id, self._staging)

    def finish(self) -> None:
        """Move all. Can be called again after an OSError."""
        if not self._unfinished:
            return
        places = [*self._unfinished.values()]
        waiting = [self._waiting(place) for place in places]
        if self._notes is not None:
            self._notes.add(waiting)
        self._places.put(places)
        for place in places:
            staging.remove(place.transfer_id, self._staging)
        if self._notes is not None:
            self._notes.show(waiting)
        self._unfinished.clear()

    # --- what is to be done with them --------------------------------------------------------

    def pending(self) -> list[Pending]:
        """Those that are neither done nor given up, oldest first."""
        return [] if self._notes is None else self._notes.list()

    def note_try(self, transfer_id: str) -> None:
        """Count a try of one that is pending.

        Raises:
            KeyError: it is not pending.
        """
        self._pending_notes().note_try(transfer_id)

    def done(self, transfer_id: str) -> None:
        """Forget one that was pending."""
        self._pending_notes().remove(transfer_id)

    def give_up(self, transfer_id: str, reason: str) -> None:
        """Move what was delivered of one that is pending to the quarantine. It blocks.

        What is no longer where it was delivered is left alone.

        Raises:
            KeyError: it is not pending.
        """
        pending = self._pending_notes().get(transfer_id)
        receipt = pending.receipt.relative_to(self._output).parts
        place = Place(transfer_id, pending.where.relative_to(self._output).parts, receipt)
        if self._quarantine.keeps:
            self._quarantine.take(
                transfer_id,
                reason,
                {"tries": pending.tries},
                (),
                lambda directory: self._places.withdraw(place, directory),
            )
            self._quarantine.sync()
        self._pending_notes().remove(transfer_id)

    def _waiting(self, place: Place) -> Pending:
        receipt = self._output.joinpath(*place.receipt)
        return Pending(place.transfer_id, self._output.joinpath(*place.path), receipt, time.time())

    def _pending_notes(self) -> PendingNotes:
        if self._notes is None:
            raise KeyError("nothing is noted as pending")
        return self._notes
