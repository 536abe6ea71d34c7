"""What people and programs see of the receiver: lines, and on a terminal its progress.

Standard output has one line for each delivered transfer, standard error the rest. What the lines
are about is decided elsewhere.
"""

import json
import sys
from typing import Any, Final, TextIO

from tqdm import tqdm

from relay.receiver import Delivered
from relay.receiver.figures import Figures

_FORMAT: Final = "{n_fmt} {rate_fmt}{postfix}"
"""No bar: nobody knows how much is to come."""


def say(text: str) -> None:
    """A line about a problem, on standard error."""
    # Above the progress, if there is one.
    tqdm.write(f"relay receive: {text}", file=sys.stderr)
    sys.stderr.flush()


class Console:
    """Tells of what happens; close it when done."""

    def __init__(
        self, lines: TextIO | None = None, *, as_json: bool = False, quiet: bool = False
    ) -> None:
        """``lines``: where transfers are told; None: standard output. ``quiet``: problems only."""
        self._lines = lines or sys.stdout
        self._as_json = as_json
        self._quiet = quiet
        self._progress: tqdm[Any] | None = None
        if sys.stderr.isatty() and not quiet:
            # Its thread is for bars that are seldom updated; ours is, every second at least.
            tqdm.monitor_interval = 0
            self._progress = tqdm(
                unit="B", unit_scale=True, unit_divisor=1024, leave=False, bar_format=_FORMAT
            )

    def close(self) -> None:
        """Remove the progress from the terminal."""
        if self._progress is not None:
            self._progress.close()

    def note(self, text: str) -> None:
        """A line that is no problem, on standard error."""
        if not self._quiet:
            say(text)

    def delivered(self, delivered: Delivered) -> None:
        """A line about a transfer."""
        if self._quiet:
            return
        line = _as_json(delivered) if self._as_json else _as_text(delivered)
        tqdm.write(line, file=self._lines)
        self._lines.flush()

    def progress(self, figures: Figures) -> None:
        """Show how far it is."""
        if self._progress is None:
            return
        shown = f"{figures.transfers} delivered, {figures.open_transfers} open"
        if figures.commands is not None:
            shown += f", {figures.commands.due} commands due"
        self._progress.set_postfix_str(shown, refresh=False)
        self._progress.update(figures.bytes - self._progress.n)


def _as_text(delivered: Delivered) -> str:
    totals = delivered.totals
    return (
        f"transfer {delivered.transfer.id}  parts {totals.parts}  bytes {totals.bytes}"
        f"  {delivered.where}"
    )


def _as_json(delivered: Delivered) -> str:
    transfer, totals = delivered.transfer, delivered.totals
    return json.dumps(
        {
            "transfer": transfer.id,
            "route": transfer.route,
            "client": transfer.client,
            "idempotency_key": transfer.idempotency_key,
            "parts": totals.parts,
            "frames": totals.frames,
            "bytes": totals.bytes,
            "where": delivered.where,
        }
    )
