"""Fold: a graph without the middle copies of its repeated blocks, which would only repeat what is found of one.

Of many copies the first two and the last stay: the first reads what comes before, the last is read by what comes after,
and the second stands for all between. A block is left as it is where something else looks into one of its copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import fx

from shardwise.graph.blocks import Block
from shardwise.graph.capture import is_getitem
from shardwise.graph.graph import Graph
from shardwise.graph.rules import Value


@dataclass(frozen=True)
class Folded:
    """A graph without what only repeats.

    Attributes:
        whole: the graph it is made from.
        graph: what is left of it.
        index: for each operator of `whole` the index of the one in `graph` that stands for it.
        values: for each tensor of `whole` that an operator reads or makes the one in `graph` that stands for it.
    """

    whole: Graph
    graph: Graph
    index: Sequence[int]
    values: Mapping[Value, Value]

    def each(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Values of `graph`'s operators as values of all operators."""
        return np.array(values, dtype=float)[self.index]

    @cached_property
    def distinct(self) -> Sequence[Value]:
        """The tensors of `graph` that stand for one, in a fixed order."""
        return list(dict.fromkeys(self.values.values()))

    @cached_property
    def numbers(self) -> Mapping[Value, int]:
        """For each tensor of `whole` the place in `distinct` of the one that stands for it."""
        place = {value: n for n, value in enumerate(self.distinct)}
        return {value: place[other] for value, other in self.values.items()}

    @cached_property
    def lives(self) -> npt.NDArray[np.int_]:
        """Of the tensors that depend on parameters three rows: what makes them, what reads them last, their numbers."""
        last = {v: op.index for op in self.whole.ops for v in op.inputs}
        last |= dict.fromkeys(self.whole.results.values(), len(self.whole.ops))
        learned, numbers = self.whole.learned, self.numbers
        found = [(op.index, last[v], numbers[v]) for v, op in self.whole.producer.items() if v in learned and v in last]
        return np.array(found, dtype=int).reshape(-1, 3).T

    @cached_property
    def reads(self) -> Sequence[tuple[Value, Sequence[int]]]:
        """Of each parameter the tensor of `graph` that stands for it, and the operators that read it."""
        found: dict[Value, list[int]] = {value: [] for value in self.whole.params.values()}
        for op in self.whole.ops:
            for value in dict.fromkeys(op.inputs):
                if value in found:
                    found[value].append(op.index)
        return [(self.values[value], uses) for value, uses in found.items() if uses]


def fold(graph: Graph, repeats: Sequence[Block]) -> Folded:
    """Leave out the middle copies of these blocks."""
    stands = list(range(len(graph.ops)))
    readers: dict[Value, list[int]] = {}
    for op in graph.ops:
        for value in op.inputs:
            readers.setdefault(value, []).append(op.index)
    for block in repeats:
        if block.count > 3 and _closed(graph, block, readers):
            copies = block.copies()
            for copy in copies[2:-1]:
                stands[copy.start : copy.stop] = copies[1]
    kept = sorted(set(stands))
    short = graph if len(kept) == len(stands) else _without(graph, stands)
    place = {old: new for new, old in enumerate(kept)}
    index = [place[i] for i in stands]
    values: dict[Value, Value] = {}
    for op, i in zip(graph.ops, index, strict=True):
        other = short.ops[i]
        for mine, its in zip([*op.inputs, *op.outputs], [*other.inputs, *other.outputs], strict=True):
            values.setdefault(mine, its)
    return Folded(graph, short, index, values)


def _closed(graph: Graph, block: Block, readers: Mapping[Value, list[int]]) -> bool:
    """Whether all copies but the ends read themselves, the one before, parameters, or what all of them read."""
    copies = block.copies()
    for k, copy in enumerate(copies[1:-1], start=1):
        near = range(copies[k - 1].start, copies[k + 1].stop)
        for i, first in zip(copy, copies[1], strict=True):
            op, model = graph.ops[i], graph.ops[first]
            if any(r not in near for v in op.outputs for r in readers.get(v, ())):
                return False
            for value, other in zip(op.inputs, model.inputs, strict=True):
                producer = graph.producer.get(value)
                inside = producer is None or producer.index in range(near.start, copy.stop)
                if not inside and value is not other:
                    return False
    return True


def _without(graph: Graph, stands: Sequence[int]) -> Graph:
    """The graph without operators that another stands for."""
    instead = {graph.ops[i].node: graph.ops[k].node for i, k in enumerate(stands) if i != k}
    short = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    picked: dict[tuple[fx.Node, object], fx.Node] = {}
    for node in graph.captured.graph.nodes:
        if node in instead:
            new[node] = new[instead[node]]
        elif is_getitem(node):
            key = (new[node.args[0]], node.args[1])
            new[node] = picked[key] = picked.get(key) or short.node_copy(node, new.__getitem__)
        else:
            new[node] = short.node_copy(node, new.__getitem__)
    for node in list(short.nodes):
        if node.op == "placeholder" and not node.users and node.name in graph.captured.params:
            short.erase_node(node)
    return Graph(replace(graph.captured, graph=short), graph.trainable)
