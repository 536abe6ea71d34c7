"""Problems as lines for people, few enough to read.

Anybody who may publish can cause a problem for each message; the log is not theirs to fill.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from relay.receiver import Problem

LINES: Final = 10
"""Problems of one batch that are told each; the others are counted."""


def lines(problems: Sequence[Problem]) -> list[str]:
    """One line each, or the first few and a line that counts the others by their kind."""
    told = [str(problem) for problem in problems[:LINES]]
    rest = Counter(str(problem.kind) for problem in problems[LINES:])
    if rest:
        kinds = ", ".join(f"{count} {kind}" for kind, count in rest.most_common())
        told.append(f"… and {rest.total()} more like these: {kinds}")
    return told
