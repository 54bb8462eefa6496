"""Normal form of a captured graph: what is a contraction, a mean or random is written so that it can be split.

- A bias is added after its contraction, so that a split contraction can be reduced in between.
- A mean over samples is a sum divided by a count, so that ranks with unequal counts agree.
- Dropout and random numbers name their operator, so that they are functions of seed, step and position.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from shardwise.graph import random

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
_LOSSES = {
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.soft_margin_loss.default,
    aten.kl_div.default,
}


def normalize(graph: fx.Graph, batch_symbols: frozenset[str]) -> None:
    """Bring a captured graph to normal form, in place."""
    _drop_assertions(graph)
    rewriter = _Rewriter(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for name, change in _CHANGES.items():
            if str(getattr(node.target, "overloadpacket", "")) == name:
                rewriter.at(node)
                change(rewriter, node)
                break
        else:
            if node.target in _LOSSES:
                rewriter.at(node)
                _mean_loss(rewriter, node)
    graph.eliminate_dead_code()
    graph.lint()


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the operator's schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        name = str(node.target)
        checks = node.op == "call_function" and name.startswith(("aten._assert_", "aten.sym_constrain"))
        if checks or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)


class _Rewriter:
    """Adds nodes with their fake values, at one place of a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.randoms = 0
        self._origin: fx.Node | None = None

    def at(self, node: fx.Node) -> None:
        self._origin = node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        assert self._origin is not None
        with self.graph.inserting_before(self._origin):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self._origin.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = evaluate(node)
        return node

    def again(self, node: fx.Node, **changes: Any) -> fx.Node:
        """The same call with some arguments changed."""
        given = {**arguments(node), **changes}
        args, kwargs = [], {}
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.kwarg_only:
                kwargs[argument.name] = given[argument.name]
            else:
                args.append(given[argument.name])
        return self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def replace(self, new: fx.Node) -> None:
        assert self._origin is not None
        self._origin.replace_all_uses_with(new)
        self.graph.erase_node(self._origin)

    def next_random(self) -> int:
        self.randoms += 1
        return self.randoms - 1


def evaluate(node: fx.Node) -> Any:
    """The fake value of a node, from the fake values of its arguments."""

    def value(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: n.meta["val"])

    args, kwargs = value(node.args), value(node.kwargs)
    mode = detect_fake_mode([args, kwargs])
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _shape(node: fx.Node) -> Sequence[Any]:
    shape: Sequence[Any] = node.meta["val"].shape
    return shape


