"""Curve and Collective: seconds as they were measured over sizes, of one operator and of one collective."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.errors import MachineError
from shardwise.machine.quantity import Quantity

BY = ("operations", "bytes", "column bytes", "product bytes")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


@dataclass(frozen=True)
class Curve:
    """Seconds of one operator over its size, in fp32.

    Attributes:
        op: the operator, such as `aten.gelu`; "elementwise" stands for all that are bound by memory and have none.
        by: what its size is counted in: "operations" of forward, "bytes" that forward reads and writes, "column bytes",
            those of products with a single column, or "product bytes", for which a product takes so long besides.
        at: sizes, growing.
        forward, backward: seconds at these sizes.
        source: where they came from.
    """

    op: str
    by: str
    at: tuple[float, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    source: str

    @classmethod
    def read(cls, table: Any, where: str) -> Curve:
        """Read a row of `operators`: `op`, `by`, the lists `at`, `forward` and `backward`, `unit` of time, `source`.

        Raises:
            MachineError: a key is missing or strange, or the lists are not of one length, growing and above zero.
        """
        keys = {"op", "by", "at", "forward", "backward", "unit", "source"}
        if not isinstance(table, Mapping) or set(table) != keys:
            raise MachineError(f"{where} must have {', '.join(sorted(keys))}, but is {table!r}")
        where = f"operator {table['op']} of {where}"
        if table["by"] not in BY:
            raise MachineError(f"by of {where} must be one of {', '.join(BY)}, but is {table['by']!r}")
        lists = [table["at"], table["forward"], table["backward"]]
        if not all(isinstance(values, list) for values in lists) or len({len(v) for v in lists}) > 1 or not lists[0]:
            raise MachineError(f"at, forward and backward of {where} must be lists of one length, of at least 1")
        unit, source = table["unit"], table["source"]

        def seconds(key: str) -> tuple[float, ...]:
            return tuple(
                Quantity.read({"value": v, "unit": unit, "source": source}, "seconds", f"{key} of {where}").value
                for v in table[key]
            )

        at = tuple(
            Quantity.read({"value": v, "source": source}, "a count", f"at of {where}").value for v in table["at"]
        )
        if list(at) != sorted(set(at)):
            raise MachineError(f"at of {where} must grow, but is {table['at']!r}")
        return cls(str(table["op"]), str(table["by"]), at, seconds("forward"), seconds("backward"), str(source))

    def seconds(self, size: float, *, backward: bool = False) -> float:
        """Seconds at a size: as at the smallest below it, in proportion above the largest, else between on log scales.

        Args:
            size: in what `by` says.
        """
        found = self.backward if backward else self.forward
        if size <= self.at[0] or len(self.at) == 1:
            return found[0] * max(1.0, size / self.at[0]) if len(self.at) == 1 else found[0]
        if size >= self.at[-1]:
            return found[-1] * size / self.at[-1]
        right = bisect_left(self.at, size)
        low, high = self.at[right - 1], self.at[right]
        share = math.log(size / low) / math.log(high / low)
        return math.exp(math.log(found[right - 1]) * (1 - share) + math.log(found[right]) * share)

    def times(self, slower: float) -> Curve:
        """The same, so many times as slow."""
        forward, backward = (tuple(s * slower for s in way) for way in (self.forward, self.backward))
        return Curve(self.op, self.by, self.at, forward, backward, self.source)


@dataclass(frozen=True)
class Collective:
    """What a collective takes over a group.

    Attributes:
        kind: one of COLLECTIVES.
        ranks: of the group.
        latency: seconds of an empty one.
        bandwidth: bytes a second beyond that: of the whole tensor; for "send" and "all_to_all" of what a rank sends.
    """

    kind: str
    ranks: int
    latency: Quantity
    bandwidth: Quantity

    @classmethod
    def read(cls, table: Any, where: str) -> Collective:
        """Read a row of `collectives`: `kind`, `ranks`, `latency`, `bandwidth`.

        Raises:
            MachineError: a key is missing or strange, or a number is not above zero.
        """
        keys = {"kind", "ranks", "latency", "bandwidth"}
        if not isinstance(table, Mapping) or set(table) != keys or table["kind"] not in COLLECTIVES:
            raise MachineError(
                f"{where} must have {', '.join(sorted(keys))}, its kind one of {', '.join(COLLECTIVES)}, "
                f"but is {table!r}"
            )
        ranks = table["ranks"]
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 2:
            raise MachineError(f"ranks of {where} must be a whole number of at least 2, but is {ranks!r}")
        latency = Quantity.read(table["latency"], "seconds", f"latency of {where}")
        return cls(
            table["kind"], ranks, latency, Quantity.read(table["bandwidth"], "bytes a second", f"bandwidth of {where}")
        )


def parts_of(collectives: Sequence[Collective], ranks: int) -> dict[str, tuple[float, float]]:
    """For each kind the seconds of an empty one over so many ranks, and of each byte; of the nearest group measured."""
    found: dict[str, tuple[float, float]] = {}
    for row in sorted(collectives, key=lambda row: -abs(math.log(row.ranks / ranks))):
        found[row.kind] = row.latency.value, 1 / row.bandwidth.value
    return found
