"""The engine of a job that does not capture: the module as it is on every rank, or the layers of a Sequential."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engine.base import Engine
from shardwise.engine.feed import Share, check_parts
from shardwise.engine.optimize import build_optimizer, check_elementwise
from shardwise.errors import JobError, PlanError, RunError
from shardwise.graph import random
from shardwise.graph.capture import caller, mean_loss
from shardwise.graph.eager import CountedMean, Lifted, Numbers, PlacedDraws, PlacedDropout, Rows
from shardwise.job import Batch, Job, batch_size, lift, map_batch, slice_batch
from shardwise.machine.backend import Backend
from shardwise.parallel import lower
from shardwise.parallel.channels import Channels
from shardwise.parallel.mesh import Mesh, Recorder, Traffic
from shardwise.parallel.pipeline import Crossing, Pipeline, Stage, total_over_stages
from shardwise.parallel.replica import Replica
from shardwise.parallel.schedule import actions, forward_only, stage_rank
from shardwise.parallel.sequential import between, stage_modules
from shardwise.plan.plan import PIPELINE, Plan
from shardwise.seeding import seed_torch

_RESULTS = ("loss", "count")
"""What the last stage gives of each micro-batch: the sum of its losses, and how many they are."""


class ModuleEngine(Engine):
    """A job under a plan that splits nothing but the batch, or the layers of a Sequential; the module runs as it is.

    The loss is that of the global batch where the job's loss returns `(sum, count)`, where it is one cross-entropy, and
    where it returns a mean over samples: each rank's counts by its samples. What one device computes and this cannot
    know is not the same:

    - another mean over something whose number differs between samples: return `(sum, count)`;
    - what couples the samples of a batch, among it a branch that depends on the whole batch, and batch norm, whose
      statistics are of each rank's micro-batch (the plan has to say so: batch-norm per-micro-batch);
    - dropout masks, where a tensor's samples cannot be told from its shape. All ranks draw independently in any case.

    Buffers that the module changes are each rank's own while it trains; what is read and evaluated is the first rank's.

    Args:
        job: what to train.
        plan: how it is split.
        why: why the job does not capture, for messages.
        module: the module, if it has been built; its parameters are the initial weights, and it is left as it is.
        dtype: runs everything in this dtype; None leaves the model's own.
        backend: the device; None detects it.

    Raises:
        PlanError: the plan needs a captured graph, or does not fit the ranks or the batch.
    """

    graph: None
    _reduction: Replica
    _feeder: _Feeder

    def __init__(
        self, job: Job, plan: Plan, *, why: str, module: nn.Module | None = None, dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        backend = backend or Backend.detect(1)
        self.device = backend.device(dist.get_rank() if dist.is_initialized() else 0)
        self.job, self.plan, self.graph, self._dtype = job, plan, None, dtype
        self.module = copy.deepcopy(module) if module is not None else job.build()
        if dtype is not None:
            lift(self.module, dtype)
        self.module.train()
        _check(plan, self.module, why)
        self.mesh = Mesh.build(plan.axes)
        self._axis = self.mesh.get(PIPELINE)
        stages = stage_modules(self.module, plan.cuts)
        self._feeder = _Feeder(self.mesh, plan, self.device, dtype)
        example = self.job.batch(range(min(2, self.job.global_batch)))
        with self._running(None), self._precision():
            self._between = between(stages, lift(example, dtype) if dtype is not None else example, self.device)
        self._stages = {s: m for s, m in enumerate(stages) if self._here(s)}
        self._owners = self._find_owners(stages)
        self._reduction = self._replica()
        self.optimizer, self.scheduler = build_optimizer(job.optimizer, self.module, self._reduction.parts())
        self._rows: list[Rows] = []
        self._batch: Batch = None
        self._channels = Channels(self.mesh, self._axis, plan.stages, self.device)
        rank, ranks = (self._axis.rank, self._axis.size) if self._axis else (0, 1)
        order = actions(plan.schedule if plan.stages > 1 else "1f1b", rank, ranks, plan.stages, plan.micro_batches)
        mine = [self._stage(s) for s in self._stages]
        self._pipeline = Pipeline(mine, plan.stages, order, self._channels, self._before_last, _RESULTS)
        forward = forward_only(list(self._stages), plan.micro_batches)
        self._forward = Pipeline(mine, plan.stages, forward, self._channels, results=_RESULTS)
        if plan.zero == 3 and len(self._reduction.buckets) > 1:
            self._rehearse()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _here(self, stage: int) -> bool:
        return self._axis is None or stage_rank(stage, self._axis.size) == self._axis.rank

    def _find_owners(self, stages: list[nn.Module]) -> dict[str, int]:
        """The pipeline rank that has a parameter or buffer, by name."""
        ranks = self._axis.size if self._axis else 1
        at = {id(t): stage_rank(s, ranks) for s, m in enumerate(stages) for t in (*m.parameters(), *m.buffers())}
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: at.get(id(tensor), 0) for name, tensor in named}

    def _replica(self) -> Replica:
        """This rank's parameters and buffers on its device; of the others the shapes are left."""
        plan, me = self.plan, self._axis.rank if self._axis else 0
        if plan.zero and plan.data:
            check_elementwise(self.job.optimizer)
        params = {}
        for name, param in self.module.named_parameters():
            if self._owners[name] == me:
                params[name] = param
            else:
                param.data = param.new_empty(()).expand(param.shape)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self.device)
        return Replica(params, self.mesh, plan.data, zero=plan.zero, bucket_bytes=plan.bucket_bytes, device=self.device)

    def _stage(self, s: int) -> Stage:
        def crossing(cut: int) -> list[Crossing]:
            if not 0 <= cut < len(self._between):
                return []
            value = self._between[cut]
            return [Crossing("value", lambda m: value.of(self._rows[m].count), value.dtype, value.grad)]

        return Stage(s, partial(self._run, s), crossing(s - 1), crossing(s))

    def _rehearse(self) -> None:
        """Run a copy of the module on the first batch, so that the ranks know which parameters are read again."""
        real = self._stages
        self._stages = {0: copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})}
        self._take(self.job.batch(range(self.job.global_batch)))
        with torch.no_grad(), self._running(self._rows), self._reduction.step():
            self._forward.step(len(self._rows))
        self._stages = real
        self.mesh.recorder.take()

    def _before_last(self, stage: int) -> None:
        self._stages_left -= 1
        if self._stages_left == 0:
            self._reduction.begin()

    # -- training ----------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch) -> float:
        self._take(batch)
        self._stages_left = len(self._stages)
        with self.mesh.exchanging(), self._running(self._rows), self._reduction.step():
            totals = self._pipeline.step(len(self._rows))
        loss, _ = self._reduction.finish(total_over_stages(totals, self._axis))
        return loss

    def evaluate(self, batches: Iterable[Batch]) -> float:
        self._agree()
        totals = torch.zeros(len(_RESULTS), dtype=torch.float64, device=self.device)
        given = False
        self.module.eval()
        try:
            for batch in batches:
                given = True
                self._take(batch)
                running = self._running(self._rows, evaluating=True)
                with torch.no_grad(), self.mesh.exchanging(), running, self._reduction.step():
                    totals += self._forward.step(len(self._rows))
        finally:
            self.module.train()
        if not given:
            raise JobError("evaluate was given no batch; give at least one")
        loss, count = self._reduction.summed(total_over_stages(totals, self._axis)).tolist()
        self.mesh.recorder.take()
        return float(loss / max(count, 1.0))

    def _take(self, batch: Batch) -> None:
        share = self._taken(batch)
        self._batch, self._rows = share.batch, self._feeder.rows(share.total)

    def _run(self, s: int, m: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stage `s` on micro-batch `m`."""
        stage, rows = self._stages[s], self._rows[m]
        start = sum(r.count for r in self._rows[:m])
        batch = slice_batch(self._batch, start, start + rows.count)
        self._draw(m)
        with self._reduction.forward(), self._precision(), CountedMean() as counted:
            output = stage(received["value"]) if s else caller(stage)(batch)
            if s < self.plan.stages - 1:
                return {"value": self._checked(s, output, rows.count)}
            mean, number = mean_loss(self.job.loss, output, batch)
            number = counted.count_of(mean) if number is None else number
            count = torch.tensor(rows.count) if number is None else number.detach()
            return {"loss": self._reduction.anchored(mean * count.to(mean.device)), "count": count.to(self.device)}

    def _checked(self, s: int, output: Any, samples: int) -> Tensor:
        want = self._between[s]
        if not isinstance(output, Tensor) or output.shape != want.of(samples) or output.dtype != want.dtype:
            seen = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise RunError(
                f"stage {s} gives {seen}, but the next one waits for {want.of(samples)} {want.dtype}, as it was when "
                "the job was set up; shapes that depend on the data cannot cross a cut: cut elsewhere, or split by data"
            )
        return output

    # -- contexts ----------------------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[Any]:
        """What forward passes run in."""
        bf16 = self.plan.precision == "bf16" and self._dtype is None
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    @contextmanager
    def _running(self, rows: list[Rows] | None, *, evaluating: bool = False) -> Iterator[None]:
        """What passes over these micro-batches run in: their random numbers, and in a proof its dtype.

        Backward as well, for activation checkpointing runs parts of the module again.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            if self._dtype is not None:
                stack.enter_context(Lifted(self._dtype))
            if self.plan.dropout == "exact":
                self._numbers = Numbers(self.job.seed, self.steps, rows, evaluating=evaluating)
                stack.enter_context(PlacedDraws(self._numbers, self._dtype or torch.get_default_dtype()))
                stack.enter_context(PlacedDropout(self._numbers))
            yield

    def _draw(self, m: int) -> None:
        """The pass that comes is over micro-batch `m`."""
        if self.plan.dropout == "exact":
            self._numbers.begin(m)
        else:
            key = random.stream(self.job.seed, self.steps, int(not self.module.training))
            seed_torch(random.stream(key, 0, self._rows[m].first))

    # -- reading -----------------------------------------------------------------------------------------------------

    def announced(self, total: int | None = None) -> list[Traffic]:
        recorder = Recorder()
        self._reduction.announce(recorder, self.plan.micro_batches)
        rows = self._feeder.rows(self.job.global_batch if total is None else total)
        axis = self._axis
        if axis is not None and axis.group is not None:
            recorder.add("all_reduce", axis.name, len(_RESULTS) * torch.float64.itemsize)
            for s, row in itertools.product(self._stages, rows):
                for cut, other in ((s, s + 1), (s - 1, s - 1)):
                    if 0 <= cut < len(self._between) and not self._here(other):
                        value = self._between[cut]
                        if value.grad or other > s:
                            size = torch.Size(value.of(row.count)).numel() * value.dtype.itemsize
                            recorder.add("send", axis.name, size)
        if self._needs_norm and self.plan.ranks > 1:
            recorder.add("all_reduce", "all", torch.float64.itemsize)
        return recorder.take()

    def state_dict(self) -> dict[str, Tensor]:
        self._agree()
        found = self._whole(self._reduction.whole())
        kept = self.module.state_dict()
        found |= {n: b.detach().clone() for n, b in self.module.named_buffers(remove_duplicate=False) if n in kept}
        names = {id(p): n for n, p in self.module.named_parameters()}
        for name, param in self.module.named_parameters(remove_duplicate=False):
            found.setdefault(name, found[names[id(param)]])
        return found

    def gradients(self) -> dict[str, Tensor]:
        return self._whole(self._reduction.whole_grads(), trained=True)

    def _whole(self, mine: dict[str, Tensor], *, trained: bool = False) -> dict[str, Tensor]:
        """What all stages have of every parameter, from what this rank has."""
        found = {}
        for name, param in self.module.named_parameters():
            if param.requires_grad or not trained:
                found[name] = mine[name] if name in mine else torch.empty(param.shape, dtype=param.dtype)
                found[name] = self._from_owner(name, found[name].to(self.device))
        return found

    def _from_owner(self, name: str, value: Tensor) -> Tensor:
        """A tensor as the stage has it that it belongs to."""
        if self._axis is not None and self._axis.group is not None:
            value = value.contiguous()
            dist.broadcast(value, src=self._axis.ranks[self._owners[name]], group=self._axis.group)
        return value

    def _agree(self) -> None:
        """Give every rank the same buffers, of those that are saved."""
        kept = self.module.state_dict()
        for name, buffer in self.module.named_buffers():
            if name in kept:
                value = self._reduction.first(self._from_owner(name, buffer.detach().clone()))
                if not torch.equal(value, buffer):
                    buffer.copy_(value)


@dataclass(frozen=True, eq=False)
class _Feeder:
    """Cuts global batches by samples: into micro-batches, and each of them over the ranks."""

    mesh: Mesh
    plan: Plan
    device: torch.device
    dtype: torch.dtype | None

    def rows(self, total: int) -> list[Rows]:
        """This rank's samples of each micro-batch of `total` samples."""
        chain = [(axis.parts, axis.rank) for axis in self.mesh.axes if axis.name != PIPELINE]
        count, found = self.plan.micro_batches, []
        for m in range(count):
            first, samples = lower.chunk_start(total, count, m), lower.chunk(total, count, m)
            found.append(Rows(first + lower.local_start(samples, chain), lower.local_count(samples, chain), total))
        return found

    def share(self, batch: Batch) -> Share:
        """This rank's samples of a global batch, in the order of the micro-batches.

        Raises:
            PlanError: the batch is too small to be cut as the plan says.
        """
        total = batch_size(batch)
        check_parts(self.plan, total)
        rows = self.rows(total)

        def mine(tensor: Tensor) -> Tensor:
            if not tensor.ndim:
                return tensor.to(self.device)
            parts = [tensor[r.first : r.first + r.count] for r in rows]
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.device)

        return Share(map_batch(lift(batch, self.dtype) if self.dtype else batch, mine), total)


def _check(plan: Plan, module: nn.Module, why: str) -> None:
    """Check that a plan needs no captured graph.

    Raises:
        PlanError: it does.
    """

    def refused(fact: str, remedy: str) -> PlanError:
        return PlanError(f"{fact}, which needs a captured graph, but {why}; {remedy}")

    for axis in plan.axes:
        if axis.name != PIPELINE and axis.dims != ("batch",):
            raise refused(f"axis {axis.name} splits {' '.join(axis.dims) or 'nothing'}", "split the batch alone")
    if plan.model:
        raise refused(f"the plan is for the graph {plan.model}", "make a new plan for this model")
    if plan.recompute:
        raise refused("the plan recomputes blocks", "call torch.utils.checkpoint in the model")
    if plan.stages > 1 and plan.schedule == "zero-bubble":
        raise refused("schedule zero-bubble takes backward in two halves", "use schedule 1f1b, gpipe or interleaved")
    if plan.stages > 1 and plan.zero == 3:
        raise refused("the plan has stages and zero 3", "use zero 2")
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if normed and plan.batch_norm == "exact" and (plan.data or plan.micro_batches > 1):
        raise refused("the plan asks for batch norm over the whole batch", "say batch-norm per-micro-batch in the plan")
