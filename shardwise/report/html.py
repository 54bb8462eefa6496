"""One self-contained HTML page that compares the ways to run a job: no script, no font, no image from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from shardwise.report.plots import Bar, Series, bars, lines
from shardwise.report.terminal import Measured, comparison, duration, percent, size, small, times, traffic_rows


def page(
    runs: Sequence[Measured],
    *,
    title: str,
    about: str,
    chosen: Measured,
    notes: Sequence[str] = (),
    sample: tuple[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """The page as text.

    Args:
        runs: the first is what the others are compared with; those without a plan are listed with their reason.
        about: a paragraph on what was trained and how it was measured.
        chosen: the run whose plan is shown first.
        notes: paragraphs below the table.
        sample: what the trained model was given, and what it wrote.
        facts: versions and hardware.
    """
    ran = [run for run in runs if run.plan is not None]
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>",
        _tiles(ran, chosen),
        section("The plan that was chosen", _plan(chosen)),
        section("Measured", grid(comparison(ran), caption="Every row made the same updates of the same batches.")),
        *(f"<p>{escape(note)}</p>" for note in notes),
        section("Time", _time(ran)),
        section("Memory", _memory(ran)),
        section("Loss", _losses(ran)),
        section("What the ranks sent", "".join(map(_traffic, ran[1:]))),
        section("All plans", "".join(map(_details, runs[1:]))),
    ]
    if sample:
        prompt, text = sample
        quoted = f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>"
        said = "<p>After this short training, given what is in bold:</p>"
        parts.append(section("What the model writes", said + quoted))
    if facts:
        parts.append(section("Made with", listed(facts.items())))
    return document(title, parts)


# --- pieces of any page -----------------------------------------------------------------------------------------------


def document(title: str, parts: Sequence[str]) -> str:
    """A page of these parts."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part with a heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def tiles(each: Sequence[tuple[str, str]]) -> str:
    """Figures that are seen first, each with what it is."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in each)
    return f'<div class="tiles">{cells}</div>'


def listed(facts: Iterable[tuple[str, str]]) -> str:
    """Names and what is told of them."""
    return grid([["", ""], *([name, told] for name, told in facts)], heads=False)


def grid(
    rows: Sequence[Sequence[str]], *, caption: str = "", left: int = 1, heads: bool = True, last: bool = False
) -> str:
    """A table; its first row names the columns, of which those from `left` on are numbers, unless the `last` is not."""

    def cells(row: Sequence[str], tag: str) -> str:
        numbers = range(left, len(row) - last) if heads else ()
        kinds = [' class="n"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    top = f"<thead><tr>{cells(rows[0], 'th')}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{said}{top}<tbody>{body}</tbody></table></div>'


# --- sections ---------------------------------------------------------------------------------------------------------


def _tiles(ran: Sequence[Measured], chosen: Measured) -> str:
    one, others = ran[0], list(ran[1:])
    return tiles(
        [
            (duration(chosen.seconds), f"a step, {chosen.name}"),
            (times(one.seconds / chosen.seconds), f"as fast as {one.name}"),
            (percent(chosen.communication), "of a step in communication alone"),
            (small(max((r.difference(one) for r in others), default=math.nan)), "largest loss difference of all"),
        ]
    )


def _plan(run: Measured) -> str:
    text = run.plan.text() if run.plan else ""
    return f"<p>{escape(run.why)}</p><pre>{escape(text)}</pre>"


def _time(ran: Sequence[Measured]) -> str:
    rows = []
    for run in ran:
        share = run.communication if math.isfinite(run.communication) else 0.0
        whole = run.seconds * 1e3
        rows.append(Bar(run.name, (whole * (1 - share), whole * share), duration(run.seconds)))
    parts = ["computing", "communication that nothing hides, the wait for other ranks included"]
    return bars(rows, parts=parts, title="Median time of a step", x_label="milliseconds a step")


def _memory(ran: Sequence[Measured]) -> str:
    rows = []
    for run in ran:
        before = min(run.memory_before, run.memory)
        own = run.memory - before
        rows.append(Bar(run.name, (before / 1e6, own / 1e6), f"{size(run.memory)}, {size(own)} the job's"))
    parts = ["Python and torch before the job", "the job: weights, gradients, optimizer, activations, buffers"]
    return bars(rows, parts=parts, title="Peak memory of the fullest rank", x_label="megabytes")


def _losses(ran: Sequence[Measured]) -> str:
    one = ran[0]
    curves = [Series(run.name, tuple(enumerate(run.losses, 1))) for run in ran]
    gaps = [Series(run.name, tuple(enumerate(_distances(run, one), 1))) for run in ran[1:]]
    title = "Training loss: the curves lie on each other"
    figures = lines(curves, title=title, x_label="step", y_label="cross-entropy (nats a byte)", nested=True)
    if any(y > 0 for s in gaps for _, y in s.points):
        title = f"Distance of the loss from {one.name}"
        figures += lines(
            gaps, title=title, x_label="step", y_label="|difference| (nats)", log=True, height=280, first_colour=1
        )
    return figures


def _distances(run: Measured, one: Measured) -> list[float]:
    return [abs(a - b) for a, b in zip(run.losses, one.losses, strict=False)]


def _traffic(run: Measured) -> str:
    rows = traffic_rows(run.traffic)
    return grid(rows, caption=f"{run.name}: collectives of one step on rank 0, and the bytes it hands in.", left=2)


def _details(run: Measured) -> str:
    if run.plan is None:
        return f"<p><b>{escape(run.name)}</b> does not apply: {escape(run.why)}</p>"
    return f"<details><summary>{escape(run.name)}</summary>{_plan(run)}</details>"


_STYLE = """
:root { --paper:#fff; --ink:#1b1f24; --soft:#57606a; --line:#d5dae0; --box:#f4f6f8;
  --c0:#3b424a; --c1:#0072b2; --c2:#c2510a; --c3:#00795a; --c4:#9c3f86; --c5:#8a6a00; --c6:#b3263a; --c7:#5a54c4;
  --p0:#0072b2; --p1:#c8691a; --p2:#7b858f; --p3:#00795a; --p4:#9c3f86; --p5:#8a6a00; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#14171b; --ink:#e8ebee; --soft:#a3adb8; --line:#39414a; --box:#1e2328;
  --c0:#c8ced6; --c1:#56b4e9; --c2:#ff9a56; --c3:#3fce9c; --c4:#e796d3; --c5:#e6c44c; --c6:#ff7a86; --c7:#a9a4ff;
  --p0:#56b4e9; --p1:#c96f1d; --p2:#8f99a4; --p3:#3fce9c; --p4:#e796d3; --p5:#e6c44c; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,sans-serif; }
main { max-width:860px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:1.7rem; line-height:1.25; margin:0 0 .4em; }
h2 { font-size:1.2rem; margin:2.2em 0 .6em; padding-top:.6em; border-top:1px solid var(--line); }
header p, caption, figcaption, section > p { color:var(--soft); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(170px,1fr)); gap:12px; margin:1.4em 0; }
.tiles div { background:var(--box); border-radius:8px; padding:14px 16px; }
.tiles b { display:block; font-size:1.5rem; line-height:1.2; font-variant-numeric:tabular-nums; }
.tiles span { color:var(--soft); font-size:.9rem; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; margin:.4em 0 1.2em; }
caption { text-align:left; padding-bottom:.4em; font-size:.95rem; }
th, td { text-align:left; padding:6px 10px; border-bottom:1px solid var(--line); vertical-align:top; }
th { font-weight:600; }
td:first-child { min-width:5.5em; }
td:first-child:empty { min-width:0; }
th.n, td.n { text-align:right; white-space:nowrap; }
pre { background:var(--box); border-radius:8px; padding:14px 16px; overflow-x:auto; font-size:.88rem;
  white-space:pre-wrap; overflow-wrap:anywhere; }
figure { margin:1em 0 1.8em; }
figcaption { margin-bottom:.4em; font-weight:600; }
figure > svg { display:block; width:100%; height:auto; }
svg text { fill:var(--soft); font:13px system-ui,sans-serif; font-variant-numeric:tabular-nums; }
svg text.strong { fill:var(--ink); }
svg .grid { stroke:var(--line); stroke-width:1; }
svg .axis { stroke:var(--soft); stroke-width:1; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 18px; padding:0; margin:.4em 0 0; font-size:.9rem; }
.legend li { display:flex; align-items:center; gap:7px; }
.legend svg { width:28px; height:14px; flex:none; }
details { margin:.5em 0; }
summary { cursor:pointer; font-weight:600; }
"""
