"""Shardwise's side of each ratio: the plan of a strategy for a workload."""

from __future__ import annotations

from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis

MICRO_BATCHES = 4
TENSOR = ("heads*", "width@*.*", "vocab*", "channels*", "experts*", "classes*")


def plan_of(strategy: str, job: Job) -> Plan:
    """The plan that is timed."""
    batch = PlanAxis("data", 2, ("batch",))
    if strategy == "one":
        return Plan()
    if strategy == "data":
        return Plan((batch,))
    if strategy == "sharded":
        return Plan((batch,), zero=3)
    if strategy == "tensor":
        return Plan((PlanAxis("tensor", 2, TENSOR),))
    return Plan((PlanAxis("pipeline", 2),), (halfway(job),), micro_batches=MICRO_BATCHES, batch_norm="per-micro-batch")


def halfway(job: Job) -> str:
    """The operator at which half of the work is done."""
    graph = Graph.of(job)
    learned = [op for op in graph.ops if any(v in graph.learned for v in op.outputs)]
    work = [op.context.work.at(job.global_batch) for op in learned]
    done, best, at = 0, sum(work), learned[-1]
    for before, op in zip(work, learned[1:], strict=False):
        done += before
        if abs(sum(work) - 2 * done) < best:
            best, at = abs(sum(work) - 2 * done), op
    return at.id
