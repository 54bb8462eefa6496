"""The page that says why a plan was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardwise.engine.train import data_plan
from shardwise.errors import PlanError
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.machine.here import here
from shardwise.plan.plan import Plan
from shardwise.report.terminal import duration, percent, size, table, times
from shardwise.search.choose import choose
from shardwise.search.explain import Explanation, Known, explain
from shardwise.search.planner import Found, Priced
from shardwise.search.space import Options
from shardwise.search.strategies import Maker, maker_of

_SHOWN = 0.002
"""Items that make a smaller part of a step are not listed among what a plan loses."""


def why(
    job: Job,
    cluster: Cluster | str | int,
    options: Options | None = None,
    tell: Callable[[Found, int], None] | None = None,
) -> tuple[Plan, Explanation | None]:
    """The best plan for a job, with the page that says why; and what the page is made of.

    Args:
        job: what to split.
        cluster: a Cluster, the name or file of one, or a number of ranks of this machine.
        options: what to look for.
        tell: as for `search.choose.search`.

    Raises:
        PlanError: no plan fits, or, for a model that does not capture, none applies.
    """
    if not isinstance(cluster, Cluster):
        cluster = here(cluster) if isinstance(cluster, int) else Cluster.load(cluster)
    options = options or Options()
    maker = maker_of(job, cluster=cluster, purpose=options.purpose)
    if not isinstance(maker, Maker):
        if options.purpose == "predict":
            return data_plan(cluster.ranks, job).with_(why=f"a replica on each rank, for {maker.why}"), None
        best = choose(job, cluster.ranks)[0]
        return best.plan.with_(why=best.reason), None
    explanation = explain(maker, cluster, options, tell)
    found = explanation.found.best
    if found is None:
        raise PlanError(nothing(explanation))
    return found.plan.with_(why=page(explanation)), explanation


def page(e: Explanation) -> str:
    """An explanation as text."""
    if e.found.best is None:
        parts = [head(e), nothing(e)]
    else:
        lines = [f"  {title(e.found.best)}", *(f"  {name:<13}{told}" for name, told in facts(e))]
        parts = [head(e), "\n".join(lines)]
    shown = ((others(e), True), (well_known(e), True), (changed(e), False))
    parts += [table(rows, left=2, last=last) for rows, last in shown if len(rows) > 1]
    return "\n\n".join(parts)


def head(e: Explanation) -> str:
    """What was planned, and where."""
    return f"{e.job} on {e.cluster.name} ({_devices(e.cluster.ranks)}), {e.batch:,} samples {unit(e)}"


def unit(e: Explanation) -> str:
    """Of what the seconds are: a step, or, to predict, a chunk of samples."""
    return "a chunk" if e.options.purpose == "predict" else "a step"


def rate(e: Explanation, priced: Priced) -> str:
    """Samples a second of a plan that predicts, where chunks follow each other."""
    return f"{e.batch / priced.value('throughput'):,.4g} samples/s"


def facts(e: Explanation) -> list[tuple[str, str]]:
    """What there is to know of the best plan, by name."""
    best, found = e.found.best, e.found
    assert best is not None
    estimate = best.estimate
    items = sorted(estimate.seconds.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {duration(s)}" for name, s in items if s > 0)
    lines = [(unit(e), f"{duration(estimate.step)}: {told}")]
    if e.options.purpose == "predict":
        copies = f"{best.plan.replicas} replicas, each " if best.plan.replicas > 1 else ""
        lines.append(("throughput", f"{rate(e, best)}: {copies}a chunk every {duration(estimate.pace)}"))
    if any(estimate.hidden.values()):
        hidden = ", ".join(f"{axis} {duration(s)}" for axis, s in estimate.hidden.items() if s)
        lines.append(("hidden", f"communication behind computing: {hidden}"))
    fullest = max(range(len(estimate.ranks)), key=lambda r: sum(estimate.ranks[r].values()))
    sizes = sorted(estimate.ranks[fullest].items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {size(b)}" for name, b in sizes if b)
    lines.append(("memory", f"{size(estimate.peak)} of {size(estimate.limits[fullest])}: {told}"))
    if e.alone is not None:
        fewest, ratio = e.alone.plan.ranks, worth(e, e.alone) / worth(e, best)
        part = f"{percent(ratio / (e.cluster.ranks / fewest))} of {e.cluster.ranks / fewest:g}×"
        lines.append(("speed-up", f"{times(ratio)} over {_devices(fewest)}, the fewest that it fits; {part}"))
    sent = sum(s for item, s in estimate.seconds.items() if item.startswith("communication"))
    if sent:
        ratio = estimate.seconds["compute"] / sent
        lines.append(("computing", f"{ratio:,.1f} times as long as communication that nothing hides"))
    share = estimate.seconds.get(e.binding)
    part = "" if share is None else f", {percent(share / estimate.step)} of {unit(e)}"
    lines.append(("limited by", f"{e.binding}{part}"))
    gap = percent(found.gap)
    if found.complete:
        large = f"{found.shapes:,} shapes, {found.small:,} of them known to be too large"
        lines.append(("searched", f"{large}; no plan of them is faster by more than {gap}"))
    else:
        lines.append(("interrupted", f"the best so far; of {found.shapes:,} shapes none is faster by more than {gap}"))
    return lines


def worth(e: Explanation, priced: Priced) -> float:
    """Seconds by which plans are compared: of a step or a chunk, or of a chunk of many where throughput counts."""
    return priced.value("throughput") if e.options.objective == "throughput" else priced.estimate.step


def others(e: Explanation) -> list[list[str]]:
    """A table of the best plans that are split differently; its first row names the columns."""
    rows = [["", "another plan", *_columns(e), "loses", "where"]]
    if e.found.best is not None:
        for place, other in enumerate(e.others, 2):
            rows.append([str(place), title(other), *_cells(e, other), *_loss(e, other, e.found.best)])
    return rows


def well_known(e: Explanation) -> list[list[str]]:
    """A table of the well-known strategies."""
    rows = [["well-known", "its best plan", *_columns(e), "loses", "where"]]
    return rows + [_known(e, known, e.found.best) for known in e.known]


def changed(e: Explanation) -> list[list[str]]:
    """A table of what other machines would do."""
    rows, best = [["if there were", "the best plan", unit(e), "gains"]], e.found.best
    for name, other in (e.changes or {}).items():
        if other is not None and best is not None:
            gained = percent(1 - worth(e, other) / worth(e, best))
            same = "the same" if other.plan == best.plan else title(other)
            rows.append([name, same, duration(other.estimate.step), gained])
    return rows


def nothing(e: Explanation) -> str:
    """Why there is no plan: by how much none fits, and what would help; or that nothing divides."""
    tight = e.found.tight
    where = f"on {e.cluster.name} ({_devices(e.cluster.ranks)})"
    if tight is None:
        reasons = "; ".join(f"{k.name}: {k.reason}" for k in e.known if k.reason)
        return f"nothing splits {e.job} {where} with {e.batch:,} samples {unit(e)} as asked for: {reasons}"
    estimate = tight.estimate
    limit = f"the limit of {size(e.options.memory)}" if e.options.memory else "what it has"
    over = max(estimate.over, estimate.peak - e.options.memory if e.options.memory else estimate.over)
    return (
        f"no plan of {e.job} fits {where}: the nearest, {title(tight)}, needs {size(estimate.peak)} on the fullest "
        f"device, {size(over)} more than {limit}; {e.way_out}"
    )


def _known(e: Explanation, known: Known, best: Priced | None) -> list[str]:
    if known.best is not None:
        loss = _loss(e, known.best, best) if best is not None else ["", ""]
        if best is not None and known.best.plan == best.plan:
            loss = ["", "is the best plan"]
        return [known.name, title(known.best), *_cells(e, known.best), *loss]
    empty = [""] * len(_columns(e))
    if known.tight is not None:
        over = known.tight.estimate.over
        return [known.name, title(known.tight), *_cells(e, known.tight), "", f"does not fit, by {size(over)}"]
    return [known.name, "", *empty, "", known.reason]


def _columns(e: Explanation) -> list[str]:
    return [unit(e), *(["throughput"] if e.options.purpose == "predict" else []), "memory"]


def _cells(e: Explanation, priced: Priced) -> list[str]:
    rates = [rate(e, priced)] if e.options.purpose == "predict" else []
    return [duration(priced.estimate.step), *rates, size(priced.estimate.peak)]


def _loss(e: Explanation, other: Priced, best: Priced) -> list[str]:
    """By what part a plan is slower than the best, and in which items it takes longer."""
    step = worth(e, best)
    mine, theirs = _items(e, best), _items(e, other)
    more = {item: theirs.get(item, 0.0) - mine.get(item, 0.0) for item in [*theirs, *mine]}
    told = [
        f"{item} +{percent(s / step)}" for item, s in sorted(more.items(), key=lambda i: -i[1]) if s > _SHOWN * step
    ]
    return [percent(worth(e, other) / step - 1), ", ".join(told)]


def _items(e: Explanation, priced: Priced) -> Mapping[str, float]:
    """Seconds by item; where throughput counts, of a chunk of many."""
    if e.options.objective != "throughput":
        return priced.estimate.seconds
    steady = {item: s for item, s in priced.estimate.seconds.items() if item != "bubble"}
    idle = priced.estimate.pace - sum(steady.values())
    return {item: s / priced.plan.replicas for item, s in (steady | {"unequal stages": idle}).items()}


def title(priced: Priced) -> str:
    """A plan in a few words, with its schedule and what it computes again."""
    plan = priced.plan
    words = [plan.title()]
    if plan.stages > 1:
        each = plan.stages // plan.pipeline
        ways = "" if priced.estimate.pace else plan.schedule  # the way there alone has but one
        words.append(f"{ways}{f' of {each} stages a rank' if each > 1 else ''}")
    if plan.recompute:
        named = not any("*" in pattern for pattern in plan.recompute)
        count = len(plan.recompute)
        words.append(f"recompute of {count} block{'s' * (count > 1)}" if named else "recompute")
    if any(dim.startswith("sequence") for axis in plan.axes if axis.name == "tensor" for dim in axis.dims):
        words.append("sequence")
    return ", ".join(word for word in words if word)


def _devices(count: int) -> str:
    return f"{count:,} device{'s' * (count != 1)}"


def to_dict(e: Explanation) -> dict[str, Any]:
    """An explanation as numbers, strings and lists."""
    best, found = e.found.best, e.found
    return {
        "job": e.job,
        "batch": e.batch,
        "cluster": e.cluster.name,
        "devices": e.cluster.ranks,
        "purpose": e.options.purpose,
        "objective": e.options.objective,
        "best": _priced(best),
        "alone": _priced(e.alone),
        "limited_by": e.binding if best is not None else None,
        "search": {
            "shapes": found.shapes, "too_large": found.small, "gap": found.gap if best is not None else None,
            "complete": found.complete,
        },
        "nearest": _priced(found.tight),
        "way_out": e.way_out,
        "others": [_priced(other) for other in e.others],
        "known": [
            {"name": k.name, "best": _priced(k.best), "nearest": _priced(k.tight), "reason": k.reason} for k in e.known
        ],
        "changes": {name: _priced(other) for name, other in (e.changes or {}).items()},
    }  # fmt: skip


def _priced(priced: Priced | None) -> Mapping[str, Any] | None:
    if priced is None:
        return None
    estimate = priced.estimate
    return {
        "title": title(priced),
        "plan": priced.plan.text(),
        "seconds": estimate.step,
        "pace": estimate.pace or None,
        "items": dict(estimate.seconds),
        "hidden": dict(estimate.hidden),
        "bytes": estimate.peak,
        "bytes_by_item": dict(estimate.memory),
        "limit": max(estimate.limits),
        "fits": estimate.fits,
    }
