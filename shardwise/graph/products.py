"""Products: which parameters of a captured graph are factors of matrix products, and which of their dims come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Slot, Value


def factors(graph: Graph) -> Mapping[str, tuple[int, ...]]:
    """For each parameter that an operator multiplies and sums over, its dims that are not summed over.

    An operator is a product where two of its operands have a dim that it sums over: linear layers, convolutions,
    products of matrices, einsums. A parameter may reach it with its dims in another order. Of one that several
    operators use, as a table that is the output layer too, the first product counts.
    """
    names = {value: (name, tuple(range(value.ndim))) for name, value in graph.params.items()}
    found: dict[str, tuple[int, ...]] = {}
    for op in graph.ops:
        for operand in op.context.inputs:
            if operand.value not in names:
                continue
            name, dims = names[operand.value]
            order = _order(op)
            if order is not None:
                names[op.outputs[0]] = name, tuple(dims[i] for i in order)
                continue
            summed = _summed(op, operand.slot)
            if summed and name not in found:
                found[name] = tuple(dims[i] for i in range(operand.ndim) if i not in summed)
    return {name: tuple(sorted(kept)) for name, kept in found.items()}


def _summed(op: Op, slot: Slot) -> set[int]:
    """The positions of an input over which a product sums; none where the operator is no product of it."""
    outer = {p.slot for letter in op.letters for p in letter.places}
    shared = [
        letter
        for letter in op.letters
        if letter.sums
        and not letter.special
        and letter.place(slot) is not None
        and len({p.slot for p in letter.places if p.slot.side == "in"}) > 1
    ]
    if not shared or slot not in outer:
        return set()
    tied = {p.pos for letter in op.letters if letter not in shared for p in letter.places if p.slot == slot}
    operand: Value = op.context.operand(slot).value
    # What has no letter, as the kernel of a convolution, is summed over too.
    return {i for i in range(operand.ndim) if i not in tied}


def _order(op: Op) -> Sequence[int] | None:
    """For an operator that only puts the dims of its input in another order, that order."""
    ndim = op.context.inputs[0].ndim
    if op.name in ("aten.t", "aten.numpy_T", "aten.detach", "aten.alias"):
        plain = list(range(ndim))
        return plain if op.name in ("aten.detach", "aten.alias") else plain[::-1]
    if op.name == "aten.transpose":
        order = list(range(ndim))
        a, b = (int(op.context.arguments[name]) % ndim for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
        return order
    if op.name == "aten.permute":
        return [int(d) % ndim for d in op.context.arguments["dims"]]
    return None
