"""Where to cut a pipeline: stages of equal time, and few bytes over each cut."""

from __future__ import annotations

from shardwise.cost.device import Device
from shardwise.cost.price import seconds
from shardwise.graph.graph import CASTS, Op
from shardwise.parallel.hybrid import Split

_SLACK = 0.15
"""How far from an equal share a cut may move for fewer bytes, as a part of a stage."""


def balanced_cuts(split: Split, stages: int, batch: int, device: Device) -> tuple[str, ...]:
    """Names of the operators at which new stages begin; empty where the model has too few operators.

    Args:
        split: how operators are split on the other axes; its own cuts are not looked at.
        stages: how many stages to make.
    """
    graph = split.graph
    inside = [op for op in graph.ops if any(v in graph.learned for v in op.outputs)]
    if len(inside) < stages:
        return ()
    times = [seconds(split, op, batch, device) for op in inside]
    crossing = _crossing(split, inside, batch)
    total, reached = sum(times), 0.0
    before = []
    for time in times:
        before.append(reached)
        reached += time
    cuts: list[int] = []
    for k in range(1, stages):
        target, slack = total * k / stages, _SLACK * total / stages
        low, high = (cuts[-1] + 1 if cuts else 1), len(inside) - (stages - k)
        # A cast is no place to cut: in another dtype the model has others.
        allowed = [i for i in range(low, high + 1) if inside[i].name not in CASTS]
        if not allowed:
            return ()

        def cost(i: int, target: float = target) -> float:
            return abs(before[i] - target) + 2 * crossing[i] / device.link

        nearest = min(allowed, key=lambda i: abs(before[i] - target))
        near = [i for i in allowed if abs(before[i] - target) <= slack]
        cuts.append(min([nearest, *near], key=cost))
    return tuple(inside[i].id for i in cuts)


def _crossing(split: Split, inside: list[Op], batch: int) -> list[int]:
    """For each operator the bytes that would be carried over a cut in front of it."""
    made = {v: i for i, op in enumerate(inside) for v in op.outputs}
    last: dict[object, int] = {}
    for i, op in enumerate(inside):
        for value in op.inputs:
            last[value] = i
    change = [0] * (len(inside) + 1)
    for value, start in made.items():
        end = last.get(value, start)
        change[start + 1] += value.bytes().at(batch)
        change[end + 1] -= value.bytes().at(batch)
    found, live = [], 0
    for delta in change[:-1]:
        live += delta
        found.append(live)
    return found
