"""What an expert writes by hand in torch to train the workloads over two ranks: the other side of each ratio.

Every baseline starts from the job's initial weights, takes the global batch, and makes one update of the same optimizer
with the same clipping; its step returns the loss of the global batch on every rank, as Shardwise's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.sync_batch_norm import synchronise
from benchmarks.workloads import Block, Dense, Head
from shardwise.job import Job

Step = Callable[[Any], float]


@dataclass(frozen=True)
class Baseline:
    """A hand-written way to train.

    Attributes:
        name: what it is, as the table prints it.
        step: takes a global batch, makes one update and returns the loss.
    """

    name: str
    step: Step


class NoBaseline(Exception):
    """torch has no such way to split this workload; the message says why."""


def _update(job: Job, module: nn.Module, optimizer: Any) -> None:
    if job.clip_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm)
    optimizer.step()
    optimizer.zero_grad()


def _mean(loss: Tensor) -> float:
    """The mean over ranks that have equally many samples."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _mine(batch: Any) -> list[Tensor]:
    """This rank's samples."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in batch]


# --- one rank ---------------------------------------------------------------------------------------------------------


def one(job: Job, workload: str) -> Baseline:
    """The loop of the tutorial."""
    module = job.build()
    optimizer = job.optimizer(module.parameters())
    assert job.loss is not None
    loss_of = job.loss

    def step(batch: Any) -> float:
        loss: Tensor = loss_of(module(batch[0]), batch)
        loss.backward()
        _update(job, module, optimizer)
        return float(loss)

    return Baseline("plain loop", step)


# --- data -------------------------------------------------------------------------------------------------------------

BUCKET_MB = {"transformer": 25.0, "resnet": 25.0, "lstm": 25.0, "mlp": 25.0}
"""The bucket size with which DistributedDataParallel was fastest here, of 1, 4, 10, 25 and 100 MB."""


def data(job: Job, workload: str) -> Baseline:
    """DistributedDataParallel, gradients as views of its buckets."""
    module = job.build()
    synchronise(module)
    wrapped = nn.parallel.DistributedDataParallel(
        module, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB[workload], broadcast_buffers=False
    )
    return Baseline("DistributedDataParallel", _shared_step(job, module, wrapped))


def _shared_step(job: Job, module: nn.Module, called: nn.Module) -> Step:
    optimizer = job.optimizer(module.parameters())
    assert job.loss is not None
    loss_of = job.loss

    def step(batch: Any) -> float:
        mine = _mine(batch)
        loss: Tensor = loss_of(called(mine[0]), mine)
        loss.backward()
        _update(job, module, optimizer)
        return _mean(loss)

    return step


# --- sharded ----------------------------------------------------------------------------------------------------------


def sharded(job: Job, workload: str) -> Baseline:
    """FSDP2: every layer sharded, its parameters gathered again for backward."""
    from torch.distributed.fsdp import fully_shard

    module = job.build()
    synchronise(module)
    mesh = _mesh()
    assert isinstance(module.layers, nn.ModuleList)
    for layer in module.layers:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return Baseline("fully_shard", _shared_step(job, module, module))


def _mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


# --- tensor -----------------------------------------------------------------------------------------------------------


def tensor(job: Job, workload: str) -> Baseline:
    """DTensor by parallelize_module, columns then rows, as Megatron splits.

    Raises:
        NoBaseline: DTensor cannot split the workload's operators.
    """
    if workload == "resnet":
        raise NoBaseline("parallelize_module has no style for convolutions: DTensor cannot split their channels")
    if workload == "lstm":
        raise NoBaseline("parallelize_module has no style for nn.LSTM: DTensor has no rule for aten.lstm")
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module = job.build()
    mesh = _mesh()
    columns: dict[str, Any] = {}
    assert isinstance(module.layers, nn.ModuleList)
    dense = 0
    for i, layer in enumerate(module.layers):
        at = f"layers.{i}"
        if isinstance(layer, Block):
            for name in ("query", "key", "value", "up"):
                columns[f"{at}.{name}"] = ColwiseParallel()
            for name in ("out", "down"):
                columns[f"{at}.{name}"] = RowwiseParallel()
        elif isinstance(layer, (Dense, nn.Linear)):
            name = f"{at}.linear" if isinstance(layer, Dense) else at
            columns[name] = RowwiseParallel() if dense % 2 else ColwiseParallel()
            dense += 1
        elif isinstance(layer, Head):
            # The logits are not split: with 256 of them the split cross-entropy costs more than it saves.
            continue
    parallelize_module(module, mesh, columns)
    # DTensors and plain tensors do not mix in one fused update or norm.
    split = [p for p in module.parameters() if isinstance(p, DTensor)]
    whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
    optimizers = [job.optimizer(group) for group in (split, whole) if group]
    assert job.loss is not None
    loss_of = job.loss

    def step(batch: Any) -> float:
        loss: Tensor = loss_of(module(batch[0]), batch)
        loss.backward()
        if job.clip_norm is not None:
            norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in (split, whole)]
            norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
            for group in (split, whole):
                nn.utils.clip_grads_with_norm_(group, job.clip_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    return Baseline("parallelize_module", step)


# --- pipeline ---------------------------------------------------------------------------------------------------------


class _ContiguousBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Sendable(nn.Module):
    """Makes activations and gradients contiguous, as sending needs them; a batch-first LSTM's are not."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ContiguousBothWays.apply(x)  # type: ignore[no-untyped-call]
        return y


MICRO_BATCHES = 4
"""Of a global batch in the pipeline, on both sides."""


def pipeline(job: Job, workload: str) -> Baseline:
    """torch.distributed.pipelining, 1F1B, equally many layers in each stage."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = job.build()
    assert isinstance(module.layers, nn.ModuleList)
    count = len(module.layers)
    layers = list(module.layers[count * rank // ranks : count * (rank + 1) // ranks])
    part = nn.Sequential(*([Sendable()] if rank else []), *layers, *([Sendable()] if rank < ranks - 1 else []))
    assert job.loss is not None
    loss_of = job.loss
    stage = PipelineStage(part, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=lambda out, y: loss_of(out, (None, y)))
    optimizer = job.optimizer(part.parameters())

    def step(batch: Any) -> float:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(batch[0])
        else:
            schedule.step(target=batch[1], losses=losses)
        if job.clip_norm is not None:
            norm = nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
            norm = norm.square()
            dist.all_reduce(norm)
            nn.utils.clip_grads_with_norm_(part.parameters(), job.clip_norm, norm.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        if losses:
            total += torch.stack(losses).mean().detach()
        dist.all_reduce(total)
        return float(total)

    return Baseline("pipelining, Schedule1F1B", step)


BASELINES: dict[str, Callable[[Job, str], Baseline]] = {f.__name__: f for f in (one, data, sharded, tensor, pipeline)}
