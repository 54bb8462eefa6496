"""The stages of an nn.Sequential that runs as it is: its children, in their order, from one cut to the next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import PlanError
from shardwise.graph.capture import caller
from shardwise.job import Batch, batch_size, map_batch


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The children of an nn.Sequential by name, those of a child that is one itself in its place; none for another."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return {}
    if module._forward_hooks or module._forward_pre_hooks:
        return {}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        inner = layers(child)
        found |= {f"{name}.{key}": value for key, value in inner.items()} if inner else {name: child}
    return found


def balanced_cuts(module: nn.Module, stages: int) -> tuple[str, ...]:
    """Names of the layers at which new stages begin, so that parameters are spread evenly; none for too few layers."""
    found = layers(module)
    if len(found) < stages:
        return ()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in found.values()]
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    names, cuts = list(found), [0]
    for k in range(1, stages):
        allowed = range(cuts[-1] + 1, len(names) - (stages - k) + 1)
        target = sum(sizes) * k / stages
        cuts.append(min(allowed, key=lambda i: abs(before[i] - target)))
    return tuple(names[i] for i in cuts[1:])


def stage_modules(module: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The parts of a Sequential between cuts.

    Raises:
        PlanError: the module is no Sequential, the cuts are not layers of it in order, or stages share parameters.
    """
    if not cuts:
        return [module]
    found = layers(module)
    if not found:
        raise PlanError(f"{type(module).__name__} is no nn.Sequential, so nothing says where to cut it into stages")
    names = list(found)
    missing = [cut for cut in cuts if cut not in found]
    if missing:
        raise PlanError(f"the plan cuts before {missing[0]!r}, but the layers are {', '.join(names)}")
    starts = [0, *(names.index(cut) for cut in cuts)]
    if sorted(set(starts)) != starts:
        raise PlanError(f"cuts must be in order of execution, but are at layers {starts[1:]}")
    stages: list[nn.Module] = [
        nn.Sequential(*(found[name] for name in names[a:b])) for a, b in zip(starts, [*starts[1:], None], strict=True)
    ]
    owner: dict[int, int] = {}
    for s, stage in enumerate(stages):
        for param in stage.parameters():
            if owner.setdefault(id(param), s) != s:
                raise PlanError(
                    f"stages {owner[id(param)]} and {s} share a parameter, and without a captured graph its gradients "
                    "cannot be summed over stages; move the cut, or split by data"
                )
    return stages


@dataclass(frozen=True)
class Between:
    """What one stage gives the next: for each sample `shape`; and whether gradients come back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    def of(self, samples: int) -> tuple[int, ...]:
        return (samples, *self.shape)


def between(stages: Sequence[nn.Module], batch: Batch, device: torch.device) -> list[Between]:
    """What crosses each cut, seen by running copies of the stages on a batch, one after the other.

    Raises:
        PlanError: it is not one tensor with the samples first.
    """
    samples = batch_size(batch)
    value: Any = map_batch(batch, lambda t: t.to(device))
    found = []
    for i, stage in enumerate(stages[:-1]):
        alone = copy.deepcopy(stage).to(device)
        value = alone(value) if i else caller(alone)(value)
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != samples:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PlanError(
                f"stage {i} gives {seen} for {samples} samples, but what crosses a cut must be one tensor with the "
                "samples as its first dim; cut elsewhere, or split by data"
            )
        found.append(Between(tuple(value.shape[1:]), value.dtype, value.requires_grad))
        value = value.detach().requires_grad_(value.requires_grad)
    return found
