"""Which tensors autograd saves for backward, observed: each operator runs under fake tensors with torch's own hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.autograd.graph import saved_tensors_hooks

from shardwise.graph.dims import Size, product
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value


class Saved(NamedTuple):
    """What one operator keeps for backward.

    Attributes:
        values: tensors of the graph; a view stands for the tensor that it is a view of.
        others: bytes of each tensor that is neither an input nor an output, such as the statistics of a norm.
    """

    values: tuple[Value, ...]
    others: tuple[Size, ...]


def saved(graph: Graph) -> Mapping[Op, Saved]:
    """What every operator keeps for backward, in one forward pass.

    An operator that does not run under fake tensors is taken to keep all its inputs and outputs.
    """
    roots: dict[Value, Value] = {}
    found = {}
    for op in graph.ops:
        try:
            found[op] = _observe(graph, op, roots)
        except Exception:  # whatever an operator raises under fake tensors: it only costs precision here
            found[op] = Saved(tuple(dict.fromkeys(roots.get(v, v) for v in [*op.inputs, *op.outputs])), ())
    return found


def _observe(graph: Graph, op: Op, roots: dict[Value, Value]) -> Saved:
    mode = detect_fake_mode([n.meta.get("val") for n in [op.node, *op.node.all_input_nodes]])
    if mode is None:
        return Saved((), ())
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with mode:
        given: dict[fx.Node, Any] = {}
        for node in op.node.all_input_nodes:
            value, fake = graph.value(node), node.meta["val"]
            if value is not None and isinstance(fake, Tensor):
                given[node] = fake.detach().requires_grad_(value in graph.needs_grad)
            else:
                given[node] = fake
        args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), lambda n: given[n])
        assert callable(op.node.target)
        with saved_tensors_hooks(pack, lambda t: t):
            made = op.node.target(*args, **kwargs)
    inputs = {_storage(t): v for n, t in given.items() if (v := graph.value(n)) is not None}
    outputs = [made] if isinstance(made, Tensor) else list(made) if isinstance(made, (list, tuple)) else []
    owners = dict(inputs)
    for tensor, value in zip(outputs, op.outputs, strict=False):
        if isinstance(tensor, Tensor):
            root = inputs.get(_storage(tensor))
            if root is not None:
                roots[value] = roots.get(root, root)
            owners.setdefault(_storage(tensor), value)
    values: dict[Value, None] = {}
    others: list[Size] = []
    for tensor in {id(t): t for t in kept}.values():
        owner = owners.get(_storage(tensor))
        if owner is not None:
            values[roots.get(owner, owner)] = None
        else:
            others.append(product([graph.size(s) for s in tensor.shape]) * tensor.element_size())
    return Saved(tuple(values), tuple(others))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
