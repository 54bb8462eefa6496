"""State: what steps of generation renew, on one rank: its part of a cache, kept from each step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.errors import PlanError
from shardwise.graph.rules import Value
from shardwise.parallel.hybrid import Micro, Split
from shardwise.parallel.schedule import stage_rank

if TYPE_CHECKING:
    from shardwise.parallel.rank import RankModel


def begin(model: RankModel, samples: int, before: Mapping[str, Tensor]) -> None:
    """Begin steps for so many samples, with a cache that is empty.

    Args:
        model: the programs of a step.
        samples: of the steps that come.
        before: this rank's part of what is not zero before the first step, for at least as many samples.
    """
    split, micro = model.split, Micro(samples, 0, samples)
    for name, (value, _) in split.graph.state.items():
        if name in model.buffers:
            shape = split.local_shape(value, split.layout.states[value], micro)
            tensor = torch.zeros(shape, dtype=model.dtype(value.dtype), device=model.device)
            if name in before:
                tensor.copy_(before[name][: shape[0]] if shape else before[name])
            model.replace_buffer(name, tensor)


def go_on(model: RankModel, other: RankModel) -> None:
    """Let a model go on from the state as another one of the same split left it."""
    for name in model.split.graph.state:
        if name in model.buffers and model.buffers[name] is not other.buffers[name]:
            model.replace_buffer(name, other.buffers[name])


def unlike(tensor: Tensor, state: Sequence[Tensor]) -> Tensor:
    """A tensor on its way to another stage; a part of the state is copied, for it would be written over meanwhile."""
    where = tensor.untyped_storage().data_ptr()
    return tensor.clone() if any(t.untyped_storage().data_ptr() == where for t in state) else tensor


def travelling(split: Split, updated: Mapping[str, Value]) -> dict[str, int]:
    """Buffers that one rank of a pipeline makes anew and another reads, with the place of the one.

    Raises:
        PlanError: one is of the state.
    """
    graph, axis = split.graph, split.pipeline
    if axis is None:
        return {}
    names = {v[0]: graph.captured.buffers[n.name] for n, v in graph.values.items() if n.name in graph.captured.buffers}
    readers: dict[str, set[int]] = {}
    for op in graph.ops:
        if not any(v in graph.learned for v in op.outputs):
            continue
        # What no parameter is a part of is computed by each stage that needs it.
        found = list(op.inputs)
        for value in found:
            if value in names:
                readers.setdefault(names[value], set()).add(stage_rank(split.stage_of[op], axis.size))
            elif value in graph.producer and value not in graph.learned:
                found += graph.producer[value].inputs
    owners = {n: stage_rank(split.stage_of[graph.producer[v]], axis.size) for n, v in updated.items()}
    travels = {name: owner for name, owner in owners.items() if readers.get(name, set()) - {owner}}
    apart = next((name for name in travels if name in graph.state), None)
    if apart is not None:
        raise PlanError(
            f"the pipeline reads {apart} in another stage than it renews it in, so that it would travel back with "
            "every token; cut between layers"
        )
    return travels
