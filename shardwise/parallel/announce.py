"""What a step will send, known before it runs: read from its programs and buckets, not from what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from shardwise.graph.rules import Value
from shardwise.graph.saved import saved
from shardwise.parallel.hybrid import Micro
from shardwise.parallel.mesh import Recorder, Traffic
from shardwise.parallel.program import Program
from shardwise.parallel.rank import RankModel
from shardwise.parallel.recompute import segments
from shardwise.parallel.reduction import Reduction
from shardwise.parallel.schedule import stage_rank
from shardwise.parallel.sharded import FlatBucket, unshard


def announce(reduction: Reduction, total: int, *, norm: bool) -> list[Traffic]:
    """The collectives of one step of `total` samples on this rank: kind, axis, count and bytes handed in.

    Args:
        reduction: how gradients are summed.
        total: samples of the step.
        norm: whether the step measures the gradient's norm.
    """
    recorder, model = Recorder(), reduction.model
    split = model.split
    micros = split.micros(total)
    for micro in micros:
        for prelude in model.preludes:
            _program(recorder, model, prelude, micro)
        for stage, program in model.programs.items():
            _program(recorder, model, program, micro)
            _crossings(recorder, model, stage, micro)
    for bucket in reduction.summed:
        for axis in bucket.axes:
            recorder.add("all_reduce", axis.name, bucket.flat.numel() * bucket.flat.element_size())
    _sharded(recorder, model, reduction.buckets, len(micros))
    pipeline = split.pipeline
    if pipeline is not None and pipeline.group is not None:
        for tensor in reduction.ties:
            recorder.add("all_reduce", pipeline.name, tensor.numel() * tensor.element_size())
        for name in model.travels:
            buffer = model.buffers[name]
            recorder.add("broadcast", pipeline.name, buffer.numel() * buffer.element_size())
    for axis, places in model.result_sums:
        recorder.add("all_reduce", axis.name, len(places) * torch.float64.itemsize)
    if norm and split.plan.ranks > 1:
        recorder.add("all_reduce", "all", torch.float64.itemsize)
    return recorder.take()


def _program(recorder: Recorder, model: RankModel, program: Program, micro: Micro) -> None:
    for node, runs in _nodes(program.module):
        forward, backward = node.meta.get("sends", []), node.meta.get("answers", [])
        for kind, axis, value, states, *more in [*forward * runs, *backward]:
            if axis.group is None:
                continue
            dtype, times = more or (value.dtype, 1)
            # Unequal parts travel as large as the first, and what is to be scattered as such parts.
            parts = axis if kind in ("all_gather", "reduce_scatter") else None
            size = _numel(model.split.local_shape(value, states, micro, parts)) * times
            size *= axis.size if kind == "reduce_scatter" else 1
            recorder.add(kind, axis.name, size * model.dtype(dtype).itemsize)


def _nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, int]]:
    """A program's nodes, and how often each runs forward: twice where it is recomputed."""
    yield from ((node, 1) for node in module.graph.nodes)
    for segment in segments(module).values():
        yield from ((node, 2) for node in segment.graph.nodes)


def _crossings(recorder: Recorder, model: RankModel, stage: int, micro: Micro) -> None:
    split = model.split
    axis = split.pipeline
    if axis is None or axis.group is None:
        return

    def away(other: int) -> bool:
        return stage_rank(other, axis.size) != axis.rank

    def size(value: Value) -> int:
        shape = split.local_shape(value, split.layout.states[value], micro)
        return _numel(shape) * model.dtype(value.dtype).itemsize

    if stage < split.plan.stages - 1 and away(stage + 1):
        for value in split.crossings(stage):
            recorder.add("send", axis.name, size(value))
    if stage and away(stage - 1):
        for value in split.crossings(stage - 1):
            if value in split.graph.needs_grad:
                recorder.add("send", axis.name, size(value))


def _sharded(recorder: Recorder, model: RankModel, buckets: Sequence[FlatBucket], micros: int) -> None:
    graph, zero = model.split.graph, model.split.plan.zero
    # What backward needs of a parameter it gathers again, with the rest of the block where that is recomputed.
    needed = {v for kept in saved(graph).values() for v in kept.values} if zero == 3 else set()
    for bucket in buckets:
        gathers = sends = 1
        if zero == 3:
            runs = [n for program in model.programs.values() for n in _gathers(program.module, bucket)]
            again = any(graph.params[name] in needed for name in bucket.names)
            gathers = micros * sum(max(n, 1 + again) for n in runs)
            sends = micros * len(runs)
        size = bucket.shard.element_size()
        for _ in range(gathers):
            recorder.add("all_gather", bucket.axis.name, bucket.part * size)
        for _ in range(sends):
            recorder.add("reduce_scatter", bucket.axis.name, bucket.length * size)
            for axis in bucket.also:
                recorder.add("all_reduce", axis.name, bucket.part * size)


def _gathers(module: fx.GraphModule, bucket: FlatBucket) -> Iterator[int]:
    """For each time that a program gathers a bucket how often that runs forward."""
    for node, runs in _nodes(module):
        if node.target is unshard and node.meta["bucket"] is bucket:
            yield runs


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
