"""Device and Link: what a rank computes with, and what joins ranks. Known ones are the TOML files beside this one."""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import MachineError
from shardwise.machine.curve import Collective, Curve
from shardwise.machine.quantity import Quantity

_HOME = Path(__file__).parent
KINDS = ("cpu", "cuda", "tpu")
PRECISIONS = ("fp8", "bf16", "fp16", "tf32", "fp32", "fp64")


@dataclass(frozen=True)
class Link:
    """What joins ranks: those of one node, or nodes.

    Attributes:
        title: what it is.
        bandwidth: bytes a second that a rank sends in a ring, in one direction, as large messages reach it.
        launch: seconds until a collective starts.
        hop: seconds that each step of a ring, or of a tree of nodes, takes besides.
        reduce: how many times as long as an all-gather an all-reduce takes: 2 as rings, less by trees and in switches.
        scaling: for numbers of nodes, in order, the share of the bandwidth that is left between so many, of gathers and
            of all-reduces; empty where it does not depend on their number.
    """

    title: str
    bandwidth: Quantity
    launch: Quantity
    hop: Quantity
    reduce: Quantity
    scaling: tuple[tuple[int, float, float], ...] = ()
    collectives: tuple[Collective, ...] = ()

    @classmethod
    def read(cls, table: Any, where: str) -> Link:
        """Read a link from a machine file.

        Raises:
            MachineError: a number is missing or wrong.
        """
        table = _table(table, where)
        _closed(table, {"title", "bandwidth", "launch", "hop", "reduce"}, where, may={"scaling", "collectives"})
        bandwidth = Quantity.read(table["bandwidth"], "bytes a second", f"bandwidth of {where}")
        launch, hop = (Quantity.read(table[key], "seconds", f"{key} of {where}") for key in ("launch", "hop"))
        reduce = Quantity.read(table["reduce"], "a count", f"reduce of {where}")
        measured = tuple(Collective.read(row, f"a collective of {where}") for row in _rows(table, "collectives", where))
        scaling = _scaling(table.get("scaling"), where)
        return cls(str(table["title"]), bandwidth, launch, hop, reduce, scaling, measured)

    def left(self, nodes: float, kind: str, part: float = 1.0) -> float:
        """The share of the bandwidth left between so many nodes, on a log scale between numbers that are known.

        Args:
            nodes: how many.
            kind: of the collective.
            part: share of each node's devices that take part. An all-reduce of fewer ranks loses less: as much as one
                of all devices of as many nodes as its ranks would fill.
        """
        column = 2 if kind == "all_reduce" else 1
        if not self.scaling:
            return 1.0
        if kind == "all_reduce":
            nodes = max(nodes * part, self.scaling[0][0])
        below = [row for row in self.scaling if row[0] <= nodes] or [self.scaling[0]]
        above = [row for row in self.scaling if row[0] >= nodes]
        low, high = below[-1], above[0] if above else below[-1]
        if low is high:
            # Beyond what is known it goes on falling as it did.
            return low[column] * (low[0] / nodes if nodes > low[0] else 1.0)
        share = math.log(nodes / low[0]) / math.log(high[0] / low[0])
        return math.exp(math.log(low[column]) * (1 - share) + math.log(high[column]) * share)


