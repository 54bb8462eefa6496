"""Pricer: prices plans of one graph on any cluster.

Pure: it runs nothing. Sizes, operations and messages come from the captured graph of the very model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shardwise.cost.again import Again
from shardwise.cost.case import Case
from shardwise.cost.estimate import Estimate
from shardwise.cost.forward import Forward, tensor_lives
from shardwise.cost.gradients import gradient_lives
from shardwise.cost.kernels import Kernels
from shardwise.cost.place import Place, loads, places
from shardwise.cost.profile import NOTHING, PROFILES, Besides, Profile
from shardwise.cost.rows import Bytes, Seconds
from shardwise.cost.table import Table
from shardwise.cost.traits import Traits, counts_samples
from shardwise.cost.weights import Weights
from shardwise.cost.work import Work
from shardwise.errors import PlanError
from shardwise.graph.blocks import Block, blocks
from shardwise.graph.dims import BATCH
from shardwise.graph.fold import Folded, fold
from shardwise.graph.graph import Graph, Op
from shardwise.graph.saved import Saved, saved
from shardwise.machine.cluster import Cluster
from shardwise.machine.device import Device
from shardwise.parallel.hybrid import stage_bounds
from shardwise.parallel.layout import SplitAxis
from shardwise.plan.plan import PIPELINE, Plan

_T = TypeVar("_T")


class Pricer:
    """Prices plans of one graph.

    Args:
        graph: the captured model.
        profile: the framework that runs the plans.
    """

    def __init__(self, graph: Graph, profile: Profile | None = None) -> None:
        self.graph = graph
        self.profile = profile or PROFILES["shardwise"]
        self._made: dict[tuple[object, ...], Any] = {}

    def price(self, plan: Plan, cluster: Cluster, batch: int, *, besides: Besides = NOTHING) -> Estimate:
        """What a plan costs on a cluster.

        Args:
            plan: how the model is split.
            cluster: the machines; ranks are placed in the order of its nodes.
            batch: samples of a step; to predict, of a chunk, which every replica has one of.
            besides: what the framework does besides.

        Raises:
            PlanError: the plan is for another graph, or needs more ranks than the cluster has.
        """
        cuts = [low for low, _ in stage_bounds(self.graph, plan)[1:]]
        return self.case(plan, cluster, batch, besides=besides).estimate(cuts)

    def seconds(self, plan: Plan, cluster: Cluster, batch: int) -> Mapping[str, float]:
        """Seconds of a plan that has no pipeline, by item; arguments as for `price`, whose bytes take the longer."""
        return self.case(plan, cluster, batch).spent([]).seconds

    def case(self, plan: Plan, cluster: Cluster, batch: int, *, besides: Besides = NOTHING) -> Case:
        """A plan on a cluster but for where its stages begin; arguments as for `price`.

        Raises:
            PlanError: the plan needs more ranks than the cluster has.
        """
        if plan.ranks > cluster.ranks:
            raise PlanError(
                f"the plan needs {plan.ranks} ranks, but cluster {cluster.name} has {cluster.ranks}; "
                "give a larger cluster, or a plan for fewer ranks"
            )
        spread = [a.size for a in plan.axes if a.dims == ("batch",)]
        data = spread if self.coupled else []
        others = [a for a in plan.axes if a.name != PIPELINE and (a.dims != ("batch",) or data)]
        inner = tuple(SplitAxis(a.name, a.size, a.dims) for a in others)
        samples = math.ceil(batch / plan.micro_batches) * (math.prod(spread) if self.graph.predicts else 1)
        # With its cluster, so that no other gets the id.
        mesh = tuple((a.name, a.size, a.dims == ("batch",)) for a in plan.axes)
        shards, parts = besides.shards, plan.micro_batches if self.graph.predicts else 1
        where = self._once(("places", id(cluster), mesh, shards), lambda: (places(plan, cluster, shards), cluster))[0]

        def loaded(place: Place) -> tuple[Table, Table, Place]:
            """The tables of a place's slowest and of its fullest ranks, and the place with what these have."""
            each = [
                (self.table(inner, load.samples * math.prod(data), load.device, plan.recompute, besides, parts), load)
                for load in loads(plan, cluster, place, samples)
            ]
            if len(each) == 1:
                return each[0][0], each[0][0], place
            slowest, slow = max(each, key=lambda e: float(e[0].seconds[-1]))
            # Parameters are the same on all of them.
            fullest, full = max(each, key=lambda e: float(e[0].whole_held.activations) - e[1].memory)
            return slowest, fullest, replace(place, device=slow.device, memory=full.memory)

        made = {key: loaded(place) for key, place in {id(place): place for place in where}.items()}
        tables, held, there = zip(*(made[id(place)] for place in where), strict=True)
        if self.graph.predicts:
            return Forward(plan, self.profile.predicting(), tables, held, there, self.copies, besides)
        return Case(plan, self.profile, tables, held, there, self.copies, besides)

    @cached_property
    def coupled(self) -> bool:
        """Whether operators on parameters' results need all samples at once, so that these are gathered for them."""
        graph = self.folded.graph
        return not graph.predicts and any(
            any(v in graph.learned and counts_samples(v) for v in op.inputs)
            and not any(letter.dim.size == BATCH for letter in op.letters)
            for op in graph.ops
        )

    @cached_property
    def copies(self) -> int:
        """How many alike layers the model has."""
        return max((block.count for block in self.blocks), default=1)

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """The graph's operators as blocks."""
        return blocks(self.graph)

    @cached_property
    def folded(self) -> Folded:
        """The graph without what only repeats."""
        return fold(self.graph, self.blocks)

    @cached_property
    def layers(self) -> frozenset[Op]:
        """The products with parameters in blocks that repeat."""
        graph, block = self.folded.graph, max(self.blocks, key=lambda b: b.count)
        learned = set(graph.params.values())
        found = {graph.ops[i] for i in self.folded.index[block.start : block.stop]}
        return frozenset(op for op in found if op.context.work.coefficient and learned.intersection(op.inputs))

    @cached_property
    def saved(self) -> Mapping[Op, Saved]:
        """What operators keep for backward."""
        return saved(self.folded.graph)

    @cached_property
    def _gradients(self) -> npt.NDArray[np.int_]:
        return gradient_lives(self.folded, self.saved)

    @cached_property
    def _tensors(self) -> npt.NDArray[np.int_]:
        return tensor_lives(self.folded)

    @cached_property
    def traits(self) -> Traits:
        """What operators are before they are split."""
        return Traits(self.folded.graph, fused=self.profile.fused, prepared=self.profile.prepared)

    def work(self, axes: Sequence[SplitAxis]) -> Work:
        """What operators do under these axes."""
        p = self.profile

        def make() -> Work:
            return Work(
                self.folded.graph, axes, self.saved, self.traits, balanced=p.balanced, regather=p.regather,
                scores=p.scores,
            )  # fmt: skip

        return self._once(("work", tuple(axes)), make)

    def table(
        self,
        axes: Sequence[SplitAxis],
        samples: int,
        device: Device,
        recompute: Sequence[str],
        besides: Besides = NOTHING,
        parts: int = 1,
    ) -> Table:
        """What operators take under these axes for a micro-batch on a device; `parts` as for `Bytes`."""
        split, recompute = tuple(axes), tuple(recompute)

        def make() -> Table:
            return Table(
                self.graph,
                self._once(("seconds", split, samples, device.rates, besides.fp8), seconds),
                self._once(("bytes", split, samples, parts), sizes),
                self._once(("weights", split), lambda: Weights(self.folded, self.work(split), self.profile.weight)),
                self._once(("again", recompute, besides.selective), again),
            )

        def seconds() -> Seconds:
            p = self.profile
            kernels = Kernels(
                device, flash=p.flash, passes=p.passes, loss=p.loss, attention=p.attention, portable=p.portable,
                eight=self.layers if besides.fp8 else frozenset(),
            )  # fmt: skip
            return Seconds(self.folded, self.work(split), samples, kernels)

        def sizes() -> Bytes:
            attention, predicts = "fused" if self.profile.flash else "scores", self.graph.predicts
            gradients = self._gradients if self.profile.stepwise and not predicts else None
            tensors = self._tensors if predicts else None
            return Bytes(self.folded, self.work(split), samples, attention, gradients, tensors, parts)

        def again() -> Again:
            return Again(
                self.folded, recompute, self.traits, self.saved, selective=besides.selective, stops=self.profile.stops
            )

        return self._once(("table", split, samples, device.rates, recompute, besides, parts), make)

    def _once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """What was made for this key, or is made now."""
        if key not in self._made:
            self._made[key] = make()
        found: _T = self._made[key]
        return found
