"""The page of accuracy, docs/accuracy.md, and its plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple

from benchmarks.published.score import Planned, Scores, score

GOALS = {
    "ultrascale": (7, 20, 5),
    **dict.fromkeys(("korthikanti", "sc21", "dgxc", "vtrain"), (5, 12, 0)),
    **dict.fromkeys(("bloom", "torchtitan", "fms", "foundry", "zerobubble", "internevo"), (8, 0, 5)),
}
"""By table what is aimed at, in percent: median and 90th percentile of the error of step time, median of memory's."""

LARGE = 512
"""Devices of ultrascale from which on nothing is aimed at: most of its runs there stalled."""

_HEAD = """# Accuracy

Prices against step times and memory that others published, each row priced as the table describes its plan, on the
cluster it ran on. Written by `make bench-published`; the tables are not a part of this project.

A cell is a model on a number of devices. In each table a third of the cells, those whose names hash lowest, are **held
out**; the numbers of profiles, devices and networks were fitted on the **other** cells, by hand and by term: a few
numbers for each framework, listed with their values in [How it prices](how-it-prices.md). No number knows a model. Of
bloom, korthikanti, sc21 and vtrain all cells were looked at when A100s and DeepSpeed were fitted. Of the other small
tables the errors of all cells were in view while missing terms were looked for, and numbers were chosen by those
of the others; only the one cell of fms that is held out could not be priced then. In ultrascale the room that libraries
take, and that a pipeline's host runs beside the device, were chosen after a look at the picks of all cells.

"""

_TABLE = """## Errors

Relative errors in percent: the median and the 90th percentile of step time, the median of memory where the source gives
it. A goal is in brackets behind what misses it; there is none for products in 8 bits, nor for ultrascale on 512
devices. For ultrascale the rows have one stage; its pipelines are below.

| table | cells | plans | step time | 90th percentile | memory |
|---|---|---|---|---|---|
"""

_CHOICE = """
## Choice

Of all plans of a cell that the prices say fit, the fastest by price is picked; regret is the share of throughput lost
against the best measured plan, 100 % where the pick does not run. Fit is how well the prices tell which plans run out
of memory (balanced accuracy, ultrascale below 512 devices {fit}).

| cell | held out | regret |
|---|---|---|
"""


class Part(NamedTuple):
    """A part of a table: its plans and their scores."""

    table: str
    held: bool
    plans: Sequence[Planned]
    scores: Scores


def text(parts: Sequence[Part], refused: Mapping[str, Mapping[str, int]], short: str) -> str:
    """The page.

    Args:
        parts: of each table.
        refused: by table, how many rows were not priced, by reason.
        short: what falls short, and why.
    """
    lines = []
    for part in parts:
        if not part.scores.priced:
            continue
        for name, plans in _kinds(part).items():
            scores = score(plans)
            if not scores.priced:
                continue
            goal = GOALS.get(name, (0, 0, 0))
            time = scores.one if part.table == "ultrascale" else scores.time
            cells = [_percent(time[0], goal[0]), _percent(time[1], goal[1]), _percent(scores.memory, goal[2])]
            count = f"{scores.priced} of {scores.plans}"
            lines.append(f"| {name} | {'held out' if part.held else 'others'} | {count} | {' | '.join(cells)} |\n")
    smaller = [p for part in parts if part.table == "ultrascale" for p in part.plans if p.devices < LARGE]
    fit = score(smaller).fit
    choice = [(cell, part.held, loss) for part in parts for cell, loss in part.scores.regret.items()]
    rows = [f"| {cell} | {'yes' if held else ''} | {loss:.1%} |\n" for cell, held, loss in sorted(choice)]
    told = [f"- {table}: " + "; ".join(f"{n} rows, {why}" for why, n in reasons.items()) + ".\n"
            for table, reasons in refused.items() if reasons]  # fmt: skip
    losses = [loss for cell, _, loss in choice if cell.startswith("ultrascale") and f"/{LARGE}," not in cell]
    summary = ""
    if losses:
        summary = f"\nUltrascale below 512 devices: median regret {median(losses):.1%}, mean {mean(losses):.1%}.\n"
    return (
        _HEAD + "![Predicted against measured step time](accuracy.svg)\n\n" + _TABLE + "".join(lines)
        + _CHOICE.format(fit="–" if math.isnan(fit) else f"{fit:.3f}") + "".join(rows) + summary
        + "\n## Not priced\n\n" + "".join(told) + short
    )  # fmt: skip


