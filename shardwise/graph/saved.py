"""What backward needs, observed: operators run under fake tensors, with torch's own hooks for saved tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.autograd.graph import saved_tensors_hooks

from shardwise.graph.backward import look_back, weigh_back
from shardwise.graph.blocks import key_of
from shardwise.graph.capture import without_logs
from shardwise.graph.dims import Size, product
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value

_MOST = 2**26
"""Entries of a tensor beyond which an operator is not run for a look."""


class Saved(NamedTuple):
    """What one operator keeps for backward, and what that makes.

    Attributes:
        values: tensors of the graph; a view stands for the tensor that it is a view of.
        others: bytes of each tensor that is neither an input nor an output, such as the statistics of a norm.
        fresh: tensors of the graph whose gradient is a new one, and not a view of what comes back, nor the same.
        room: bytes that backward takes besides at its fullest moment, to be added up.
    """

    values: tuple[Value, ...]
    others: tuple[Size, ...]
    fresh: tuple[Value, ...] = ()
    room: tuple[Size, ...] = ()


def saved(graph: Graph) -> Mapping[Op, Saved]:
    """What every operator keeps for backward, in one forward pass, and what its backward makes.

    Operators that are alike are looked at once. One that does not run under fake tensors is run on one sample and on
    two; one that does not run at all is taken to keep all its inputs and outputs.
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
        fresh = dict.fromkeys(op.inputs[i] for i in look.fresh)
        found[op] = Saved(tuple(kept), look.others, tuple(fresh), look.room)
    return found


class _Seen(NamedTuple):
    """What was seen of an operator.

    Attributes:
        kept: places of kept tensors among its inputs and outputs.
        others: as in `Saved`.
        views: places of outputs that are views, and of what they are views of.
        fresh: places of inputs whose gradients are new tensors.
        room: as in `Saved`.
    """

    kept: tuple[int, ...]
    others: tuple[Size, ...]
    views: tuple[tuple[int, int], ...]
    fresh: tuple[int, ...] = ()
    room: tuple[Size, ...] = ()


def _observe(graph: Graph, op: Op) -> _Seen:
    nodes = op.node.all_input_nodes
    mode = detect_fake_mode([n.meta.get("val") for n in [op.node, *nodes]])
    if mode is None:
        return _Seen((), (), ())
    # Whatever an operator raises only costs precision here.
    with contextlib.suppress(Exception), without_logs(), mode:
        given = {n: n.meta["val"].detach() if graph.value(n) else n.meta["val"] for n in nodes}
        seen, outs, wanted = _run(graph, op, given)
        with contextlib.suppress(Exception):
            back = look_back(outs, [t for _, t in wanted], lambda t: _bytes(graph, t))
            return seen._replace(fresh=tuple(wanted[i][0] for i in back.fresh), room=_affine(*back.room))
        return seen._replace(fresh=tuple(i for i, _ in wanted))
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
        runs = [_run(graph, op, {n: _real(graph, n, samples) for n in nodes}) for samples in (1, 2)]
        others = [float(sum(size.at(1) for size in seen.others)) for seen, _, _ in runs]
        seen, _, wanted = runs[1]
        fresh, room = tuple(i for i, _ in wanted), [0.0, 0.0]
        with contextlib.suppress(Exception):
            weighed = [weigh_back(outs, [t for _, t in asked]) for _, outs, asked in runs]
            fresh, room = tuple(wanted[i][0] for i in weighed[1][0]), [size for _, size in weighed]
        return _Seen(seen.kept, _affine(*others), seen.views, fresh, _affine(*room))
    return _Seen(tuple(range(len(op.inputs) + len(op.outputs))), (), (), tuple(range(len(op.inputs))))


def _affine(one: float, two: float) -> tuple[Size, Size]:
    """What a number of bytes is made of that is known for one sample and for two: of each sample, and once."""
    each = max(int(two - one), 0)
    return Size(each, 1), Size(max(int(one) - each, 0), 0)


def _bytes(graph: Graph, tensor: Tensor) -> tuple[int, int]:
    """Bytes of a fake tensor with one sample and with two."""
    size = product([graph.size(s) for s in tensor.shape]) * tensor.element_size()
    return size.at(1), size.at(2)


def _real(graph: Graph, node: fx.Node, samples: int) -> Any:
    """A node's value for so many samples, on the CPU and full of zeros; a number stays one.

    Raises:
        ValueError: it is too large to be made for a look.
    """
    fake = node.meta["val"]
    if not isinstance(fake, Tensor):
        return fake if isinstance(fake, (int, float, bool)) else graph.size(fake).at(samples)
    shape = [graph.size(s).at(samples) for s in fake.shape]
    if math.prod(shape) > _MOST:
        raise ValueError(f"{shape} has more than {_MOST} entries")
    return torch.zeros(shape, dtype=fake.dtype)


def _run(graph: Graph, op: Op, given: Mapping[fx.Node, Any]) -> tuple[_Seen, list[Tensor], list[tuple[int, Tensor]]]:
    """What an operator keeps when it is run on these; what it makes; and its inputs that get gradients, by place."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for node, tensor in given.items():
        if isinstance(tensor, Tensor) and graph.value(node) in graph.needs_grad:
            tensor.requires_grad_()
    args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), lambda n: given[n])
    assert callable(op.node.target)
    with saved_tensors_hooks(pack, lambda t: t):
        made = op.node.target(*args, **kwargs)
    inputs: dict[int, int] = {}
    for node, tensor in given.items():
        value = graph.value(node)
        if isinstance(tensor, Tensor) and value is not None and value in op.inputs:
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
    values = {node: graph.value(node) for node in given}
    wanted = {op.inputs.index(v): given[n] for n, v in values.items() if v in graph.needs_grad and v in op.inputs}
    outs = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    return _Seen(tuple(found), tuple(others), tuple(views)), outs, sorted(wanted.items(), key=lambda each: each[0])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
