"""Engine: a job under a plan on this rank. `step` takes a batch and returns the loss of the global batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engine.evaluate import Evaluation
from shardwise.engine.feed import Feeder, Share, cast
from shardwise.engine.optimize import build_optimizer, check_elementwise, squared_norm
from shardwise.engine.whole import Whole
from shardwise.errors import JobError, PlanError
from shardwise.graph import random
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job
from shardwise.machine.backend import Backend
from shardwise.parallel.announce import announce
from shardwise.parallel.channels import Channels
from shardwise.parallel.hybrid import Split, check_fixed_batch
from shardwise.parallel.mesh import Mesh, Traffic
from shardwise.parallel.pipeline import Pipeline, total_over_stages
from shardwise.parallel.rank import RankModel
from shardwise.parallel.reduction import Reduction
from shardwise.parallel.schedule import actions
from shardwise.parallel.sharded import Resharding
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
        borrowed = module is not None
        module = module if module is not None else job.build()
        dtypes: dict[torch.dtype, torch.dtype] = {}
        if dtype is not None:
            module = module.to(dtype)
            dtypes = {d: dtype for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if d != dtype}
        self._dtype = dtype
        if graph is None:
            graph = self._graph(module, training=True)
        self.graph = graph
        check_fixed_batch(graph, plan)
        if plan.model and plan.model != graph.fingerprint():
            raise PlanError(
                f"the plan is for model {plan.model}, but this one is {graph.fingerprint()}; make a new plan for it"
            )
        self.mesh = Mesh.build([(a.name, a.size) for a in plan.axes])
        self.split = Split(graph, plan, self.mesh)
        self.model = RankModel(
            self.split, self.device, dtypes=dtypes, autocast=plan.precision == "bf16" and dtype is None
        )
        self.model.load(module)
        self._reduction = Reduction(self.model)
        self._whole = Whole(module, self._reduction)
        self.optimizer, self.scheduler = self._make_optimizer(module)
        self.steps = 0
        self.grad_norm: float | None = None
        self._feeder = Feeder(self.split, self.device, dtype)
        self._fed: Share | None = None
        self._traffic: list[Traffic] = []
        self._channels = Channels(self.mesh, self.split.pipeline, plan.stages, self.device)
        self._pipeline = self._make_pipeline()
        self._evaluation: Evaluation | None = None
        # Kept for its structure: evaluation captures it once more.
        self._module = module
        if not borrowed:
            _let_go(module)

    # -- setting up --------------------------------------------------------------------------------------------------

    def _graph(self, module: nn.Module, *, training: bool) -> Graph:
        example = self.job.batch(range(min(2, self.job.global_batch)))
        if self._dtype is not None:
            example = cast(example, self._dtype)
        return Graph.of(self.job, module, example, training=training)

    def _make_optimizer(self, module: nn.Module) -> tuple[Any, Any]:
        if self._whole.cut():
            check_elementwise(self.job.optimizer)
        return build_optimizer(self.job.optimizer, module, self._reduction.parts())

    def _make_pipeline(self) -> Pipeline:
        plan, axis = self.plan, self.split.pipeline
        rank, ranks = (axis.rank, axis.size) if axis else (0, 1)
        schedule = plan.schedule if axis or plan.stages > 1 else "1f1b"
        order = actions(schedule, rank, ranks, plan.stages, plan.micro_batches)
        return Pipeline(self.model.stages(), plan.stages, order, self._channels, self._before_last)

    def _before_last(self, stage: int) -> None:
        self._stages_left -= 1
        if self._stages_left == 0:
            self._reduction.begin()

    # -- training ----------------------------------------------------------------------------------------------------

    def feed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """This rank's share of each global batch of a loader that is the same on every rank."""
        for batch in loader:
            self._fed = self._feeder.share(batch)
            yield self._fed.batch

    def _taken(self, batch: Batch) -> Share:
        """This rank's share of a batch; it may be one already."""
        if self._fed is not None and batch is self._fed.batch:
            return self._fed
        return self._feeder.share(batch)

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
        self._reduction.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1

    def forward_backward(self, batch: Batch) -> float:
        """The loss of a global batch, and the gradients of this rank's parameters, summed over all ranks."""
        share = self._taken(batch)
        # A new key for each step; the optimizer's place in the run, not the rank's, decides it.
        key = random.stream(self.job.seed, self.steps, 0)
        micro = self.model.start(self._feeder.tensors(share), share.total, key)
        self._stages_left = len(self.split.mine)
        resharding: Any = Resharding(self._reduction.buckets) if self.plan.zero == 3 else nullcontext()
        with resharding:
            loss = self._pipeline.step(micro)
        self._reduction.finish()
        return float(total_over_stages(loss, self.split.pipeline))

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over batches, computed as the model is evaluated: no dropout, running statistics, no gradients.

        Batches are weighted by the count where the job's loss returns `(sum, count)`, and by their samples otherwise.

        Args:
            batches: global batches, the same on every rank; or this rank's shares of them, as `feed` yields them.

        Returns:
            The same number on every rank.

        Raises:
            JobError: there is no batch.
            PlanError: a batch is too small to be cut as the plan says.
            CaptureError: the model captures in training, but not in evaluation.
        """
        if self._evaluation is None:
            graph = self._graph(self._module, training=False)
            self._evaluation = Evaluation(graph, self._reduction, self._whole, self._channels, self._dtype)
        evaluation = self._evaluation
        evaluation.load(self._module)
        key = random.stream(self.job.seed, self.steps, 1)
        found = [evaluation.run(self._taken(batch), key) for batch in batches]
        if not found:
            raise JobError("evaluate was given no batch; give at least one")
        self.mesh.recorder.take()
        # Where no item of any batch counts the losses are zero.
        return sum(loss * count for loss, count in found) / max(sum(count for _, count in found), 1.0)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _clip(self) -> float | None:
        """Scale gradients to the job's norm. The norm is of the whole gradient, each entry counted once."""
        grads = list(self._reduction.grads())
        total = squared_norm([(grad, share) for _, grad, share in grads], self.device)
        if dist.is_initialized() and self.plan.ranks > 1:
            self.mesh.recorder.add("all_reduce", "all", total.element_size())
            dist.all_reduce(total)
        norm = math.sqrt(float(total))
        limit = self.job.clip_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_([grad for _, grad, _ in grads], limit / (norm + 1e-6))
        return norm

    # -- reading -----------------------------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """The collectives of the last step."""
        return self._traffic

    def announced(self, total: int | None = None) -> list[Traffic]:
        """The collectives that a step of `total` samples (the job's global batch) will make, known beforehand."""
        total = self.job.global_batch if total is None else total
        return announce(self._reduction, total)

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole, under the user's names; the same on every rank."""
        return self._whole.state_dict()

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient of every parameter that the model uses, after `forward_backward`; on every rank."""
        return self._whole.gradients()


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


def _let_go(module: nn.Module) -> None:
    """Free a module's weights and keep their shapes."""
    for param in module.parameters():
        param.data = param.new_empty(()).expand(param.shape)


def _local_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
