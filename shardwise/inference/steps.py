"""Steps: a model that generates on the ranks of one replica, its cache cut as its layers are and never put together.

Two programs share the cache: one for a token of each sample, one for several positions of their prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.evaluate import corresponding
from shardwise.errors import CaptureError, JobError, PlanError
from shardwise.graph.capture import capture_step
from shardwise.graph.eager import Lifted
from shardwise.graph.garbage import uncollected
from shardwise.graph.graph import Graph
from shardwise.graph.step import Step, step_of
from shardwise.inference.limits import Demand, check_fits, check_takes, vocabulary_of, vocabulary_tried
from shardwise.inference.prediction import Replica, for_prediction
from shardwise.job import Job, lift, lifts
from shardwise.parallel.channels import Channels
from shardwise.parallel.hybrid import Split
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.rank import RankModel, let_go
from shardwise.parallel.schedule import forward_only, stage_rank
from shardwise.parallel.state import begin, go_on
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis


class Steps(Protocol):
    """A job's model on this rank, step by step.

    Attributes:
        piece: positions of a prompt that go in at once where there are as many; the others go one by one.
        fixed: samples that go in, where the model has a cache for so many and no others.
    """

    piece: int
    fixed: int | None

    def begin(self, samples: int) -> None:
        """Begin anew, with an empty cache for so many samples."""

    def step(self, tokens: Tensor, start: int) -> Tensor | None:
        """The logits behind the last of some tokens, [samples, vocabulary]; on the rank that hands out.

        Args:
            tokens: [samples, length], of one position or of `piece`.
            start: position of the first.
        """

    def agree(self, tokens: Tensor) -> Tensor:
        """The next tokens, [samples], on every rank of the replica, from the one that hands out."""

    def vocabulary(self) -> int:
        """What tokens have to be below; the same on every rank of the replica. The cache is begun anew."""

    def state_bytes(self) -> int:
        """Bytes of the cache on this rank."""


def build_steps(
    job: Job,
    plan: Plan,
    mesh: Mesh,
    demand: Demand,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Steps:
    """A job's model on this rank, ready to generate.

    A replica of one rank runs the module as it is. One that is split runs captured steps.

    Args:
        mesh: of all axes of the plan.
        demand: of the prompts.
        dtype: runs everything in this dtype; None leaves the model's own.

    Raises:
        PlanError: the plan does not fit the model, or splits one that does not capture.
        JobError: the model has no cache, or too small a one, or too small a vocabulary.
    """
    if plan.precision != "fp32":
        raise PlanError(
            f"the plan says {plan.precision}, but a cache has the model's own dtype; build the model in bfloat16 and "
            "say precision fp32"
        )
    if not any(axis.size > 1 and axis.name not in plan.data for axis in plan.axes):
        return ModuleSteps(job, demand, device, dtype)
    try:
        return GraphSteps(job, plan, mesh, demand, device, dtype)
    except CaptureError as error:
        raise PlanError(f"{plan.title()} splits the model, but {error}; to generate, split the batch alone") from error


class ModuleSteps:
    """The module as it is, with the whole cache."""

    def __init__(self, job: Job, demand: Demand, device: torch.device, dtype: torch.dtype | None) -> None:
        module = job.build()
        self._step = step_of(module if dtype is None else lift(module, dtype), job.global_batch, demand.longest)
        self._step.eval()
        self._device, self._dtype, self.piece = torch.device("cpu"), dtype, demand.piece
        self.fixed = _fixed(self._step, job)
        self._state: list[Tensor] = []
        # Here, where an index that is too large is an error; on a GPU it is the end of the process.
        check_takes(self._takes, type(module).__name__, demand)
        self._step.to(device)
        self._device, self._state = device, []

    def _takes(self, token: int, position: int) -> bool:
        self.begin(self.fixed or 1)
        try:
            self.step(torch.full((self.fixed or 1, 1), token), position)
        except JobError:
            return False
        except Exception:  # it may run on a GPU alone; then nothing is known
            return True
        return True

    def begin(self, samples: int) -> None:
        with torch.inference_mode():
            state = [t.to(self._device) for t in self._step.start(samples)]
            self._state = state if self._dtype is None else lift(state, self._dtype)

    def step(self, tokens: Tensor, start: int) -> Tensor | None:
        positions = torch.arange(start, start + tokens.shape[1], device=self._device)
        with torch.inference_mode(), Lifted(self._dtype) if self._dtype is not None else nullcontext():
            try:
                logits: Tensor
                logits, *self._state = self._step(tokens.to(self._device), positions, *self._state)
            except (IndexError, RuntimeError) as error:
                if not re.search("out of (range|bounds)", str(error)):
                    raise
                name = type(self._step.module).__name__
                raise JobError(
                    f"{name} does not take tokens up to {int(tokens.max())} at positions up to {int(positions[-1])}: "
                    f"{error}; see that the prompts are of its vocabulary and that they fit with their new tokens"
                ) from error
        return logits

    def agree(self, tokens: Tensor) -> Tensor:
        return tokens

    def vocabulary(self) -> int:
        samples = self.fixed or 1
        self.begin(samples)
        logits = self.step(torch.zeros((samples, 1), dtype=torch.int64), 0)
        assert logits is not None
        return vocabulary_tried(self._takes, logits.shape[-1]) if self._device.type == "cpu" else logits.shape[-1]

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._state)


class GraphSteps:
    """Captured steps, split within the replica."""

    def __init__(
        self, job: Job, plan: Plan, mesh: Mesh, demand: Demand, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        module, weights = job.bare()
        step = step_of(module if dtype is None else lift(module, dtype), job.global_batch, demand.longest)
        self.fixed, self._gives = _fixed(step, job), Replica.of(plan, mesh.rank).giver == mesh.rank
        graph = _graph(step, job, 1)
        check_fits(graph.captured, type(module).__name__, demand)
        self._vocabulary = vocabulary_of(graph.captured)
        plan, bounds = for_prediction(job, plan.with_(micro_batches=1), module, graph, purposes=("train", "predict"))
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name not in plan.data), mesh.rank, mesh.recorder)
        plan = plan.with_(axes=tuple(_without_batch(axis) for axis in plan.replica().axes))
        split = Split(graph, plan, inner, bounds)
        _check_splits(split)
        self._model = RankModel(split, device, dtypes=lifts(dtype) if dtype is not None else {})
        self._model.load(module, frees=True, weights=weights)
        for param in module.parameters():
            let_go(param)
        self._before = _before(step, split, job, device)
        self._mesh, self._inner, self._device = mesh, inner, device
        self._channels = Channels(mesh, split.pipeline, plan.stages, device)
        self._pipelines = {1: _pipeline(self._model, self._channels)}
        self._models = {1: self._model}
        self._last, self.piece = self._model, 1
        if demand.piece > 1:
            self._take_pieces(step, job, demand.piece)

    def _take_pieces(self, step: Step, job: Job, length: int) -> None:
        """Make programs for several positions, where they need the same parts of weights and of the cache."""
        split = self._model.split
        graph = _graph(step, job, length)
        several = Split(graph, split.plan, split.mesh, corresponding(split.graph, graph, split.bounds))
        model = RankModel.like(self._model, several)
        if _kept(several, model) == _kept(split, self._model):
            model.share(self._model)
            self._models[length], self._pipelines[length] = model, _pipeline(model, self._channels)
            self.piece = length

    def begin(self, samples: int) -> None:
        with torch.inference_mode():
            begin(self._model, samples, self._before)
        self._last = self._model
        for model in self._models.values():
            go_on(model, self._model)

    def step(self, tokens: Tensor, start: int) -> Tensor | None:
        model = self._models[tokens.shape[1]]
        if model is not self._last:
            go_on(model, self._last)
            self._last = model
        positions = torch.arange(start, start + tokens.shape[1], device=self._device)
        given = dict(zip(model.split.graph.captured.inputs, (tokens.to(self._device), positions), strict=True))
        found: list[Mapping[str, Tensor]] = []
        with torch.inference_mode(), self._mesh.exchanging():
            self._pipelines[tokens.shape[1]].play(
                model.start(given, tokens.shape[0], 0), lambda m, outputs: found.append(outputs)
            )
        self._mesh.recorder.take()
        return found[0]["logits"] if self._gives else None

    def agree(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._device)
        # The last stage has them on its first rank: first they go through that stage, then to the others.
        for axis in sorted(self._inner.axes, key=lambda axis: axis.name == PIPELINE):
            if axis.group is not None:
                last = stage_rank(self._model.split.plan.stages - 1, axis.size) if axis.name == PIPELINE else 0
                dist.broadcast(tokens, src=axis.ranks[last], group=axis.group)
        return tokens

    def vocabulary(self) -> int:
        return self._vocabulary

    def state_bytes(self) -> int:
        state = [b for name, b in self._model.buffers.items() if name in self._model.split.graph.state]
        return sum(t.numel() * t.element_size() for t in state)


@uncollected()
def _graph(step: Step, job: Job, length: int) -> Graph:
    return Graph(capture_step(step, job.global_batch, length), frozenset())


def _pipeline(model: RankModel, channels: Channels) -> Pipeline:
    split = model.split
    order = forward_only(split.mine, 1)
    return Pipeline(model.stages(), split.plan.stages, order, channels, results=tuple(split.graph.results))


def _fixed(step: Step, job: Job) -> int | None:
    return None if all(each.samples for each in step.state) else job.global_batch


def _before(step: Step, split: Split, job: Job, device: torch.device) -> dict[str, Tensor]:
    """This rank's part of what is not zero before the first step."""
    whole = dict(zip(step.names, step.start(job.global_batch), strict=True))
    used = ((name, value, whole[name]) for name, (value, _) in split.graph.state.items())
    return {name: split.shard(value, tensor).to(device) for name, value, tensor in used if tensor.any()}


