"""What ``relay send`` tells its user: a line or JSON for each transfer, problems, progress.

Names of files and words of servers may hold anything, so nothing is printed before it is made
harmless to a terminal. What happened is for others to know.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn, Self, TextIO

from tqdm import tqdm

MAX_TEXT: Final = 1000
"""Characters of what a server says that are shown."""

NAMES: Final = 10
"""Names listed at most; the others are counted."""


class Report:
    """Standard output for what was sent, standard error for the rest; a context manager."""

    def __init__(self, *, total: int | None, as_json: bool, is_quiet: bool) -> None:
        """``total``: bytes to send, if that is known. Progress is shown on terminals only."""
        self._as_json = as_json
        self._is_quiet = is_quiet
        self._bar: tqdm[NoReturn] = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=True if is_quiet else None,
            leave=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def moved(self, size: int) -> None:
        """So many bytes more were sent; fewer, when they must be sent again."""
        self._bar.update(size)

    def retrying(self, label: str, problem: Mapping[str, Any], seconds: float) -> None:
        """A transfer failed and will be tried again, while nothing succeeds for so long."""
        if not self._is_quiet:
            self._say(f"{label}: {_words(problem)}; trying again for up to {_duration(seconds)}")

    def sent(self, label: str, about: Mapping[str, object], receipt: Mapping[str, Any]) -> None:
        """A transfer is safe. ``about``: what JSON has beside the receipt."""
        listed, omitted = len(receipt["parts"]), receipt.get("parts_omitted", 0)
        if self._as_json:
            self._print(json.dumps({**receipt, **about}), sys.stdout)
        elif not self._is_quiet:
            text = f"transfer {receipt['transfer']}  parts {listed + omitted}"
            self._print(f"{text}  bytes {receipt['bytes']}  {label}", sys.stdout)
        if omitted and not self._is_quiet:
            text = f"the receipt lists {listed} parts; the others were compared by their sum"
            self._say(f"{label}: {text}")

    def failed(self, label: str, about: Mapping[str, object], problem: Mapping[str, Any]) -> None:
        """A transfer is given up. ``problem``: ``status``, ``code``, ``detail``, as in HTTP."""
        if self._as_json:
            self._print(json.dumps({**problem, **about}), sys.stdout)
        self._say(f"{label}: {_words(problem)}")

    def interrupted(self, unfinished: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        """Labels and what JSON has of the transfers that nobody will finish."""
        begun = [(label, about) for label, about in unfinished if about["tries"]]
        for label, about in begun:
            text = "interrupted: it may have arrived or not; sent again with --key"
            self._say(f"{label}: {text} {about['key']} it counts once")
        others = [label for label, about in unfinished if not about["tries"]]
        if others:
            rest = len(others) - NAMES
            more = f" and {rest} more" if rest > 0 else ""
            self._say(f"interrupted: not sent: {', '.join(others[:NAMES])}{more}")
        if self._as_json:
            problem = {"status": None, "code": "interrupted", "detail": "not finished"}
            for _, about in unfinished:
                self._print(json.dumps({**problem, **about}), sys.stdout)

    def _say(self, text: str) -> None:
        self._print(f"relay send: {text}", sys.stderr)

    def _print(self, text: str, file: TextIO) -> None:
        # Not print: a progress bar may be in the line.
        tqdm.write(shown(text), file=file)
        file.flush()


def shown(text: str) -> str:
    """``text`` as one line without control characters, those that turn its direction included."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _words(problem: Mapping[str, Any]) -> str:
    status = "" if problem["status"] is None else f"{problem['status']} "
    detail = str(problem["detail"])
    if len(detail) > MAX_TEXT:
        detail = f"{detail[:MAX_TEXT]}…"
    return f"{status}{problem['code']}: {detail}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
