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
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile

from benchmarks.regret_jobs import JOBS
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import joined
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.measure.machine import collectives
from shardwise.measure.probes import PROBES, sampled
from shardwise.plan.plan import Plan

ALL, MORE, TURN = 3, 5, 2
"""Steps of every plan and further ones of those near the fastest that are counted, and how many of them in one turn."""
NEAR, FAR = 1.15, 3.0
"""How many times as long as the fastest plan's a step takes of those near it, and of those of which one step counts."""
DISTURBED, TICK = 0.1, 0.02
"""Processors that other programs may keep busy in a step that counts; and seconds by which the system counts."""
MEMORY_STEPS = 2
WATCHED = ("aten.linear", "aten.conv2d", "aten.scaled_dot_product_attention", "elementwise", "aten.gelu")
"""Operators whose first probe tells how fast the machine is now; a machine that others share is now so, now so."""
WATCHED_SECONDS = 0.15


def measure(name: str, plans: list[str], weighed: list[str], together: int, seconds: float) -> dict[str, Any]:
    """Times steps of plans in turns, and weighs some.

    Args:
        name: of the job.
        plans: as text.
        weighed: those whose memory is measured too.
        together: how many are held in memory at once.
        seconds: after which no more rounds begin.

    Returns:
        `seconds`, for each plan its steps', in order; `bytes`, for each weighed plan those at the peak of every rank;
        `speed`, before and after, what `speed` gives.
    """
    warnings.simplefilter("ignore")
    job = JOBS[name]()
    graph = Graph.of(job)
    batches = [job.batch(range(i * job.global_batch, (i + 1) * job.global_batch)) for i in range(2)]
    found: list[list[float]] = []
    before = speed()
    for start in range(0, len(plans), together):
        part = plans[start : start + together]
        found += _in_turns(job, graph, part, batches, seconds * len(part) / len(plans))
    after = speed()
    sizes = [weigh(job, graph, Plan.parse(text), batches) for text in weighed]
    return {"seconds": found, "bytes": sizes, "speed": [before, after]}


def watched() -> list[tuple[int, int]]:
    """The places of the probes that are watched, and of their sizes: the last but one."""
    names = [probe.op for probe in PROBES]
    return [(names.index(op), len(PROBES[names.index(op)].batches) - 2) for op in WATCHED]


