"""Operators that read or write at computed positions."""

from __future__ import annotations

from shardwise.graph.rules import order
from shardwise.graph.rules.context import OpContext, Operand
from shardwise.graph.rules.table import rules


@rules(["index"])
def index(c: OpContext) -> None:
    x = c.inputs[0]
    indices = list(c.arguments["indices"])
    used = [i for i, t in enumerate(indices) if t is not None]
    tensors = [t for t in indices if t is not None]
    if any(t.value.dtype.itemsize == 1 for t in tensors):
        return
    adjacent = used == list(range(used[0], used[-1] + 1))
    start = used[0] if adjacent else 0
    width = max(t.ndim for t in tensors)
    rest = [i for i in range(x.ndim) if i not in used]
    for n, i in enumerate(rest):
        c.tie(x, i, c.out, n if n < start else n + width)
    for t in tensors:
        for back in range(1, t.ndim + 1):
            c.broadcast(t, -back, c.out, start + width - back)
    if len(used) == 1 and order.numbered(c, x, used[0], tensors[0]):
        order.arrange(c, c.out, start, tensors[0])
    else:
        for i, t in zip(used, tensors, strict=True):
            _identity(c, x, i, t, start + width - t.ndim)
    c.linear_in(x)


def _identity(c: OpContext, x: Operand, pos: int, t: Operand, offset: int) -> None:
    """A position indexed by 0, 1, 2, ... of its own length is the same dim before and after."""
    along = c.iota.get(t.slot)
    if along is not None and x.size(pos) == t.size(along):
        c.tie(x, pos, t, along)
        c.special(x, pos, "iota")


@rules(["index_select"])
def index_select(c: OpContext) -> None:
    x, at = c.inputs[0], c.the("index")
    dim = int(c.arguments["dim"]) % x.ndim
    c.same(x, c.out, but=[dim])
    c.tie(at, 0, c.out, dim)
    if order.numbered(c, x, dim, at):
        order.arrange(c, c.out, dim, at)
    c.linear_in(x)


@rules(["gather"])
def gather(c: OpContext) -> None:
    x, at = c.the("self"), c.the("index")
    dim = int(c.arguments["dim"]) % x.ndim
    c.same(at, c.out)
    for i in range(x.ndim):
        if i != dim and x.size(i) == at.size(i):
            c.tie(x, i, at, i)
        elif i != dim:
            c.block(at, i)


@rules(["scatter", "scatter_add", "scatter_reduce"])
def scatter(c: OpContext) -> None:
    x, at = c.the("self"), c.the("index")
    dim = int(c.arguments["dim"]) % x.ndim
    c.same(x, c.out, but=[dim])
    src = c.tensor("src")
    for i in range(x.ndim):
        if i == dim:
            continue
        if x.size(i) == at.size(i):
            c.tie(x, i, at, i)
        else:
            c.block(x, i)
        if src and src.size(i) == x.size(i):
            c.tie(x, i, src, i)
        elif src:
            c.block(x, i)


@rules(["one_hot"])
def one_hot(c: OpContext) -> None:
    x = c.inputs[0]
    for i in range(x.ndim):
        c.tie(x, i, c.out, i)


@rules(["index_add", "index_copy", "index_fill", "slice_scatter", "select_scatter"])
def other_positions(c: OpContext) -> None:
    x = c.inputs[0]
    dim = int(c.arguments.get("dim", 0)) % x.ndim
    c.same(x, c.out, but=[dim])
    at, source = c.tensor("index"), c.tensor("source")
    if at and source and source.ndim == x.ndim and order.numbered(c, x, dim, at, [(source.slot, dim)]):
        c.tie(x, dim, c.out, dim)
        c.tie(at, 0, source, dim)
        order.arrange_as(c, c.out, dim, x)
    for other in c.inputs[1:]:
        if other.ndim == x.ndim:
            c.same(x, other, but=[dim])
        elif c.node_name() == "aten.select_scatter" and other.ndim == x.ndim - 1:
            for i in range(other.ndim):
                c.tie(other, i, c.out, i + (i >= dim))


@rules(["index_put", "_unsafe_index_put"])
def index_put(c: OpContext) -> None:
    """What is not indexed passes through, and values have it in its place; indexed positions are whole."""
    x, indices, values = c.inputs[0], list(c.arguments["indices"]), c.the("values")
    used = [i for i, t in enumerate(indices) if t is not None]
    rest = [i for i in range(x.ndim) if i not in used]
    tensors = [t for t in indices if t is not None]
    if used == list(range(used[0], used[-1] + 1)) and all(t.value.dtype.itemsize > 1 for t in tensors):
        width = max(t.ndim for t in tensors)
        for n, i in enumerate(rest):
            c.tie(x, i, c.out, i)
            back = len(rest) + width - (n if n < used[0] else n + width)
            if values.ndim >= back:
                c.broadcast(values, -back, c.out, i)
        return
    for i in rest:
        c.tie(x, i, c.out, i)
        back = x.ndim - i
        if i > used[-1] and values.ndim >= back:
            c.broadcast(values, -back, c.out, i)
        elif values.ndim:
            c.block(x, i)
