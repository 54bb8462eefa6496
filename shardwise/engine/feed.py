"""Feed: which samples of a global batch this rank takes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.errors import PlanError
from shardwise.job import Batch, batch_size, batch_tensors, lift, map_batch
from shardwise.parallel import lower
from shardwise.parallel.hybrid import Split
from shardwise.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's part of a global batch.

    Attributes:
        batch: the samples of this rank, in the order of the micro-batches.
        total: samples of the global batch.
    """

    batch: Batch
    total: int


@dataclass(frozen=True, eq=False)
class Feeder:
    """Cuts global batches as a split wants them.

    Args:
        split: what this rank has of every tensor.
        device: where the samples go.
        dtype: of floating-point tensors; None leaves the data's own.
    """

    split: Split
    device: torch.device
    dtype: torch.dtype | None

    def share(self, batch: Batch) -> Share:
        """This rank's samples of a global batch, in the order of the micro-batches.

        Raises:
            PlanError: the batch is too small to be cut as the plan says.
        """
        total = batch_size(batch)
        self.check(total)
        micros = self.split.micros(total)
        graph = self.split.graph
        names = iter(graph.captured.inputs)
        values = {n.name: v[0] for n, v in graph.values.items() if n.op == "placeholder"}

        def rows(tensor: Tensor) -> Tensor:
            value = values[next(names)]
            if not value.ndim or value.sizes[0].power == 0:
                return tensor.to(self.device)
            spans = [self.split.rows(value, m) for m in micros]
            if all(a[1] == b[0] for a, b in itertools.pairwise(spans)):
                return tensor[spans[0][0] : spans[-1][1]].to(self.device)
            return torch.cat([tensor[a:b] for a, b in spans]).to(self.device)

        return Share(map_batch(lift(batch, self.dtype) if self.dtype else batch, rows), total)

    def tensors(self, share: Share) -> dict[str, Tensor]:
        """The tensors of a share, by the captured graph's names."""
        return dict(zip(self.split.graph.captured.inputs, batch_tensors(share.batch), strict=True))

    def check(self, total: int) -> None:
        """Check that a batch of so many samples can be cut.

        Raises:
            PlanError: it is too small to be cut as the plan says, or the model fixes another number.
        """
        check_parts(self.split.plan, total)
        fixed = self.split.graph.captured.fixed_batch
        if fixed is not None and total != fixed:
            raise PlanError(f"the model fixes its batch at {fixed} samples, but a batch has {total}")


def check_parts(plan: Plan, total: int) -> None:
    """Check that every micro-batch of every rank has a sample.

    Raises:
        PlanError: a batch of `total` samples is too small.
    """
    axes = [axis for axis in plan.axes if "batch" in axis.dims]
    least = total // plan.micro_batches
    for axis in axes:
        least = min(lower.part_sizes(least, (), axis.shares or axis.size))
    if least < 1:
        parts = plan.micro_batches * math.prod(sum(axis.shares) or axis.size for axis in axes)
        shared = "".join(f", shared out {':'.join(map(str, axis.shares))}" for axis in axes if axis.shares)
        ranks = math.prod(axis.size for axis in axes)
        raise PlanError(
            f"a batch of {total} samples cannot be cut into {plan.micro_batches * ranks} parts "
            f"({plan.micro_batches} micro-batches on {ranks} data ranks{shared}); give at least {parts} samples"
        )
