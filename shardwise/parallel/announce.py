"""What a step will send, known before it runs: read from its programs and buckets, not from what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.graph.rules import Value
from shardwise.graph.saved import saved
from shardwise.parallel.hybrid import Micro
from shardwise.parallel.mesh import Recorder, Traffic
from shardwise.parallel.program import Program
from shardwise.parallel.rank import RankModel
from shardwise.parallel.reduction import Reduction
from shardwise.parallel.schedule import stage_rank
from shardwise.parallel.sharded import FlatBucket


def announce(reduction: Reduction, total: int) -> list[Traffic]:
    """The collectives of one step of `total` samples on this rank: kind, axis, count and bytes handed in."""
    recorder, model = Recorder(), reduction.model
    split = model.split
    micros = split.micros(total)
    for micro in micros:
        for prelude in model.preludes:
            _program(recorder, model, prelude, micro)
        for stage, program in model.programs.items():
            _program(recorder, model, program, micro)
            _crossings(recorder, model, stage, micro)
    for bucket in reduction.sync.buckets:
        for axis in bucket.axes:
            recorder.add("all_reduce", axis.name, bucket.flat.numel() * bucket.flat.element_size())
    _sharded(recorder, model, reduction.buckets, len(micros))
    pipeline = split.pipeline
    if pipeline is not None and pipeline.group is not None:
        for tensor in reduction.ties:
            recorder.add("all_reduce", pipeline.name, tensor.numel() * tensor.element_size())
        recorder.add("all_reduce", pipeline.name, torch.float64.itemsize)
    if split.plan.ranks > 1:
        recorder.add("all_reduce", "all", torch.float64.itemsize)
    return recorder.take()


def _program(recorder: Recorder, model: RankModel, program: Program, micro: Micro) -> None:
    for node in program.module.graph.nodes:
        for kind, axis, value, states, *more in node.meta.get("sends", ()):
            if axis.group is None:
                continue
            dtype, times = more or (value.dtype, 1)
            size = _numel(model.split.local_shape(value, states, micro.samples)) * times
            recorder.add(kind, axis.name, size * model.dtype(dtype).itemsize)


def _crossings(recorder: Recorder, model: RankModel, stage: int, micro: Micro) -> None:
    split = model.split
    axis = split.pipeline
    if axis is None or axis.group is None:
        return

    def away(other: int) -> bool:
        return stage_rank(other, axis.size) != axis.rank

    def size(value: Value) -> int:
        shape = split.local_shape(value, split.layout.states[value], micro.samples)
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
    # What backward needs of a parameter it gathers again.
    needed = {v for kept in saved(graph).values() for v in kept.values} if zero == 3 else set()
    for bucket in buckets:
        size = bucket.shard.element_size()
        rounds = 1
        if zero == 3:
            users = [s for s in model.programs if set(bucket.names) & set(model.split.stage_params(s))]
            rounds = micros * len(users)
            again = any(graph.params[name] in needed for name in bucket.names)
            for _ in range(rounds * (2 if again else 1)):
                recorder.add("all_gather", bucket.axis.name, bucket.part * size)
        else:
            recorder.add("all_gather", bucket.axis.name, bucket.part * size)
        for _ in range(rounds):
            recorder.add("reduce_scatter", bucket.axis.name, bucket.length * size)
            for axis in bucket.also:
                recorder.add("all_reduce", axis.name, bucket.part * size)


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
