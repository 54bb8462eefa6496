"""The page of a chosen plan as HTML: what it costs, what it was chosen from, and what else would change the choice."""

from __future__ import annotations

from html import escape

from shardwise.report.html import document, grid, listed, section, tiles
from shardwise.report.planned import changed, facts, head, others, rate, title, unit, well_known, worth
from shardwise.report.plots import Bar, bars
from shardwise.report.terminal import duration, percent, size, times
from shardwise.search.explain import Explanation
from shardwise.search.planner import Priced

_SECONDS = ("computing", "communication", "overhead of the host", "bubble", "update")
_BYTES = ("parameters", "gradients", "optimizer", "activations", "buffers", "reserve", "whole model")


def page(e: Explanation) -> str:
    """An explanation with a plan as one self-contained page."""
    best = e.found.best
    assert best is not None
    shown = [best, *e.others, *(k.best for k in e.known if k.best is not None and k.best.plan != best.plan)]
    plans = list({priced.plan: priced for priced in shown}.values())
    parts = [
        f"<header><h1>{escape(title(best))}</h1><p>{escape(head(e))}</p></header>",
        tiles(_figures(e, best)),
        section("Why this plan", listed(facts(e))),
        section("The plan", f"<pre>{escape(best.plan.text())}</pre>"),
        section("Time", _time(e, plans)),
        section("Memory", _memory(plans)),
    ]
    tables = (
        (
            "Other plans",
            others(e),
            "The best of each other kind, what it loses against the chosen one, and where.",
        ),
        ("Well-known strategies", well_known(e), "Each with the best sizes that it can have here."),
        ("Other machines", changed(e), "What the best plan would be, of those that were priced."),
    )
    for name, rows, caption in tables:
        if len(rows) > 1:
            parts.append(section(name, grid(rows, caption=caption, left=2, last=rows[0][-1] == "where")))
    parts.append("<p>Every figure on this page is predicted; nothing was run.</p>")
    return document(f"Plan: {head(e)}", parts)


def _figures(e: Explanation, best: Priced) -> list[tuple[str, str]]:
    estimate = best.estimate
    found = [(duration(estimate.step), f"{unit(e)}, predicted")]
    if e.options.purpose == "predict":
        found.append((rate(e, best), "of many chunks"))
    if e.alone is not None:
        ratio, fewest = worth(e, e.alone) / worth(e, best), e.alone.plan.ranks
        found.append(
            (times(ratio), f"as fast as {fewest:,} of the {e.cluster.ranks:,} devices, the fewest that it fits")
        )
    found.append((percent(estimate.peak / max(estimate.limits)), f"of a device's {size(max(estimate.limits))} in use"))
    found.append((percent(e.found.gap), f"at most to be gained by any other of {e.found.shapes:,} shapes"))
    return found


def _time(e: Explanation, plans: list[Priced]) -> str:
    rows = []
    for priced in plans:
        items = priced.estimate.seconds
        sent = sum(s for item, s in items.items() if item.startswith("communication"))
        parts = (items.get("compute", 0.0), sent, *(items.get(key, 0.0) for key in ("overhead", "bubble", "update")))
        rows.append(Bar(title(priced), tuple(p * 1e3 for p in parts), duration(priced.estimate.step)))
    return bars(rows, parts=_SECONDS, title=f"Where the time of {unit(e)} goes", x_label=f"milliseconds {unit(e)}")


def _memory(plans: list[Priced]) -> str:
    rows = []
    for priced in plans:
        items = priced.estimate.memory
        rows.append(Bar(title(priced), tuple(items.get(key, 0.0) / 1e9 for key in _BYTES), size(priced.estimate.peak)))
    return bars(rows, parts=_BYTES, title="Memory of the fullest rank", x_label="gigabytes")
