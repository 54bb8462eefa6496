"""Plots as inline SVG, written by hand: lines and stacked bars, in colours that the page's style sheet names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
"""The style sheet defines --c0 to --c7 in a light and a dark version, each with a contrast of 3 or more."""

_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 18, 14, 52
_THICK, _LONG = 26, 30


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: its parts from the left, and what is written after it."""

    name: str
    parts: tuple[float, ...]
    note: str = ""


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    height: int = 340,
    first_colour: int = 0,
    nested: bool = False,
) -> str:
    """Lines over each other.

    Args:
        first_colour: the number of the first line's colour, so that a line has the same one in every plot.
        nested: the first is the widest, so that lines that coincide are all seen.
        log: whether the y axis is logarithmic; points that are not above zero are then drawn at its foot.
    """
    shown = [s for s in series if s.points]
    xs = [x for s in shown for x, _ in s.points] or [0.0, 1.0]
    ys = [y for s in shown for _, y in s.points if math.isfinite(y) and (y > 0 or not log)] or [0.1, 1.0]
    marks = decades(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    across = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, high = min(marks[0], *ys), max(marks[-1], *ys)
    flat = _scale(math.log10(low), math.log10(high), height - _BOTTOM, _TOP) if log else None
    straight = _scale(low, high, height - _BOTTOM, _TOP)

    def up(y: float) -> float:
        if flat is None:
            return straight(y)
        return flat(math.log10(max(y, low)))

    body = [_rule(up(y), power(y) if log else short(y)) for y in marks]
    body += [_tick(across(x), short(x), height) for x in ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs)]
    body += [_labels(x_label, y_label, height)]
    widths = [_line(i, len(shown)) if nested else 2.0 for i in range(len(shown))]
    for i, s in enumerate(shown):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in s.points if math.isfinite(y))
        look = f'stroke="var(--c{(first_colour + i) % COLOURS})" stroke-width="{widths[i]}"'
        body.append(f'<polyline points="{path}" fill="none" {look} stroke-linejoin="round" stroke-linecap="round"/>')
    legend = [(s.name, width) for s, width in zip(shown, widths, strict=True)]
    return _figure(title, _svg(title, body, height), legend, first=first_colour)


def bars(rows: Sequence[Bar], *, parts: Sequence[str], title: str, x_label: str) -> str:
    """Horizontal bars of one part or of several, one below the other; long names stand above their bars."""
    longest = max((len(r.name) for r in rows), default=0)
    above = longest > _LONG
    step, left = (58, 10.0) if above else (38, 10 + 7.4 * longest)
    right = 20 + 7.2 * max((len(r.note) for r in rows), default=0)
    height = step * len(rows) + _TOP + _BOTTOM
    largest = max((sum(r.parts) for r in rows), default=0.0) or 1.0
    marks = [m for m in ticks(0.0, largest) if m <= largest * 1.05]
    across = _scale(0.0, max(largest, marks[-1]), left, _WIDTH - right)
    body = [_upright(across(x), height) + _tick(across(x), short(x), height, mark=False) for x in marks]
    middle = (left + _WIDTH - right) / 2
    body.append(f'<text x="{middle:.0f}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>')
    for i, row in enumerate(rows):
        y = _TOP + i * step + (26 if above else 6)
        middle = y + _THICK / 2 + 4
        name = f'x="{left}" y="{y - 6}"' if above else f'x="{left - 8:.1f}" y="{middle}" text-anchor="end"'
        body.append(f'<text {name} class="strong">{escape(row.name)}</text>')
        at = 0.0
        for j, part in enumerate(row.parts):
            width = across(at + part) - across(at)
            body.append(
                f'<rect x="{across(at):.1f}" y="{y}" width="{max(width, 0):.1f}" height="{_THICK}" '
                f'fill="var(--p{j})"><title>{escape(parts[j])}: {short(part)}</title></rect>'
            )
            at += part
        body.append(f'<text x="{across(at) + 7:.1f}" y="{middle}">{escape(row.note)}</text>')
    legend = [(name, 12.0) for name in parts] if len(parts) > 1 else []
    return _figure(title, _svg(title, body, height), legend, colour="p")


# --- scales -----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `wanted` of them."""
    if not high > low:
        low, high = (low - 1, high + 1) if low else (0.0, 1.0)
    raw = (high - low) / max(1, wanted - 1)
    scale = 10 ** math.floor(math.log10(raw))
    step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from at or below `low` to at or above `high`, at most eight."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    return [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / 7)))]


def short(value: float) -> str:
    """A tick's label."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if value != int(value) else f"{int(value):,}"


def power(value: float) -> str:
    """A power of ten, e.g. 10⁻⁷."""
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _line(index: int, count: int) -> float:
    return round(2.0 + 2.4 * (count - 1 - index), 1)


def _rule(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _upright(x: float, height: int) -> str:
    return f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'


def _tick(x: float, label: str, height: int, *, mark: bool = True) -> str:
    foot = height - _BOTTOM
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>' if mark else ""
    return f'{line}<text x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{label}</text>'


def _labels(x_label: str, y_label: str, height: int) -> str:
    middle = (_TOP + height - _BOTTOM) / 2
    return (
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_label)}</text>'
    )


def _svg(title: str, body: Sequence[str], height: float) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">' + "".join(body) + "</svg>"


def _figure(title: str, svg: str, legend: Sequence[tuple[str, float]], colour: str = "c", first: int = 0) -> str:
    keys = "".join(
        f'<li><svg viewBox="0 0 28 14" aria-hidden="true"><line x1="3" x2="25" y1="7" y2="7" '
        f'stroke="var(--{colour}{i % COLOURS})" stroke-width="{min(width, 13)}"/></svg>{escape(name)}</li>'
        for i, (name, width) in enumerate(legend, first)
    )
    listed = f'<ul class="legend">{keys}</ul>' if keys else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{listed}</figure>"
