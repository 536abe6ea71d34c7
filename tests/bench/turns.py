"""Systems take turns: in another order each round, with an empty queue and a broker at rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.destination import Destination
from tests.bench.report import Report, progress


@dataclass(frozen=True)
class Turn:
    """One measurement of a round.

    Attributes:
        system: what is measured.
        cases: in which tables the figures stand.
        run: does it; the figures.
    """

    system: str
    cases: Sequence[str]
    run: Callable[[], dict[str, float]]


def take(turns: Sequence[Turn], destination: Destination, report: Report) -> None:
    """All rounds of them. What disturbs the first place of a round is not always the same one's."""
    for number in range(report.options.rounds):
        first = number % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            progress(f"{turn.cases[0]}, round {number + 1}: {turn.system}")
            destination.renew()
            report.runs.add(turn.system, turn.cases, number, turn.run())
    destination.clear()
