"""Choose: the plans worth running, ranked by their price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.search.candidate import Candidate
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
        ranked.sort(key=lambda r: r.seconds)
    if not ranked:
        reasons = "; ".join(f"{c.strategy}: {c.reason}" for c in found)
        raise PlanError(f"nothing splits {job.title()} over {ranks} ranks: {reasons}")
    return ranked, [c for c in found if c.plan is None]


def _ranked(maker: Maker | ModuleMaker, candidate: Candidate) -> Ranked:
    assert candidate.plan is not None
    terms = maker.price(candidate.plan)
    seconds = sum(terms.values()) if terms else math.nan
    return Ranked(candidate.strategy, candidate.plan, seconds, terms, candidate.reason)
