"""Prediction: a job's model on the ranks of one replica, from a chunk of samples to the tensors of its own output.

Axes that split the batch alone make replicas, of which each takes whole chunks. So a chunk meets the model as it would
on one device, whatever couples its samples. The other axes split the model within a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardwise.engine.evaluate import corresponding
from shardwise.engine.forward import Forward
from shardwise.errors import CaptureError, JobError, PlanError
from shardwise.graph import random
from shardwise.graph.capture import Purpose, caller
from shardwise.graph.graph import Graph
from shardwise.graph.output import checked
from shardwise.inference.precision import Arithmetic, fill
from shardwise.job import Batch, Job, batch_size, map_batch
from shardwise.parallel.channels import Channels
from shardwise.parallel.hybrid import Split, check_fixed_batch, stage_bounds
from shardwise.parallel.layout import SplitAxis, check_axes
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.rank import RankModel, let_go
from shardwise.parallel.schedule import stage_rank
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.seeding import seed_torch

_KEY = 2
"""Tells the random numbers of prediction from those of training (0) and evaluation (1)."""


class Prediction(Protocol):
    """A job's model on this rank."""

    def outputs(self, chunk: int, batch: Batch) -> tuple[Any, list[Tensor]]:
        """The form of the output of a chunk and its tensors; called on every rank of a replica.

        The rank that hands out has the tensors; others may have none.
        """

    def form(self, example: Batch) -> Any:
        """The form of outputs, found on this rank alone."""

    def check(self, samples: int) -> None:
        """Check that a chunk of so many samples can be computed.

        Raises:
            PlanError: it is too small to be cut as the plan says, or the model fixes another number.
        """


@dataclass(frozen=True)
class Replica:
    """The ranks that compute one chunk together.

    Attributes:
        number: which replica it is.
        count: how many there are.
        ranks: in order; the first claims chunks for all of them.
        giver: the rank that hands outputs out: of the last stage the first.
    """

    number: int
    count: int
    ranks: tuple[int, ...]
    giver: int

    @classmethod
    def of(cls, plan: Plan, rank: int) -> Replica:
        """The replica of a rank, under a plan."""
        places = _places(plan.axes)
        data = [i for i, axis in enumerate(plan.axes) if axis.name in plan.data]
        keys = list(dict.fromkeys(tuple(place[i] for i in data) for place in places))
        mine = tuple(places[rank][i] for i in data)
        ranks = tuple(r for r, place in enumerate(places) if tuple(place[i] for i in data) == mine)
        last = stage_rank(plan.stages - 1, plan.pipeline)
        at = next((i for i, axis in enumerate(plan.axes) if axis.name == PIPELINE), None)
        giver = next(r for r in ranks if at is None or places[r][at] == last)
        return cls(keys.index(mine), len(keys), ranks, giver)


def _places(axes: Sequence[PlanAxis]) -> list[tuple[int, ...]]:
    """The coordinates of every rank; neighbouring ranks differ in the last axis."""
    found: list[tuple[int, ...]] = [()]
    for axis in axes:
        found = [(*place, i) for place in found for i in range(axis.size)]
    return found


def build(job: Job, plan: Plan, mesh: Mesh, example: Batch, device: torch.device, arithmetic: Arithmetic) -> Prediction:
    """A job's model on this rank.

    A replica of one rank runs the module as it is. One that is split runs the captured graph.

    Args:
        mesh: of all axes of the plan.
        example: a few samples.
        arithmetic: in which numbers it is held and computed.

    Raises:
        PlanError: the plan does not fit the model; or it splits the model, which does not capture.
        JobError: there is nothing to hold in int8.
    """
    split = any(axis.size > 1 and axis.name not in plan.data for axis in plan.axes)
    if not split and plan.micro_batches == 1 and not plan.cuts:
        return ModulePrediction(job, example, device, arithmetic)
    try:
        return GraphPrediction(job, plan, mesh, example, device, arithmetic)
    except CaptureError as error:
        why = str(error)
    if split:
        raise PlanError(f"{plan.title()} splits the model, but {why}; to predict, split the batch alone")
    return ModulePrediction(job, example, device, arithmetic)


class ModulePrediction:
    """The module as it is, on chunks of this rank."""

    def __init__(self, job: Job, example: Batch, device: torch.device, arithmetic: Arithmetic) -> None:
        module, weights = job.bare()
        module = fill(arithmetic, job, arithmetic.prepare(module), weights, arithmetic.take(example), device)
        self._module = module.eval()
        self._call = caller(self._module)
        self._seed, self._device, self._arithmetic = job.seed, device, arithmetic

    def outputs(self, chunk: int, batch: Batch) -> tuple[Any, list[Tensor]]:
        batch = map_batch(self._arithmetic.take(batch), lambda t: t.to(self._device))
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.random.fork_rng([self._device] if self._device.type == "cuda" else []))
            seed_torch(random.stream(self._seed, chunk, _KEY))
            stack.enter_context(self._arithmetic.running(self._device))
            output = self._call(batch)
        return checked(output)

    def form(self, example: Batch) -> Any:
        return self.outputs(0, example)[0]

    def check(self, samples: int) -> None:
        pass


