"""Bars with their spread as a self-contained SVG: one group for each case, one bar for each system.

It knows of measurements what ``measure`` does, and draws one column of the tables.
"""

import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from tests.bench.measure import Column, Runs, Spread
from tests.bench.plot import BACKGROUND, FONT, GRID, INK, MARGIN, QUIET, WIDTH, text_at, ticks

BAR: Final = 16
STEP: Final = 22
NAMES: Final = 200
"""Of the width: what the names of the systems have."""

VALUES: Final = 130
TOP: Final = 112
SUBTITLE_WIDTH: Final = 130

# Okabe and Ito's: told apart with every kind of colour vision. relay has one of its own.
RELAY: Final = "#0072b2"
OTHER: Final = "#9aa4af"


def draw(runs: Runs, column: Column, title: str, subtitle: str) -> str:
    """Draws a column: medians as bars, least and most as lines through their ends.

    Returns:
        The SVG document.
    """
    groups = [
        (case, [(s, v) for s in runs.systems(case) if (v := column.of(runs, case, s)) is not None])
        for case in runs.cases()
    ]
    groups = [(case, rows) for case, rows in groups if rows]
    highest = max((value.high for _, rows in groups for _, value in rows), default=1.0)
    height = TOP + sum(STEP * (len(rows) + 2) for _, rows in groups)
    heading = f"{title}: {column.title}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title desc" '
        f'font-family="{FONT}" font-size="12">',
        f'<title id="title">{escape(heading)}</title>',
        f'<desc id="desc">{escape(_in_words(groups, column.digits))}</desc>',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" '
        f'fill="{BACKGROUND}" stroke="{GRID}"/>',
        text_at(MARGIN, 38, heading, size=17, weight=600),
        *(
            text_at(MARGIN, 60 + 17 * row, line, colour=QUIET)
            for row, line in enumerate(textwrap.wrap(subtitle, SUBTITLE_WIDTH))
        ),
    ]
    top = float(TOP)
    for case, rows in groups:
        lines += _group(case, rows, top, ticks(highest), column.digits)
        top += STEP * (len(rows) + 2)
    return "\n".join([*lines, "</svg>", ""])


def _group(
    case: str,
    rows: Sequence[tuple[str, Spread]],
    top: float,
    scale: Sequence[float],
    digits: int,
) -> Iterator[str]:
    left, right = MARGIN + NAMES, WIDTH - MARGIN - VALUES
    bottom = top + STEP * (len(rows) + 0.5)

    def x(value: float) -> float:
        return left + (right - left) * value / scale[-1]

    yield text_at(MARGIN, top + 4, case, size=13, weight=600)
    for tick in scale:
        yield _line(x(tick), top + STEP / 2, x(tick), bottom, GRID if tick else QUIET)
        yield text_at(x(tick), bottom + 13, f"{tick:g}", colour=QUIET, anchor="middle", size=11)
    for number, (system, value) in enumerate(rows):
        middle = top + STEP * (number + 1)
        colour = RELAY if system.startswith("relay") else OTHER
        yield text_at(left - 8, middle + 4, system, anchor="end")
        yield (
            f'<rect x="{left:.1f}" y="{middle - BAR / 2:.1f}" '
            f'width="{x(value.median) - left:.1f}" height="{BAR}" fill="{colour}"/>'
        )
        yield _line(x(value.low), middle, x(value.high), middle, INK)
        yield text_at(right + 8, middle + 4, value.text(digits), colour=INK)


def _in_words(groups: Sequence[tuple[str, Sequence[tuple[str, Spread]]]], digits: int) -> str:
    return " ".join(
        f"{case}: " + ", ".join(f"{system} {value.text(digits)}" for system, value in rows) + "."
        for case, rows in groups
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
