"""Blocks: stretches of a graph that are there several times in a row, found by structural hashing.

Every operator gets a key of what it is: its kind, its literals, the shapes of what it reads and makes, and the dims it
can be split on. Two operators `period` apart match where their keys are equal and each input comes either from the same
place within the own copy, or from outside of it in both. A run of matches is a block and a count. No module path is
looked at, so that layers held in a list, written out one by one, or inlined are found alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from shardwise.graph import random
from shardwise.graph.dims import Dim
from shardwise.graph.graph import Graph, Op


@dataclass(frozen=True)
class Block:
    """A stretch of `length` operators from `graph.ops[start]` on, there `count` times in a row.

    Attributes:
        start: index of the first operator of the first copy.
        length: operators of one copy.
        count: how many copies; 1 for what does not repeat.
    """

    start: int
    length: int
    count: int = 1

    @property
    def stop(self) -> int:
        """Index behind the last operator of the last copy."""
        return self.start + self.length * self.count

    def copies(self) -> list[range]:
        """The operators' indices, copy by copy."""
        return [range(a, a + self.length) for a in range(self.start, self.stop, self.length)]


def blocks(graph: Graph) -> list[Block]:
    """The graph's operators, in order, as blocks; together they hold each operator once.

    Of all ways to read a stretch as copies the one that leaves fewest distinct operators is taken, and of the places
    where a copy may begin the one that the fewest bytes cross.
    """
    found = _Finder(graph)
    return list(found.within(0, len(graph.ops)))


def twins(graph: Graph, repeats: Sequence[Block] | None = None) -> dict[Dim, Dim]:
    """For each dim that operators can be split on the one that has its place in the first copy of its block.

    Dims with equal twins are split alike in copies that are alike.

    Args:
        graph: the captured model.
        repeats: its blocks, where they are known.
    """
    same: dict[Dim, Dim] = {}

    def first(dim: Dim) -> Dim:
        while same.setdefault(dim, dim) is not dim:
            dim = same[dim]
        return dim

    for block in repeats if repeats is not None else blocks(graph):
        head, *others = block.copies()
        for copy in others:
            for i, j in zip(head, copy, strict=True):
                for mine, other in zip(graph.ops[i].letters, graph.ops[j].letters, strict=True):
                    same[first(other.dim)] = first(mine.dim)
    return {letter.dim: first(letter.dim) for op in graph.ops for letter in op.letters}


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.ops = graph.ops
        producer = graph.producer
        most = max((len(op.inputs) for op in graph.ops), default=0)
        self.sources = np.full((len(graph.ops), most), -1)
        for op in graph.ops:
            self.sources[op.index, : len(op.inputs)] = [producer[v].index if v in producer else -1 for v in op.inputs]
        numbers: dict[Any, int] = {}
        self.keys = torch.tensor([numbers.setdefault(key_of(op), len(numbers)) for op in graph.ops])
        params = set(graph.params.values())
        self.holds_weights = [any(v in params for v in op.inputs) for op in graph.ops]
        self.crossing = _crossing(graph)

    def within(self, low: int, high: int) -> Iterator[Block]:
        """The blocks of the operators from `low` up to `high`, in order."""
        best = max(self._repeats(low, high), key=lambda b: ((b.count - 1) * b.length, -b.length), default=None)
        if best is None:
            if high > low:
                yield Block(low, high - low)
            return
        yield from self.within(low, best.start)
        yield best
        yield from self.within(best.stop, high)

    def _repeats(self, low: int, high: int) -> Iterator[Block]:
        for period in range(1, (high - low) // 2 + 1):
            equal = self.keys[low : high - period] == self.keys[low + period : high]
            for start, stop in _runs(equal, period):
                yield from self._checked(low + start, low + stop, period)

    def _checked(self, start: int, stop: int, period: int) -> Iterator[Block]:
        """Blocks of the operators from `start` up to `stop` that match by their keys, where their inputs do too."""
        while stop - start >= period:
            alike = self._alike(start, stop, period)
            bad = stop if alike.all() else start + int(alike.argmin())
            if bad - start >= period:
                slack = (bad - start) % period
                count = (bad - start) // period + 1
                cheapest = sorted(range(start, start + slack + 1), key=lambda s: (self._cost(s, period, count), s))
                # Where copies begin decides what comes from outside of them. From `start` on they match.
                at = next(s for s in cheapest if self._match(s, period, count))
                if any(self.holds_weights[at : at + period]):
                    yield Block(at, period, count)
            start = bad + 1

    def _match(self, start: int, period: int, count: int) -> bool:
        return bool(self._alike(start, start + (count - 1) * period, period).all())

    def _alike(self, start: int, stop: int, period: int) -> npt.NDArray[np.bool_]:
        """Of the operators from `start` up to `stop` whether the inputs match those of the copy behind."""
        a, b = self.sources[start:stop], self.sources[start + period : stop + period]
        copy = (start + np.arange(stop - start) // period * period)[:, None]
        found: npt.NDArray[np.bool_] = ((b - a == period) | ((a < copy) & (b < copy + period))).all(axis=1)
        return found

    def _cost(self, start: int, period: int, count: int) -> int:
        return sum(self.crossing[start + k * period] for k in range(count + 1))


def _runs(equal: torch.Tensor, least: int) -> list[tuple[int, int]]:
    """Where `equal` is true at least `least` times in a row."""
    none = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(equal.to(torch.int8), prepend=none, append=none)
    starts, stops = torch.nonzero(edges == 1).flatten(), torch.nonzero(edges == -1).flatten()
    long = stops - starts >= least
    return list(zip(starts[long].tolist(), stops[long].tolist(), strict=True))


def key_of(op: Op) -> Any:
    """What an operator is, apart from where its inputs come from and what they are called."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return "tensor" if isinstance(argument.meta.get("val"), torch.Tensor) else str(argument.meta.get("val"))
        if isinstance(argument, (list, tuple)):
            return tuple(plain(a) for a in argument)
        return repr(argument)

    operands = [*op.context.inputs, *op.context.outputs]
    args = op.node.args[:-1] if op.node.target in random.DRAWS else op.node.args  # without its number, which is its own
    return (
        op.name,
        plain(args),
        tuple((name, plain(argument)) for name, argument in sorted(op.node.kwargs.items())),
        tuple((o.slot, o.value.sizes, o.value.dtype) for o in operands),
        # Equal operators can still be split differently, where a neighbour has split one of their dims into finer ones.
        tuple((letter.dim.size, letter.places) for letter in op.letters),
    )


def _crossing(graph: Graph) -> Sequence[int]:
    """For each operator, and for the end, the bytes of one sample that are computed before it and used from it on."""
    last = {v: op.index for op in graph.ops for v in op.inputs}
    change = [0] * (len(graph.ops) + 2)
    for value, op in graph.producer.items():
        change[op.index + 1] += value.bytes().at(1)
        change[last.get(value, op.index) + 1] -= value.bytes().at(1)
    return torch.tensor(change).cumsum(0).tolist()
