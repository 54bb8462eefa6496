"""Choose: the plans worth running, ranked by their price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.search.strategies import STRATEGIES, Candidate, Maker


@dataclass(frozen=True)
class Ranked:
    """A plan and its price.

    Attributes:
        strategy: what it is called.
        plan: how to split.
        seconds: of one step, as estimated.
        terms: the same by term.
        reason: why it has its place.
    """

    strategy: str
    plan: Plan
    seconds: float
    terms: Mapping[str, float]
    reason: str


def choose(job: Job, ranks: int, graph: Graph | None = None) -> list[Ranked]:
    """Plans for `ranks` ranks, the best first.

    Raises:
        CaptureError: the model does not capture.
        PlanError: no strategy applies; the message has each one's reason.
    """
    graph = graph if graph is not None else Graph.of(job)
    maker = Maker(job, graph)
    if ranks == 1:
        plan = Plan(precision=job.precision, model=graph.fingerprint())
        return [_ranked(maker, Candidate("one", plan, "one rank is not split"))]
    found = [maker.candidate(strategy, ranks) for strategy in STRATEGIES]
    ranked = sorted((_ranked(maker, c) for c in found if c.plan is not None), key=lambda r: r.seconds)
    if not ranked:
        reasons = "; ".join(f"{c.strategy}: {c.reason}" for c in found)
        raise PlanError(f"nothing splits {job.title()} over {ranks} ranks: {reasons}")
    return ranked


def _ranked(maker: Maker, candidate: Candidate) -> Ranked:
    assert candidate.plan is not None
    terms = maker.price(candidate.plan)
    return Ranked(candidate.strategy, candidate.plan, sum(terms.values()), terms, candidate.reason)
