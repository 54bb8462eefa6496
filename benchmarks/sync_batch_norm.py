"""Batch normalisation over the samples of all ranks, for the baselines: torch's own SyncBatchNorm refuses CPU tensors.

As torch's does on a GPU: the ranks' means and variances are gathered and combined; backward sums two values a channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.BatchNorm2d, sizes: list[int]) -> Tensor:
        over = [0, 2, 3]
        pixels = x.shape[2] * x.shape[3]
        # In two passes: torch.var_mean is ten times slower on a CPU.
        mean = x.mean(over)
        centred = x - mean.view(1, -1, 1, 1)
        var = centred.mul_(centred).mean(over)
        mine = torch.stack([mean, var])
        ranks = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(ranks, mine)
        counts = mine.new_tensor([n * pixels for n in sizes]).view(-1, 1)
        means, variances = torch.stack(ranks).unbind(1)
        total = sum(sizes) * pixels
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        if layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None:
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(var * (total / (total - 1)), layer.momentum)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.total = layer.eps, total
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, layer.eps, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        # With fixed statistics, torch's kernel gives this rank's two sums, and the gradient as far as it needs none.
        back, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([for_weight, for_bias])
        dist.all_reduce(sums)
        inverse = torch.rsqrt(var + ctx.eps)
        slope = -weight * inverse * inverse * sums[0] / ctx.total
        shift = -slope * mean - weight * inverse * sums[1] / ctx.total
        back.addcmul_(x, slope.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))
        return back, for_weight, for_bias, None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics are of the samples of all ranks, which all have the same number of them."""

    def forward(self, input: Tensor) -> Tensor:
        sizes = [input.shape[0]] * dist.get_world_size()
        y: Tensor = _SyncBatchNorm.apply(input, self.weight, self.bias, self, sizes)  # type: ignore[no-untyped-call]
        return y


def synchronise(module: nn.Module) -> None:
    """Turn every `nn.BatchNorm2d` within a module into one over all ranks, in place."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
