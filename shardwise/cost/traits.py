"""Traits: what is known of a graph's operators before they are split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from shardwise.graph.graph import Graph, Op
from shardwise.graph.rewrite import gives_views
from shardwise.graph.rules import Slot, Value
from shardwise.parallel.defer import comes_in_halves

PRODUCT, ATTENTION, MEMORY, NOTHING = "product", "attention", "memory", "nothing"
_ATTENTION = {"aten.scaled_dot_product_attention"}


class Read(NamedTuple):
    """A tensor that an operator reads from memory, the last slot that it has there, and whether it has a gradient."""

    value: Value
    slot: Slot
    grad: bool


class Trait(NamedTuple):
    """What an operator is, however it is split.

    Attributes:
        kind: PRODUCT, ATTENTION, MEMORY (bound by memory) or NOTHING (a view).
        dtype: what it computes in.
        gradients: how many of its tensor inputs get a gradient.
        reads, writes: tensors that it reads from memory and writes there.
        made: what it makes that gradients flow through.
        bias: whether it runs inside of the product before it.
        free: whether it costs nothing: a view, or made ready beforehand.
        weighted: whether parameters meet what is received in it, so that its backward can come in two halves.
        halves: whether it does: whether the second half computes anything.
        last: whether it comes behind the last product, as a loss does.
    """

    kind: str
    dtype: torch.dtype
    gradients: int
    reads: tuple[Read, ...]
    writes: tuple[Value, ...]
    made: tuple[Value, ...]
    bias: bool
    free: bool
    weighted: bool
    halves: bool
    last: bool


class Traits:
    """The operators of a graph before they are split.

    Args:
        graph: the captured model.
        fused: which operators bound by memory run as one where they follow each other: "none", those of one module
            ("modules": a norm, an activation), or "all".
        prepared: whether what depends on the batch alone costs nothing.
    """

    def __init__(self, graph: Graph, *, fused: str = "none", prepared: bool = False) -> None:
        self.graph, self.fused, self.prepared = graph, fused, prepared
        self._roots: dict[Value, Value] = {}
        self.params: Mapping[Value, str] = {v: n for n, v in graph.params.items()}

    @cached_property
    def of(self) -> Mapping[Op, Trait]:
        """Of each operator."""
        return {op: self._trait(op) for op in self.graph.ops}

    def each(self, name: str) -> list[float]:
        """Of each operator what a field of its `Trait` says."""
        return [getattr(trait, name) for trait in self.of.values()]

    def _trait(self, op: Op) -> Trait:
        graph, kind = self.graph, self.kinds[op]
        slots = {operand.value: operand.slot for operand in op.context.inputs}
        bias, learned = op in self._biases, any(v in graph.learned for v in op.outputs)
        weighted = not bias and bool(self.learned(op))
        return Trait(
            kind=kind,
            dtype=next((v.dtype for v in op.outputs if v.dtype.is_floating_point), torch.float32),
            gradients=len({v for v in op.inputs if v in graph.needs_grad}),
            reads=tuple(Read(v, s, v in graph.needs_grad) for v, s in slots.items() if self.reaches_memory(v, op)),
            writes=tuple(v for v in op.outputs if self.reaches_memory(v, op)),
            made=tuple(v for v in op.outputs if v in graph.needs_grad),
            bias=bias,
            free=kind == NOTHING or (self.prepared and not learned),
            weighted=weighted,
            halves=weighted and comes_in_halves(op.name),
            last=self._levels[op] == self._deepest,
        )

    @cached_property
    def kinds(self) -> Mapping[Op, str]:
        """What bounds each operator."""
        found = {}
        for op in self.graph.ops:
            if op.name in _ATTENTION:
                found[op] = ATTENTION
            elif op.context.work.coefficient:
                found[op] = PRODUCT
            else:
                found[op] = NOTHING if is_view(op) else MEMORY
        return found

    def learned(self, op: Op) -> Sequence[Value]:
        """What an operator reads that is made of parameters alone, where it reads what a stage receives besides."""
        begins = {v: self._begins.get(v, len(self.graph.ops)) for v in op.inputs if v in self.graph.needs_grad}
        return [v for v, first in begins.items() if first > min(begins.values())]

    @cached_property
    def _begins(self) -> Mapping[Value, int]:
        """For each tensor that an operator makes the first operator that its gradient reaches.

        To a stage that begins behind that one the tensor is received. To others it is made of parameters alone, as are
        rows that the batch picks of them.
        """
        found: dict[Value, int] = {}
        for op in self.graph.ops:
            first = min((found[v] for v in op.inputs if v in found and v in self.graph.needs_grad), default=op.index)
            found.update(dict.fromkeys(op.outputs, first))
        return found

    @cached_property
    def _biases(self) -> Collection[Op]:
        """Additions of a bias that run inside of the product before them; what fuses all has them anyway."""
        if self.fused == "all":
            return ()
        learned, producer = set(self.graph.params.values()), self.graph.producer
        return {
            op for op in self.graph.ops
            if op.name == "aten.add" and len(op.inputs) == 2 and op.inputs[1] in learned and op.inputs[0] in producer
            and self.kinds[producer[op.inputs[0]]] == PRODUCT and len(self._readers[op.inputs[0]]) == 1
        }  # fmt: skip

    @cached_property
    def _levels(self) -> Mapping[Op, int]:
        """How many products lie at most before an operator: operators of one level can be fused."""
        levels: dict[Op, int] = {}
        producer = self.graph.producer
        for op in self.graph.ops:
            before = [producer[v] for v in op.inputs if v in producer]
            levels[op] = max((levels[b] + (self.kinds[b] in (PRODUCT, ATTENTION)) for b in before), default=0)
        return levels

    @cached_property
    def _deepest(self) -> int:
        """How many products lie before those operators that come behind the last."""
        return max(self._levels.values(), default=0) or 1

    @cached_property
    def heads(self) -> Collection[Op]:
        """The last products, whose scores a loss reads."""
        return {op for op in self.graph.ops if self.kinds[op] == PRODUCT and self._levels[op] + 1 == self._deepest}

    @cached_property
    def _readers(self) -> Mapping[Value, list[Op]]:
        found: dict[Value, list[Op]] = {}
        for op in self.graph.ops:
            for v in op.inputs:
                found.setdefault(v, []).append(op)
        return found

    def fuses(self, a: Op, b: Op) -> bool:
        """Whether what `a` computes for `b` never reaches memory."""
        small = (MEMORY, NOTHING)
        if self.kinds[a] not in small or self.kinds[b] not in small or self._levels[a] != self._levels[b]:
            return False
        return self.fused == "all" or (a.module == b.module != "")

    def reaches_memory(self, value: Value, op: Op) -> bool:
        """Whether an operator reads or writes this tensor in memory."""
        if self.fused == "none" or self.kinds[op] != MEMORY or op in self._biases:
            return True
        producer = self.graph.producer.get(value)
        if producer is None:
            return True
        if producer is not op:
            return not self.fuses(producer, op)
        readers = self._readers.get(value, [])
        return not readers or any(not self.fuses(op, reader) for reader in readers)

    @cached_property
    def shared(self) -> Mapping[Op, list[Value]]:
        """Tensors of the batch that are alike for all its samples, at their first use with samples."""
        seen: set[Value] = set()
        found: dict[Op, list[Value]] = {}
        for op in self.graph.ops:
            mine = found.setdefault(op, [])
            if not any(counts_samples(v) for v in op.outputs):
                continue
            for value in op.inputs:
                if value in self.graph.needs_grad and not counts_samples(value) and value not in seen:
                    seen.add(value)
                    if value not in self.graph.steady:
                        mine.append(value)
        return found

    def root(self, value: Value) -> Value:
        """The tensor that a view is a view of."""
        if value not in self._roots:
            producer = self.graph.producer.get(value)
            view = producer is not None and self.kinds[producer] == NOTHING and bool(producer.inputs)
            self._roots[value] = self.root(producer.inputs[0]) if producer is not None and view else value
        return self._roots[value]


def counts_samples(value: Value) -> bool:
    """Whether a tensor is larger with more samples."""
    return any(size.at(1) != size.at(2) for size in value.sizes)


def is_view(op: Op) -> bool:
    """Whether an operator moves nothing: its output is a view of its input."""
    return op.name in _VIEWS or gives_views(op.node.target)


_VIEWS = {"aten.reshape", "aten.flatten", "aten.unflatten", "aten.contiguous", "aten.dropout", "aten._unsafe_view"}
