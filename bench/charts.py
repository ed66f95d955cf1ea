"""Charts as SVG text: bars of ratios, and curves of time over size. Equal numbers give equal bytes.

Axes are logarithmic. Nothing is drawn but rectangles, lines, circles and text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from train.plots import BLUE, GOLD, GREEN, GREY, ORANGE, VIOLET

INK, PAPER, RULE = "#23272e", "#ffffff", "#d9dce1"
_COLOURS = (BLUE, ORANGE, GREEN, VIOLET, GOLD, GREY)
_WIDTH = 860


class Bar(NamedTuple):
    """One ratio: above 1 the peer takes longer than ours; noise is one inside the spread, wall one of wall times."""

    label: str
    ratio: float
    noise: bool
    wall: bool = False


class Point(NamedTuple):
    """A time at a size, and its spread."""

    size: float
    seconds: float
    spread_s: float


def ratio_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Draw a bar per peer, group by group, from the line at 1: to the right ours is faster.

    Raises:
        ValueError: there is no bar.
    """
    bars = [bar for _, group in groups for bar in group]
    if not bars:
        raise ValueError("groups must hold at least one bar")
    left, right, top = 300, 84, 76
    axis = _Axis([1.0, *(bar.ratio for bar in bars)], left, _WIDTH - right)
    parts, y = [], top
    for name, group in groups:
        y += 26
        parts.append(_text(16, y, name, weight="bold"))
        for bar in group:
            y += 19
            begin, end = sorted((axis(1.0), axis(bar.ratio)))
            parts.append(_text(left - 10, y, bar.label, anchor="end"))
            shape = f'x="{begin:.1f}" y="{y - 11}" width="{end - begin:.1f}" height="13"'
            parts.append(f'<rect {shape} fill="{_colour(bar)}"/>')
            parts.append(_text(end + 5, y, f"{bar.ratio:.2f}{' (wall)' * bar.wall}", size=11))
    bottom = y + 14
    grid = [line for tick in axis.ticks for line in _grid_x(axis(tick), top, bottom, f"{tick:g}×")]
    one = f'<line x1="{axis(1.0):.1f}" y1="{top}" x2="{axis(1.0):.1f}" y2="{bottom}" stroke="{INK}"/>'
    key = [(BLUE, "ours is faster"), (ORANGE, "ours is slower"), (GREY, "inside the spread")]
    used = [entry for entry in key if entry[0] in map(_colour, bars)]
    told = _text((left + _WIDTH - right) / 2, bottom + 36, "time of the peer over ours, logarithmic", anchor="middle")
    head = [_text(16, 28, title, size=16, weight="bold"), *_legend(used, 52)]
    return _svg(bottom + 50, [*head, *grid, *parts, one, told])


def _colour(bar: Bar) -> str:
    return GREY if bar.noise else BLUE if bar.ratio > 1 else ORANGE


def scaling_chart(
    title: str, panels: Sequence[tuple[str, Mapping[str, Sequence[Point]]]], remark: str | None = None
) -> str:
    """Draw one panel per sweep: time over size, a curve per peer, bars for the spread; below them a remark.

    Raises:
        ValueError: there is no panel, or one without a point.
    """
    if not panels or not all(any(curves.values()) for _, curves in panels):
        raise ValueError("panels must hold at least one point each")
    top, bottom, gap, margin = 84, 360, 74, 62
    width = (_WIDTH - margin - 24 - gap * (len(panels) - 1)) / len(panels)
    names = list(dict.fromkeys(name for _, curves in panels for name in curves))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    parts = [_text(16, 28, title, size=16, weight="bold"), *_legend([(colours[name], name) for name in names], 52)]
    for number, (label, curves) in enumerate(panels):
        left = margin + number * (width + gap)
        points = [point for curve in curves.values() for point in curve]
        x = _Axis([point.size for point in points], left + 12, left + width - 12)
        y = _Axis([1e3 * end for point in points for end in _ends(point)], bottom - 8, top + 8)
        for size in sorted({point.size for point in points}):
            parts += _grid_x(x(size), top, bottom, f"{size:g}")
        parts += [line for tick in y.ticks for line in _grid_y(y(tick), left, left + width, f"{tick:g}")]
        parts.append(_text(left + width / 2, bottom + 38, label, anchor="middle"))
        parts.append(_text(left - 46, top - 8, "ms; both axes are logarithmic", size=11))
        for name, curve in curves.items():
            parts += _curve(sorted(curve), x, y, colours[name])
    parts += [_text(16, bottom + 62, remark)] if remark else []
    return _svg(bottom + (80 if remark else 56), parts)


class _Axis:
    """Maps positive values to pixels, logarithmically; ticks are 1, 2 and 5 times powers of ten."""

    def __init__(self, values: Sequence[float], begin: float, end: float):
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = 0.03 * (high - low) + 0.02
        self._low, self._high, self._begin, self._end = low - margin, high + margin, begin, end
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        steps = (1, 2, 5) if high - low < 2 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        self.ticks = [tick for tick in ticks if self._low <= math.log10(tick) <= self._high]

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)


def _ends(point: Point) -> tuple[float, float]:
    """Half a spread to either side, but never down to 0."""
    return max(point.seconds - point.spread_s / 2, point.seconds / 2), point.seconds + point.spread_s / 2


def _curve(points: Sequence[Point], x: _Axis, y: _Axis, colour: str) -> list[str]:
    line = " ".join(f"{x(point.size):.1f},{y(1e3 * point.seconds):.1f}" for point in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for point in points:
        at = x(point.size)
        low, high = (y(1e3 * end) for end in _ends(point))
        parts.append(f'<line x1="{at:.1f}" y1="{low:.1f}" x2="{at:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y(1e3 * point.seconds):.1f}" r="3.5" fill="{colour}"/>')
    return parts


def _legend(entries: Sequence[tuple[str, str]], y: float) -> list[str]:
    parts, x = [], 16.0
    for colour, name in entries:
        parts.append(f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y, name))
        x += 42 + 6.6 * len(name)
    return parts


def _grid_x(x: float, top: float, bottom: float, label: str) -> list[str]:
    line = f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{RULE}"/>'
    return [line, _text(x, bottom + 16, label, size=11, anchor="middle")]


def _grid_y(y: float, left: float, right: float, label: str) -> list[str]:
    line = f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="{RULE}"/>'
    return [line, _text(left - 6, y + 4, label, size=11, anchor="end")]


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "normal") -> str:
    look = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'width="{_WIDTH}" height="{height:.0f}" viewBox="0 0 {_WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    paper = f'<rect width="{_WIDTH}" height="{height:.0f}" fill="{PAPER}"/>'
    return "\n".join([head, paper, *parts, "</svg>", ""])
