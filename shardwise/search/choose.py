"""Choose: the best plan for a job on a cluster, and what it was chosen from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shardwise.errors import PlanError
from shardwise.graph.fold import Folded
from shardwise.graph.garbage import uncollected
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.parallel.hybrid import Split
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.search.candidate import Candidate, NotApplicable
from shardwise.search.cuts import cut_places
from shardwise.search.dims import SEQUENCE
from shardwise.search.planner import Found, Planner
from shardwise.search.space import MOST_INNER, SPLIT, Options, Space, divisors, recomputed
from shardwise.search.strategies import STRATEGIES, Maker, maker_of
from shardwise.search.uncaptured import ModuleMaker


@dataclass(frozen=True)
class Ranked:
    """A plan and its price.

    Attributes:
        strategy: what it is called.
        plan: how to split.
        seconds: of one step, as estimated; NaN for a model that does not capture, whose plans are not ranked by it.
        terms: the same by term; empty for such a model.
        reason: why it has its place.
    """

    strategy: str
    plan: Plan
    seconds: float
    terms: Mapping[str, float]
    reason: str


@uncollected()
def search(
    maker: Maker, cluster: Cluster, options: Options | None = None, tell: Callable[[Found, int], None] | None = None
) -> Found:
    """The best plans for a job on all devices of a cluster, or, where cost is the objective, on some of them.

    Args:
        maker: of the job.
        cluster: where it is to run.
        options: what to look for.
        tell: called before each shape is priced, with what is found so far and how many shapes are left.
    """
    options = options or Options()
    ranks = [cluster.ranks]
    while options.objective == "cost" and ranks[-1] > 1:
        ranks.append(ranks[-1] // 2)
    founds = [planner_of(maker, cluster.first(n), n, options).search(tell) for n in ranks]
    best = min(founds, key=lambda f: f.best.value(f.objective) if f.best is not None else math.inf)
    bound = min(f.bound for f in founds)
    return replace(best, bound=bound, shapes=sum(f.shapes for f in founds), complete=all(f.complete for f in founds))


def planner_of(maker: Maker, cluster: Cluster, ranks: int, options: Options) -> Planner:
    """What looks for the best plan over so many ranks of a cluster."""
    folded, job = maker.pricer.folded, maker.job
    sizes = [n for n in divisors(ranks) if 1 < n <= MOST_INNER]
    dims = {name: {n: _choices(maker, name, n) for n in sizes if options.fixed.get(name) != 1} for name in SPLIT}
    again = recomputed(maker.graph) if options.recompute else [()]
    table = maker.pricer.table((), 1, cluster.nodes[0].device, ())
    space = Space(
        ranks=ranks,
        batch=job.global_batch,
        dims=dims,
        most_stages=len(cut_places(table)) + 1,
        splits_batch=maker.graph.batch_dim is not None and maker.graph.captured.fixed_batch is None,
        splits_time=_splits_time(folded),
        recompute=again if options.objective != "memory" else list(dict.fromkeys((again[0], again[-1]))),
        options=options,
        speeds=_speeds(maker, cluster, ranks),
    )

    def runs(plan: Plan) -> bool:
        try:
            maker.split(plan)
        except PlanError:
            return False
        return True

    return Planner(maker.pricer, cluster, space, runs, maker.graph.fingerprint(), job.precision)


def _choices(maker: Maker, axis: str, ranks: int) -> list[tuple[str, ...]]:
    """What an axis may split: of the tensor axis the dims that pay, with the sequence between them and without."""
    if axis != "tensor":
        found = [maker.expert_dims(ranks) if axis == "expert" else maker.sequence_dims(ranks)]
        return [dims for dims in found if dims]
    try:
        chosen = maker.tensor_dims(ranks)
    except NotApplicable:
        return []
    sequences = tuple(d for d in maker.sequence_dims(ranks) if d not in chosen)
    without = tuple(d for d in chosen if not d.startswith(SEQUENCE))
    return list(dict.fromkeys(dims for dims in (chosen, without, (*chosen, *sequences)) if dims))


def _speeds(maker: Maker, cluster: Cluster, ranks: int) -> list[float]:
    """How fast each rank's device runs the whole model, where they are not alike."""
    samples = max(1, maker.job.global_batch // ranks)
    kinds = {node.device.name: node.device for node in cluster.nodes}
    seconds = {name: maker.pricer.table((), samples, device, ()).seconds[-1] for name, device in kinds.items()}
    return [1 / float(seconds[cluster.device(r).name]) for r in range(ranks)] if len(kinds) > 1 else []


def _splits_time(folded: Folded) -> bool:
    """Whether a batch can be cut into micro-batches: statistics that are of the whole batch forbid it."""
    try:
        Split(folded.graph, Plan(micro_batches=2), Mesh.build([], rank=0))
    except PlanError:
        return False
    return True


def choose(job: Job, ranks: int, graph: Graph | None = None) -> list[Ranked]:
    """Plans for `ranks` ranks, the best first; for a model that does not capture those that split most simply.

    Raises:
        PlanError: no strategy applies; the message has each one's reason.
    """
    return compared(job, ranks, graph)[0]


def compared(job: Job, ranks: int, graph: Graph | None = None) -> tuple[list[Ranked], list[Candidate]]:
    """As `choose`; and the strategies that do not apply, with the reasons."""
    maker = maker_of(job, graph)
    if ranks == 1:
        return [_ranked(maker, Candidate("one", maker.one(), "one rank is not split"))], []
    found = [maker.candidate(strategy, ranks) for strategy in STRATEGIES]
    ranked = [_ranked(maker, c) for c in found if c.plan is not None]
    if isinstance(maker, Maker):
        best = search(maker, maker.cluster(ranks)).best
        if best is not None and all(r.plan != best.plan for r in ranked):
            why = f"the best of all plans; {maker.reason(best.plan)}"
            ranked.append(Ranked("chosen", best.plan, best.estimate.step, best.estimate.seconds, why))
        ranked.sort(key=lambda r: r.seconds)
    if not ranked:
        reasons = "; ".join(f"{c.strategy}: {c.reason}" for c in found)
        raise PlanError(f"nothing splits {job.title()} over {ranks} ranks: {reasons}")
    return ranked, [c for c in found if c.plan is None]


def _ranked(maker: Maker | ModuleMaker, candidate: Candidate) -> Ranked:
    assert candidate.plan is not None
    found = maker.price(candidate.plan)
    terms = found.seconds if found is not None else {}
    seconds = found.step if found is not None else math.nan
    return Ranked(candidate.strategy, candidate.plan, seconds, terms, candidate.reason)
