"""Operators that move, cut and join dims without arithmetic."""

from __future__ import annotations

from shardwise.graph.dims import Size
from shardwise.graph.rules.context import OpContext, Operand
from shardwise.graph.rules.table import rules

NOMINAL_BATCH = 1_000_003
"""Stands in for the number of samples where two products are ordered by size."""


@rules(["view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias", "flatten", "unflatten"])
def view(c: OpContext) -> None:
    x, out = c.inputs[0], c.out
    c.size_args["size"] = c.size_args["shape"] = out.slot
    for left, right in segments(x, out):
        c.tie_products([(x, i) for i in left], [(out, j) for j in right])
    c.linear_in(x)


def segments(x: Operand, out: Operand) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of positions whose products are equal on both sides of a reshape."""
    todo_x = [i for i in range(x.ndim) if not x.size(i).one][::-1]
    todo_out = [j for j in range(out.ndim) if not out.size(j).one][::-1]
    found = []
    while todo_x and todo_out:
        left, right = [todo_x.pop()], [todo_out.pop()]
        a, b = x.size(left[0]), out.size(right[0])
        while a != b and (todo_x or todo_out):
            if todo_x and (a.at(NOMINAL_BATCH) <= b.at(NOMINAL_BATCH) or not todo_out):
                left.append(todo_x.pop())
                a = a * x.size(left[-1])
            else:
                right.append(todo_out.pop())
                b = b * out.size(right[-1])
        if a == b:
            found.append((left, right))
    return found


@rules(["expand", "expand_as", "broadcast_to", "expand_copy"])
def expand(c: OpContext) -> None:
    x = c.inputs[0]
    c.size_args["size"] = c.out.slot
    c.elementwise(c.inputs)
    c.linear_in(x)
    for pos in range(c.out.ndim):
        back = c.out.ndim - pos
        if back > x.ndim or x.size(-back).one:
            c.fresh(c.out, pos)


@rules(["permute", "permute_copy"])
def permute(c: OpContext) -> None:
    x = c.inputs[0]
    for j, i in enumerate(c.arguments["dims"]):
        c.tie(x, int(i), c.out, j)
    c.linear_in(x)


@rules(["transpose", "swapaxes", "t", "transpose_copy", "numpy_T", "mT"])
def transpose(c: OpContext) -> None:
    x = c.inputs[0]
    order = list(range(x.ndim))
    a, b = int(c.arguments.get("dim0", 0)), int(c.arguments.get("dim1", -1))
    if order:
        order[a], order[b] = order[b], order[a]
    for j, i in enumerate(order):
        c.tie(x, i, c.out, j)
    c.linear_in(x)


@rules(["movedim"])
def movedim(c: OpContext) -> None:
    x = c.inputs[0]
    source, target = c.arguments["source"], c.arguments["destination"]
    pairs = {int(t) % x.ndim: int(s) % x.ndim for s, t in zip(source, target, strict=True)}
    rest = iter(i for i in range(x.ndim) if i not in pairs.values())
    for j in range(x.ndim):
        c.tie(x, pairs[j] if j in pairs else next(rest), c.out, j)
    c.linear_in(x)


@rules(["unsqueeze", "squeeze", "squeeze_copy", "unsqueeze_copy", "atleast_1d", "atleast_2d"])
def squeeze(c: OpContext) -> None:
    x = c.inputs[0]
    kept = [i for i in range(x.ndim) if not x.size(i).one]
    target = [j for j in range(c.out.ndim) if not c.out.size(j).one]
    for i, j in zip(kept, target, strict=True):
        c.tie(x, i, c.out, j)
    c.linear_in(x)


@rules(["slice", "slice_copy", "narrow"])
def slice_(c: OpContext) -> None:
    x, out = c.inputs[0], c.out
    dim = int(c.arguments.get("dim", 0)) % x.ndim
    c.same(x, out, but=[dim])
    c.linear_in(x)
    whole, part = x.size(dim), out.size(dim)
    if whole == part:
        c.tie(x, dim, out, dim)
        return
    start, step = c.arguments.get("start") or 0, c.arguments.get("step", 1)
    count = whole.divide(part)
    if not isinstance(start, int) or step != 1 or count is None or part.power or whole.power:
        return
    start = start + whole.coefficient if start < 0 else start
    if start % part.coefficient == 0:
        c.tie_products([(x, dim)], [(out, dim)], skip_left=count)
        c.special(out, dim, "slice")


@rules(["select", "select_copy"])
def select(c: OpContext) -> None:
    x = c.inputs[0]
    dim = int(c.arguments["dim"]) % x.ndim
    for i in range(x.ndim):
        if i != dim:
            c.tie(x, i, c.out, i - (i > dim))
    c.linear_in(x)


@rules(["unbind", "unbind_copy"])
def unbind(c: OpContext) -> None:
    x = c.inputs[0]
    dim = int(c.arguments.get("dim", 0)) % x.ndim
    for out in c.outputs:
        for i in range(x.ndim):
            if i != dim:
                c.tie(x, i, out, i - (i > dim))
    c.linear_in(x)


@rules(["split", "split_with_sizes", "chunk", "tensor_split", "split_copy", "unsafe_split", "split_with_sizes_copy"])
def split(c: OpContext) -> None:
    x = c.inputs[0]
    dim = int(c.arguments.get("dim", 0)) % x.ndim
    equal = len({out.size(dim) for out in c.outputs}) == 1
    for out in c.outputs:
        c.same(x, out, but=[dim])
        if equal:
            c.tie_products([(x, dim)], [(out, dim)], skip_left=Size(len(c.outputs)))
    if equal:
        c.special(c.out, dim, "split")
    c.linear_in(x)


@rules(["cat", "concat"])
def cat(c: OpContext) -> None:
    parts, out = [x for x in c.inputs if x.ndim], c.out
    dim = int(c.arguments.get("dim", 0)) % out.ndim
    equal = len({x.size(dim) for x in parts}) == 1 and len(parts) == len(c.inputs)
    for x in parts:
        if x.ndim != out.ndim:
            return
        c.same(x, out, but=[dim])
        if equal:
            c.tie_products([(x, dim)], [(out, dim)], skip_right=Size(len(parts)))
    c.linear_in(c.inputs)


@rules(["stack"])
def stack(c: OpContext) -> None:
    dim = int(c.arguments.get("dim", 0)) % c.out.ndim
    for x in c.inputs:
        for i in range(x.ndim):
            c.tie(x, i, c.out, i + (i >= dim))
    c.linear_in(c.inputs)


@rules(["repeat"])
def repeat(c: OpContext) -> None:
    x, out = c.inputs[0], c.out
    for back in range(1, out.ndim + 1):
        if back <= x.ndim and not x.size(-back).one:
            count = out.size(-back).divide(x.size(-back))
            if count is not None and not count.power:
                c.tie_products([(x, -back)], [(out, -back)], skip_right=count)
    c.linear_in(x)


@rules(["repeat_interleave"])
def repeat_interleave(c: OpContext) -> None:
    x, out = c.inputs[0], c.out
    dim = c.arguments.get("dim")
    if dim is None or len(c.inputs) > 1:
        return
    dim = int(dim) % x.ndim
    c.same(x, out, but=[dim])
    c.tie_major(out, dim, x, dim)
    c.linear_in(x)


@rules(["constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"])
def pad(c: OpContext) -> None:
    x = c.inputs[0]
    padded = c.arguments["pad" if "pad" in c.arguments else "padding"]
    touched = {x.ndim - 1 - k // 2 for k, amount in enumerate(padded) if amount != 0}
    c.same(x, c.out, but=sorted(touched))
    if c.arguments.get("value", 0) in (0, 0.0, None):
        c.linear_in(x)


@rules(["unfold"])
def unfold(c: OpContext) -> None:
    x = c.inputs[0]
    dim = int(c.arguments["dimension"]) % x.ndim
    for i in range(x.ndim):
        if i != dim:
            c.tie(x, i, c.out, i)


@rules(["pixel_shuffle", "pixel_unshuffle", "im2col", "col2im"])
def samples_only(c: OpContext) -> None:
    if c.inputs[0].ndim == 4 or c.out.ndim == 4:
        c.tie(c.inputs[0], 0, c.out, 0)
