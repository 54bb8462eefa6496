"""Data parallel: gradients summed over the ranks that saw other samples, in buckets, while backward goes on.

Nothing is averaged: losses are sums divided by the global count, so gradients are summed. While gradients accumulate
over micro-batches nothing is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.mesh import Axis

FIRST_BYTES = 1_000_000
"""The bucket that fills first is no larger than this, so that sending starts early."""


class Bucket(ABC):
    """Parameters whose gradients are sent together.

    Attributes:
        params: the parameters.
        waiting: how many of their gradients are still to come.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.waiting = 0

    @abstractmethod
    def collect(self, i: int) -> None:
        """Take the gradient of one parameter, zeros where it has none."""

    @abstractmethod
    def send(self) -> None:
        """Start to sum."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for the sums, and put them where the optimizer looks."""


class GradientSync:
    """Sends buckets of gradients as backward fills them.

    Args:
        buckets: in the order in which backward is expected to fill them.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = list(buckets)
        self._where = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}
        self._next = 0
        self._active = False
        self._handles = [p.register_post_accumulate_grad_hook(weakly(self._ready)) for p in self._where]

    def begin(self) -> None:
        """The backward pass that comes is the last of this step: send buckets as they fill."""
        self._active = True
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting = len(bucket.params)

    def _ready(self, param: Tensor) -> None:
        bucket, i = self._where[param]  # type: ignore[index]
        # Micro-batches accumulate where the sum will be made, so that gradients are there once.
        bucket.collect(i)
        if not self._active:
            return
        bucket.waiting -= 1
        # Every rank sends its buckets in the same order, whatever order they fill in.
        while self._next < len(self.buckets) and self.buckets[self._next].waiting <= 0:
            self._send(self.buckets[self._next])
            self._next += 1

    def _send(self, bucket: Bucket) -> None:
        bucket.send()

    def finish(self) -> None:
        """Send what has not been sent, parameters without a gradient as zeros, and wait for all."""
        for bucket in self.buckets[self._next :]:
            for i in range(len(bucket.params)):
                bucket.collect(i)
            self._send(bucket)
        for bucket in self.buckets:
            bucket.wait()
        self._active = False
        self._next = 0


class SummedBucket(Bucket):
    """Gradients that are summed whole (all-reduce).

    Attributes:
        axes: the axes over which to sum.
        flat: the gradients one after the other; from `collect` on those of parameters are views of it.
    """

    def __init__(self, params: list[nn.Parameter], axes: tuple[Axis, ...]) -> None:
        super().__init__(params)
        self.axes = axes
        self.flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        parts = self.flat.split([p.numel() for p in params])
        self.views = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
        self.work: Any = None

    def collect(self, i: int) -> None:
        take_gradient(self.params[i], self.views[i])

    def send(self) -> None:
        *first, last = self.axes
        size = self.flat.numel() * self.flat.element_size()
        for axis in first:
            axis.record("all_reduce", size)
            dist.all_reduce(self.flat, group=axis.group)
        last.record("all_reduce", size)
        self.work = dist.all_reduce(self.flat, group=last.group, async_op=True)

    def wait(self) -> None:
        self.work.wait()
        self.work = None


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """What calls a method for as long as its object is there, and does not keep it.

    What a parameter calls is held where the garbage collector cannot look: an object that has the parameter, and is
    called by it, would never be freed.
    """
    found = WeakMethod(method)

    def call(*given: object) -> None:
        there = found()
        if there is not None:
            there(*given)

    return call


def take_gradient(param: nn.Parameter, view: Tensor) -> None:
    """Move a parameter's gradient into a part of a bucket."""
    if param.grad is None:
        view.zero_()
    elif param.grad.data_ptr() != view.data_ptr():
        view.copy_(param.grad)
    param.grad = view


def summed_buckets(params: Sequence[tuple[nn.Parameter, tuple[Axis, ...]]], limit: int) -> list[SummedBucket]:
    """Buckets of parameters whose gradients are partial over some axes.

    Args:
        params: in the order in which the forward pass uses them, each with the axes to sum over.
        limit: bytes of a bucket, about.
    """
    groups: dict[tuple[tuple[Axis, ...], torch.dtype], list[nn.Parameter]] = {}
    # Backward reaches the last used parameters first.
    for param, axes in reversed(list(params)):
        real = tuple(axis for axis in axes if axis.group is not None)
        if real:
            groups.setdefault((real, param.dtype), []).append(param)
    return [
        SummedBucket([members[i] for i in chunk], axes)
        for (axes, _), members in groups.items()
        for chunk in by_size([p.numel() * p.element_size() for p in members], limit, FIRST_BYTES)
    ]


def by_size(sizes: Sequence[int], limit: int, first: int) -> list[list[int]]:
    """Runs of at most `limit` bytes together, as indices; the first of at most `first`."""
    found: list[list[int]] = [[]]
    total, room = 0, min(limit, first)
    for i, size in enumerate(sizes):
        if found[-1] and total + size > room:
            found.append([])
            total, room = 0, limit
        found[-1].append(i)
        total += size
    return [run for run in found if run]
