"""Shardwise's side of each ratio: the plan that the planner makes of a strategy for a workload."""

from __future__ import annotations

from benchmarks.baselines import MICRO_BATCHES
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.search.strategies import Maker, maker_of


class NoPlan(Exception):
    """The strategy cannot split this workload; the message says why."""


def plan_of(strategy: str, job: Job, ranks: int = 2) -> Plan:
    """The plan that is timed.

    Raises:
        NoPlan: the strategy does not apply.
    """
    if strategy == "one":
        return Plan()
    maker = maker_of(job)
    found = maker.candidate(strategy, ranks)
    if found.plan is None:
        raise NoPlan(found.reason)
    if strategy == "pipeline" and isinstance(maker, Maker):
        # As torch's pipeline: batch statistics are of each micro-batch.
        return maker.cut(found.plan.with_(micro_batches=MICRO_BATCHES, batch_norm="per-micro-batch"), ranks)
    return found.plan
