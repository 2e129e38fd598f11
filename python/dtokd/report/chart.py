"""A line chart as SVG text: no library, no script, colours by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

#: That the page's style has.
COLOURS = 6
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 38
#: Points that a screen can tell apart.
_MOST = 400


def line_chart(
    title: str, series: Mapping[str, Points], x: str, *, log: bool = False, mark: float | None = None
) -> str:
    """A figure of one or several lines.

    Args:
        title: its caption.
        series: by name; values that are not finite are left out, with `log` also those that are not positive. Long
            ones are drawn as means of neighbours. A series without points keeps its colour from the others.
        x: name of the axis.
        log: logarithmic y.
        mark: a y to draw a dashed line at.

    Returns:
        A <figure>, or "" if there is nothing to draw.
    """
    kept = {name: _thin([p for p in points if _drawn(p[1], log)], log) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [p[0] for points in kept.values() for p in points]
    ys = [math.log10(p[1]) if log else p[1] for points in kept.values() for p in points]
    if mark is not None:
        ys.append(math.log10(mark) if log else mark)
    x0, x1 = _wide(min(xs), max(xs))
    y0, y1 = _wide(min(ys), max(ys))

    def place(a: float, b: float) -> tuple[float, float]:
        b = math.log10(b) if log else b
        return (
            _LEFT + (a - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (b - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for tick in _ticks(y0, y1):
        _, b = place(x0, 10**tick if log else tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{b + 4:.1f}" text-anchor="end">{10**tick if log else tick:.4g}</text>')
    for tick in _ticks(x0, x1):
        a, _ = place(tick, 10**y0 if log else y0)
        parts.append(f'<text x="{a:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{tick:.5g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    if mark is not None:
        _, b = place(x0, mark)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
    looks = {name: _look(i) for i, name in enumerate(series)}
    for name, points in kept.items():
        places = [place(*p) for p in points]
        if len(places) == 1:
            parts.append(f'<circle class="{looks[name]}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="4"/>')
        text = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="{looks[name]}" points="{text}"/>')
    legend = " ".join(f'<span><i class="{looks[name]}"></i>{escape(name)}</span>' for name in kept)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _look(i: int) -> str:
    """The class of line i: six colours, then the same ones dashed."""
    return f"s{i % COLOURS}{' dashed' if i // COLOURS % 2 else ''}"


def _drawn(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def _thin(points: Points, log: bool) -> list[tuple[float, float]]:
    """Means of neighbours, geometric ones on a logarithmic axis."""
    size = -(-len(points) // _MOST)
    if size <= 1:
        return list(points)
    thinned = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ys = [math.log(p[1]) if log else p[1] for p in part]
        y = math.fsum(ys) / len(ys)
        thinned.append((part[len(part) // 2][0], math.exp(y) if log else y))
    return thinned


def _wide(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers between."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((unit * m for m in (1, 2, 5) if unit * m >= raw), unit * 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
