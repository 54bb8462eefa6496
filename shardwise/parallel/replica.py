"""Replica: the parameters of a module that runs as it is, on ranks that differ in their samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.data import FIRST_BYTES, GradientSync, summed_buckets
from shardwise.parallel.mesh import Axis, Mesh, Recorder
from shardwise.parallel.on_demand import OnDemand
from shardwise.parallel.sharded import FlatBucket, ScatteredBucket, make_buckets


class Replica:
    """The parameters of a module, or of the part of it that this rank runs, and the sums that follow backward.

    Args:
        params: by the user's names, in the order in which the module declares them, whole and on any device.
        mesh: this rank's place.
        data: names of the mesh axes over which the batch is cut.
        zero: ZeRO stage.
        bucket_bytes: gradients travel, and parameters are gathered, in buckets of about this size.
        device: where the parameters go.

    Attributes:
        params: the same parameters, which the module has; in stages 1 to 3 their values are parts of buckets.
        plain: those that are kept as they are.
        buckets: the others, in parts over one axis.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], mesh: Mesh, data: Sequence[str], *, zero: int, bucket_bytes: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.params, self._zero = dict(params), zero
        self._axes = [axis for name in data if (axis := mesh[name]).group is not None]
        self._copies = math.prod(axis.size for axis in self._axes)
        self._trained = {n: p for n, p in params.items() if p.requires_grad}
        cut = self._trained if zero and self._axes else {}
        self.plain = {n: p for n, p in params.items() if n not in cut}
        for param in self.plain.values():
            param.data = param.data.to(device)
        self.buckets = make_buckets(
            [(n, p, self._axes[0], tuple(self._axes[1:])) for n, p in cut.items()],
            lambda name: (), bucket_bytes, bucket_bytes if zero == 3 else FIRST_BYTES,
        )  # fmt: skip
        for bucket in self.buckets:
            self._move(bucket, bucket.shard.detach().to(device))
        left = [(p, tuple(self._axes)) for n, p in self._trained.items() if n in self.plain]
        self._summed = summed_buckets(left, bucket_bytes)
        self._lent = OnDemand(self.buckets[::-1], self.params, mesh) if zero == 3 and self.buckets else None
        scattered = []
        if self._lent is None:
            for bucket in self.buckets:
                self._flatten(bucket)
                members = [self.params[name] for name in bucket.names]
                scattered.append(ScatteredBucket(bucket, members, frees=zero == 2))
        self._sync = GradientSync([*self._summed, *scattered])

    def _flatten(self, bucket: FlatBucket) -> None:
        """ZeRO 1 and 2: the module's parameters are views of a flat tensor, of which this rank's part is the shard."""
        full = bucket.gather()
        self._move(bucket, full.chunk(bucket.axis.size)[bucket.axis.rank])
        for name, view in zip(bucket.names, bucket.views(full), strict=True):
            self.params[name].data = view

    def _move(self, bucket: FlatBucket, shard: Tensor) -> None:
        """Keep a bucket's part in this tensor."""
        bucket.shard.data = shard
        for i, name in enumerate(bucket.names):
            if name in bucket.pieces:
                low, high = bucket.span(i)
                bucket.pieces[name].data = shard[low:high]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What this rank's optimizer updates of each parameter: all of it, a piece, or nothing."""
        found = {n: [p] for n, p in self.plain.items()}
        for bucket in self.buckets:
            found |= {n: [bucket.pieces[n]] if n in bucket.pieces else [] for n in bucket.names}
        return found

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> AbstractContextManager[None]:
        """What forward and backward passes run in."""
        return self._lent.step() if self._lent is not None else nullcontext()

    def forward(self) -> AbstractContextManager[None]:
        """What one forward pass runs in; every rank makes as many."""
        return self._lent.forward() if self._lent is not None else nullcontext()

    def anchored(self, loss: Tensor) -> Tensor:
        """The loss of a forward pass, to take backward of."""
        return self._lent.anchored(loss) if self._lent is not None else loss

    def begin(self) -> None:
        """The last backward pass of this step comes: what is ready may be sent."""
        self._sync.begin()

    def finish(self, totals: Tensor) -> tuple[float, float]:
        """Sum gradients and totals over all ranks, and divide gradients by the global count.

        A parameter that no rank used has no gradient, as on one device.

        Args:
            totals: [2] float64, the sum and the count of this rank's losses.

        Returns:
            The mean loss and the count, of the global batch.
        """
        arrived = self._lent.used if self._lent is not None else ()
        used = [p.grad is not None or n in arrived for n, p in self._trained.items()]
        self._sync.finish()
        if self._lent is not None:
            self._lent.used.clear()
            for bucket in self.buckets:
                bucket.give(bucket.shard.grad)
                bucket.shard.grad = None
        flags = torch.tensor(used, dtype=totals.dtype, device=totals.device)
        total, count, *users = self.summed(torch.cat([totals, flags])).tolist()
        parts = self.parts()
        for param in (p for name, n in zip(self._trained, users, strict=True) if not n for p in parts[name]):
            param.grad = None
        # Where no item counts the losses are zero.
        divisor = max(count, 1.0)
        grads = [grad for _, grad, _ in self.grads()]
        if grads:
            torch._foreach_div_(grads, divisor)
        return total / divisor, count

    def summed(self, numbers: Tensor) -> Tensor:
        """Numbers summed over the ranks that have other samples."""
        for axis in self._axes:
            axis.record("all_reduce", numbers.numel() * numbers.element_size())
            dist.all_reduce(numbers, group=axis.group)
        return numbers

    def grads(self) -> Iterator[tuple[str, Tensor, float]]:
        """This rank's gradients: name, tensor, and the share by which it counts in a sum over all ranks."""
        for name, param in self.plain.items():
            if param.grad is not None:
                yield name, param.grad, 1.0 / self._copies
        for bucket in self.buckets:
            for name, piece in bucket.pieces.items():
                if piece.grad is not None:
                    yield name, piece.grad, bucket.axis.size / self._copies

    def after_update(self) -> None:
        """ZeRO 1 and 2: fetch the parts that other ranks updated."""
        if self._lent is None:
            for bucket in self.buckets:
                assert bucket.full is not None
                _all_gather(bucket.axis, bucket.shard.detach().clone(), bucket.full, recorded=True)

    def announce(self, recorder: Recorder, micros: int) -> None:
        """The collectives of a step, known beforehand."""
        for summed in self._summed:
            for axis in summed.axes:
                recorder.add("all_reduce", axis.name, summed.flat.numel() * summed.flat.element_size())
        if self._lent is not None:
            self._lent.announce(recorder, micros)
        else:
            for bucket in self.buckets:
                size = bucket.shard.element_size()
                recorder.add("reduce_scatter", bucket.axis.name, bucket.length * size)
                for axis in bucket.also:
                    recorder.add("all_reduce", axis.name, bucket.part * size)
                recorder.add("all_gather", bucket.axis.name, bucket.part * size)
        for axis in self._axes:
            recorder.add("all_reduce", axis.name, (2 + len(self._trained)) * torch.float64.itemsize)

    # -- reading -----------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Tensor]:
        """Every parameter, whole."""
        found = {n: p.detach().clone() for n, p in self.params.items()}
        if self._lent is not None:
            for bucket in self.buckets:
                found |= _gathered(bucket, bucket.shard.detach())
        return found

    def whole_grads(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter, whole; zero where there is none."""
        found = {}
        for name, param in self._trained.items():
            if name in self.plain:
                found[name] = torch.zeros_like(param) if param.grad is None else param.grad.clone()
        for bucket in self.buckets:
            own = torch.zeros_like(bucket.shard)
            for i, name in enumerate(bucket.names):
                if name in bucket.pieces and (grad := bucket.pieces[name].grad) is not None:
                    low, high = bucket.span(i)
                    own[low:high] = grad
            found |= _gathered(bucket, own)
        return {name: found[name] for name in self._trained}

    def first(self, value: Tensor) -> Tensor:
        """A tensor as the first of the ranks has it that have other samples."""
        value = value.contiguous()
        for axis in self._axes:
            dist.broadcast(value, src=axis.ranks[0], group=axis.group)
        return value


def _gathered(bucket: FlatBucket, own: Tensor) -> dict[str, Tensor]:
    full = own.new_empty(bucket.length)
    _all_gather(bucket.axis, own, full)
    return {n: view.clone() for n, view in zip(bucket.names, bucket.views(full), strict=True)}


def _all_gather(axis: Axis, own: Tensor, full: Tensor, *, recorded: bool = False) -> None:
    if recorded:
        axis.record("all_gather", own.numel() * own.element_size())
    dist.all_gather(list(full.chunk(axis.size)), own, group=axis.group)