def _kinds(part: Part) -> Mapping[str, Sequence[Planned]]:
    """The plans of a part by what they are called: of those of the table's own name something is aimed at."""
    found: dict[str, list[Planned]] = {}
    for p in part.plans:
        most = part.table == "ultrascale" and p.devices >= LARGE
        name = part.table + ", 8 bits" * p.eight + f", {LARGE} devices" * most
        found.setdefault(name, []).append(p)
    return dict(sorted(found.items(), key=lambda item: len(item[0])))


def _percent(value: float, goal: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" + (f" ({goal})" if goal and 100 * value > goal else "")


# -- the plot ----------------------------------------------------------------------------------------------------------

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7570b3", "#66a61e", "#999999",
    "#a6761d", "#e7298a",
)  # fmt: skip
_WIDE, _HIGH, _EDGE = 640, 480, 52


def plot(parts: Sequence[Part]) -> str:
    """Predicted against measured step time, both on a log scale, as SVG that follows the reader's light or dark."""
    points = [(part.table, part.held, p) for part in parts for p in part.plans if p.ran and p.predicted == p.predicted]
    values = [v for _, _, p in points for v in (p.measured, p.predicted)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at(value: float, size: int) -> float:
        return _EDGE + (math.log10(value) - low) / (high - low) * (size - 2 * _EDGE)

    names = list(dict.fromkeys(table for table, _, _ in points))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE + 130} {_HIGH}" font-family="sans-serif" '
        'font-size="12"><style>.i{stroke:#333;fill:none}.t{fill:#333}'
        "@media(prefers-color-scheme:dark){.i{stroke:#ccc}.t{fill:#ccc}}</style>"
    ]
    for power in range(low, high + 1):
        x, y = at(10.0**power, _WIDE), _HIGH - at(10.0**power, _HIGH)
        lines = f"M{x:.0f} {_EDGE}V{_HIGH - _EDGE}M{_EDGE} {y:.0f}H{_WIDE - _EDGE}"
        out.append(f'<path class="i" stroke-opacity=".2" d="{lines}"/>')
        out.append(f'<text class="t" x="{x:.0f}" y="{_HIGH - _EDGE + 18}" text-anchor="middle">{10.0**power:g}</text>')
        out.append(f'<text class="t" x="{_EDGE - 6}" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    for ratio, dash in ((1.0, ""), (0.8, ' stroke-dasharray="4"'), (1.25, ' stroke-dasharray="4"')):
        a, b = 10.0**low * max(1, 1 / ratio), 10.0**high * min(1, 1 / ratio)
        ends = [f"{at(v, _WIDE):.1f} {_HIGH - at(v * ratio, _HIGH):.1f}" for v in (a, b)]
        out.append(f'<path class="i" stroke-opacity=".6"{dash} d="M{ends[0]}L{ends[1]}"/>')
    for i, name in enumerate(names):
        colour, y = _COLOURS[i % len(_COLOURS)], _EDGE + 18 * i
        out.append(f'<circle cx="{_WIDE}" cy="{y}" r="4" fill="{colour}"/>')
        out.append(f'<text class="t" x="{_WIDE + 10}" y="{y + 4}">{name}</text>')
        for held in (False, True):
            style = f'fill="none" stroke="{colour}"' if held else f'fill="{colour}" fill-opacity=".5"'
            dots = "".join(
                f'<circle cx="{at(p.measured, _WIDE):.1f}" cy="{_HIGH - at(p.predicted, _HIGH):.1f}" r="2.5"/>'
                for table, out_of, p in points if table == name and out_of == held
            )  # fmt: skip
            out.append(f"<g {style}>{dots}</g>")
    y = _EDGE + 18 * len(names) + 6
    out.append(f'<text class="t" x="{_WIDE}" y="{y}">ring: held out</text>')
    out.append(f'<text class="t" x="{_WIDE}" y="{y + 18}">dashes: 20 % less,</text>')
    out.append(f'<text class="t" x="{_WIDE}" y="{y + 34}">25 % more</text>')
    middle = 'class="t" text-anchor="middle"'
    out.append(f'<text {middle} x="{_WIDE / 2}" y="{_HIGH - 12}">measured, seconds of a step</text>')
    out.append(f'<text {middle} transform="translate(14 {_HIGH / 2}) rotate(-90)">predicted, seconds of a step</text>')
    return "\n".join([*out, "</svg>\n"])
