"""Reuse: operators that write over the tensor they read, where nothing else reads it.

On a CPU, a fresh tensor's pages are faulted in one by one, which takes longer than to fill them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from shardwise.parallel.batch_norm import batch_norm

aten = torch.ops.aten

_OVERWRITING: Mapping[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
"""Operators that keep shape and dtype, and whose backward needs their output and not their input."""

_PRODUCTS: Mapping[Any, int] = {
    aten.linear.default: 2, aten.mm.default: 2, aten.addmm.default: 2, aten.conv2d.default: 4, aten.conv3d.default: 5,
}  # fmt: skip
"""Operators whose backward needs no output, with the dims for which that is not a view of another tensor."""

_NORMS = (batch_norm, aten._native_batch_norm_legit_functional.default)


def reuse(graph: fx.Graph) -> None:
    """Let operators overwrite what they alone read. A node's `meta["ndim"]` is the dims of its tensor, where known."""
    for node in graph.nodes:
        # What is recomputed must find its inputs as they were.
        if node.target in _OVERWRITING and not node.meta.get("block") and _is_spare(node.args[0]):
            node.target = _OVERWRITING[node.target]


_WRITES: Mapping[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten._unsafe_index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
}
"""Operators that write some positions of their first tensor, and the same in place."""


def overwrite(module: fx.GraphModule, names: Collection[str]) -> None:
    """Let a program write to what it keeps from one step to the next, where nothing else reads it as it was."""
    for node in module.graph.nodes:
        source = node.args[0] if node.target in _WRITES else None
        if isinstance(source, fx.Node) and source.target in names and len(source.users) == 1:
            node.target = _WRITES[node.target]
    if names:
        module.recompile()


def _is_spare(x: Any) -> bool:
    """Whether a tensor has memory of its own, is read once, and is not kept for its operator's backward."""
    if not isinstance(x, fx.Node) or x.op != "call_function" or len(x.users) != 1:
        return False
    if x.target is operator.getitem and x.args[1] == 0:
        source = x.args[0]
        return isinstance(source, fx.Node) and source.target in _NORMS
    return x.target in _PRODUCTS and x.meta.get("ndim") == _PRODUCTS[x.target]
