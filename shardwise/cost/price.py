"""What a plan costs: seconds of one step by term, from the captured graph and the plan's layout.

A first price: every term is exposed (nothing overlaps), and a device is a handful of nominal numbers. It ranks plans;
it does not foretell a clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shardwise.cost.device import Device
from shardwise.cost.work import exchanged
from shardwise.graph.graph import Op
from shardwise.graph.rules import Value
from shardwise.parallel.hybrid import Split
from shardwise.parallel.layout import VARIES, Cut, State, States


class Message(NamedTuple):
    """Collectives of one kind on one axis in a step: how many ranks and calls, and the bytes of the whole tensors."""

    kind: str
    ranks: int
    calls: int
    size: float

    def seconds(self, device: Device) -> float:
        """Time of rings: an all-reduce is a reduce-scatter and an all-gather (Thakur et al., 2005)."""
        part = (self.ranks - 1) / self.ranks
        rings = {"all_reduce": 2 * part, "all_to_all": part / self.ranks, "send": 1.0}
        times = rings.get(self.kind, part) * (1.0 if self.kind in ("all_reduce", "send") else device.excess)
        steps = 2 if self.kind == "all_reduce" else 1
        return self.calls * steps * device.latency + times * self.size / device.link


def price(split: Split, batch: int, device: Device) -> dict[str, float]:
    """Seconds of one training step of `batch` samples, by term: compute, communication, bubble."""
    plan = split.plan
    stages = [sum(seconds(split, op, batch, device) for op in split.graph.ops[a:b]) for a, b in split.bounds]
    ranks = plan.pipeline
    loads = [sum(stages[rank::ranks]) for rank in range(ranks)]
    mean, busiest = sum(loads) / ranks, max(loads)
    # Micro-batches fill the pipeline but for its start and its end; interleaved stages fill it sooner.
    idle = busiest * (ranks - 1) / (plan.micro_batches * plan.stages // ranks)
    sent = sum(m.seconds(device) for m in messages(split, batch))
    return {"compute": mean, "communication": sent, "bubble": busiest - mean + idle}


def seconds(split: Split, op: Op, batch: int, device: Device) -> float:
    """Time of an operator on one rank in all micro-batches of a step; backward does twice the work of forward."""
    layout = split.layout
    # An operator that does not split over micro-batches runs whole in each of them.
    micros = split.plan.micro_batches
    share = layout.share(op) * micros
    moved = 0 if op.name in _VIEWS else sum(v.bytes().at(batch) for v in {*op.inputs, *op.outputs})
    work = max(op.context.work.at(batch) / device.flops, moved / device.memory)
    passes = 3 if any(v in split.graph.needs_grad for v in op.outputs) else 1
    return passes * (work * share + micros * device.call)


_VIEWS = {
    "aten.view", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.slice",
    "aten.split", "aten.split_with_sizes", "aten.select", "aten.t", "aten.alias", "aten.detach", "aten.chunk",
}  # fmt: skip


def messages(split: Split, batch: int) -> Iterator[Message]:
    """What one rank sends in a step."""
    plan, graph = split.plan, split.graph
    for value, uses in split.layout.uses.items():
        yield from _conversions(split, value, set(uses), batch)
    for name in graph.params:
        yield from _gradients(split, name)
    for cut in range(plan.stages - 1):
        for value in split.crossings(cut):
            ways = 2 if value in graph.needs_grad else 1
            size = _size(split, value, split.layout.states[value], batch)
            yield Message("send", 2, ways * plan.micro_batches, ways * size / plan.pipeline)


def _conversions(split: Split, value: Value, uses: set[States], batch: int) -> Iterator[Message]:
    """What it takes to bring a tensor from how it is made to how operators need it, on each axis, there and back."""
    made = split.layout.states[value]
    if value in split.graph.params.values():
        made = tuple(s if isinstance(s, Cut) else VARIES for s in made)
    for a, axis in enumerate(split.axes):
        if axis is None or axis.size == 1:
            continue
        size = _size(split, value, [s for b, s in enumerate(made) if b != a], batch, skip=a)
        for need in {use[a] for use in uses}:
            there, back = exchanged(made[a], need)
            kinds = there + (back if value in split.graph.needs_grad else ())
            for kind in kinds:
                yield Message(kind, axis.size, split.plan.micro_batches, size / split.plan.pipeline)


def _gradients(split: Split, name: str) -> Iterator[Message]:
    """What a parameter's gradient takes, and, sharded, the parameter itself. Small ones travel together in a bucket."""
    value, plan = split.graph.params[name], split.plan
    size = _size(split, value, split.layout.states[value], 1)
    for axis in split.sums(value):
        if plan.zero == 3 and axis.name in plan.data:
            gathers = 2 * plan.micro_batches
            yield Message("all_gather", axis.size, 0, gathers * size / plan.pipeline)
            yield Message("reduce_scatter", axis.size, 0, plan.micro_batches * size / plan.pipeline)
        else:
            yield Message("all_reduce", axis.size, 0, size / plan.pipeline)


def _size(split: Split, value: Value, states: States | list[State], batch: int, skip: int | None = None) -> float:
    """Bytes of a tensor on one rank over all micro-batches, where axis `skip` does not cut it."""
    parts = 1
    axes = [axis for a, axis in enumerate(split.axes) if a != skip]
    for axis, state in zip(axes, states, strict=True):
        if axis is not None and isinstance(state, Cut):
            parts *= axis.size
    return value.bytes().at(batch) / parts