def speed() -> list[float]:
    """Seconds, there and back, of each probe that is watched, while all ranks run it; the mean over ranks."""
    backend, found = Backend.cpu(), []
    for i, j in watched():
        if dist.get_world_size() > 1:
            dist.barrier()
        for seconds in (0.0, WATCHED_SECONDS):  # the first run asks the system for memory
            forward, backward = sampled(PROBES[i], PROBES[i].batches[j], PROBES[i].make(), backend, seconds)
        found.append(statistics.fmean(forward) + statistics.fmean(backward))
    every = torch.tensor(found, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(every)
    return (every / dist.get_world_size()).tolist()


def _in_turns(job: Job, graph: Graph, plans: list[str], batches: list[Any], seconds: float) -> list[list[float]]:
    engines = [parallelize(job, Plan.parse(text), graph=graph) for text in plans]
    calm: list[list[float]] = [[] for _ in engines]
    disturbed: list[list[float]] = [[] for _ in engines]
    first = [_step(engine, batches[0])[0] for engine in engines]
    far = [once > FAR * min(first) for once in first]
    gc.collect()
    gc.disable()
    until = time.monotonic() + seconds
    try:
        for k in range(ALL + MORE):
            # A plan that was disturbed at first may be the fastest all the same.
            quickest = [min(c or d or [f]) for c, d, f in zip(calm, disturbed, first, strict=True)]
            near = NEAR * min(quickest)
            go = [
                not lost and len(times) < ALL + (MORE if least <= near else 0)
                for times, least, lost in zip(calm, quickest, far, strict=True)
            ]
            if not _agreed(any(go) and (k < 1 or time.monotonic() < until), go):
                break
            for at in range(len(engines)):
                i = (k + at) % len(engines)  # whom another plan's steps come before is another each time
                engine = engines[i]
                # The first step of a turn finds the memory as another plan left it.
                for again in range(go[i] * (1 + TURN)):
                    taken, other = _step(engine, batches[again % 2])
                    if again:
                        (disturbed if other > DISTURBED else calm)[i].append(taken)
    finally:
        gc.enable()
    counted = [c if len(c) >= 2 else c + d for c, d in zip(calm, disturbed, strict=True)]
    return [times or [once] for times, once in zip(counted, first, strict=True)]


def _agreed(on: bool, go: list[bool]) -> bool:
    """What rank 0 says: whether to go on, and in `go` with which."""
    told = torch.tensor([on, *go], dtype=torch.int8)
    if dist.get_world_size() > 1:
        dist.broadcast(told, 0)
    go[:] = [bool(x) for x in told[1:]]
    return bool(told[0])


def _step(engine: Any, batch: Any) -> tuple[float, float]:
    """Seconds of a step until the last rank is done; and how many processors other programs kept busy meanwhile."""
    many = dist.get_world_size() > 1
    if many:
        dist.barrier()
    own, busy, began = time.process_time(), _busy(), time.perf_counter()
    engine.step(batch)
    if many:
        dist.barrier()
    seconds = time.perf_counter() - began
    others = _busy() - busy
    worked = torch.tensor(time.process_time() - own, dtype=torch.float64)
    if many:
        dist.all_reduce(worked)
    return seconds, max(0.0, others - float(worked) - TICK) / seconds


def _busy() -> float:
    """Seconds that all processors together have spent on programs."""
    try:
        words = Path("/proc/stat").read_text().split(maxsplit=4)
    except OSError:
        return 0.0
    return sum(int(word) for word in words[1:4]) / os.sysconf("SC_CLK_TCK")


def weigh(job: Job, graph: Graph, plan: Plan, batches: list[Any]) -> list[float]:
    """Bytes of tensors that each rank has at the peak, from an empty process on: what torch's allocator says."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine = parallelize(job, plan, graph=graph)
        for k in range(MEMORY_STEPS):
            engine.step(batches[k])
    del engine
    todo = list(seen.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    events = []
    while todo:
        node = todo.pop()
        todo += node.children
        if isinstance(node.extra_fields, _ExtraFields_Allocation):
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    mine = torch.tensor(float(fullest([event[1:] for event in sorted(events)])), dtype=torch.float64)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [float(t) for t in every]


def fullest(events: Sequence[tuple[int, int]]) -> int:
    """Bytes at the fullest moment, of what is allocated and freed in order: addresses, and sizes, below 0 of what goes.

    A profiler does not see what threads free that are not its own, such as those that collectives run on, where they
    are the last to let go. What is allocated at the same place later says that it is free.
    """
    starts: list[int] = []
    sizes: dict[int, int] = {}
    now = most = 0

    def free(at: int) -> int:
        starts.pop(bisect_left(starts, at))
        return sizes.pop(at)

    for at, size in events:
        if size <= 0:
            now -= free(at) if at in sizes else 0
            continue
        first = bisect_left(starts, at)
        if first and starts[first - 1] + sizes[starts[first - 1]] > at:
            first -= 1
        for there in starts[first : bisect_left(starts, at + size)]:
            now -= free(there)
        insort(starts, at)
        sizes[at] = size
        now += size
        most = max(most, now)
    return most


def main() -> None:
    """Do what a file says on this rank of a launch; rank 0 writes the answer beside it."""
    path = Path(sys.argv[1])
    task = json.loads(path.read_text())
    with joined(threads=1, collective_timeout=600.0) as place:
        if task["what"] == "link":
            found: Any = collectives(place.world, place.backend, 5)
        else:
            found = measure(*(task[key] for key in ("name", "plans", "weighed", "together", "seconds")))
        if place.rank == 0:
            path.with_suffix(".out").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
