"""State: what steps of generation renew, on one rank: its part of a cache, kept from each step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.parallel.hybrid import Micro

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
