"""Curves over time as a self-contained SVG that reads well on light and dark pages.

It draws panels side by side, sharing a time axis; what they show is the caller's business.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 880
HEIGHT = 380
MARGIN = 28
PANEL_TOP = 138
PANEL_BOTTOM = 338
AXIS_WIDTH = 34
GAP = 34
TICKS = 5
LABEL_DISTANCE = 9
LETTER_WIDTH = 7.6  # of a label, on the safe side: an SVG cannot measure text
TINT = 0.13

# A panel of its own colour, because GitHub shows the picture on white and on near-black.
BACKGROUND = "#ffffff"
INK = "#1f2328"
QUIET = "#59636e"
GRID = "#e4e7eb"
FONT = "ui-sans-serif, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: written beside the line.
        colour: of line and label.
        points: seconds and value, in order of time.
        label_at: seconds at which the label stands above the line.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    label_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture of several curves, with its headline and the unit of its values."""

    title: str
    unit: str
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a panel lies, and its scales: seconds to x, values to y."""

    left: float
    right: float
    seconds: float
    highest: float

    def x(self, seconds: float) -> float:
        return self.left + (self.right - self.left) * seconds / self.seconds

    def y(self, value: float) -> float:
        return PANEL_BOTTOM - (PANEL_BOTTOM - PANEL_TOP) * value / self.highest


def draw(title: str, subtitle: Sequence[str], panels: Sequence[Panel], description: str) -> str:
    """Draws the panels.

    Args:
        title: the headline.
        subtitle: what was measured, line by line.
        panels: from left to right; their time ends with the shortest curve.
        description: the same in words, for those who do not see the picture.

    Returns:
        The SVG document.
    """
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title desc" '
        f'font-family="{FONT}" font-size="12">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(description)}</desc>',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" '
        f'fill="{BACKGROUND}" stroke="{GRID}"/>',
        text_at(MARGIN, 38, title, size=17, weight=600),
        *(text_at(MARGIN, 60 + 17 * row, line, colour=QUIET) for row, line in enumerate(subtitle)),
    ]
    seconds = min(curve.points[-1][0] for panel in panels for curve in panel.curves)
    width = (WIDTH - 2 * MARGIN - GAP * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        left = MARGIN + number * (width + GAP)
        highest = max(value for curve in panel.curves for _, value in curve.points)
        top = ticks(highest)[-1]
        frame = _Frame(left + AXIS_WIDTH, left + width, seconds, top)
        lines += _panel(panel, frame, left)
    return "\n".join([*lines, "</svg>", ""])


def _panel(panel: Panel, frame: _Frame, left: float) -> Iterator[str]:
    """Areas below, then the grid, then lines, then labels: nothing hides what is read."""
    yield text_at(left, PANEL_TOP - 30, panel.title, size=13, weight=600)
    paths = [_path(curve, frame) for curve in panel.curves]
    for curve, path in zip(panel.curves, paths, strict=True):
        foot = f"{frame.right:.1f},{PANEL_BOTTOM} {frame.left:.1f},{PANEL_BOTTOM}"
        yield f'<polygon points="{path} {foot}" fill="{_tint(curve.colour)}"/>'
    yield from _axes(panel, frame)
    for curve, path in zip(panel.curves, paths, strict=True):
        yield (
            f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="2" '
            'stroke-linejoin="round"/>'
        )
    for curve in panel.curves:
        yield _label(curve, frame)


def _axes(panel: Panel, frame: _Frame) -> Iterator[str]:
    for value in ticks(frame.highest):
        y = frame.y(value)
        yield (
            f'<line x1="{frame.left:.1f}" y1="{y:.1f}" x2="{frame.right:.1f}" y2="{y:.1f}" '
            f'stroke="{GRID if value else QUIET}" stroke-opacity="0.8"/>'
        )
        yield text_at(frame.left - 7, y + 4, f"{value:g}", colour=QUIET, anchor="end")
    yield text_at(frame.left - 7, PANEL_TOP - 11, panel.unit, colour=QUIET, size=11, anchor="end")
    for second in [tick for tick in ticks(frame.seconds) if tick <= frame.seconds]:
        words = f"{second:g} s" if second else "0"
        yield text_at(frame.x(second), PANEL_BOTTOM + 18, words, colour=QUIET, anchor="middle")


def _path(curve: Curve, frame: _Frame) -> str:
    points = [
        (round(frame.x(seconds), 1), round(frame.y(value), 1))
        for seconds, value in curve.points
        if seconds <= frame.seconds
    ]
    return " ".join(f"{x:g},{y:g}" for x, y in _thinned(points))


def _label(curve: Curve, frame: _Frame) -> str:
    seconds, value = min(curve.points, key=lambda point: abs(point[0] - curve.label_at))
    half = len(curve.label) * LETTER_WIDTH / 2
    x = min(max(frame.x(seconds), frame.left + half), frame.right - half)
    y = frame.y(value) - LABEL_DISTANCE
    return text_at(x, y, curve.label, colour=curve.colour, weight=600, anchor="middle")


def _tint(colour: str) -> str:
    """Returns a `#rrggbb` colour thinned with white."""
    channels = bytes.fromhex(colour[1:])
    return "#" + bytes(round(255 - (255 - channel) * TINT) for channel in channels).hex()


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Leaves out the points between two of the same height: nobody would see them."""
    inner = [
        point
        for (before, point), (_, after) in pairwise(pairwise(points))
        if not before[1] == point[1] == after[1]
    ]
    return [points[0], *inner, points[-1]]


def ticks(highest: float) -> list[float]:
    """Returns round values from 0 to the first one at or above `highest`."""
    rough = max(highest, 1e-9) / TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= rough)
    return [number * step for number in range(math.ceil(highest / step) + 1)]


def text_at(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: int = 400,
    colour: str = INK,
    anchor: str = "start",
) -> str:
    """A line of text, with its foot at a point."""
    # The outline keeps a label readable where it crosses a line of the grid.
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}" text-anchor="{anchor}" stroke="{BACKGROUND}" stroke-width="3" '
        f'paint-order="stroke">{escape(text)}</text>'
    )