class GraphPrediction:
    """The captured model, split within the replica: this rank's programs, with no more than what they use.

    Where the job's weights are in files, the rank reads its slices and nothing else of them.
    """

    def __init__(
        self, job: Job, plan: Plan, mesh: Mesh, example: Batch, device: torch.device, arithmetic: Arithmetic
    ) -> None:
        module, weights = job.bare()
        module, example = arithmetic.prepare(module), arithmetic.take(example)
        gives = Replica.of(plan, mesh.rank).giver == mesh.rank
        with arithmetic.capturing():
            graph = Graph.of(job, module, example, purpose="predict")
            plan, bounds = for_prediction(job, plan, module, graph, example)
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name not in plan.data), mesh.rank, mesh.recorder)
        plan = plan.replica()
        check_fixed_batch(graph, plan)
        split = Split(graph, plan, inner, bounds)
        int8 = arithmetic.factors(graph, job.title())
        model = RankModel(split, device, dtypes=arithmetic.dtypes, autocast=arithmetic.autocast, int8=int8)
        model.load(module, frees=True, weights=weights)
        for param in module.parameters():
            let_go(param)
        self._channels = Channels(mesh, split.pipeline, plan.stages, device)
        self._forwards = {plan.micro_batches: Forward(model, self._channels, arithmetic.samples)}
        self._seed, self._form, self._mesh, self._samples = job.seed, graph.captured.form, mesh, arithmetic.samples
        self._gives = gives

    def outputs(self, chunk: int, batch: Batch) -> tuple[Any, list[Tensor]]:
        forward = self._forward_for(batch_size(batch))
        share = forward.feeder.share(batch)
        with torch.inference_mode(), self._mesh.exchanging():
            found = forward.outputs(share, random.stream(self._seed, chunk, _KEY), wanted=self._gives)
        self._mesh.recorder.take()
        return self._form, found

    def form(self, example: Batch) -> Any:
        return self._form

    def check(self, samples: int) -> None:
        self._forward_for(samples).feeder.check(samples)

    def _forward_for(self, samples: int) -> Forward:
        """The programs for a chunk; one of fewer samples than the plan's micro-batches has one for each."""
        most = max(self._forwards)
        count = min(samples, most)
        if count not in self._forwards:
            whole = self._forwards[most].model
            split = whole.split
            model = RankModel.like(
                whole, Split(split.graph, split.plan.with_(micro_batches=count), split.mesh, split.bounds)
            )
            model.share(whole)
            self._forwards[count] = Forward(model, self._channels, self._samples)
        return self._forwards[count]


# -- plans -------------------------------------------------------------------------------------------------------------


def for_prediction(
    job: Job,
    plan: Plan,
    module: nn.Module,
    graph: Graph,
    example: Batch | None = None,
    purposes: Sequence[Purpose] = ("train",),
) -> tuple[Plan, list[tuple[int, int]] | None]:
    """The plan as the graph of prediction takes it, and its stages where they are not those of the plan by name.

    What is for training alone is left out. A plan for the job's training, or for another of `purposes`, is carried
    over: its stages follow those of the graph that it is for, and its dims are those of the same parameters.

    Raises:
        PlanError: the plan is for another model.
    """
    plan = plan.with_(zero=0, recompute=())
    own = plan.with_(model="")
    if plan.model in ("", graph.fingerprint()) and _names_only(plan, graph):
        return own, None
    try:
        training = _made_for(job, plan, module, example, purposes)
    except (CaptureError, JobError) as error:
        if plan.model:
            raise PlanError(
                f"the plan is for model {plan.model}, but this one is {graph.fingerprint()} as it predicts, and as it "
                f"trains it cannot be looked at: {error}"
            ) from error
        check_axes(graph, [SplitAxis(a.name, a.size, a.dims) for a in plan.axes if a.name != PIPELINE])
        stage_bounds(graph, plan)  # one of them says which dim or operator there is not
        raise
    if plan.model not in ("", training.fingerprint()):
        raise PlanError(
            f"the plan is for model {plan.model}, but this one is {training.fingerprint()} as it trains and "
            f"{graph.fingerprint()} as it predicts; make a new plan for it"
        )
    check_axes(training, [SplitAxis(a.name, a.size, a.dims) for a in plan.axes if a.name != PIPELINE])
    bounds = corresponding(training, graph, stage_bounds(training, plan))
    axes = tuple(_renamed(axis, training, graph) for axis in own.axes)
    return own.with_(axes=axes), bounds


def _made_for(job: Job, plan: Plan, module: nn.Module, example: Batch | None, purposes: Sequence[Purpose]) -> Graph:
    """The graph that a plan was made for; the first of a purpose, where it was made for none of them.

    Raises:
        CaptureError, JobError: there is none.
    """
    found: list[Graph] = []
    for purpose in purposes:
        try:
            graph = Graph.of(job, module, example, purpose=purpose)
        except (CaptureError, JobError):
            if purpose == purposes[-1] and not found:
                raise
            continue
        if plan.model in ("", graph.fingerprint()):
            return graph
        found.append(graph)
    return found[0]


def _names_only(plan: Plan, graph: Graph) -> bool:
    """Whether the operators and dims that a plan names are all this graph's."""
    dims = {dim.name for dim in graph.dims()}
    plain = (dim for axis in plan.axes for dim in axis.dims if not any(c in dim for c in "*?["))
    return all(cut in graph.places for cut in plan.cuts) and all(dim in dims for dim in plain)


def _renamed(axis: PlanAxis, training: Graph, graph: Graph) -> PlanAxis:
    """An axis with the names that its dims have in another graph of the same model, behind each its own."""
    names: dict[str, dict[str, None]] = {}
    for name in training.params.keys() & graph.params.keys():
        pairs = zip(training.params[name].leaves(), graph.params[name].leaves(), strict=True)
        for old, new in pairs:
            if [leaf.size for leaf in old] == [leaf.size for leaf in new]:
                for a, b in zip(old, new, strict=True):
                    names.setdefault(a.name, {})[b.name] = None
    found: dict[str, None] = {}
    for pattern in axis.dims:
        found[pattern] = None
        one = SplitAxis(axis.name, axis.size, (pattern,))
        for old_name in sorted(names):
            if one.matches(old_name) is not None:
                found.update(names[old_name])
    return PlanAxis(axis.name, axis.size, tuple(found), axis.shares)
