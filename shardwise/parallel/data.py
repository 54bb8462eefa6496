"""Data parallel: gradients summed over the ranks that saw other samples, in buckets, while backward goes on.

Nothing is averaged: losses are sums divided by the global count, so gradients are summed. While gradients accumulate
over micro-batches nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.mesh import Axis


@dataclass(eq=False)
class _Bucket:
    params: list[nn.Parameter]
    axes: tuple[Axis, ...]
    flat: Tensor
    views: list[Tensor]
    waiting: int = 0
    work: Any = None


class GradientSync:
    """Sums gradients over the axes where they are partial.

    Args:
        params: parameters in the order in which the forward pass uses them, each with the axes to sum over.
        bucket_bytes: gradients travel in buckets of about this size.
    """

    def __init__(self, params: Sequence[tuple[nn.Parameter, tuple[Axis, ...]]], bucket_bytes: int) -> None:
        self.buckets: list[_Bucket] = []
        self._where: dict[nn.Parameter, tuple[_Bucket, int]] = {}
        self._next = 0
        self._active = False
        groups: dict[tuple[tuple[Axis, ...], torch.dtype], list[nn.Parameter]] = {}
        # Backward reaches the last used parameters first.
        for param, axes in reversed(list(params)):
            real = tuple(axis for axis in axes if axis.group is not None)
            if real:
                groups.setdefault((real, param.dtype), []).append(param)
        for (real, dtype), members in groups.items():
            for chunk in _by_size(members, bucket_bytes):
                self._add(chunk, real, dtype)
        self._handles = [p.register_post_accumulate_grad_hook(self._ready) for p in self._where]

    def _add(self, params: list[nn.Parameter], axes: tuple[Axis, ...], dtype: torch.dtype) -> None:
        flat = torch.zeros(sum(p.numel() for p in params), dtype=dtype, device=params[0].device)
        views = [v.view(p.shape) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
        bucket = _Bucket(params, axes, flat, views)
        for i, p in enumerate(params):
            self._where[p] = (bucket, i)
        self.buckets.append(bucket)

    def begin(self) -> None:
        """The backward pass that comes is the last of this step: send buckets as they fill."""
        self._active = True
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting = len(bucket.params)

    def _ready(self, param: Tensor) -> None:
        if not self._active:
            return
        bucket, i = self._where[param]  # type: ignore[index]
        self._collect(bucket, i)
        bucket.waiting -= 1
        # Every rank sends its buckets in the same order, whatever order they fill in.
        while self._next < len(self.buckets) and self.buckets[self._next].waiting <= 0:
            self._send(self.buckets[self._next])
            self._next += 1

    def _collect(self, bucket: _Bucket, i: int) -> None:
        param, view = bucket.params[i], bucket.views[i]
        if param.grad is None:
            view.zero_()
        elif param.grad.data_ptr() != view.data_ptr():
            view.copy_(param.grad)
        param.grad = view

    def _send(self, bucket: _Bucket) -> None:
        *first, last = bucket.axes
        size = bucket.flat.numel() * bucket.flat.element_size()
        for axis in first:
            axis.record("all_reduce", size)
            dist.all_reduce(bucket.flat, group=axis.group)
        last.record("all_reduce", size)
        bucket.work = dist.all_reduce(bucket.flat, group=last.group, async_op=True)

    def finish(self) -> None:
        """Send what has not been sent, parameters without a gradient as zeros, and wait for all."""
        for bucket in self.buckets[self._next :]:
            for i in range(len(bucket.params)):
                self._collect(bucket, i)
            self._send(bucket)
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work = None
        self._active = False
        self._next = 0


def _by_size(params: Sequence[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Runs of parameters of at most `limit` bytes, the first smaller, so that sending starts early."""
    found: list[list[nn.Parameter]] = [[]]
    size = 0
    room = min(limit, 1_000_000)
    for param in params:
        bytes_ = param.numel() * param.element_size()
        if found[-1] and size + bytes_ > room:
            found.append([])
            size, room = 0, limit
        found[-1].append(param)
        size += bytes_
    return [chunk for chunk in found if chunk]
