"""Which tensors autograd saves for backward, observed: operators run under fake tensors with torch's own hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.autograd.graph import saved_tensors_hooks

from shardwise.graph.blocks import key_of
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

    Operators that are alike are looked at once. One that does not run under fake tensors is taken to keep all its
    inputs and outputs.
    """
    roots: dict[Value, Value] = {}
    seen: dict[Any, _Seen] = {}
    found = {}
    for op in graph.ops:
        # Aliases matter: an operator on one tensor twice keeps it once.
        places = tuple(op.inputs.index(v) for v in op.inputs)
        key = (key_of(op), places, tuple(v in graph.needs_grad for v in op.inputs))
        if key not in seen:
            seen[key] = _observe(graph, op)
        look = seen[key]
        tensors = [*op.inputs, *op.outputs]
        for out, source in look.views:
            roots[op.outputs[out]] = roots.get(op.inputs[source], op.inputs[source])
        kept = dict.fromkeys(roots.get(tensors[i], tensors[i]) for i in look.kept)
        found[op] = Saved(tuple(kept), look.others)
    return found


class _Seen(NamedTuple):
    """What was seen of an operator: the places of kept tensors among its inputs and outputs, and which are views."""

    kept: tuple[int, ...]
    others: tuple[Size, ...]
    views: tuple[tuple[int, int], ...]


def _observe(graph: Graph, op: Op) -> _Seen:
    try:
        return _run(graph, op)
    except Exception:  # whatever an operator raises under fake tensors: it only costs precision here
        return _Seen(tuple(range(len(op.inputs) + len(op.outputs))), (), ())


def _run(graph: Graph, op: Op) -> _Seen:
    mode = detect_fake_mode([n.meta.get("val") for n in [op.node, *op.node.all_input_nodes]])
    if mode is None:
        return _Seen((), (), ())
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
    inputs: dict[int, int] = {}
    for node, tensor in given.items():
        value = graph.value(node)
        if value is not None and value in op.inputs:
            inputs.setdefault(_storage(tensor), op.inputs.index(value))
    outputs = [made] if isinstance(made, Tensor) else list(made) if isinstance(made, (list, tuple)) else []
    owners, views = dict(inputs), []
    for place, tensor in enumerate(outputs[: len(op.outputs)]):
        if isinstance(tensor, Tensor):
            if _storage(tensor) in inputs:
                views.append((place, inputs[_storage(tensor)]))
            owners.setdefault(_storage(tensor), len(op.inputs) + place)
    found: dict[int, None] = {}
    others: list[Size] = []
    for tensor in {id(t): t for t in kept}.values():
        owner = owners.get(_storage(tensor))
        if owner is not None:
            found[owner] = None
        else:
            others.append(product([graph.size(s) for s in tensor.shape]) * tensor.element_size())
    return _Seen(tuple(found), tuple(others), tuple(views))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