def _kept(split: Split, model: RankModel) -> dict[str, list[tuple[str, int, int]]]:
    """Which part of each parameter and of the state this rank has."""
    values = {**split.graph.params, **{name: old for name, (old, _) in split.graph.state.items()}}
    return {name: split.stored(values[name]) if name in values else [] for name in [*model.used, *model.used_buffers]}


# -- plans -------------------------------------------------------------------------------------------------------------


def _without_batch(axis: PlanAxis) -> PlanAxis:
    """An axis within a replica: there the samples are not cut."""
    return PlanAxis(axis.name, axis.size, tuple(dim for dim in axis.dims if dim != "batch"))


def _check_splits(split: Split) -> None:
    """Check that every axis splits something of a step.

    Raises:
        PlanError: one does not, such as an axis of the sequence, or one cuts the samples.
    """
    for a, axis in enumerate(split.layout.axes):
        splits = any(choices[a].letter is not None for choices in split.layout.choices.values())
        if axis.size > 1 and axis.matches("batch") is not None:
            raise PlanError(f"axis {axis.name} splits the batch and other dims; to generate, name the other dims alone")
        if axis.size > 1 and not splits:
            raise PlanError(
                f"axis {axis.name} of {axis.size} ranks ({', '.join(axis.dims)}) splits nothing of a step, which has "
                "one token of each sample; split heads and widths (tensor), layers (pipeline) or the batch (data)"
            )
