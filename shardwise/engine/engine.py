"""The engine of a captured job: the programs of this rank, run in the order of the schedule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engine.base import Engine
from shardwise.engine.evaluate import Evaluation
from shardwise.engine.feed import Feeder
from shardwise.engine.module import ModuleEngine
from shardwise.engine.optimize import build_optimizer, check_elementwise
from shardwise.engine.whole import Whole
from shardwise.errors import CaptureError, JobError, PlanError
from shardwise.graph import random
from shardwise.graph.capture import Purpose
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job, lift, lifts
from shardwise.machine.backend import Backend
from shardwise.parallel.announce import announce
from shardwise.parallel.channels import Channels
from shardwise.parallel.hybrid import Split, check_fixed_batch
from shardwise.parallel.mesh import Mesh, Traffic
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.rank import RankModel, let_go
from shardwise.parallel.reduction import Reduction
from shardwise.parallel.schedule import actions
from shardwise.parallel.sharded import Resharding
from shardwise.plan.plan import Plan
from shardwise.weights.fill import Weights


class GraphEngine(Engine):
    """A captured job under a plan, on this rank of an initialised process group (or alone)."""

    graph: Graph
    _reduction: Reduction
    _feeder: Feeder

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
        super().__init__()
        backend = backend or Backend.detect(1)
        self.device = backend.device(_local_rank())
        self.job, self.plan = job, plan
        borrowed = module is not None
        weights: Weights | None = None
        if module is None:
            module, weights = job.bare()
        dtypes: dict[torch.dtype, torch.dtype] = {}
        if dtype is not None:
            module = lift(module, dtype)
            dtypes = lifts(dtype)
        self._dtype = dtype
        if graph is None:
            graph = self._graph(module, "train")
        self.graph = graph
        check_fixed_batch(graph, plan)
        if plan.model and plan.model != graph.fingerprint():
            raise PlanError(
                f"the plan is for model {plan.model}, but this one is {graph.fingerprint()}; make a new plan for it"
            )
        self.mesh = Mesh.build(plan.axes)
        self.split = Split(graph, plan, self.mesh)
        self.model = RankModel(
            self.split, self.device, dtypes=dtypes, autocast=plan.precision == "bf16" and dtype is None
        )
        self.model.load(module, frees=not borrowed, weights=weights, later=True)
        self._reduction = Reduction(self.model)
        if weights is not None:
            weights.fill(module, [n for n, _ in module.named_parameters() if n not in graph.params])
        self._whole = Whole(module, self._reduction)
        self.optimizer, self.scheduler = self._make_optimizer(module)
        self._feeder = Feeder(self.split, self.device, dtype)
        self._channels = Channels(self.mesh, self.split.pipeline, plan.stages, self.device)
        self._pipeline = self._make_pipeline()
        self._evaluation: Evaluation | None = None
        # Kept for its structure: evaluation captures it once more.
        self._module = module
        if not borrowed:
            for param in module.parameters():
                let_go(param)

    # -- setting up --------------------------------------------------------------------------------------------------

    def _graph(self, module: nn.Module, purpose: Purpose) -> Graph:
        example = self.job.batch(range(min(2, self.job.global_batch)))
        if self._dtype is not None:
            example = lift(example, self._dtype)
        return Graph.of(self.job, module, example, purpose=purpose)

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

    def forward_backward(self, batch: Batch) -> float:
        share = self._taken(batch)
        # A new key for each step; the optimizer's place in the run, not the rank's, decides it.
        key = random.stream(self.job.seed, self.steps, 0)
        micro = self.model.start(self._feeder.tensors(share), share.total, key)
        self._stages_left = len(self.split.mine)
        resharding: Any = Resharding(self._reduction.buckets) if self.plan.zero == 3 else nullcontext()
        with self.mesh.exchanging(), resharding:
            loss = self._pipeline.step(micro)
        self._reduction.finish()
        self.model.renew()
        return float(self.model.total(loss))

    def evaluate(self, batches: Iterable[Batch]) -> float:
        if self._evaluation is None:
            graph = self._graph(self._module, "evaluate")
            self._evaluation = Evaluation(graph, self._reduction, self._whole, self._channels, self._dtype)
        evaluation = self._evaluation
        evaluation.load(self._module)
        key = random.stream(self.job.seed, self.steps, 1)
        with self.mesh.exchanging():
            found = [evaluation.run(self._taken(batch), key) for batch in batches]
        if not found:
            raise JobError("evaluate was given no batch; give at least one")
        self.mesh.recorder.take()
        # Where no item of any batch counts the losses are zero.
        return sum(loss * count for loss, count in found) / max(sum(count for _, count in found), 1.0)

    # -- reading -----------------------------------------------------------------------------------------------------

    def announced(self, total: int | None = None) -> list[Traffic]:
        total = self.job.global_batch if total is None else total
        return announce(self._reduction, total, norm=self._needs_norm)

    def state_dict(self) -> dict[str, Tensor]:
        return self._whole.state_dict()

    def gradients(self) -> dict[str, Tensor]:
        return self._whole.gradients()


def parallelize(
    job: Job,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    module: nn.Module | None = None,
    graph: Graph | None = None,
) -> Engine:
    """A job under a plan, on this rank of an initialised process group.

    Where the model does not capture, the module runs as it is: split by samples, or by layers where it is a Sequential.

    Args:
        job: what to train.
        plan: how it is split; its ranks must be the process group's.
        dtype: runs everything in this dtype (float64 for proofs); None leaves the model's own.
        module: the module, if it has been built; its parameters are the initial weights.
        graph: the job's, if it has been captured.

    Raises:
        PlanError: the plan does not fit the ranks, the model or the batch; or the model does not capture, and the plan
            splits more than samples or layers.
    """
    try:
        return GraphEngine(job, plan, dtype=dtype, module=module, graph=graph)
    except CaptureError as error:
        why = str(error)
    return ModuleEngine(job, plan, why=why, dtype=dtype, module=module)


def _local_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
