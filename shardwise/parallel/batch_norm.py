"""Batch normalisation of a batch that is cut over ranks, with the statistics of all samples.

Forward gathers each rank's mean, sum of squared deviations and count, and combines them (Chan et al. 1979), which
unlike sums of squares does not cancel. Backward sums two numbers per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.collectives import all_reduce_, join
from shardwise.parallel.mesh import Axis

aten = torch.ops.aten
FORWARD_ROWS, BACKWARD_ROWS = 3, 2
"""Numbers per channel that travel over each axis: gathered in forward, summed in backward."""
PIECE = 65536
"""Elements whose deviations are squared at a time."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    axes: Sequence[Axis],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalises [samples, channels, ...] over all but channels, and over the ranks of `axes`.

    Returns:
        The output; per channel the mean, the inverse standard deviation, and the new running mean and variance.
    """
    out, mean, variance, count = _SplitBatchNorm.apply(x, weight, bias, eps, axes)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        inverse = torch.rsqrt(variance + eps)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        new_mean = running_mean.lerp(mean.to(running_mean.dtype), momentum)
        new_var = running_var.lerp(unbiased.to(running_var.dtype), momentum)
    return out, mean, inverse, new_mean, new_var


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of a tensor."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _SplitBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: Sequence[Axis]
    ) -> Any:
        mean, variance, count = _statistics(x.to(statistics_dtype(x.dtype)), axes)
        kept = weight if weight is None else weight.to(mean.dtype)
        shift = bias if bias is None else bias.to(mean.dtype)
        ctx.save_for_backward(x, kept, mean, variance, count)
        ctx.eps, ctx.axes = eps, axes
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.mark_non_differentiable(mean, variance, count)
        return aten.native_batch_norm.default(x, kept, shift, mean, variance, False, 0.0, eps)[0], mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        # With the statistics held fixed: this rank's gradients, of weight and bias as they are to be summed.
        back, for_weight, for_bias = aten.native_batch_norm_backward.default(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        if ctx.needs_input_grad[0]:
            # What the statistics' own dependence on x adds is linear in x: slope · x + shift.
            sums = torch.stack([for_weight, for_bias])
            for axis in ctx.axes:
                all_reduce_(sums, axis)
            inverse = torch.rsqrt(variance + ctx.eps)
            scale = (inverse if weight is None else weight * inverse) / -count
            slope = scale * inverse * sums[0]
            shift = scale * sums[1] - slope * mean
            shape = _per_channel(x)
            back.addcmul_(x, slope.view(shape)).add_(shift.view(shape))
        grads = [None if d is None else g.to(d) for g, d in zip((for_weight, for_bias), ctx.dtypes, strict=True)]
        return back, *grads, None, None


def _statistics(x: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over all ranks; the count is a scalar."""
    over = [i for i in range(x.ndim) if i != 1]
    mean = x.mean(over)
    squares = torch.zeros_like(mean)
    # On a CPU in pieces that stay in its cache: a whole tensor of deviations takes longer to allocate than to compute.
    samples = max(1, PIECE // max(x[:1].numel(), 1)) if x.device.type == "cpu" else len(x)
    for piece in x.split(samples):
        deviations = piece - mean.view(_per_channel(x))
        squares += deviations.mul_(deviations).sum(over)
    count = x.numel() // max(x.shape[1], 1)
    rows = torch.stack([mean, squares, torch.full_like(mean, count)])
    for axis in axes:
        means, squares, counts = join(rows.unsqueeze(0), axis, 0, 1, [1] * axis.size).unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        rows = torch.stack([mean, (squares + counts * (means - mean).square()).sum(0), total])
    mean, squares, counts = rows.unbind(0)
    return mean, squares / counts, counts[:1].squeeze(0)


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.ndim - 2)
