"""The share of a step that collectives take, seen by torch's profiler."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile

from shardwise.engine.base import Engine
from shardwise.engine.train import run_steps
from shardwise.job import Batch
from shardwise.machine.backend import Backend


def communication_share(engine: Engine, data: Iterator[Batch], steps: int, backend: Backend) -> float:
    """The part of a step, 0 to 1, while a collective of this rank is under way; waiting for other ranks is included.

    It makes `steps` updates under torch's profiler. Collectives that overlap with computing count too.
    """
    if engine.plan.ranks == 1:
        return 0.0
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (backend.device_type == "cuda")
    with profile(activities=kinds) as seen:
        seconds = sum(run_steps(engine, data, steps, backend).seconds)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or []
        if event.name.startswith(("gloo:", "nccl:"))
    )
    busy, reached = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return min(1.0, busy * 1e-6 / seconds)
