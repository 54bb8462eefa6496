"""Engine: a job under a plan on this rank. `step` takes a batch and returns the loss of the global batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engine.optimize import build_optimizer, check_elementwise
from shardwise.errors import PlanError
from shardwise.graph import random
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job, batch_size, batch_tensors, map_batch
from shardwise.machine.backend import Backend
from shardwise.parallel.announce import announce
from shardwise.parallel.data import GradientSync
from shardwise.parallel.hybrid import RankModel, Split, check_fixed_batch
from shardwise.parallel.mesh import Axis, Mesh, Traffic
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.schedule import actions
from shardwise.parallel.sharded import FlatBucket, Resharding, make_buckets
from shardwise.plan.plan import Plan


class Engine:
    """A job under a plan, on this rank of an initialised process group (or alone).

    Attributes:
        job, plan, graph: what it was made of.
        mesh: the device mesh.
        optimizer, scheduler: the user's, over this rank's parameters.
        steps: updates made so far.
        grad_norm: 2-norm of the last step's whole gradient, before clipping; None before the first step.
    """

    def __init__(
        self,
        job: Job,
        plan: Plan,
        *,
        module: nn.Module | None = None,
        graph: Graph | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        backend = backend or Backend.detect(1)
        self.device = backend.device(_local_rank())
        self.job, self.plan = job, plan
        module = module if module is not None else job.build()
        dtypes: dict[torch.dtype, torch.dtype] = {}
        if dtype is not None:
            module = module.to(dtype)
            dtypes = {d: dtype for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if d != dtype}
        self._dtype = dtype
        if graph is None:
            graph = Graph.of(job, module, self._cast(job.batch(range(min(2, job.global_batch)))))
        self.graph = graph
        check_fixed_batch(graph, plan)
        if plan.model and plan.model != graph.fingerprint():
            raise PlanError(
                f"the plan is for model {plan.model}, but this one is {graph.fingerprint()}; make a new plan for it"
            )
        self.mesh = Mesh.build([(a.name, a.size) for a in plan.axes])
        self.split = Split(graph, plan, self.mesh)
        self.model = RankModel(
            self.split, module, self.device, dtypes=dtypes, autocast=plan.precision == "bf16" and dtype is None
        )
        self._shapes = {n: p.shape for n, p in module.named_parameters()}
        self._untouched = {n: p.detach().to(self.device) for n, p in module.named_parameters() if n not in graph.params}
        self._whole_buffers = {n: b for n, b in module.named_buffers() if n in module.state_dict()}
        self._stage_ranks = self._ties(module)
        self._prepare_reduction()
        self.optimizer, self.scheduler = self._make_optimizer(module)
        self.steps = 0
        self.grad_norm: float | None = None
        self._fed: tuple[Any, int] | None = None
        self._traffic: list[Traffic] = []
        self._pipeline = self._make_pipeline()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _cast(self, batch: Batch) -> Batch:
        if self._dtype is None:
            return batch
        return map_batch(batch, lambda t: t.to(self._dtype) if t.is_floating_point() else t)

    def _prepare_reduction(self) -> None:
        """Decide for each local parameter how its gradient is summed, and which parameters are kept in parts."""
        model, split, plan = self.model, self.split, self.plan
        data = [self.mesh[name] for name in plan.data]
        self._plain: dict[str, nn.Parameter] = {}
        flat: list[tuple[str, nn.Parameter, Axis, tuple[Axis, ...]]] = []
        sums: dict[str, tuple[Axis, ...]] = {}
        for name, param in model.params.items():
            axes = split.sums(self.graph.params[name]) if param.requires_grad else ()
            cutting = next((axis for axis in data if axis in axes), None)
            if plan.zero and cutting is not None and name not in self._stage_ranks:
                flat.append((name, param, cutting, tuple(a for a in axes if a is not cutting)))
            else:
                self._plain[name] = param
                sums[name] = axes
        self.buckets: list[FlatBucket] = make_buckets(flat, self._block_of, plan.bucket_bytes)
        self._sync = GradientSync([(p, sums[n]) for n, p in self._plain.items() if p.requires_grad], plan.bucket_bytes)
        self._where = {n: (b, i) for b in self.buckets for i, n in enumerate(b.names)}
        if plan.zero == 3:
            self.model.gather_buckets(self.buckets)
        else:
            self._flatten()

    def _block_of(self, name: str) -> str:
        return ".".join(name.split(".")[:-2]) if self.plan.zero == 3 else ""

    def _flatten(self) -> None:
        """ZeRO 1 and 2: whole parameters are views of a flat tensor of which this rank's part is the shard."""
        for bucket in self.buckets:
            full = bucket.gather()
            part = bucket.part
            low = bucket.axis.rank * part
            bucket.shard.data = full[low : low + part]
            for i, (name, view) in enumerate(zip(bucket.names, bucket.views(full), strict=True)):
                self.model.params[name].data = view
                a, b = bucket.span(i)
                if b > a:
                    bucket.pieces[name].data = bucket.shard.data[a:b]

    def _ties(self, module: nn.Module) -> dict[str, list[int]]:
        """Parameters that several stages use, with those stages."""
        stages: dict[str, list[int]] = {}
        for s in range(self.plan.stages):
            for name in self.split.stage_params(s):
                stages.setdefault(name, []).append(s)
        several = {}
        for name, at in stages.items():
            ranks = sorted({s % self.plan.pipeline for s in at})
            if len(ranks) > 1:
                several[name] = ranks
        self._tie_groups = self._make_tie_groups(several)
        return several

    def _make_tie_groups(self, several: dict[str, list[int]]) -> dict[str, Any]:
        """A process group for each set of stages that share a parameter; every rank makes all groups."""
        groups: dict[str, Any] = {}
        axis = self.split.pipeline
        if axis is None or not several:
            return groups
        made: dict[tuple[int, ...], Any] = {}
        columns = _columns(self.mesh, axis)
        for ranks in sorted({tuple(r) for r in several.values()}):
            for column in columns:
                members = [column[r] for r in ranks]
                group = dist.new_group(members) if dist.is_initialized() else None
                if self.mesh.rank in members:
                    made[ranks] = group
        for name, ranks in several.items():
            if tuple(ranks) in made:
                groups[name] = made[tuple(ranks)]
        return groups

    def _make_optimizer(self, module: nn.Module) -> tuple[Any, Any]:
        local: dict[str, list[nn.Parameter]] = {n: [p] for n, p in self._plain.items()}
        for bucket in self.buckets:
            for name in bucket.names:
                local[name] = [bucket.pieces[name]] if name in bucket.pieces else []
        cut = bool(self.buckets) or any(p.shape != self._shapes[n] for n, p in self._plain.items())
        if cut:
            check_elementwise(self.job.optimizer)
        return build_optimizer(self.job.optimizer, module, local)

    def _make_pipeline(self) -> Pipeline:
        plan, axis = self.plan, self.split.pipeline
        rank, ranks = (axis.rank, axis.size) if axis else (0, 1)
        schedule = plan.schedule if axis or plan.stages > 1 else "1f1b"
        order = actions(schedule, rank, ranks, plan.stages, plan.micro_batches)
        return Pipeline(self.model.stages(), plan.stages, order, axis, self.device, self._before_last)

    def _before_last(self, stage: int) -> None:
        self._stages_left -= 1
        if self._stages_left == 0:
            self._sync.begin()

    # -- training ----------------------------------------------------------------------------------------------------

    def feed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """This rank's share of each global batch of a loader that is the same on every rank."""
        for batch in loader:
            total = batch_size(batch)
            share = self._share(batch, total)
            self._fed = (share, total)
            yield share

    def step(self, batch: Batch) -> float:
        """One update: forward, backward, gradient reduction, clipping, optimizer, scheduler.

        Args:
            batch: a global batch, the same on every rank; or this rank's share of one, as `feed` yields it.

        Returns:
            The loss of the global batch, the same number on every rank.

        Raises:
            PlanError: the batch is too small to be cut as the plan says.
        """
        self.mesh.recorder.take()
        loss = self.forward_backward(batch)
        self.update()
        self._traffic = self.mesh.recorder.take()
        return loss

    def update(self) -> None:
        """Clip, and step the optimizer and the scheduler, once."""
        self.grad_norm = self._clip()
        self.optimizer.step()
        self._after_update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1

    def forward_backward(self, batch: Batch) -> float:
        """The loss of a global batch, and the gradients of this rank's parameters, summed over all ranks."""
        if self._fed is not None and batch is self._fed[0]:
            share, total = self._fed
        else:
            total = batch_size(batch)
            share = self._share(batch, total)
        tensors = dict(zip(self._input_names(), batch_tensors(share), strict=True))
        # A new key for each step; the optimizer's place in the run, not the rank's, decides it.
        key = random.stream(self.job.seed, self.steps, 0)
        micro = self.model.start(tensors, total, key)
        self._stages_left = len(self.split.mine)
        resharding: Any = Resharding(self.buckets) if self.plan.zero == 3 else nullcontext()
        with resharding:
            loss = self._pipeline.step(micro)
        self._sync.finish()
        self._reduce_flat()
        self._reduce_ties()
        return self._whole_loss(loss)

    def _input_names(self) -> list[str]:
        return self.graph.captured.inputs

    def _share(self, batch: Batch, total: int) -> Batch:
        """This rank's samples of a global batch, in the order of the micro-batches."""
        self._check_total(total)
        micros = self.split.micros(total)
        names = iter(self._input_names())
        values = {n.name: v[0] for n, v in self.graph.values.items() if n.op == "placeholder"}

        def rows(tensor: Tensor) -> Tensor:
            value = values[next(names)]
            if not value.ndim or value.sizes[0].power == 0:
                return tensor.to(self.device)
            spans = [self.split.rows(value, m) for m in micros]
            if all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)):
                return tensor[spans[0][0] : spans[-1][1]].to(self.device)
            return torch.cat([tensor[a:b] for a, b in spans]).to(self.device)

        return map_batch(self._cast(batch), rows)

    def _check_total(self, total: int) -> None:
        parts = self.plan.micro_batches
        for axis in self.plan.axes:
            if "batch" in axis.dims:
                parts *= axis.size
        if total < parts:
            raise PlanError(
                f"a batch of {total} samples cannot be cut into {parts} parts "
                f"({self.plan.micro_batches} micro-batches on {parts // self.plan.micro_batches} data ranks); "
                f"give at least {parts} samples"
            )
        fixed = self.graph.captured.fixed_batch
        if fixed is not None and total != fixed:
            raise PlanError(f"the model fixes its batch at {fixed} samples, but a batch has {total}")

    def _reduce_flat(self) -> None:
        """ZeRO 1 and 2: sum gradients into the parts that this rank updates."""
        for bucket in self.buckets:
            if self.plan.zero == 3:
                grad = bucket.shard.grad
                bucket.shard.grad = None
            else:
                flat = bucket.shard.new_zeros(bucket.length)
                for view, name in zip(bucket.views(flat), bucket.names, strict=True):
                    param = self.model.params[name]
                    if param.grad is not None:
                        view.copy_(param.grad)
                    param.grad = None
                grad = bucket.reduce(flat)
            for i, name in enumerate(bucket.names):
                low, high = bucket.span(i)
                if high > low:
                    bucket.pieces[name].grad = None if grad is None else grad[low:high]

    def _reduce_ties(self) -> None:
        for name, group in sorted(self._tie_groups.items()):
            param = self.model.params.get(name)
            if param is None or not param.requires_grad:
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            assert self.split.pipeline is not None
            self.split.pipeline.record("all_reduce", param.grad.numel() * param.grad.element_size())
            dist.all_reduce(param.grad, group=group)

    def _after_update(self) -> None:
        """ZeRO 1 and 2: fetch the parts that other ranks updated."""
        if self.plan.zero in (1, 2):
            for bucket in self.buckets:
                assert bucket.full is not None
                own = bucket.shard.data.clone()
                bucket.axis.record("all_gather", own.numel() * own.element_size())
                dist.all_gather(list(bucket.full.chunk(bucket.axis.size)), own, group=bucket.axis.group)

    def _whole_loss(self, loss: Tensor) -> float:
        axis = self.split.pipeline
        if axis is not None and axis.group is not None:
            axis.record("all_reduce", loss.numel() * loss.element_size())
            dist.all_reduce(loss, group=axis.group)
        return float(loss)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def local_grads(self) -> Iterator[tuple[str, Tensor, float]]:
        """This rank's gradients: name, tensor, and the share by which it counts in a sum over all ranks."""
        for name, param in self._plain.items():
            if param.grad is not None:
                copies = self.split.copies(self.graph.params[name]) * len(self._stage_ranks.get(name, [0]))
                yield name, param.grad, 1.0 / copies
        for bucket in self.buckets:
            for name, piece in bucket.pieces.items():
                if piece.grad is not None:
                    yield name, piece.grad, bucket.axis.size / self.split.copies(self.graph.params[name])

    def _clip(self) -> float | None:
        """Scale gradients to the job's norm. The norm is of the whole gradient, each entry counted once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        grads = list(self.local_grads())
        for _, grad, share in grads:
            total += grad.detach().double().pow(2).sum() * share
        if dist.is_initialized() and self.plan.ranks > 1:
            self.mesh.recorder.add("all_reduce", "all", total.element_size())
            dist.all_reduce(total)
        norm = math.sqrt(float(total))
        limit = self.job.clip_norm
        if limit is not None and norm > limit:
            for _, grad, _ in grads:
                grad.mul_(limit / (norm + 1e-6))
        return norm

    # -- reading -----------------------------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """The collectives of the last step."""
        return self._traffic

    def announced(self, total: int | None = None) -> list[Traffic]:
        """The collectives that a step of `total` samples (the job's global batch) will make, known beforehand."""
        total = self.job.global_batch if total is None else total
        tied = [self.model.params[n] for n in self._tie_groups if n in self.model.params]
        return announce(self.model, self._sync, self.buckets, [p for p in tied if p.requires_grad], total)

    def gather(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what this rank has of each parameter (values or gradients); the same on every rank."""
        found: dict[str, Tensor] = {}
        for name in self._shapes:
            if name not in self.graph.params:
                continue
            found[name] = self._gather_one(name, local.get(name))
        return found

    def _gather_one(self, name: str, mine: Tensor | None) -> Tensor:
        """One whole parameter from this rank's part. Stages that do not have it receive it."""
        value = self.graph.params[name]
        owner = self._owner(name)
        axis = self.split.pipeline
        whole: Tensor | None = None
        if axis is None or axis.rank == owner:
            if name in self._where:
                bucket, i = self._where[name]
                flat = self._gather_flat(bucket, i, mine)
                whole = self.split.unshard(value, flat.view(bucket.shapes[i]))
            else:
                assert mine is not None
                whole = self.split.unshard(value, mine)
        if axis is not None and axis.group is not None:
            if whole is None:
                dtype = self._dtype or value.dtype
                whole = torch.empty(self._shapes[name], dtype=dtype, device=self.device)
            whole = whole.contiguous()
            dist.broadcast(whole, src=axis.ranks[owner], group=axis.group)
        assert whole is not None
        return whole

    def _owner(self, name: str) -> int:
        for s in range(self.plan.stages):
            if name in self.split.stage_params(s):
                return s % self.plan.pipeline
        return 0

    def _gather_flat(self, bucket: FlatBucket, index: int, mine: Tensor | None) -> Tensor:
        low, high = bucket.span(index)
        own = bucket.shard.new_zeros(bucket.part)
        if high > low and mine is not None:
            own[low:high] = mine
        parts = [torch.empty_like(own) for _ in range(bucket.axis.size)]
        dist.all_gather(parts, own, group=bucket.axis.group)
        start = bucket.starts[index]
        return torch.cat(parts)[start : start + bucket.shapes[index].numel()]

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole, under the user's names; the same on every rank."""
        local = {n: p.detach() for n, p in self._plain.items()}
        for bucket in self.buckets:
            local.update({n: p.detach() for n, p in bucket.pieces.items()})
        with torch.no_grad():
            found = {n: t.detach().clone() for n, t in self.gather(local).items()}
            found.update(self._untouched)
            found.update({n: b.detach().clone() for n, b in self._buffers().items()})
        for copy, original in self.graph.captured.tied.items():
            found[copy] = found[original]
        return found

    def _buffers(self) -> dict[str, Tensor]:
        """The module's buffers; those a stage changes come from that stage."""
        found = {n: b.to(self.device) for n, b in self._whole_buffers.items()}
        found.update({n: b for n, b in self.model.buffers.items() if n in found})
        axis = self.split.pipeline
        if axis is not None and axis.group is not None:
            for name in self.graph.captured.updates:
                if name in found:
                    owner = self._buffer_owner(name)
                    found[name] = found[name].clone()
                    dist.broadcast(found[name], src=axis.ranks[owner], group=axis.group)
        return found

    def _buffer_owner(self, name: str) -> int:
        value = self.model._updated().get(name)
        for op, stage in self.split.stage_of.items():
            if value in op.outputs:
                return stage % self.plan.pipeline
        return 0

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient of every trainable parameter that has one, after `forward_backward`; on every rank."""
        local = {name: grad for name, grad, _ in self.local_grads()}
        for name, param in self._plain.items():
            local.setdefault(name, torch.zeros_like(param))
        return {name: grad.clone() for name, grad in self.gather(local).items()}


def parallelize(job: Job, plan: Plan, *, dtype: torch.dtype | None = None, module: nn.Module | None = None) -> Engine:
    """A job under a plan, on this rank of an initialised process group.

    Args:
        job: what to train.
        plan: how it is split; its ranks must be the process group's.
        dtype: runs everything in this dtype (float64 for proofs); None leaves the model's own.
        module: the module, if it has been built; its parameters are the initial weights.

    Raises:
        PlanError: the plan does not fit the ranks, the model or the batch.
        CaptureError: the model does not capture.
    """
    return Engine(job, plan, dtype=dtype, module=module)


def _local_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _columns(mesh: Mesh, axis: Axis) -> list[list[int]]:
    """For every place on the other axes the ranks along one axis."""
    sizes = [a.size for a in mesh.axes]
    index = mesh.axes.index(axis)
    stride = 1
    for size in sizes[index + 1 :]:
        stride *= size
    span = stride * axis.size
    return [
        [base + inner + k * stride for k in range(axis.size)]
        for base in range(0, mesh.size, span)
        for inner in range(stride)
    ]
