"""Shardwise: the split of a PyTorch model and its data over machines, found, run and proved.

    import shardwise as sw
    plan = sw.plan(job, 2)
    result = sw.train(job, plan, steps=200)
    print(sw.report(plan, result))

Names are imported when they are first used, so that `import shardwise` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

# These packages share their names with functions of the façade. Imported first, they do not replace them later.
import shardwise.plan
import shardwise.report  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardwise.arrays.map import map
    from shardwise.engine.engine import parallelize
    from shardwise.engine.train import Result, train
    from shardwise.errors import RunError, ShardwiseError, UserError
    from shardwise.graph.graph import Graph
    from shardwise.graph.rules import rule
    from shardwise.inference.generate import generate
    from shardwise.inference.predict import predict
    from shardwise.job import Job, load_spec
    from shardwise.machine.cluster import Cluster
    from shardwise.measure.machine import discover
    from shardwise.measure.verify import verify
    from shardwise.plan.plan import Plan, PlanAxis
    from shardwise.search.strategies import strategies

_HOMES = {
    "Cluster": "shardwise.machine.cluster",
    "Job": "shardwise.job",
    "Plan": "shardwise.plan.plan",
    "PlanAxis": "shardwise.plan.plan",
    "RunError": "shardwise.errors",
    "ShardwiseError": "shardwise.errors",
    "UserError": "shardwise.errors",
    "discover": "shardwise.measure.machine",
    "generate": "shardwise.inference.generate",
    "load_spec": "shardwise.job",
    "map": "shardwise.arrays.map",
    "parallelize": "shardwise.engine.engine",
    "predict": "shardwise.inference.predict",
    "rule": "shardwise.graph.rules",
    "strategies": "shardwise.search.strategies",
    "train": "shardwise.engine.train",
    "verify": "shardwise.measure.verify",
}

__all__ = [
    "Cluster",
    "Job",
    "Plan",
    "PlanAxis",
    "RunError",
    "ShardwiseError",
    "UserError",
    "capture",
    "discover",
    "generate",
    "load_spec",
    "map",
    "parallelize",
    "plan",
    "predict",
    "report",
    "rule",
    "strategies",
    "train",
    "verify",
]


def capture(job: Job) -> Graph:
    """The graph of a job with the dims of every tensor found; its weights are not allocated.

    Raises:
        CaptureError: the model does not capture.
    """
    from shardwise.graph.graph import Graph

    return Graph.of(job)


def plan(
    job: Job,
    cluster: Cluster | str | int,
    *,
    purpose: Literal["train", "predict"] = "train",
    objective: str = "",
    memory: float | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Plan:
    """The best plan for a job; `plan.explain()` says why.

    Args:
        job: what to split; its weights are never allocated.
        cluster: a Cluster, the name or file of one, or a number of ranks of this machine.
        purpose: what the plan is for.
        objective: what counts. To train: "time" of a step, which is usual, "cost" in device-seconds, or "memory" of the
            fullest rank. To predict: "throughput" of many chunks, which is usual, "latency" of one, or "memory".
        memory: bytes that a rank may use, where it is less than its device has.
        fixed: sizes of axes ("pipeline", "data", "tensor") that are given; 1 forbids an axis.

    Raises:
        PlanError: no plan fits; the message has by how much, and what would help.
        MachineError: there is no such cluster.
    """
    from shardwise.graph.garbage import uncollected

    with uncollected():
        from shardwise.report.planned import why
        from shardwise.search.space import Options

        return why(job, cluster, Options(objective, memory, fixed or {}, purpose=purpose))[0]


def report(plan: Plan, result: Result, predicted: Mapping[str, float] | None = None) -> str:
    """What a run did as text: its plan, speed, memory and collectives, beside the seconds that were predicted."""
    from shardwise.report.terminal import report

    return report(plan, result, predicted)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
