"""Problems as lines: each one, or a few and a count."""

from relay.receiver import Problem
from relay.receiver.problems import LINES, lines


def test_a_few_problems_are_told_each() -> None:
    problems = [Problem("stray", f"number {n}", str(n)) for n in range(LINES)]
    assert lines(problems) == [f"transfer {n} number {n}" for n in range(LINES)]


def test_of_many_the_first_are_told_and_the_others_counted_by_kind() -> None:
    problems = [Problem("gap", "x")] * LINES
    problems += [Problem("stray", "y")] * 90 + [Problem("not-a-frame", "z")] * 400
    told = lines(problems)
    assert told[:LINES] == ["x"] * LINES
    assert told[LINES:] == ["… and 490 more like these: 400 not-a-frame, 90 stray"]


def test_no_problem_no_line() -> None:
    assert lines([]) == []
