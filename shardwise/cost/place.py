"""Place: where the ranks of a pipeline stage are: their devices, their memory, what their axes send over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from shardwise.machine.cluster import Cluster, Route
from shardwise.machine.device import Device
from shardwise.parallel.lower import chunk
from shardwise.plan.plan import PIPELINE, Plan

DATA = "data"
"""All axes that split the batch, together."""
SHARDS, COPIES = "shards", "copies"
"""Of these the ranks that have the shards of one copy, and those that have the same shard."""


class Load(NamedTuple):
    """What some ranks of a stage have to do: so many samples on the slowest of their devices, with the least memory."""

    samples: int
    device: Device
    memory: float


@dataclass(frozen=True)
class Place:
    """Where the ranks of one pipeline stage are.

    Attributes:
        device: the slowest of their devices.
        memory: bytes of the smallest.
        routes: what each axis sends over; axes that split the batch together as DATA; the pipeline to the next stage.
        ranks: those of them whose loads may differ.
    """

    device: Device
    memory: float
    routes: Mapping[str, Route]
    ranks: tuple[int, ...]


def places(plan: Plan, cluster: Cluster, shards: int = 0) -> list[Place]:
    """The place of each pipeline rank's stages; ranks are put on the cluster's devices in order.

    Args:
        plan: how the model is split.
        cluster: the machines.
        shards: how many neighbours of those that split the batch share what ZeRO shards; 0 for all.
    """
    sizes = [axis.size for axis in plan.axes]
    strides = {axis.name: math.prod(sizes[i + 1 :]) for i, axis in enumerate(plan.axes)}
    alike = all(node == cluster.nodes[0] for node in cluster.nodes)
    step, size = strides.get(PIPELINE, plan.ranks), plan.pipeline
    found: list[Place] = []
    for stage in range(size):
        if alike and stage:
            found.append(_after(found, plan, cluster, step, stage))
            continue
        ranks = range(plan.ranks) if alike else [r for r in range(plan.ranks) if r // step % size == stage]
        devices = [cluster.nodes[0].device] if alike else [cluster.device(r) for r in ranks]
        first = ranks[0]
        routes = {}
        for axis in plan.axes:
            count = axis.size if axis.name != PIPELINE else min(2, size)
            # The last stage has none behind it, and sends back to the one before.
            start = first - step if axis.name == PIPELINE and stage == size - 1 > 0 else first
            routes[axis.name] = cluster.path([start + strides[axis.name] * i for i in range(count)])
        members = [first]
        for axis in plan.axes:
            if axis.dims == ("batch",):
                members = [m + strides[axis.name] * i for m in members for i in range(axis.size)]
        routes[DATA] = cluster.path(members)
        group = shards or len(members)
        routes[SHARDS], routes[COPIES] = cluster.path(members[:group]), cluster.path(members[::group])
        # Whatever the shares, of alike nodes all ranks of a share are alike.
        each = tuple(members if alike else ranks)
        found.append(Place(_slowest(devices), min(d.memory.value for d in devices), routes, each))
    return found


def _after(found: Sequence[Place], plan: Plan, cluster: Cluster, step: int, stage: int) -> Place:
    """The place of a later stage where all nodes are alike: that of the stage before but for what it sends over."""
    first = min(stage, plan.pipeline - 2) * step
    hop = cluster.path([first, first + step])
    known = next((place for place in found if place.routes[PIPELINE] == hop), None)
    return known or replace(found[0], routes={**found[0].routes, PIPELINE: hop})


def loads(plan: Plan, cluster: Cluster, place: Place, samples: int) -> list[Load]:
    """What the ranks of a place have to do of a micro-batch of `samples`; one load where all have as much."""
    axes = [(axis, math.prod(a.size for a in plan.axes[i + 1 :])) for i, axis in enumerate(plan.axes)]
    batch = [(axis, stride) for axis, stride in axes if axis.dims == ("batch",)]
    if not any(axis.shares for axis, _ in batch):
        parts = math.prod(axis.size for axis, _ in batch)
        return [Load(max(1, math.ceil(samples / parts)), place.device, place.memory)]
    found: dict[int, list[Device]] = {}
    for rank in place.ranks:
        mine = samples
        for axis, stride in batch:
            at = rank // stride % axis.size
            mine = chunk(mine, axis.shares, at) if axis.shares else math.ceil(mine / axis.size)
        found.setdefault(mine, []).append(cluster.device(rank))
    return [Load(mine, _slowest(devices), min(d.memory.value for d in devices)) for mine, devices in found.items()]


def _slowest(devices: Sequence[Device]) -> Device:
    return min(devices, key=lambda d: d.peak("bf16") * d.matmul.value)
