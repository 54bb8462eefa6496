"""The machine at hand as a cluster: as it was measured, or its accelerators by their names, or its cores."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from shardwise.errors import MachineError
from shardwise.machine.backend import Backend, cores
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.device import Device, Link, device, known_devices, network, read_toml
from shardwise.machine.quantity import Quantity
from shardwise.machine.slots import place

_USUAL = "a100-80gb"


def here(ranks: int) -> Cluster:
    """This machine with so many ranks: each has an accelerator, or its share of the cores and of the memory.

    Its numbers are those that `shardwise machine` measured, where it was run; the cluster's name says so.

    Raises:
        MachineError: the file of measured numbers cannot be read.
    """
    backend = Backend.detect(ranks)
    found = measured(measured_file(backend))
    if found:
        kind = _nearest(found, ranks, backend)
        return Cluster("this machine, as measured", (Node(ranks, kind, network(kind.network)),))
    if backend.device_type == "cuda":
        kind = accelerator(torch.cuda.get_device_name(0))
        kind = replace(kind, memory=Quantity(float(backend.total_memory()), "torch says so"))
    else:
        kind = _share(device("cpu-core"), ranks, backend.total_memory())
    return Cluster("this machine", (Node(ranks, kind, network(kind.network)),))


# --- measured numbers -------------------------------------------------------------------------------------------------


def measured_file(backend: Backend | None = None) -> Path:
    """Where `shardwise machine` keeps what it measured: one file for each processor, number of cores and torch."""
    backend = backend or Backend.detect()
    what = torch.cuda.get_device_name(0) if backend.device_type == "cuda" else processor()
    key = f"{what}, {cores()} cores, {torch.cuda.device_count()} devices, torch {torch.__version__}"
    if place():
        key += ", shared memory"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "shardwise" / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:16]}.toml"


def measured(path: Path) -> dict[int, Device]:
    """The devices of a measured file by the number of ranks that shared the machine; none where there is no file.

    Raises:
        MachineError: the file cannot be read, or lacks a number.
    """
    if not path.exists():
        return {}
    found: dict[int, Device] = {}
    try:
        for name, table in read_toml(path).get("devices", {}).items():
            count = name.removeprefix("ranks-")
            if count.isdecimal():
                found[int(count)] = Device.read({"name": name, **table}, f"device {name} of {path}")
    except MachineError as error:
        raise MachineError(f"{error}; `shardwise machine` measures anew, or remove the file") from error
    return found


def _nearest(found: dict[int, Device], ranks: int, backend: Backend) -> Device:
    """The device that was measured with about so many ranks, with the memory and the cores of so many."""
    count = min(found, key=lambda n: (abs(n - ranks), n))
    kind = found[count]
    if count == ranks or backend.device_type == "cuda":
        return kind
    slower = backend.threads(count) / backend.threads(ranks) * max(1.0, ranks / max(count, cores()))

    def per_second(quantity: Quantity) -> Quantity:
        return Quantity(quantity.value / slower, f"{quantity.source}, taken for {ranks} ranks")

    return replace(
        kind, memory=Quantity(kind.memory.value * count / ranks, kind.memory.source),
        flops={precision: per_second(rate) for precision, rate in kind.flops.items()},
        bandwidth=per_second(kind.bandwidth), operators=tuple(curve.times(slower) for curve in kind.operators),
        crowd=_crowd(ranks),
    )  # fmt: skip


def machine_file(cluster: Cluster) -> str:
    """A measured machine as a cluster file, whose node has as many ranks as the machine has devices or cores.

    Args:
        cluster: as `discover` returns it: each node is the machine with another number of ranks.
    """
    lines = [
        "# What `shardwise machine` measured. [[nodes]] is this machine with a rank for each core or accelerator;",
        "# [devices.ranks-N] is what each of N ranks has when all work at once.",
        f'name = "{processor()}, {cores()} cores, torch {torch.__version__}"',
    ]
    most = min(cluster.nodes, key=lambda node: abs(node.devices - max(cores(), torch.cuda.device_count())))
    if most.device.kind == "cuda":
        most = max(cluster.nodes, key=lambda node: node.devices)
    lines += ["", "[[nodes]]", f"devices = {most.devices}", f'device = "{most.device.name}"']
    for node in cluster.nodes:
        lines += _device_lines(node.device)
    return "\n".join(lines) + "\n"


def _device_lines(d: Device) -> list[str]:
    def entry(key: str, quantity: Quantity, unit: str = "", size: float = 1.0) -> str:
        told = f'unit = "{unit}", ' if unit else ""
        return f'{key} = {{ value = {quantity.value / size:.5g}, {told}source = "{quantity.source}" }}'

    def listed(values: tuple[float, ...], size: float = 1.0) -> str:
        return "[" + ", ".join(f"{v / size:.5g}" for v in values) + "]"

    at = f"devices.{d.name}"
    lines = [
        "", f"[{at}]", f'title = "{d.title}"', f'kind = "{d.kind}"', entry("units", d.units),
        entry("memory", d.memory, "GiB", 2.0**30), entry("bandwidth", d.bandwidth, "GB/s", 1e9), entry("node", d.node),
        f'network = "{d.network}"', *([entry("step", d.step, "us", 1e-6)] if d.step is not None else []),
        *([entry("halved", d.halved, "us", 1e-6)] if d.halved is not None else []),
        *([entry("crowd", d.crowd)] if d.crowd is not None else []),
        "", f"[{at}.flops]", *(entry(p, rate, "GFLOP/s", 1e9) for p, rate in d.flops.items()),
        "", f"[{at}.reached]", entry("matmul", d.matmul), entry("attention", d.attention), entry("memory", d.reached),
        entry("call", d.call, "us", 1e-6), *_link_lines(d.link, f"{at}.link", entry),
    ]  # fmt: skip
    for curve in d.operators:
        lines += [
            "", f"[[{at}.operators]]", f'op = "{curve.op}"', f'by = "{curve.by}"', f"at = {listed(curve.at)}",
            f"forward = {listed(curve.forward, 1e-6)}", f"backward = {listed(curve.backward, 1e-6)}", 'unit = "us"',
            f'source = "{curve.source}"',
        ]  # fmt: skip
    return lines


def _link_lines(link: Link, at: str, entry: Callable[..., str]) -> list[str]:
    lines = [
        "", f"[{at}]", f'title = "{link.title}"', entry("bandwidth", link.bandwidth, "GB/s", 1e9),
        entry("launch", link.launch, "us", 1e-6), entry("hop", link.hop, "us", 1e-6), entry("reduce", link.reduce),
    ]  # fmt: skip
    for row in link.collectives:
        lines += [
            "", f"[[{at}.collectives]]", f'kind = "{row.kind}"', f"ranks = {row.ranks}",
            entry("latency", row.latency, "us", 1e-6), entry("bandwidth", row.bandwidth, "GB/s", 1e9),
        ]  # fmt: skip
    return lines


def processor() -> str:
    """The name of this machine's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return re.sub(r'["\\]', "", found[1].strip()) if found else platform.processor() or platform.machine()


# --- known numbers ----------------------------------------------------------------------------------------------------


def _share(core: Device, ranks: int, memory: int) -> Device:
    threads = max(1, cores() // ranks)
    slower = min(1.0, cores() / ranks)  # more ranks than cores take turns

    def times(quantity: Quantity) -> Quantity:
        return Quantity(quantity.value * threads * slower, f"{quantity.source}, {threads} threads a rank")

    return replace(
        core, flops={precision: times(rate) for precision, rate in core.flops.items()}, units=times(core.units),
        memory=Quantity(memory / ranks, "the machine's, shared by its ranks"), bandwidth=times(core.bandwidth),
        crowd=_crowd(ranks),
    )  # fmt: skip


def _crowd(ranks: int) -> Quantity | None:
    return Quantity(ranks / cores(), f"{ranks} ranks on {cores()} cores") if ranks > cores() else None


def accelerator(title: str) -> Device:
    """A known device by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3"; else a usual one."""
    words = set(re.findall(r"[a-z]*\d+[a-z]*", title.lower()))
    fitting = [name for name in known_devices() if set(re.findall(r"[a-z]+\d+[a-z]*", name)) & words]
    if not fitting:
        # Plans can be ranked by a usual accelerator's numbers; only a cluster file foretells this one's clock.
        return replace(device(_USUAL), name="unknown", title=f"{title}, with the numbers of {_USUAL}")
    sized = [name for name in fitting if set(re.findall(r"\d+gb", name)) & words]
    return device((sized or fitting)[0])
