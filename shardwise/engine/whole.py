"""Whole tensors from what the ranks have of them: values, gradients and buffers under the user's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.reduction import Reduction
from shardwise.parallel.sharded import FlatBucket


class Whole:
    """Gathers whole tensors. Every method is called by all ranks, and gives the same to each.

    Args:
        module: the user's module, for names and shapes.
        reduction: what this rank has of each parameter.

    Attributes:
        untouched: parameters that the model does not use.
    """

    def __init__(self, module: nn.Module, reduction: Reduction) -> None:
        self.reduction, self.model = reduction, reduction.model
        self.split = self.model.split
        self._params = self.split.graph.params
        device = self.model.device
        self._shapes = {n: p.shape for n, p in module.named_parameters()}
        self.untouched = {n: p.detach().to(device) for n, p in module.named_parameters() if n not in self._params}
        kept = module.state_dict()
        self._buffers = {n: b.detach().to(device) for n, b in module.named_buffers() if n in kept}

    def cut(self) -> bool:
        """Whether some parameter is kept in parts."""
        plain = self.reduction.plain
        return bool(self.reduction.buckets) or any(p.shape != self._shapes[n] for n, p in plain.items())

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what this rank has of each parameter (values or gradients)."""
        return {n: self.one(n, local.get(n)) for n in self._shapes if n in self._params}

    def one(self, name: str, mine: Tensor | None) -> Tensor:
        """One whole parameter from this rank's part. Stages that do not have it receive it."""
        value = self._params[name]
        owner = self._owner(name)
        axis = self.split.pipeline
        whole: Tensor | None = None
        if axis is None or axis.rank == owner:
            if name in self.reduction.where:
                bucket, i = self.reduction.where[name]
                whole = self.split.unshard(value, _gather_flat(bucket, i, mine).view(bucket.shapes[i]))
            else:
                assert mine is not None
                whole = self.split.unshard(value, mine)
        if axis is not None and axis.group is not None:
            if whole is None:
                dtype = self.model.dtype(value.dtype)
                whole = torch.empty(self._shapes[name], dtype=dtype, device=self.model.device)
            whole = whole.contiguous()
            dist.broadcast(whole, src=axis.ranks[owner], group=axis.group)
        assert whole is not None
        return whole

    def _owner(self, name: str) -> int:
        plan = self.split.plan
        return next((s % plan.pipeline for s in range(plan.stages) if name in self.split.stage_params(s)), 0)

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers under the user's names."""
        with torch.no_grad():
            found = {n: t.detach().clone() for n, t in self.gather(self.reduction.values()).items()}
            found.update(self.untouched)
            found.update({n: b.detach().clone() for n, b in self.buffers().items()})
        for copy, original in self.split.graph.captured.tied.items():
            found[copy] = found[original]
        return found

    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers; those that a stage changes come from that stage."""
        found = dict(self._buffers)
        found.update({n: b for n, b in self.model.buffers.items() if n in found})
        axis = self.split.pipeline
        if axis is not None and axis.group is not None:
            for name, value in self.model.updated.items():
                if name in found:
                    owner = self.split.stage_of[self.split.graph.producer[value]] % axis.size
                    found[name] = found[name].clone()
                    dist.broadcast(found[name], src=axis.ranks[owner], group=axis.group)
        return found

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient of every parameter that the model uses; zero where there is none."""
        local = {name: grad for name, grad, _ in self.reduction.grads()}
        for name, param in self.reduction.plain.items():
            local.setdefault(name, torch.zeros_like(param))
        return {name: grad.clone() for name, grad in self.gather(local).items()}


def _gather_flat(bucket: FlatBucket, index: int, mine: Tensor | None) -> Tensor:
    low, high = bucket.span(index)
    own = bucket.shard.new_zeros(bucket.part)
    if high > low and mine is not None:
        own[low:high] = mine
    parts = [torch.empty_like(own) for _ in range(bucket.axis.size)]
    dist.all_gather(parts, own, group=bucket.axis.group)
    start = bucket.starts[index]
    return torch.cat(parts)[start : start + bucket.shapes[index].numel()]
