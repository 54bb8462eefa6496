"""Operators that contract: matrix products, convolutions, attention, recurrent layers, embeddings.

`work` counts forward floating-point operations, a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.graph.dims import Size, product
from shardwise.graph.rules import order
from shardwise.graph.rules.context import OpContext, Operand
from shardwise.graph.rules.table import rules


@rules(["linear"])
def linear(c: OpContext) -> None:
    x, w = c.the("input"), c.the("weight")
    c.tie(x, -1, w, w.ndim - 1)
    c.sum_over(x, -1)
    if w.ndim == 2:
        c.tie(w, 0, c.out, -1)
        c.hint(w, 0, "width")
    for i in range(x.ndim - 1):
        c.tie(x, i, c.out, i)
    if bias := c.tensor("bias"):
        c.tie(bias, 0, c.out, -1)
        c.block(x, -1)
    c.linear_in(x)
    c.work = Size(2) * c.out.value.numel() * x.size(-1)


@rules(["mm", "bmm", "matmul", "dot", "mv"])
def matmul(c: OpContext) -> None:
    a, b = c.inputs
    out = c.out
    contracted_b = max(b.ndim - 2, 0)
    c.tie(a, a.ndim - 1, b, contracted_b)
    c.sum_over(a, a.ndim - 1)
    if a.ndim > 1:
        c.tie(a, a.ndim - 2, out, out.ndim - (2 if b.ndim > 1 else 1))
    if b.ndim > 1:
        c.tie(b, b.ndim - 1, out, out.ndim - 1)
    for x in (a, b):
        lead_out = out.ndim - (a.ndim > 1) - (b.ndim > 1)
        for back in range(3, x.ndim + 1):
            c.broadcast(x, x.ndim - back, out, lead_out - (back - 2))
    c.linear_in(a, b)
    c.work = Size(2) * out.value.numel() * a.size(-1)


@rules(["baddbmm", "addmm", "addbmm"])
def addmm(c: OpContext) -> None:
    bias, a, b = c.inputs
    c.elementwise([bias])
    for i in range(a.ndim - 1):
        c.tie(a, i, c.out, i)
    c.tie(b, -1, c.out, -1)
    if b.ndim == 3:
        c.tie(b, 0, c.out, 0)
    c.work = Size(2) * c.out.value.numel() * a.size(-1)


@rules(["outer"])
def outer(c: OpContext) -> None:
    a, b = c.inputs
    c.tie(a, 0, c.out, 0)
    c.tie(b, 0, c.out, 1)
    c.linear_in(a, b)


@rules(["einsum"])
def einsum(c: OpContext) -> None:
    equation = str(c.arguments["equation"]).replace(" ", "")
    if "..." in equation:
        return
    left, _, right = equation.partition("->")
    terms = left.split(",")
    first: dict[str, tuple[Operand, int]] = {}
    for term, x in zip(terms, c.inputs, strict=True):
        for i, letter in enumerate(term):
            if letter in first:
                c.broadcast(*first[letter], x, i)
            else:
                first[letter] = (x, i)
    for j, letter in enumerate(right):
        c.broadcast(*first[letter], c.out, j)
    for letter, (x, i) in first.items():
        if letter not in right:
            c.sum_over(x, i)
    c.linear_in(*c.inputs)
    c.work = _pairwise(terms, right, {letter: x.size(i) for letter, (x, i) in first.items()})


def _pairwise(terms: Sequence[str], right: str, sizes: Mapping[str, Size]) -> Size:
    """Work of an einsum as torch does it: two operands at a time, from the left; a letter is summed when it is done.

    Steps that grow more slowly with the batch than others are left out.
    """
    steps, made = [Size(0)], terms[0]
    for n, term in enumerate(terms[1:], 2):
        both = dict.fromkeys(made + term)
        steps.append(Size(2) * product(sizes[letter] for letter in both))
        later = right + "".join(terms[n:])
        made = "".join(letter for letter in both if letter in later)
    power = max(step.power for step in steps)
    return Size(sum(step.coefficient for step in steps if step.power == power), power)


@rules(["scaled_dot_product_attention"])
def attention(c: OpContext) -> None:
    q, k, v, out = c.the("query"), c.the("key"), c.the("value"), c.out
    for i in range(q.ndim - 2):
        c.tie(q, i, out, i)
        for x in (k, v):
            if x.size(i) == q.size(i):
                c.tie(q, i, x, i)
            elif q.size(i).divide(x.size(i)) is not None and not x.size(i).one:
                c.tie_major(q, i, x, i)
    c.tie(q, -2, out, -2)
    if c.arguments.get("is_causal"):
        c.special(out, -2, "queries")
    c.tie(k, -2, v, -2)
    c.tie(v, -1, out, -1)
    if mask := c.tensor("attn_mask"):
        for back in range(3, mask.ndim + 1):
            c.broadcast(mask, -back, out, -back)
        c.broadcast(mask, -2, out, -2)
    if q.ndim >= 4:
        c.hint(k, -3, "heads")
    c.hint(q, -1, "depth")
    c.hint(v, -1, "depth")
    keys = k.size(-2)
    c.work = Size(2) * product(q.value.sizes[:-1]) * keys * Size(q.size(-1).coefficient + v.size(-1).coefficient)


@rules(["_trilinear"])
def trilinear(c: OpContext) -> None:
    """A product of three tensors, each expanded by the dims that it lacks, summed over some of all (`nn.Bilinear`)."""
    lacks = [{int(d) for d in c.arguments[f"expand{n}"]} for n in (1, 2, 3)]
    summed = {int(d) for d in c.arguments["sumdim"]}
    count = c.inputs[0].ndim + len(lacks[0])
    has = [[d for d in range(count) if d not in lack] for lack in lacks]
    kept = [d for d in range(count) if d not in summed]
    for d in range(count):
        places = [(x, at.index(d)) for x, at in zip(c.inputs, has, strict=True) if d in at]
        for x, i in places[1:]:
            c.broadcast(*places[0], x, i)
        if d in summed:
            c.sum_over(*places[0])
        elif places:
            c.broadcast(*places[0], c.out, kept.index(d))
    c.linear_in(*c.inputs)
    sizes = [max((x.size(at.index(d)) for x, at in zip(c.inputs, has, strict=True) if d in at)) for d in range(count)]
    c.work = Size(4) * product(sizes)


@rules(["conv1d", "conv2d", "conv3d", "convolution"])
def convolution(c: OpContext) -> None:
    x, w, out = c.inputs[0], c.the("weight"), c.out
    groups = int(c.arguments.get("groups", 1))
    if c.arguments.get("transposed") or x.ndim != w.ndim:
        return
    c.tie(x, 0, out, 0)
    if groups == 1:
        c.tie(x, 1, w, 1)
        c.sum_over(x, 1)
        c.tie(w, 0, out, 1)
    else:
        c.tie_parts(Size(groups), [(x, 1), (w, 0), (out, 1)])
        c.special(x, 1, "groups")
    c.hint(w, 0, "channels")
    c.linear_in(x)
    kernel = product(w.value.sizes[1:])
    c.work = Size(2) * out.value.numel() * kernel


@rules(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def conv_transpose(c: OpContext) -> None:
    x, w, out = c.inputs[0], c.the("weight"), c.out
    if x.ndim != w.ndim:
        return
    c.tie(x, 0, out, 0)
    if int(c.arguments.get("groups", 1)) == 1:
        c.tie(x, 1, w, 0)
        c.sum_over(x, 1)
        c.tie(w, 1, out, 1)
        c.hint(w, 1, "channels")
    c.linear_in(x)
    c.work = Size(2) * x.value.numel() * product(w.value.sizes[1:])


POOLS = [
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
]  # fmt: skip


@rules(POOLS)
def pooling(c: OpContext) -> None:
    x = c.inputs[0]
    for out in c.outputs:
        for i in range(min(2, x.ndim)):
            c.tie(x, i, out, i)


@rules(["embedding"])
def embedding(c: OpContext) -> None:
    table, index, out = c.the("weight"), c.the("indices"), c.out
    # Gradients that are divided by how often a row is read are of all samples together.
    if not c.arguments.get("scale_grad_by_freq"):
        c.sum_over(table, 0, "vocabulary")
        for i in range(index.ndim):
            c.tie(index, i, out, i)
    c.tie(table, 1, out, -1)
    c.hint(table, 0, "vocabulary")


@rules(["_embedding_bag", "embedding_bag", "_embedding_bag_forward_only"])
def embedding_bag(c: OpContext) -> None:
    table = c.the("weight")
    c.tie(table, 1, c.outputs[0], 1)
    c.independent.update(o.slot for o in c.outputs[1:3])
    c.hint(table, 0, "vocabulary")
    index = c.the("indices")
    c.work = index.value.numel() * table.size(1)


@rules(["lstm", "gru", "rnn_tanh", "rnn_relu"])
def recurrent(c: OpContext) -> None:
    x = c.the("input")
    batch_first = bool(c.arguments["batch_first"])
    pos = 0 if batch_first else 1
    c.tie(x, pos, c.outputs[0], pos)
    states = c.arguments["hx"]
    for state in states if isinstance(states, list) else [states]:
        c.tie(x, pos, state, 1)
    for out in c.outputs[1:]:
        c.tie(x, pos, out, 1)
    steps = product((x.size(0), x.size(1)))
    weights = [w for w in c.arguments["params"] if w.ndim == 2]
    # One multiply-add for each entry of every weight matrix at each step.
    total = sum(w.value.numel().coefficient for w in weights)
    c.work = Size(2 * total) * steps
    for w in weights:
        c.hint(w, 0, "hidden")


@rules(["_weight_norm", "_weight_norm_interface"])
def weight_norm(c: OpContext) -> None:
    v, g = c.inputs
    kept = int(c.arguments.get("dim", 0)) % v.ndim
    c.tie(v, kept, c.outputs[0], kept)
    c.broadcast(g, kept, v, kept)
    c.independent.update(o.slot for o in c.outputs[1:])


@rules(["grouped_mm_fallback", "_grouped_mm"], prefix="transformers.")
@rules(["_grouped_mm"])
def grouped_mm(c: OpContext) -> None:
    x, w = c.inputs[0], c.inputs[1]
    if x.ndim != 2 or w.ndim != 3:
        return
    c.tie(x, 0, c.out, 0)
    c.tie(x, 1, w, 1)
    c.sum_over(x, 1)
    c.tie(w, 2, c.out, 1)
    c.sum_over(w, 0, "experts")
    if order.grouped(c, x, c.inputs[2]) and w.size(0) == c.inputs[2].size(0):
        c.leave_partial(x, 0, c.inputs[2])
    else:
        c.block(x, 0)
    c.hint(w, 0, "experts")
    c.hint(w, 2, "width")
    c.linear_in(x)
    c.work = Size(2) * c.out.value.numel() * x.size(1)
