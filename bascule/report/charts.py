"""Charts of the report as inline SVG: bars with intervals, lines. Colours are CSS classes, so a page can be dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Bar:
    """A success rate with its interval; fractions in [0, 1]."""

    label: str
    rate: float
    interval: tuple[float, float]
    value: str
    """Label next to the bar, e.g. "312/320"."""
    kind: str
    """CSS class that colours it: before, after, fail or plain."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "before"
    intervals: Sequence[Sequence[float]] | None = None
    """Optional (lo, hi) per point, drawn as whiskers."""
    markers: bool = False


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars on a 0..100% axis with a whisker for each interval."""
    width, left, right, step, height = 720, 190, 170, 34, 18
    span = width - left - right
    bottom = step * len(rows) + 8

    def x(fraction: float) -> float:
        return left + span * fraction

    parts = []
    for percent in range(0, 101, 25):
        parts.append(_line("grid", x(percent / 100), 2, x(percent / 100), bottom))
        parts.append(_text("tick", x(percent / 100), bottom + 16, f"{percent}%", "middle"))
    for index, row in enumerate(rows):
        top = step * index + (step - height) / 2 + 2
        middle = top + height / 2
        lo, hi = row.interval
        parts.append(_text("label", left - 12, middle + 4.5, row.label, "end"))
        # A rate of zero keeps a sliver: an empty row would look like missing data.
        length = max(span * row.rate, 2)
        parts.append(f'<rect class="{row.kind}" x="{left}" y="{top}" width="{length:.1f}" height="{height}" rx="3"/>')
        caps = f"M{x(lo):.1f} {middle - 5}v10M{x(hi):.1f} {middle - 5}v10"
        parts.append(f'<path class="whisker" d="M{x(lo):.1f} {middle}H{x(hi):.1f}{caps}"/>')
        parts.append(_text("label strong", width - right + 62, middle + 4.5, f"{100 * row.rate:.1f}%", "end"))
        parts.append(_text("tick", width - right + 72, middle + 4.5, row.value))
    return _svg(width, bottom + 24, "success rates", parts)


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    log_y: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """A line chart. `percent`: ys are fractions on a 0..100% axis. `reference` = (label, y): a dashed level."""
    width, height, left, right, top, bottom = 560, 270, 56, 18, 30, 44
    points = [[(x, y) for x, y in zip(one.xs, one.ys, strict=True) if _drawable(x, y, log_y)] for one in series]
    flat = [point for line in points for point in line]
    if not flat:
        return ""
    x_lo, x_hi = min(p[0] for p in flat), max(p[0] for p in flat)
    x_lo, x_hi = (min(x_lo, 0.0), x_hi) if x_hi > 0 else (x_lo, x_lo + 1)
    if percent:
        y_ticks = [0, 0.25, 0.5, 0.75, 1.0]
    else:
        y_ticks = _log_ticks(flat) if log_y else _ticks(0, max(p[1] for p in flat))
    y_lo, y_hi = (y_ticks[0], y_ticks[-1])

    def sx(value: float) -> float:
        return left + (width - left - right) * (value - x_lo) / (x_hi - x_lo)

    def sy(value: float) -> float:
        fraction = math.log(value / y_lo) / math.log(y_hi / y_lo) if log_y else (value - y_lo) / (y_hi - y_lo)
        return height - bottom - (height - top - bottom) * min(max(fraction, 0.0), 1.0)

    parts = [_text("label strong", left - 48, 14, y_label)]
    for tick in y_ticks:
        parts.append(_line("grid", left, sy(tick), width - right, sy(tick)))
        parts.append(_text("tick", left - 8, sy(tick) + 4, f"{100 * tick:.0f}%" if percent else _short(tick), "end"))
    for tick in _ticks(x_lo, x_hi):
        if x_lo <= tick <= x_hi:
            parts.append(_text("tick", sx(tick), height - bottom + 18, _short(tick), "middle"))
    parts.append(_text("tick", (left + width - right) / 2, height - 6, x_label, "middle"))
    if reference is not None:
        parts.append(_line("reference", left, sy(reference[1]), width - right, sy(reference[1])))
        parts.append(_text("tick", width - right, sy(reference[1]) - 6, reference[0], "end"))
    for one, line in zip(series, points, strict=True):
        path = "L".join(f"{sx(x):.1f} {sy(y):.1f}" for x, y in line)
        parts.append(f'<path class="line {one.kind}" d="M{path}"/>' if line else "")
        if one.markers:
            parts += [f'<circle class="{one.kind}" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="3.5"/>' for x, y in line]
        for x, y, (lo, hi) in zip(one.xs, one.ys, one.intervals or (), strict=False):
            if _drawable(x, y, log_y):
                parts.append(f'<path class="whisker thin" d="M{sx(x):.1f} {sy(lo):.1f}V{sy(hi):.1f}"/>')
    if len(series) > 1:
        parts.append(_legend(series, width - right))
    return _svg(width, height, y_label, parts)


@dataclass(frozen=True)
class Trace:
    """One line of a small chart over time."""

    label: str
    values: Sequence[float]
    kind: str = "before"


def traces(
    lines: Sequence[Trace],
    seconds: Sequence[float],
    bounds: tuple[float, float],
    idle: Sequence[tuple[float, float]] = (),
    points: int = 160,
) -> str:
    """A small chart of lines over time, all within `bounds`; `idle`: (from, to) in seconds, shaded. What lies beyond
    the bounds is drawn at their edge, as a mark; of long episodes every so many frames."""
    width, height, left, right, top, bottom = 260, 98, 4, 4, 18, 20
    low, high = bounds
    wide = (high - low) or 1.0
    last = max(seconds[-1], 1e-9)

    def sx(value: float) -> float:
        return left + (width - left - right) * value / last

    def sy(value: float) -> float:
        return height - bottom - (height - top - bottom) * min(max((value - low) / wide, 0.0), 1.0)

    parts = [
        f'<rect class="idle" x="{sx(start):.1f}" y="{top}" width="{max(sx(end) - sx(start), 1):.1f}" '
        f'height="{height - top - bottom}"/>'
        for start, end in idle
    ]
    parts += [_line("grid", left, sy(edge), width - right, sy(edge)) for edge in (low, high)]
    for one in lines:
        every = max(1, math.ceil(len(one.values) / points))
        known = [(x, y) for x, y in zip(seconds[::every], one.values[::every], strict=True) if math.isfinite(y)]
        path = "L".join(f"{sx(x):.1f} {sy(y):.1f}" for x, y in known)
        parts.append(f'<path class="line {one.kind}" d="M{path}"/>' if known else "")
        beyond = [(x, y) for x, y in zip(seconds, one.values, strict=True) if not low <= y <= high][:20]
        parts += [
            f'<circle class="fail" cx="{sx(x):.1f}" cy="{sy(y) if math.isfinite(y) else top:.1f}" r="3"/>'
            for x, y in beyond
        ]
    names = "".join(
        f'<tspan class="{one.kind}" dx="4">\u25a0</tspan><tspan dx="3">{escape(one.label)}</tspan>' for one in lines
    )
    parts.append(f'<text class="tick" x="0" y="12">{names}</text>')
    parts.append(_text("tick", width - right, height - 6, f"{low:.3g} to {high:.3g}", "end"))
    return _svg(width, height, ", ".join(one.label for one in lines), parts)


def columns(values: Sequence[float], flagged: Sequence[bool], y_label: str) -> str:
    """One thin column for each value, those flagged in the colour of failures."""
    width, height, left, bottom, top = 1000, 130, 44, 20, 10
    most = max(values, default=1) or 1
    ticks = _ticks(0, most)
    step = (width - left) / max(len(values), 1)

    def sy(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / ticks[-1]

    parts = []
    for tick in ticks[:: max(1, len(ticks) // 3)]:
        parts.append(_line("grid", left, sy(tick), width, sy(tick)))
        parts.append(_text("tick", left - 8, sy(tick) + 4, _short(tick), "end"))
    for at, (value, flag) in enumerate(zip(values, flagged, strict=True)):
        kind = "fail" if flag else "before"
        parts.append(
            f'<rect class="{kind}" x="{left + at * step + 0.1 * step:.2f}" y="{sy(value):.1f}" '
            f'width="{min(0.8 * step, 18):.2f}" height="{max(height - bottom - sy(value), 1):.1f}"/>'
        )
    parts.append(_text("tick", left, height - 4, y_label))
    return _svg(width, height, y_label, parts)


def _legend(series: Sequence[Series], right: float) -> str:
    """A coloured square and a name per line, ending at the right edge."""
    entries = "".join(
        f'<tspan class="{one.kind}" dx="16">\u25a0</tspan><tspan dx="5">{escape(one.label)}</tspan>' for one in series
    )
    return f'<text class="tick" x="{right}" y="14" text-anchor="end">{entries}</text>'


def _text(css: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _drawable(x: float, y: float, log_y: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)


def _ticks(lo: float, hi: float) -> list[float]:
    """Four to seven round numbers from lo or below to hi or above."""
    span = max(hi - lo, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(lo / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(hi / step - 1e-9) - first + 1)]


def _log_ticks(points: Sequence[tuple[float, float]]) -> list[float]:
    """1-2-5 numbers around the positive ys, at least two."""
    lo, hi = min(p[1] for p in points), max(p[1] for p in points)
    exponents = range(math.floor(math.log10(lo)) - 1, math.ceil(math.log10(hi)) + 2)
    grid = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    first = max(i for i, tick in enumerate(grid) if tick <= lo)
    last = min(i for i, tick in enumerate(grid) if tick >= hi and i > first)
    return grid[first : last + 1]


def _short(value: float) -> str:
    """12500 -> 12.5k; 0.05 -> 0.05."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