def _bias_after(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    bias = a["bias"]
    if bias is None:
        return
    args = list(node.args)
    args[2] = None
    assert callable(node.target)
    product = r.call(node.target, *args, **node.kwargs)
    extra = len(_shape(product)) - 2
    if "linear" not in str(node.target) and extra > 0:
        bias = r.call(aten.view.default, bias, [-1] + [1] * extra)
    r.replace(r.call(aten.add.Tensor, product, bias))


def _addmm(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    if a["beta"] != 1 or a["alpha"] != 1:
        return
    product = aten.mm.default if "addmm" in str(node.target) else aten.bmm.default
    right = a["mat2"] if "mat2" in a else a["batch2"]
    left = a["mat1"] if "mat1" in a else a["batch1"]
    r.replace(r.call(aten.add.Tensor, r.call(product, left, right), a["self"]))


def _type_as(r: _Rewriter, node: fx.Node) -> None:
    # Of the other tensor only its dtype is wanted, however it is cut.
    a = arguments(node)
    r.replace(r.call(aten._to_copy.default, a["self"], dtype=a["other"].meta["val"].dtype))


def _mean_loss(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    if a["reduction"] != MEAN:
        return
    total = r.again(node, reduction=SUM)
    r.replace(r.call(aten.div.Tensor, total, _numel(r, a["self"])))


def _numel(r: _Rewriter, node: fx.Node) -> Any:
    """The number of elements of a node's value, as a node where it depends on the number of samples."""
    count: Any = 1
    for i, size in enumerate(_shape(node)):
        count = _times(r, count, r.call(aten.sym_size.int, node, i) if isinstance(size, torch.SymInt) else size)
    return count


def _times(r: _Rewriter, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return r.call(operator.mul, a, b)


def _cross_entropy(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    target = a["target"]
    if a["reduction"] == NONE and not target.meta["val"].is_floating_point():
        # torch 2.13 captures this with the shape of a scalar.
        node.meta["val"] = target.meta["val"].to(a["self"].meta["val"].dtype)
    if a["reduction"] != MEAN:
        return
    total = r.again(node, reduction=SUM)
    if target.meta["val"].is_floating_point():
        logits = _shape(a["self"])
        classes = 0 if len(logits) == 1 else 1
        count: Any = _numel(r, a["self"])
        r.replace(r.call(aten.div.Tensor, r.call(aten.mul.Tensor, total, logits[classes]), count))
        return
    valid = r.call(aten.ne.Scalar, target, a["ignore_index"])
    if a.get("weight") is None:
        count = r.call(aten.sum.default, valid)
    else:
        safe = r.call(aten.mul.Tensor, target, valid)
        weights = r.call(aten.index.Tensor, a["weight"], [safe])
        count = r.call(aten.sum.default, r.call(aten.mul.Tensor, weights, valid))
    r.replace(r.call(aten.div.Tensor, total, count))


def _dropout(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    p, train = a.get("p"), a.get("train", True)
    x = a["input"]
    several = "native_dropout" in str(node.target)
    if several and len([u for u in node.users if u.args[1] == 1]):
        return
    if "feature" in str(node.target) or "alpha" in str(node.target):
        return
    result = x if not train or p == 0 else r.call(random.dropout, x, p, r.next_random())
    if several:
        for user in list(node.users):
            user.replace_all_uses_with(result)
            r.graph.erase_node(user)
        r.graph.erase_node(node)
    else:
        r.replace(result)


def _attention(r: _Rewriter, node: fx.Node) -> None:
    """Attention with dropout, written out: its mask must not depend on the split."""
    a = arguments(node)
    if not a["dropout_p"]:
        return
    q, k, v = a["query"], a["key"], a["value"]
    if a["enable_gqa"] and _shape(q)[-3] != _shape(k)[-3]:
        times = _shape(q)[-3] // _shape(k)[-3]
        k, v = (r.call(aten.repeat_interleave.self_int, t, times, -3) for t in (k, v))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(_shape(q)[-1])
    scores = r.call(aten.matmul.default, r.call(aten.mul.Tensor, q, scale), r.call(aten.transpose.int, k, -2, -1))
    if a["is_causal"]:
        rows, columns = _shape(q)[-2], _shape(k)[-2]
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


def _uniform(r: _Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    value = node.meta["val"]
    size = a.get("size")
    if size is None:
        like = a["self"]
        size = [
            r.call(aten.sym_size.int, like, i) if isinstance(s, torch.SymInt) else s
            for i, s in enumerate(_shape(like))
        ]
    name = str(node.target)
    draw = random.normal if "randn" in name else random.uniform
    result = r.call(draw, size, r.next_random(), dtype=value.dtype, device=value.device)
    if "bernoulli" in name:
        chance = a.get("p") if a.get("p") is not None else a["self"]
        below = aten.lt.Scalar if isinstance(chance, float) else aten.lt.Tensor
        result = r.call(aten._to_copy.default, r.call(below, result, chance), dtype=value.dtype)
    r.replace(result)


_CHANGES: dict[str, Callable[[_Rewriter, fx.Node], None]] = {
    "aten.linear": _bias_after,
    "aten.conv1d": _bias_after,
    "aten.conv2d": _bias_after,
    "aten.conv3d": _bias_after,
    "aten.conv_transpose1d": _bias_after,
    "aten.conv_transpose2d": _bias_after,
    "aten.conv_transpose3d": _bias_after,
    "aten.convolution": _bias_after,
    "aten.type_as": _type_as,
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.cross_entropy_loss": _cross_entropy,
    "aten.nll_loss_nd": _cross_entropy,
    "aten.nll_loss": _cross_entropy,
    "aten.dropout": _dropout,
    "aten.native_dropout": _dropout,
    "aten.scaled_dot_product_attention": _attention,
    "aten.rand": _uniform,
    "aten.rand_like": _uniform,
    "aten.randn": _uniform,
    "aten.randn_like": _uniform,
    "aten.bernoulli": _uniform,
}
