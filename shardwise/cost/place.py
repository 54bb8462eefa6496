"""Place: where the ranks of a pipeline stage are: their slowest device, their memory, what their axes send over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.machine.cluster import Cluster, Route
from shardwise.machine.device import Device
from shardwise.plan.plan import PIPELINE, Plan

DATA = "data"
"""All axes that split the batch, together."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of one pipeline stage are.

    Attributes:
        device: the slowest of their devices.
        memory: bytes of the smallest.
        routes: what each axis sends over; axes that split the batch together as DATA; the pipeline to the next stage.
    """

    device: Device
    memory: float
    routes: Mapping[str, Route]


def places(plan: Plan, cluster: Cluster) -> list[Place]:
    """The place of each pipeline rank's stages; ranks are put on the cluster's devices in order."""
    sizes = [axis.size for axis in plan.axes]
    strides = {axis.name: math.prod(sizes[i + 1 :]) for i, axis in enumerate(plan.axes)}
    alike = all(node == cluster.nodes[0] for node in cluster.nodes)
    step, size = strides.get(PIPELINE, plan.ranks), plan.pipeline
    found: list[Place] = []
    for stage in range(size):
        if alike and found:
            found.append(found[0])
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
        slowest = min(devices, key=lambda d: d.peak("bf16") * d.matmul.value)
        found.append(Place(slowest, min(d.memory.value for d in devices), routes))
    return found
