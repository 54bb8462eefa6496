"""Normal form of a captured graph: what is a contraction, a mean or random is written so that it can be split.

- A bias is added after its contraction, so that a split contraction can be reduced in between.
- A mean over samples is a sum divided by a count, so that ranks with unequal counts agree.
- Where rows are put back in the order that they had before a sort, the inverse of the sort has an operator of its own.
- Dropout and random numbers name their operator, so that they are functions of seed, step and position.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardwise.graph import permutation
from shardwise.graph.draws import DRAWS, refuse_draws
from shardwise.graph.rewrite import Rewriter, arguments, shape

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
    """Bring a captured graph to normal form, in place.

    Raises:
        CaptureError: an operator draws random numbers that would depend on the split.
    """
    _drop_assertions(graph)
    rewriter = Rewriter(graph)
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
    refuse_draws(graph)
    graph.lint()


def is_check(node: fx.Node) -> bool:
    """Whether a node computes nothing, but looks whether something holds."""
    return node.op == "call_function" and str(node.target).startswith(("aten._assert_", "aten.sym_constrain"))


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if is_check(node) or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)


def _bias_after(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    bias = a["bias"]
    if bias is None:
        return
    args = list(node.args)
    args[2] = None
    assert callable(node.target)
    product = r.call(node.target, *args, **node.kwargs)
    extra = len(shape(product)) - 2
    if "linear" not in str(node.target) and extra > 0:
        bias = r.call(aten.view.default, bias, [-1] + [1] * extra)
    r.replace(r.call(aten.add.Tensor, product, bias))


def _addmm(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    if a["beta"] != 1 or a["alpha"] != 1:
        return
    product = aten.mm.default if "addmm" in str(node.target) else aten.bmm.default
    right = a["mat2"] if "mat2" in a else a["batch2"]
    left = a["mat1"] if "mat1" in a else a["batch1"]
    r.replace(r.call(aten.add.Tensor, r.call(product, left, right), a["self"]))


def _type_as(r: Rewriter, node: fx.Node) -> None:
    # Of the other tensor only its dtype is wanted, however it is cut.
    a = arguments(node)
    r.replace(r.call(aten._to_copy.default, a["self"], dtype=a["other"].meta["val"].dtype))


def _copy(r: Rewriter, node: fx.Node) -> None:
    # What is written over a part of a tensor. torch has no derivative of it in this form.
    a = arguments(node)
    source, dtype = a["src"], node.meta["val"].dtype
    if source.meta["val"].dtype != dtype:
        source = r.call(aten._to_copy.default, source, dtype=dtype)
    sizes: list[Any] = []
    new = len(shape(node)) - len(shape(source))
    for i, size in enumerate(shape(node)):
        if i >= new and str(shape(source)[i - new]) == str(size):
            sizes.append(-1)
        else:
            sizes.append(r.call(aten.sym_size.int, a["self"], i) if isinstance(size, torch.SymInt) else size)
    r.replace(source if all(size == -1 for size in sizes) else r.call(aten.expand.default, source, sizes))


def _repeat_interleave(r: Rewriter, node: fx.Node) -> None:
    # The size of the output follows from the input's, however that is cut.
    if arguments(node)["output_size"] is not None:
        r.replace(r.again(node, output_size=None))


def _squeeze(r: Rewriter, node: fx.Node) -> None:
    # Named are the dims that go: a rank that has one sample still has a dim of samples.
    a = arguments(node)
    sizes = shape(a["self"])
    given = a.get("dim", range(len(sizes)))
    places = [given] if isinstance(given, int) else list(given)
    gone = [p % len(sizes) for p in places if isinstance(sizes[p], int) and sizes[p] == 1] if sizes else []
    r.replace(r.call(aten.squeeze.dims, a["self"], gone) if gone else a["self"])


def _cat(r: Rewriter, node: fx.Node) -> None:
    # torch lets an empty vector be joined to anything; caches of keys and values begin as one.
    parts = arguments(node)["tensors"]
    ndim = len(shape(node))
    kept = [part for part in parts if ndim == 1 or list(map(str, shape(part))) != ["0"]]
    if len(kept) < len(parts):
        r.replace(r.again(node, tensors=kept) if len(kept) > 1 else kept[0])


def _slice_scatter(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    source, old = a["src"].meta["val"], a["self"].meta["val"]
    if source.dtype != old.dtype:
        return
    dim, start, step = a["dim"] % old.ndim, a["start"] or 0, a["step"]
    size, part = old.shape[dim], source.shape[dim]
    if str(size) == str(part):
        # All of a tensor is written over.
        r.replace(a["src"])
    elif source.is_complex() and step == 1 and isinstance(size, int) and isinstance(part, int):
        # torch has no derivative of it for complex numbers.
        start = start + size if start < 0 else start
        before, after = ((a["self"], dim, 0, start), (a["self"], dim, start + part, size))
        ends = [r.call(aten.slice.Tensor, *end) if end[3] > end[2] else None for end in (before, after)]
        r.replace(r.call(aten.cat.default, [n for n in (ends[0], a["src"], ends[1]) if n is not None], dim))


def _mean_loss(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    if a["reduction"] != MEAN:
        return
    total = r.again(node, reduction=SUM)
    r.replace(r.call(aten.div.Tensor, total, _numel(r, a["self"])))


def _numel(r: Rewriter, node: fx.Node) -> Any:
    """The number of elements of a node's value, as a node where it depends on the number of samples."""
    count: Any = 1
    for i, size in enumerate(shape(node)):
        count = _times(r, count, r.call(aten.sym_size.int, node, i) if isinstance(size, torch.SymInt) else size)
    return count


