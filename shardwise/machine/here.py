"""The machine at hand as a cluster: its accelerators by their names, or its cores."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from shardwise.machine.backend import Backend, cores
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.device import Device, device, known_devices, network
from shardwise.machine.quantity import Quantity

_USUAL = "a100-80gb"


def here(ranks: int) -> Cluster:
    """This machine with so many ranks: each has an accelerator, or its share of the cores and of the memory."""
    backend = Backend.detect(ranks)
    if backend.device_type == "cuda":
        kind = accelerator(torch.cuda.get_device_name(0))
        kind = replace(kind, memory=Quantity(float(backend.total_memory()), "torch says so"))
    else:
        kind = _share(device("cpu-core"), ranks, backend.total_memory())
    return Cluster("this machine", (Node(ranks, kind, network(kind.network)),))


def _share(core: Device, ranks: int, memory: int) -> Device:
    threads = max(1, cores() // ranks)
    slower = min(1.0, cores() / ranks)  # more ranks than cores take turns

    def times(quantity: Quantity) -> Quantity:
        return Quantity(quantity.value * threads * slower, f"{quantity.source}, {threads} threads a rank")

    return replace(
        core, flops={precision: times(rate) for precision, rate in core.flops.items()}, units=times(core.units),
        memory=Quantity(memory / ranks, "the machine's, shared by its ranks"), bandwidth=times(core.bandwidth),
    )  # fmt: skip


def accelerator(title: str) -> Device:
    """A known device by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3"; else a usual one."""
    words = set(re.findall(r"[a-z]*\d+[a-z]*", title.lower()))
    fitting = [name for name in known_devices() if set(re.findall(r"[a-z]+\d+[a-z]*", name)) & words]
    if not fitting:
        # Plans can be ranked by a usual accelerator's numbers; only a cluster file foretells this one's clock.
        return replace(device(_USUAL), name="unknown", title=f"{title}, with the numbers of {_USUAL}")
    sized = [name for name in fitting if set(re.findall(r"\d+gb", name)) & words]
    return device((sized or fitting)[0])
