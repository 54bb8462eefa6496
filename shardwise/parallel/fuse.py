"""Fusions of a written program, where nothing that splits came between its operators."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def fuse_bias(graph: fx.Graph) -> None:
    """Put a bias back into the product it follows, where nothing comes between them."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        product, bias = node.args
        if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node) or len(product.users) != 1:
            continue
        linear = product.target is aten.linear.default and bias.op == "get_attr"
        if bias.target in _VIEWS and product.target in _CONVOLUTIONS:
            bias, linear = bias.all_input_nodes[0], True
        if product.target is aten.mm.default and bias.op == "get_attr":
            with graph.inserting_before(node):
                fused = graph.call_function(aten.addmm.default, (bias, *product.args))
        elif linear:
            args = list(product.args)
            args[2:3] = [bias]
            assert callable(product.target)
            with graph.inserting_before(node):
                fused = graph.call_function(product.target, tuple(args), dict(product.kwargs))
        else:
            continue
        fused.meta.update({key: node.meta[key] for key in ("block", "ndim") if key in node.meta})
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(product)
    graph.eliminate_dead_code()


_VIEWS: Collection[Any] = {aten.view.default, aten.reshape.default}
_CONVOLUTIONS: Collection[Any] = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip
