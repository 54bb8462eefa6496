"""Shardwise's side of each ratio: the plan that the planner makes of a strategy for a workload."""

from __future__ import annotations

from benchmarks.baselines import MICRO_BATCHES
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.search.strategies import strategies


class NoPlan(Exception):
    """The strategy cannot split this workload; the message says why."""


def plan_of(strategy: str, job: Job, ranks: int = 2) -> Plan:
    """The plan that is timed.

    Raises:
        NoPlan: the strategy does not apply.
    """
    if strategy == "one":
        return Plan()
    found = next(c for c in strategies(job, ranks) if c.strategy == strategy)
    if found.plan is None:
        raise NoPlan(found.reason)
    if strategy == "pipeline":
        # As torch's pipeline: batch statistics are of each micro-batch.
        return found.plan.with_(micro_batches=MICRO_BATCHES, batch_norm="per-micro-batch")
    return found.plan
