"""Random operators in normal form: each draws numbers that name it, so that they do not depend on the split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardwise.errors import CaptureError
from shardwise.graph import random
from shardwise.graph.rewrite import Rewriter, arguments, shape

aten = torch.ops.aten


def refuse_draws(graph: fx.Graph) -> None:
    """Check that no operator is left that draws numbers of its own.

    Raises:
        CaptureError: one is; every rank would draw others.
    """
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        given = arguments(node)
        name = str(target.overloadpacket)
        if name == "aten.scaled_dot_product_attention" or (given.get("dropout") == 0 and "num_layers" in given):
            continue
        stack = node.meta.get("nn_module_stack") or {}
        where = next(reversed([path for path, _ in stack.values()]), "").removeprefix("module").removeprefix(".")
        raise CaptureError(
            f"{name}{f' in {where}' if where else ''} draws random numbers inside, which would depend on the split; "
            "write it with torch.rand or F.dropout, or draw the numbers in the dataset"
        )


def _dropout(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    p, train = a.get("p"), a.get("train", True)
    x = a["input"]
    several = "native_dropout" in str(node.target)
    if several and len([u for u in node.users if u.args[1] == 1]):
        return
    result = x if not train or p == 0 else r.call(random.dropout, x, p, r.next_random())
    if several:
        for user in list(node.users):
            user.replace_all_uses_with(result)
            r.graph.erase_node(user)
        r.graph.erase_node(node)
    else:
        r.replace(result)


def _attention(r: Rewriter, node: fx.Node) -> None:
    """Attention with dropout, written out: its mask must not depend on the split."""
    a = arguments(node)
    if not a["dropout_p"]:
        return
    q, k, v = a["query"], a["key"], a["value"]
    if a["enable_gqa"] and shape(q)[-3] != shape(k)[-3]:
        times = shape(q)[-3] // shape(k)[-3]
        k, v = (r.call(aten.repeat_interleave.self_int, t, times, -3) for t in (k, v))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(shape(q)[-1])
    scores = r.call(aten.matmul.default, r.call(aten.mul.Tensor, q, scale), r.call(aten.transpose.int, k, -2, -1))
    if a["is_causal"]:
        rows, columns = shape(q)[-2], shape(k)[-2]
        ones = r.call(aten.ones.default, [rows, columns], dtype=torch.bool, device=q.meta["val"].device)
        mask = r.call(aten.tril.default, ones)
        scores = r.call(aten.where.ScalarOther, mask, scores, -math.inf)
    elif a["attn_mask"] is not None:
        mask = a["attn_mask"]
        if mask.meta["val"].dtype is torch.bool:
            scores = r.call(aten.where.ScalarOther, mask, scores, -math.inf)
        else:
            scores = r.call(aten.add.Tensor, scores, mask)
    weights = r.call(aten.softmax.int, scores, -1)
    weights = r.call(random.dropout, weights, a["dropout_p"], r.next_random())
    r.replace(r.call(aten.matmul.default, weights, v))


def _draw(r: Rewriter, node: fx.Node, kind: Callable[..., Any], dtype: torch.dtype | None = None) -> fx.Node:
    """Numbers of the shape, and the dtype if none is given, that an operator returns."""
    a, value = arguments(node), node.meta["val"]
    size = a.get("size")
    if size is None:
        like = a["self"]
        size = [
            r.call(aten.sym_size.int, like, i) if isinstance(s, torch.SymInt) else s for i, s in enumerate(shape(like))
        ]
    return r.call(kind, size, r.next_random(), dtype=dtype or value.dtype, device=value.device)


def _uniform(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    low, high = a.get("from", 0.0), a.get("to", 1.0)
    found = _draw(r, node, random.uniform)
    if (low, high) != (0.0, 1.0):
        found = r.call(aten.add.Tensor, r.call(aten.mul.Tensor, found, high - low), low)
    r.replace(found)


def _normal(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    mean, deviation = a.get("mean", 0.0), a.get("std", 1.0)
    if isinstance(mean, fx.Node) or isinstance(deviation, fx.Node):
        return
    found = _draw(r, node, random.normal)
    if (mean, deviation) != (0.0, 1.0):
        found = r.call(aten.add.Tensor, r.call(aten.mul.Tensor, found, deviation), mean)
    r.replace(found)


def _bernoulli(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    chance = a.get("p") if a.get("p") is not None else a["self"]
    below = aten.lt.Tensor if isinstance(chance, fx.Node) else aten.lt.Scalar
    found = _draw(r, node, random.uniform, torch.float32)
    r.replace(r.call(aten._to_copy.default, r.call(below, found, chance), dtype=node.meta["val"].dtype))


def _exponential(r: Rewriter, node: fx.Node) -> None:
    rest = r.call(aten.sub.Tensor, r.call(aten.neg.default, _draw(r, node, random.uniform)), -1)
    r.replace(r.call(aten.div.Tensor, r.call(aten.log.default, rest), -arguments(node)["lambd"]))


def _integers(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    low = a.get("low", 0)
    scaled = r.call(aten.mul.Tensor, _draw(r, node, random.uniform, torch.float64), a["high"] - low)
    found = r.call(aten._to_copy.default, r.call(aten.floor.default, scaled), dtype=node.meta["val"].dtype)
    r.replace(r.call(aten.add.Tensor, found, low) if low else found)


DRAWS: dict[str, Callable[[Rewriter, fx.Node], None]] = {
    "aten.dropout": _dropout,
    "aten.native_dropout": _dropout,
    "aten.scaled_dot_product_attention": _attention,
    "aten.rand": _uniform,
    "aten.rand_like": _uniform,
    "aten.uniform": _uniform,
    "aten.randn": _normal,
    "aten.randn_like": _normal,
    "aten.normal": _normal,
    "aten.normal_functional": _normal,
    "aten.bernoulli": _bernoulli,
    "aten.exponential": _exponential,
    "aten.randint": _integers,
}
"""How each random operator is rewritten, by name."""
