"""Explain: what a chosen plan is worth, what it was chosen from, and what else would change the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shardwise.graph.garbage import uncollected
from shardwise.machine.cluster import Cluster
from shardwise.plan.plan import Plan
from shardwise.search.choose import search
from shardwise.search.planner import Found, Priced
from shardwise.search.space import AXES, Options
from shardwise.search.strategies import Maker

_OTHERS = 10
_MEGATRON = 8
_GROWTH = 6
"""How many times the machines are doubled to find where a plan fits."""


@dataclass(frozen=True)
class Known:
    """A well-known strategy: its best plan, or the one that comes nearest to fitting, or why there is none."""

    name: str
    best: Priced | None
    tight: Priced | None
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """What a plan was chosen from.

    Attributes:
        job: its title.
        batch: samples of a step.
        cluster: where it is to run.
        options: what was looked for.
        found: what the search found.
        others: the best plans that are split differently, best first.
        alone: the fewest devices that the job fits, of 1, 2, 4 and so on, and the best plan for them.
        known: well-known strategies.
        changes: what a change of the machine would make of the best plan.
        way_out: where nothing fits: the first change that would help.
    """

    job: str
    batch: int
    cluster: Cluster
    options: Options
    found: Found
    others: tuple[Priced, ...] = ()
    alone: Priced | None = None
    known: tuple[Known, ...] = ()
    changes: Mapping[str, Priced | None] | None = None
    way_out: str = ""

    @property
    def binding(self) -> str:
        """What limits the best plan: memory, where twice as much would help by a hundredth, or its largest item."""
        best = self.found.best
        assert best is not None
        more = (self.changes or {}).get("twice the memory")
        objective = self.options.objective
        if objective != "memory" and more is not None and more.value(objective) < 0.99 * best.value(objective):
            return "memory"
        return max(best.estimate.seconds, key=lambda item: best.estimate.seconds[item])


@uncollected()
def explain(
    maker: Maker, cluster: Cluster, options: Options | None = None, tell: Callable[[Found, int], None] | None = None
) -> Explanation:
    """Choose a plan for a job on a cluster, and say why; arguments as for `choose.search`."""
    options = options or Options()
    found = search(maker, cluster, options, tell)
    made = Explanation(maker.job.title(), maker.job.global_batch, cluster, options, found)
    if not found.complete:
        if found.best is None:
            raise KeyboardInterrupt
        return replace(made, others=tuple(found.different[1 : _OTHERS + 1]))
    known = tuple(_known(maker, cluster, options))
    if found.best is None:
        return replace(made, known=known, way_out=_way_out(maker, cluster, options))
    others = tuple(found.different[1 : _OTHERS + 1])
    plans = [p.plan for p in (*found.priced, *(k.best for k in known)) if p is not None]
    changes: dict[str, Priced | None] = {"twice the memory": _search(maker, cluster.with_memory(2), options).best}
    for name, other in _faster(cluster):
        changes[name] = min((_again(maker, p, other) for p in plans), key=lambda p: p.value(options.objective))
    return replace(made, others=others, alone=_alone(maker, cluster, options), known=known, changes=changes)


def _search(maker: Maker, cluster: Cluster, options: Options) -> Found:
    """As `choose.search`, and an interrupt ends it all."""
    found = search(maker, cluster, options)
    if not found.complete:
        raise KeyboardInterrupt
    return found


def _known(maker: Maker, cluster: Cluster, options: Options) -> list[Known]:
    tensor = min(_MEGATRON, cluster.nodes[0].devices, cluster.ranks)
    megatron = {"tensor": tensor, "expert": 1, "context": 1}
    classes: tuple[tuple[str, str, dict[str, int], tuple[int, ...]], ...] = (
        ("data parallel", "data", _only("data"), (0,)),
        ("sharded data parallel (ZeRO-3, FSDP)", "sharded", _only("data"), (3,)),
        (f"tensor {tensor}, then pipeline and data (Megatron)", "tensor", megatron, (0, 1)),
    )
    if options.purpose == "predict":
        classes = (
            ("replicas (data parallel)", "data", _only("data"), (0,)),
            (f"tensor {tensor}, then pipeline and data", "tensor", megatron, (0,)),
            ("a pipeline", "pipeline", _only("pipeline"), (0,)),
        )
    found = []
    for name, strategy, fixed, zero in classes:
        wanted = replace(options, fixed={**fixed, **options.fixed}, zero=[z for z in zero if z in options.zero])
        best = _search(maker, cluster, wanted)
        reason = ""
        if not best.shapes:
            candidate = maker.candidate(strategy, tensor if strategy == "tensor" else cluster.ranks)
            reason = candidate.reason if candidate.plan is None else "it is not among the plans that were asked for"
        found.append(Known(name, best.best, best.tight, reason))
    return found


def _only(*names: str) -> dict[str, int]:
    """Axes that are not there where only these may be."""
    return {name: 1 for name in AXES if name not in names}


def _alone(maker: Maker, cluster: Cluster, options: Options) -> Priced | None:
    """The best plan on the fewest devices that the job fits."""
    ranks = 1
    while ranks < cluster.ranks:
        found = _search(maker, cluster.first(ranks), replace(options, fixed={}))
        if found.best is not None:
            return found.best
        ranks *= 2
    return None


def _again(maker: Maker, plan: Plan, cluster: Cluster) -> Priced:
    """A plan priced on another cluster."""
    return Priced(plan, maker.pricer.price(plan, cluster, maker.job.global_batch))


def _faster(cluster: Cluster) -> list[tuple[str, Cluster]]:
    """The same machines with faster links."""
    changes = []
    if cluster.nodes[0].devices > 1:
        changes.append(("links inside of nodes twice as fast", cluster.with_links(2, between=False)))
    if len(cluster.nodes) > 1:
        changes.append(("links between nodes twice as fast", cluster.with_links(2, inside=False)))
    return changes


def _way_out(maker: Maker, cluster: Cluster, options: Options) -> str:
    """The smallest of larger machines, in number or in memory, that some plan fits."""
    for doubled in range(1, _GROWTH + 1):
        times = 2**doubled
        more = cluster.times(times)
        if _search(maker, more, options).best is not None:
            return f"{more.ranks} devices of this kind would do ({times} times as many)"
        free = replace(options, memory=options.memory and options.memory * times)
        if _search(maker, cluster.with_memory(times), free).best is not None:
            return f"{times} times the memory of each device would do"
    return f"even {2**_GROWTH} times as many devices, or as much memory, would not do"
