"""Collectives on local tensors, each with its mirror image in backward.

`Cut` tensors are cut along one leaf of one position: the position is viewed as (lead, leaf, tail), and parts are
joined along the leaf. A geometry is `(pos, lead, sizes)`, the sizes of the leaf on each rank of the axis; they differ
only where the number of samples does not divide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.machine.shared_memory import shares_memory
from shardwise.parallel.mesh import Axis

Sizes = Sequence[int]


# -- without gradients -------------------------------------------------------------------------------------------------


def all_reduce_(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum over the axis, in place."""
    if axis.group is not None:
        axis.record("all_reduce", x.numel() * x.element_size())
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def split_view(x: Tensor, pos: int, lead: int, leaf: int) -> Tensor:
    """`x` with position `pos` seen as (lead, leaf, tail)."""
    tail = x.shape[pos] // max(lead * leaf, 1)
    return x.reshape(*x.shape[:pos], lead, leaf, tail, *x.shape[pos + 1 :])


def merge_view(x: Tensor, pos: int) -> Tensor:
    """The inverse of `split_view`."""
    merged = x.shape[pos] * x.shape[pos + 1] * x.shape[pos + 2]
    return x.reshape(*x.shape[:pos], merged, *x.shape[pos + 3 :])


def take(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes) -> Tensor:
    """This rank's part of a whole tensor."""
    start = sum(sizes[: axis.rank])
    if lead == 1:
        tail = x.shape[pos] // max(sum(sizes), 1)
        return x.narrow(pos, start * tail, sizes[axis.rank] * tail)
    seen = split_view(x, pos, lead, sum(sizes))
    return merge_view(seen.narrow(pos + 1, start, sizes[axis.rank]), pos)


def join(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes, *, on_first: bool = False) -> Tensor:
    """The whole tensor from every rank's part (all-gather); or, on the first rank alone, where others keep theirs."""
    if axis.group is None:
        return x
    mine = split_view(x.contiguous(), pos, lead, sizes[axis.rank])
    kind = "gather" if on_first else "all_gather"
    axis.record(kind, mine.narrow(pos + 1, 0, 1).numel() * max(sizes) * mine.element_size())
    own = padded(mine, max(sizes), pos + 1)
    if on_first and axis.rank:
        dist.gather(own, None, axis.ranks[0], group=axis.group)
        return x
    whole = x.new_empty(_resized(x.shape, pos, sizes[axis.rank], sum(sizes)))
    # What reads the whole need not copy it. Parts arrive where they belong, but not every backend takes gaps.
    places = _parts(whole, pos, lead, sizes)
    fit = len(set(sizes)) == 1 and (shares_memory(axis.group) or all(place.is_contiguous() for place in places))
    got = list(places) if fit else [torch.empty_like(own) for _ in sizes]
    if on_first:
        dist.gather(own, got, axis.ranks[0], group=axis.group)
    else:
        dist.all_gather(got, own, group=axis.group)
    for place, part, n in zip(places, got, sizes, strict=True) if not fit else ():
        place.copy_(part.narrow(pos + 1, 0, n))
    return whole


def sum_parts(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes) -> Tensor:
    """This rank's part of the sum over the axis (reduce-scatter)."""
    if axis.group is None:
        return x
    parts = [padded(part, max(sizes), pos + 1) for part in _parts(x.contiguous(), pos, lead, sizes)]
    if not shares_memory(axis.group):
        parts = [part.contiguous() for part in parts]
    out = x.new_empty(parts[0].shape)
    axis.record("reduce_scatter", out.numel() * out.element_size() * axis.size)
    dist.reduce_scatter(out, parts, group=axis.group)
    return merge_view(out.narrow(pos + 1, 0, sizes[axis.rank]), pos)


def padded(x: Tensor, length: int, pos: int = 0) -> Tensor:
    """`x` with zeros behind position `pos`, because not every backend takes unequal parts."""
    more = length - x.shape[pos]
    return torch.cat([x, x.new_zeros((*x.shape[:pos], more, *x.shape[pos + 1 :]))], dim=pos) if more else x


