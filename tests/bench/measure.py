"""The arithmetic of benchmarks: what was measured, its medians, ratios within a round, verdicts.

A machine's speed changes from minute to minute, so that two figures are only compared if they were
measured beside each other: every ratio is taken within a round, and the median of those is told.
No I/O: what was measured, and how, is the caller's business.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Pick = Callable[[Iterable[float]], float]
"""Which of several others is the one to compare with: ``max`` or ``min``."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the least and the most of what it was taken from."""

    median: float
    low: float
    high: float
    count: int

    def text(self, digits: int) -> str:
        """``median (low–high)``; only the figure if there was but one."""
        median = f"{self.median:.{digits}f}"
        if self.count == 1:
            return median
        return f"{median} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of the values that so many percent of them do not exceed (nearest rank).

    Raises:
        ValueError: there are no values, or ``percent`` is not within 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError("a percentile is of some values, and between 0 and 100")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement of one system.

    Attributes:
        system: what was measured.
        cases: what was asked of it. Several if the same measurement serves them all, such as the
            floor, which does not depend on how an upload looks.
        round: in which of the repeats.
        figures: by name.
    """

    system: str
    cases: tuple[str, ...]
    round: int
    figures: Mapping[str, float]


@dataclass(slots=True)
class Runs:
    """All that was measured, in the order in which it was."""

    kept: list[Run] = field(default_factory=list)

    def add(
        self, system: str, cases: Sequence[str], number: int, figures: Mapping[str, float]
    ) -> None:
        """Keep one more; ``number`` is its round."""
        self.kept.append(Run(system, tuple(cases), number, dict(figures)))

    def cases(self) -> list[str]:
        """In the order in which they first came."""
        return list(dict.fromkeys(case for run in self.kept for case in run.cases))

    def systems(self, case: str) -> list[str]:
        """Those that were measured in a case, in a fixed order: names as they first came."""
        return list(dict.fromkeys(run.system for run in self.kept if case in run.cases))

    def values(self, case: str, system: str, figure: str) -> list[float]:
        """One figure of each round that has it."""
        return list(self._by_round(case, system, figure).values())

    def ratios(
        self, case: str, system: str, figure: str, bases: Sequence[str], pick: Pick = max
    ) -> list[float]:
        """A system's figure as a multiple of another's, round by round.

        Of several others it is the one with the highest (or, with ``min``, the lowest) figure of
        that round. Rounds that lack one side are left out.
        """
        others = [self._by_round(case, base, figure) for base in bases]
        ratios = []
        for number, value in self._by_round(case, system, figure).items():
            beside = [other[number] for other in others if number in other]
            if beside:
                ratios.append(value / pick(beside))
        return ratios

    def _by_round(self, case: str, system: str, figure: str) -> dict[int, float]:
        return {
            run.round: run.figures[figure]
            for run in self.kept
            if run.system == system and case in run.cases and figure in run.figures
        }


@dataclass(frozen=True, slots=True)
class Column:
    """A figure in a table, or its ratio to the same figure of others."""

    title: str
    figure: str
    digits: int = 2
    bases: Sequence[str] | None = None
    pick: Pick = max
    brief: bool = False
    """Whether the table has no room for the spread."""

    def of(self, runs: Runs, case: str, system: str) -> Spread | None:
        """What the table says in the row of a system."""
        if self.bases is not None:
            return spread(runs.ratios(case, system, self.figure, self.bases, self.pick))
        return spread(runs.values(case, system, self.figure))

    def cell(self, runs: Runs, case: str, system: str) -> str:
        """Its text; empty if there is no figure."""
        found = self.of(runs, case, system)
        if found is None:
            return ""
        return f"{found.median:.{self.digits}f}" if self.brief else found.text(self.digits)


def table(runs: Runs, case: str, columns: Sequence[Column]) -> list[str]:
    """The lines of a table: a system in each, medians with their spread, under a headline.

    Columns that nobody has a figure for are left out.
    """
    rows = [
        [system, *(column.cell(runs, case, system) for column in columns)]
        for system in runs.systems(case)
    ]
    return aligned([[case, *(column.title for column in columns)], *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with their cells below each other, the first to the left, the others to the right.

    A column of which only the headline has text is left out.
    """
    kept = [
        cells
        for number, cells in enumerate(zip(*rows, strict=True))
        if number == 0 or any(cells[1:])
    ]
    widths = [max(map(len, cells)) for cells in kept]
    lines = []
    for row in zip(*kept, strict=True):
        first = row[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *others]).rstrip())
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is promised, and what was measured of it; None if this run did not measure it."""

    what: str
    measured: Spread | None
    bound: float
    at_most: bool
    digits: int = 2

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the promise; None if it was not measured."""
        if self.measured is None:
            return None
        if self.at_most:
            return self.measured.median <= self.bound
        return self.measured.median >= self.bound

    def row(self) -> list[str]:
        """Its cells."""
        sign = "≤" if self.at_most else "≥"
        verdict = {True: "yes", False: "NO", None: "not measured"}[self.met]
        measured = "" if self.measured is None else self.measured.text(self.digits)
        return [self.what, measured, f"{sign} {self.bound:g}", verdict]


def verdicts(targets: Sequence[Target]) -> list[str]:
    """The lines of the table of targets."""
    return aligned([["target", "measured", "wanted", "met"], *(target.row() for target in targets)])
