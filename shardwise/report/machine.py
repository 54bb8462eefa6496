"""The command that measures the machine at hand: what it writes, and what its numbers look like to people."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise.machine.cluster import Cluster
from shardwise.machine.device import Device
from shardwise.machine.here import machine_file, measured_file
from shardwise.measure.machine import discover
from shardwise.report.terminal import duration, size, table


def measure_here(out: Path | None, write: Callable[[Path, str], None]) -> list[dict[str, Any]]:
    """Measure this machine, write its file where prices look for it, and print its numbers; the same as numbers.

    Args:
        out: another file to write it to.
        write: writes a file whole or raises a UserError.
    """
    files = [path for path in (measured_file(), out) if path is not None]
    for path in files:  # whether they can be written is known before a minute is spent
        if not path.exists():
            write(path, "")
            path.unlink()
    found = discover(tell=lambda what: print(f"measuring with {what}", file=sys.stderr, flush=True))
    for path in files:
        write(path, machine_file(found))
    print(f"{machine_page(found)}\n\nwritten to {' and '.join(map(str, files))}")
    return to_dict(found)


def machine_page(cluster: Cluster) -> str:
    """A measured machine as tables: rates, operators and collectives, by the number of ranks that share it.

    Args:
        cluster: as `discover` returns it: each node is the machine with another number of ranks.
    """
    devices = [node.device for node in cluster.nodes]
    rows = [["each of", *(f"{node.devices} ranks" if node.devices > 1 else "1 rank" for node in cluster.nodes)]]
    for precision in devices[0].flops:
        rows.append([f"products, {precision}", *(f"{d.flops[precision].value / 1e9:,.0f} GFLOP/s" for d in devices)])
    rows.append(["memory bandwidth", *(f"{d.bandwidth.value / 1e9:,.1f} GB/s" for d in devices)])
    rows.append(["memory", *(size(d.memory.value) for d in devices)])
    rows.append(["the shortest operator", *(duration(d.call.value) for d in devices)])
    rows.append(["a step besides operators", *(duration(d.step.value) if d.step else "" for d in devices)])
    halves = (duration(d.halved.value) if d.halved else "" for d in devices)
    rows.append(["an operator's backward in two halves", *halves])
    parts = [devices[0].title.partition(",")[0], table(rows)]
    rows = [["operator", *(f"{n.devices}: forward, backward" for n in cluster.nodes), "of"]]
    for i, curve in enumerate(devices[0].operators):
        unit = "operations" if curve.by == "operations" else "bytes"
        rows.append([
            curve.op.removeprefix("aten."),
            *(f"{duration(d.operators[i].forward[-1])}, {duration(d.operators[i].backward[-1])}" for d in devices),
            f"{curve.at[-1]:,.0f} {unit}",
        ])  # fmt: skip
    parts.append(table(rows))
    rows = [["collective", "ranks", "of", "latency", "bandwidth"]]
    for node in cluster.nodes:
        for row in node.device.link.collectives:
            rows.append([
                row.kind, f"{row.ranks}", f"{node.devices}", duration(row.latency.value),
                f"{row.bandwidth.value / 1e9:,.2f} GB/s",
            ])  # fmt: skip
    if len(rows) > 1:
        parts.append(table(rows))
    return "\n\n".join(parts)


def to_dict(cluster: Cluster) -> list[dict[str, Any]]:
    """The same as numbers in base units: bytes, seconds, operations a second; one entry for each number of ranks."""
    return [_device(node.devices, node.device) for node in cluster.nodes]


def _device(ranks: int, d: Device) -> dict[str, Any]:
    return {
        "ranks": ranks, "title": d.title, "kind": d.kind, "memory": d.memory.value, "bandwidth": d.bandwidth.value,
        "flops": {precision: rate.value for precision, rate in d.flops.items()}, "call": d.call.value,
        "step": d.step.value if d.step is not None else None,
        "halved": d.halved.value if d.halved is not None else None,
        "crowd": d.crowd.value if d.crowd is not None else None, "source": d.bandwidth.source,
        "operators": [
            {"op": c.op, "by": c.by, "at": c.at, "forward": c.forward, "backward": c.backward} for c in d.operators
        ],
        "collectives": [
            {"kind": c.kind, "ranks": c.ranks, "latency": c.latency.value, "bandwidth": c.bandwidth.value}
            for c in d.link.collectives
        ],
    }  # fmt: skip