def exchange_parts(x: Tensor, axis: Axis, source: tuple[int, int, Sizes], target: tuple[int, int, Sizes]) -> Tensor:
    """From a cut along one leaf to a cut along another (all-to-all)."""
    if axis.group is None:
        return x
    (source_pos, source_lead, source_sizes), (pos, lead, sizes) = source, target
    axis.record("all_to_all", x.numel() * x.element_size())
    parts = _parts(x, pos, lead, sizes)
    counts = [part.numel() for part in parts]
    flat = x.new_empty(x.numel())
    for place, part in zip(flat.split(counts), parts, strict=True):
        place.view(part.shape).copy_(part)
    shape = _resized(x.shape, pos, sum(sizes), sizes[axis.rank])
    shape = _resized(shape, source_pos, source_sizes[axis.rank], sum(source_sizes))
    each = math.prod(shape) // sum(source_sizes)
    got = x.new_empty(math.prod(shape))
    dist.all_to_all_single(got, flat, [each * n for n in source_sizes], counts, group=axis.group)
    del flat
    whole = x.new_empty(shape)
    places = _parts(whole, source_pos, source_lead, source_sizes)
    for place, part in zip(places, got.split([each * n for n in source_sizes]), strict=True):
        place.copy_(part.view(place.shape))
    return whole


def _parts(x: Tensor, pos: int, lead: int, sizes: Sizes) -> Sequence[Tensor]:
    """Every rank's part of a whole tensor, its position `pos` seen as (lead, leaf, tail)."""
    return torch.split(split_view(x, pos, lead, sum(sizes)), list(sizes), dim=pos + 1)


def _resized(shape: Sequence[int], pos: int, old: int, new: int) -> list[int]:
    """A shape whose position `pos` has a leaf of another size."""
    return [*shape[:pos], shape[pos] // max(old, 1) * new, *shape[pos + 1 :]]


# -- with gradients ----------------------------------------------------------------------------------------------------


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # A clone: autograd may hand the same tensor to another branch.
        return all_reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes, varies: bool) -> Tensor:
        ctx.at = (axis, pos, lead, sizes)
        ctx.varies = varies
        return join(x, axis, pos, lead, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = sum_parts(grad, *ctx.at) if ctx.varies else take(grad, *ctx.at)
        return back, None, None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes, pads: bool) -> Tensor:
        ctx.at = (axis, pos, lead, sizes)
        ctx.pads = pads
        ctx.shape = x.shape
        return take(x, axis, pos, lead, sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not ctx.pads:
            return join(grad, *ctx.at), None, None, None, None, None
        axis, pos, lead, sizes = ctx.at
        whole = grad.new_zeros(ctx.shape)
        seen = whole.view(*ctx.shape[:pos], lead, sum(sizes), -1, *ctx.shape[pos + 1 :])
        part = seen.narrow(pos + 1, sum(sizes[: axis.rank]), sizes[axis.rank])
        part.copy_(grad.reshape(part.shape))
        return whole, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes) -> Tensor:
        ctx.at = (axis, pos, lead, sizes)
        return sum_parts(x, axis, pos, lead, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return join(grad, *ctx.at), None, None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, source: Any, target: Any) -> Tensor:
        ctx.at = (axis, target, source)
        return exchange_parts(x, axis, source, target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return exchange_parts(grad, *ctx.at), None, None, None


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def vary(x: Tensor, axis: Axis) -> Tensor:
    """Whole → whole, used differently on each rank. Backward: all-reduce."""
    return _Vary.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial → whole: all-reduce. Backward: nothing."""
    return _Reduce.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def gather(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes, varies: bool) -> Tensor:
    """Cut → whole: all-gather. Backward: reduce-scatter where the use varies, else this rank's part."""
    return _Gather.apply(x, axis, pos, lead, sizes, varies)  # type: ignore[no-any-return,no-untyped-call]


def scatter(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes, pads: bool) -> Tensor:
    """Whole → cut: this rank's part. Backward: all-gather, or zeros elsewhere where the sum comes later (`pads`)."""
    return _Scatter.apply(x, axis, pos, lead, sizes, pads)  # type: ignore[no-any-return,no-untyped-call]


def reduce_scatter(x: Tensor, axis: Axis, pos: int, lead: int, sizes: Sizes) -> Tensor:
    """Partial → cut: reduce-scatter. Backward: all-gather."""
    return _ReduceScatter.apply(x, axis, pos, lead, sizes)  # type: ignore[no-any-return,no-untyped-call]


def exchange(x: Tensor, axis: Axis, source: tuple[int, int, Sizes], target: tuple[int, int, Sizes]) -> Tensor:
    """Cut → cut along another leaf: all-to-all. Backward: the way back."""
    return _Exchange.apply(x, axis, source, target)  # type: ignore[no-any-return,no-untyped-call]


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """Forward nothing. Backward: times a factor, for a gradient that every rank has whole and that will be summed."""
    return _ScaleGrad.apply(x, factor)  # type: ignore[no-any-return,no-untyped-call]
