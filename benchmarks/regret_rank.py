"""What a rank of the regret benchmark does: steps of many plans in turns, and the bytes that some of them allocate.

`python -m benchmarks.regret_rank TASK.json` does it on a rank of a launch.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.regret_jobs import JOBS
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import joined
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.measure.machine import collectives
from shardwise.plan.plan import Plan

WARM_UP, ALL, MORE = 2, 3, 6
"""Steps of a plan that are not counted, rounds over all plans, and rounds over those near the fastest."""
NEAR = 1.15
MEMORY_STEPS = 2


def measure(name: str, plans: list[str], weighed: list[str], together: int, seconds: float) -> dict[str, Any]:
    """Times steps of plans in turns, and weighs some.

    Args:
        name: of the job.
        plans: as text.
        weighed: those whose memory is measured too.
        together: how many are held in memory at once.
        seconds: after which no more rounds begin.

    Returns:
        `seconds`, for each plan its steps', in order; `bytes`, for each weighed plan those at the peak of every rank.
    """
    warnings.simplefilter("ignore")
    job = JOBS[name]()
    graph = Graph.of(job)
    batches = [job.batch(range(i * job.global_batch, (i + 1) * job.global_batch)) for i in range(2)]
    found: list[list[float]] = []
    began = time.monotonic()
    for start in range(0, len(plans), together):
        share = seconds * (start + together) / len(plans)
        found += _in_turns(job, graph, plans[start : start + together], batches, began + share)
    sizes = [_weigh(job, graph, Plan.parse(text), batches) for text in weighed]
    return {"seconds": found, "bytes": sizes}


def _in_turns(job: Job, graph: Graph, plans: list[str], batches: list[Any], until: float) -> list[list[float]]:
    engines = [parallelize(job, Plan.parse(text), graph=graph) for text in plans]
    times: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        for k in range(WARM_UP):
            engine.step(batches[k % 2])
    gc.collect()
    gc.disable()
    try:
        for k in range(ALL + MORE):
            middles = [statistics.median(t) if t else 0.0 for t in times]
            near = [i for i, m in enumerate(middles) if k < ALL or m <= NEAR * min(middles)]
            go = torch.tensor([float(k < 1 or time.monotonic() < until), *(float(i in near) for i in range(len(times)))])
            if dist.get_world_size() > 1:
                dist.broadcast(go, 0)
            if not go[0]:
                break
            for i in range(len(times)):
                if go[1 + i]:
                    times[i].append(_step(engines[i], batches[k % 2]))
    finally:
        gc.enable()
    return times


def _step(engine: Any, batch: Any) -> float:
    many = dist.get_world_size() > 1
    if many:
        dist.barrier()
    began = time.perf_counter()
    engine.step(batch)
    if many:
        dist.barrier()
    return time.perf_counter() - began


def _weigh(job: Job, graph: Graph, plan: Plan, batches: list[Any]) -> list[float]:
    """Bytes of tensors that each rank has at the peak, from an empty process on: what torch's allocator says."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine = parallelize(job, plan, graph=graph)
        for k in range(MEMORY_STEPS):
            engine.step(batches[k])
    del engine
    now = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    mine = torch.tensor(float(peak), dtype=torch.float64)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [float(t) for t in every]


def main() -> None:
    """Do what a file says on this rank of a launch; rank 0 writes the answer beside it."""
    path = Path(sys.argv[1])
    task = json.loads(path.read_text())
    with joined(threads=1, collective_timeout=600.0) as place:
        if task["what"] == "link":
            found: Any = collectives(place.world, place.backend)
        else:
            found = measure(*(task[key] for key in ("name", "plans", "weighed", "together", "seconds")))
        if place.rank == 0:
            path.with_suffix(".out").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