def _times(r: Rewriter, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return r.call(operator.mul, a, b)


def _cross_entropy(r: Rewriter, node: fx.Node) -> None:
    a = arguments(node)
    target = a["target"]
    if a["reduction"] == NONE and not target.meta["val"].is_floating_point():
        # torch 2.13 captures this with the shape of a scalar.
        node.meta["val"] = target.meta["val"].to(a["self"].meta["val"].dtype)
    if a["reduction"] != MEAN:
        return
    total = r.again(node, reduction=SUM)
    if target.meta["val"].is_floating_point():
        logits = shape(a["self"])
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


def _constant(r: Rewriter, node: fx.Node) -> None:
    """A constant tensor takes no other tensor, not even for its dtype: there is nothing to be had of it."""
    a, value = arguments(node), node.meta["val"]
    filled = (a["fill_value"],) if "fill_value" in a else ()
    plain = _CONSTANTS[str(node.target)]
    r.replace(r.call(plain, a["size"], *filled, dtype=value.dtype, device=value.device))


_CONSTANTS = {
    "aten.new_empty.default": aten.empty.memory_format,
    "aten.new_full.default": aten.full.default,
    "aten.new_ones.default": aten.ones.default,
    "aten.new_zeros.default": aten.zeros.default,
}


def _written(r: Rewriter, node: fx.Node) -> None:
    # One value wherever a mask says so is a choice between it and what was there, entry by entry.
    a = arguments(node)
    sizes = list(map(str, shape(a["self"])))
    mask, *others = a["indices"]
    plain = mask is not None and not others and mask.meta["val"].dtype == torch.bool
    if not plain or list(map(str, shape(mask))) != sizes or shape(a["values"]) or a["accumulate"]:
        permutation.written(r, node)
        return
    r.replace(r.call(aten.where.self, mask, a["values"], a["self"]))


_CHANGES: dict[str, Callable[[Rewriter, fx.Node], None]] = {
    "aten.linear": _bias_after,
    "aten.conv1d": _bias_after,
    "aten.conv2d": _bias_after,
    "aten.conv3d": _bias_after,
    "aten.conv_transpose1d": _bias_after,
    "aten.conv_transpose2d": _bias_after,
    "aten.conv_transpose3d": _bias_after,
    "aten.convolution": _bias_after,
    "aten.type_as": _type_as,
    "aten.cat": _cat,
    "aten.squeeze": _squeeze,
    "aten.slice_scatter": _slice_scatter,
    "aten.copy": _copy,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.cross_entropy_loss": _cross_entropy,
    "aten.nll_loss_nd": _cross_entropy,
    "aten.nll_loss": _cross_entropy,
    "aten.index_put": _written,
    "aten.scatter": permutation.written,
    "aten.sort": permutation.sorted_again,
    "aten.argsort": permutation.sorted_again,
    "aten.new_empty": _constant,
    "aten.new_full": _constant,
    "aten.new_ones": _constant,
    "aten.new_zeros": _constant,
    **DRAWS,
}
CHANGED = frozenset(_CHANGES)
"""Names of operators that the normal form writes differently."""
