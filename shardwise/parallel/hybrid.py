"""Hybrid: any product of axes on one mesh, and what this rank has of every tensor under it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.errors import PlanError
from shardwise.graph.dims import BATCH
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.parallel import lower
from shardwise.parallel.collectives import join, take
from shardwise.parallel.layout import WHOLE, Cut, Layout, SplitAxis, State, States, check_axes
from shardwise.parallel.mesh import Axis, Mesh
from shardwise.parallel.micro import Early, early_values, same_for_all, time_axis
from shardwise.parallel.recompute import check_blocks
from shardwise.parallel.schedule import stage_rank
from shardwise.plan.plan import PIPELINE, Plan
from shardwise.weights.files import Ranges, runs


@dataclass(frozen=True)
class Micro:
    """One micro-batch of a step: its samples over all ranks, and where they start among all samples of the step."""

    samples: int
    first: int
    total: int


class Split:
    """A graph, a plan and a mesh put together: what this rank's tensors look like.

    Args:
        graph: the captured model.
        plan: how it is split.
        mesh: this rank's place.
        bounds: the operators of each stage, for a graph that is not the one that the plan was made for but a relative.

    Raises:
        PlanError: the plan does not fit the graph.
    """

    def __init__(self, graph: Graph, plan: Plan, mesh: Mesh, bounds: Sequence[tuple[int, int]] | None = None) -> None:
        self.graph, self.plan, self.mesh = graph, plan, mesh
        self.timed = plan.micro_batches > 1
        split_axes = [SplitAxis(a.name, a.size, a.dims) for a in plan.axes if a.name != PIPELINE]
        if bounds is None:
            check_axes(graph, split_axes)
            check_blocks(graph, plan.recompute)
        self.axes: list[Axis | None] = [mesh[a.name] for a in split_axes]
        if self.timed:
            self.axes.insert(0, None)
            split_axes.insert(0, time_axis(plan.micro_batches))
        self.layout = Layout(graph, split_axes)
        self.early: list[Early] = (
            early_values(graph, self.layout, exact_batch_norm=plan.batch_norm == "exact") if self.timed else []
        )
        self.same = graph.steady | (same_for_all(graph, self.layout) if self.timed else frozenset())
        self.pipeline = mesh.get(PIPELINE)
        self.bounds = bounds if bounds is not None else stage_bounds(graph, plan)
        rank = self.pipeline.rank if self.pipeline else 0
        ranks = self.pipeline.size if self.pipeline else 1
        self.mine = [s for s in range(plan.stages) if stage_rank(s, ranks) == rank]
        self.stage_of = {op: s for s, (lo, hi) in enumerate(self.bounds) for op in graph.ops[lo:hi]}

    # -- samples -----------------------------------------------------------------------------------------------------

    def micros(self, total: int) -> list[Micro]:
        """The micro-batches of a step of `total` samples."""
        count = self.plan.micro_batches
        return [Micro(lower.chunk(total, count, m), lower.chunk_start(total, count, m), total) for m in range(count)]

    def _cutting(self, states: Sequence[State], cut: Cut) -> list[Axis]:
        """The mesh axes that cut one leaf, outermost first."""
        return [x for x, s in zip(self.axes, states, strict=True) if x is not None and s == cut]

    def rows(self, value: Value, micro: Micro) -> tuple[int, int]:
        """Which samples of the step this rank needs of a batch tensor, for one micro-batch."""
        chain = [(x.parts, x.rank) for x in self._cutting(self.layout.states[value], Cut(0, 0))]
        start = micro.first + lower.local_start(micro.samples, chain)
        return start, start + lower.local_count(micro.samples, chain)

    def local_shape(self, value: Value, states: States, micro: Micro, most: Axis | None = None) -> tuple[int, ...]:
        """The shape of a tensor on this rank, for a micro-batch.

        With an axis `most` on the rank along it that has the largest part of the samples.
        """

        def size(leaf: Cut) -> int:
            # What holds nothing of the samples' own may have a place for each of the whole step.
            samples = micro.total if self.timed and states[0] != leaf else micro.samples
            return self._leaf_size(value, leaf, states, samples, most)

        return tuple(
            math.prod(size(Cut(pos, k)) for k in range(len(dim.leaves()))) for pos, dim in enumerate(value.dims)
        )

    def lead(self, value: Value, cut: Cut, states: Sequence[State], samples: int) -> int:
        """The size on this rank of what lies before a leaf in its position."""
        return math.prod(self._leaf_size(value, Cut(cut.pos, k), states, samples) for k in range(cut.leaf))

    def _leaf_size(
        self, value: Value, leaf: Cut, states: Sequence[State], samples: int, most: Axis | None = None
    ) -> int:
        size = value.dims[leaf.pos].leaves()[leaf.leaf].size
        axes = self._cutting(states, leaf)
        if size == BATCH:
            return lower.local_count(samples, [(x.parts, x.largest if x is most else x.rank) for x in axes])
        return size.at(samples) // math.prod(x.size for x in axes)

    # -- parameters --------------------------------------------------------------------------------------------------

    def shard(self, value: Value, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter."""
        local = whole
        for a, (axis, cut, sizes) in self._cuts(value):
            local = take(local, axis, cut.pos, self._param_lead(value, cut, a), sizes)
        return local.contiguous()

    def ranges(self, value: Value, shape: Sequence[int]) -> list[Ranges]:
        """The entries of each position of a whole parameter that this rank's part has, as `shard` cuts it."""
        kept = [torch.arange(n, device="cpu") for n in shape]
        for a, (axis, cut, sizes) in self._cuts(value):
            kept[cut.pos] = take(kept[cut.pos], axis, 0, self._param_lead(value, cut, a), sizes)
        return [runs(indices) for indices in kept]

    def unshard(self, value: Value, local: Tensor) -> Tensor:
        """The whole parameter from the parts of all ranks."""
        whole = local
        for a, (axis, cut, sizes) in reversed(self._cuts(value)):
            whole = join(whole, axis, cut.pos, self._param_lead(value, cut, a), sizes)
        return whole

    def cutting(self, value: Value, but: Collection[int]) -> list[Axis]:
        """The mesh axes that cut a parameter along other positions than these."""
        return [axis for _, (axis, cut, _) in self._cuts(value) if cut.pos not in but]

    def _cuts(self, value: Value) -> list[tuple[int, tuple[Axis, Cut, list[int]]]]:
        found = []
        states = self.layout.states[value]
        for a, (axis, state) in enumerate(zip(self.axes, states, strict=True)):
            if axis is None or not isinstance(state, Cut):
                continue
            leaf = value.dims[state.pos].leaves()[state.leaf].size.coefficient
            for b in range(a):
                outer = self.axes[b]
                if outer is not None and states[b] == state:
                    leaf //= outer.size
            found.append((a, (axis, state, [leaf // axis.size] * axis.size)))
        return found

    def _param_lead(self, value: Value, cut: Cut, a: int) -> int:
        """As `lead`, with only the axes before `a` cutting."""
        states = self.layout.states[value]
        return self.lead(value, cut, [s if b < a else WHOLE for b, s in enumerate(states)], 1)

    def stored(self, value: Value) -> list[tuple[str, int, int]]:
        """Which part of a parameter this rank keeps: equal for equal parts, whatever the dims are called."""
        return [(axis.name, cut.pos, self._param_lead(value, cut, a)) for a, (axis, cut, _) in self._cuts(value)]

    def sums(self, value: Value) -> tuple[Axis, ...]:
        """The mesh axes over which a parameter's gradient is to be summed."""
        return tuple(x for a in self.layout.grad_axes(value) if (x := self.axes[a]) is not None)

    def copies(self, value: Value) -> int:
        """How many ranks of one stage hold the same entries of a parameter."""
        stored = zip(self.axes, self.layout.states[value], strict=True)
        return math.prod(axis.size for axis, state in stored if axis is not None and not isinstance(state, Cut))

    # -- stages ------------------------------------------------------------------------------------------------------

    def crossings(self, cut: int) -> list[Value]:
        """What is carried over the cut behind stage `cut`, in order of execution."""
        return _crossings(self.graph, self.bounds[cut][1])

    def stage_params(self, stage: int) -> list[str]:
        """Names of the parameters that a stage's operators use, in order of use."""
        names = {v: n for n, v in self.graph.params.items()}
        found: dict[str, None] = {}
        for op in self.graph.ops:
            if self.stage_of[op] == stage:
                for value in op.inputs:
                    if value in names:
                        found[names[value]] = None
        return list(found)


def stage_bounds(graph: Graph, plan: Plan) -> list[tuple[int, int]]:
    """The operators of each stage, as a range of indices.

    Raises:
        PlanError: a cut names no operator of the graph, or the cuts are out of order.
    """
    at = graph.places
    missing = [cut for cut in plan.cuts if cut not in at]
    if missing:
        raise PlanError(
            f"the plan cuts before {missing[0]!r}, but the model has no such operator; the plan is for another model"
        )
    starts = [0, *(at[cut] for cut in plan.cuts)]
    if sorted(set(starts)) != starts:
        raise PlanError(f"cuts must be in order of execution, but are at operators {starts[1:]}")
    return list(zip(starts, [*starts[1:], len(graph.ops)], strict=True))


def crossings(graph: Graph, plan: Plan, cut: int) -> list[Value]:
    """What is carried over the cut behind stage `cut`, in order of execution.

    What depends on the batch alone is not: each stage computes it for itself.
    """
    return _crossings(graph, stage_bounds(graph, plan)[cut][1])


def _crossings(graph: Graph, start: int) -> list[Value]:
    before: dict[Value, Op] = {v: op for op in graph.ops[:start] for v in op.outputs if v in graph.learned}
    needed = {v for op in graph.ops[start:] for v in op.inputs} | set(graph.results.values())
    return [v for v in before if v in needed]


def check_fixed_batch(graph: Graph, plan: Plan) -> None:
    """Refuse to cut the batch of a model that was written for one batch size.

    Raises:
        PlanError: the plan cuts the batch, but the model fixes it.
    """
    if graph.captured.fixed_batch is not None and (plan.data or plan.micro_batches > 1):
        raise PlanError(
            f"the model fixes its batch at {graph.captured.fixed_batch} samples (a size was turned into a plain "
            "number), so the batch cannot be cut; write the model with tensor.shape[0] in place of len(tensor)"
        )