@dataclass(frozen=True)
class Device:
    """What a rank computes with.

    Attributes:
        name: what it is called in cluster names.
        title: its name for people.
        kind: one of KINDS.
        units: processors that share the work of an operator (streaming multiprocessors, cores).
        memory: bytes that a program can use.
        bandwidth: bytes a second to its memory.
        flops: operations a second at most, by precision.
        matmul: share of them that large matrix products reach.
        attention: share of them that fused attention reaches.
        reached: share of the bandwidth that operators bound by memory reach.
        call: seconds that the shortest operator takes.
        link: to the other devices of its node.
        node: how many devices usually share a node.
        network: name of the network that usually joins such nodes.
        operators: what operators were measured to take, in place of the shares above.
        step: seconds that a step takes besides its operators, where that was measured.
        halved: seconds that an operator with parameters takes besides where its backward comes in two halves; likewise.
        portable: share that fused attention reaches without the instructions that earlier devices lack, where that is
            less.
        crowd: how many ranks share what the numbers above give to each of them, where more ranks than processors do:
            while some of them wait, the others have more.
    """

    name: str
    title: str
    kind: str
    units: Quantity
    memory: Quantity
    bandwidth: Quantity
    flops: Mapping[str, Quantity]
    matmul: Quantity
    attention: Quantity
    reached: Quantity
    call: Quantity
    link: Link
    node: Quantity
    network: str
    operators: tuple[Curve, ...] = ()
    step: Quantity | None = None
    halved: Quantity | None = None
    portable: Quantity | None = None
    crowd: Quantity | None = None

    @classmethod
    def read(cls, table: Any, where: str) -> Device:
        """Read a device from a machine file.

        Raises:
            MachineError: a number is missing or wrong.
        """
        table = _table(table, where)
        keys = {"name", "title", "kind", "units", "memory", "bandwidth", "node", "network", "flops", "reached", "link"}
        _closed(table, keys, where, may={"operators", "step", "halved", "crowd"})
        kind = str(table["kind"])
        if kind not in KINDS:
            raise MachineError(f"kind of {where} must be one of {', '.join(KINDS)}, but is {kind!r}")
        flops = _table(table["flops"], f"flops of {where}")
        strange = sorted(set(flops) - set(PRECISIONS))
        if strange or "fp32" not in flops:
            fact = f"has {strange[0]!r}" if strange else "lacks fp32"
            raise MachineError(f"flops of {where} {fact}; it has fp32 and any of {', '.join(PRECISIONS)}")
        reached = _table(table["reached"], f"reached of {where}")
        _closed(reached, {"matmul", "attention", "memory", "call"}, f"reached of {where}", may={"portable"})

        def of(source: Mapping[str, Any], key: str, measure: str) -> Quantity:
            return Quantity.read(source[key], measure, f"{key} of {where}")

        return cls(
            name=str(table["name"]),
            title=str(table["title"]),
            kind=kind,
            units=of(table, "units", "a count"),
            memory=of(table, "memory", "bytes"),
            bandwidth=of(table, "bandwidth", "bytes a second"),
            flops={p: of(flops, p, "operations a second") for p in flops},
            matmul=of(reached, "matmul", "a share"),
            attention=of(reached, "attention", "a share"),
            reached=of(reached, "memory", "a share"),
            call=of(reached, "call", "seconds"),
            link=Link.read(table["link"], f"link of {where}"),
            node=of(table, "node", "a count"),
            network=str(table["network"]),
            operators=tuple(Curve.read(row, where) for row in _rows(table, "operators", where)),
            step=of(table, "step", "seconds") if "step" in table else None,
            halved=of(table, "halved", "seconds") if "halved" in table else None,
            crowd=of(table, "crowd", "a count") if "crowd" in table else None,
            portable=of(reached, "portable", "a share") if "portable" in reached else None,
        )

    @functools.cached_property
    def rates(self) -> tuple[object, ...]:
        """All that its operators' seconds depend on: equal for devices that compute alike."""
        portable = self.portable or self.attention
        numbers = (self.units, self.bandwidth, self.matmul, self.attention, portable, self.reached, self.call)
        flops = sorted((precision, rate.value) for precision, rate in self.flops.items())
        return self.kind, *(n.value for n in numbers), *flops, *self.operators

    @functools.cached_property
    def curves(self) -> Mapping[str, tuple[Curve, ...]]:
        """What was measured of each operator."""
        found: dict[str, tuple[Curve, ...]] = {}
        for curve in self.operators:
            found[curve.op] = (*found.get(curve.op, ()), curve)
        return found

    def peak(self, precision: str) -> float:
        """Operations a second at most. A precision that the device lacks runs in the nearest that it has.

        Args:
            precision: "bf16", "fp16", "fp8", "fp32" or "fp64"; fp32 is not TF32, as torch has it by default.
        """
        for name in {"bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16"), "fp8": ("fp8", "bf16", "fp16")}.get(
            precision, (precision,)
        ):
            if name in self.flops:
                return self.flops[name].value
        return self.flops["fp32"].value


def known_devices() -> list[str]:
    """Names of the devices that are shipped."""
    return sorted(path.stem for path in (_HOME / "devices").glob("*.toml"))


def known_networks() -> list[str]:
    """Names of the networks that are shipped."""
    return sorted(path.stem for path in (_HOME / "networks").glob("*.toml"))


@functools.cache
def device(name: str) -> Device:
    """A shipped device by its name.

    Raises:
        MachineError: there is none of this name.
    """
    path = _HOME / "devices" / f"{name}.toml"
    if name not in known_devices():
        raise MachineError(f"no device is called {name!r}{_near(name, known_devices())}")
    return Device.read(read_toml(path), f"device {name}")


@functools.cache
def network(name: str) -> Link:
    """A shipped network by its name.

    Raises:
        MachineError: there is none of this name.
    """
    if name not in known_networks():
        raise MachineError(f"no network is called {name!r}{_near(name, known_networks())}")
    table = dict(read_toml(_HOME / "networks" / f"{name}.toml"))
    table.pop("name", None)
    return Link.read(table, f"network {name}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as tables.

    Raises:
        MachineError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(f"the machine file {path} cannot be read: {error.strerror}; give another path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MachineError(f"the machine file {path} is not TOML: {error}") from error


def _near(name: str, known: list[str]) -> str:
    close = [k for k in known if k.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    said = f"; did you mean {close[0]}?" if close else ";"
    return f"{said} known are {', '.join(known)}, or write a cluster file"


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise MachineError(f"{where} must be a table, but is {value!r}")
    return value


def _rows(table: Mapping[str, Any], key: str, where: str) -> list[Any]:
    rows = table.get(key, [])
    if not isinstance(rows, list):
        raise MachineError(f"{key} of {where} must be a list of tables, but is {rows!r}")
    return rows


def _scaling(value: Any, where: str) -> tuple[tuple[int, float, float], ...]:
    if value is None:
        return ()
    table = _table(value, f"scaling of {where}")
    _closed(table, {"nodes", "gather", "all_reduce", "source"}, f"scaling of {where}")
    rows = list(zip(table["nodes"], table["gather"], table["all_reduce"], strict=False))
    if len({len(table[key]) for key in ("nodes", "gather", "all_reduce")}) > 1 or not rows:
        raise MachineError(f"nodes, gather and all_reduce of scaling of {where} must be lists of one length")
    if [r[0] for r in rows] != sorted({r[0] for r in rows}) or any(not 0 < x <= 1 for r in rows for x in r[1:]):
        raise MachineError(f"scaling of {where} must have growing numbers of nodes, and shares above 0 and up to 1")
    return tuple((int(n), float(g), float(r)) for n, g, r in rows)


def _closed(table: Mapping[str, Any], keys: set[str], where: str, may: Set[str] = frozenset()) -> None:
    missing, strange = sorted(keys - set(table)), sorted(set(table) - keys - may)
    if missing or strange:
        fact = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(strange)}, which it cannot have"
        raise MachineError(f"{where} {fact}; its keys are {', '.join(sorted(keys))}")
