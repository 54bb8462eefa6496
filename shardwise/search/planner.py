"""Planner: the best plan of a space, best bound first, and how far from the optimum it can be.

Every shape has a bound that no cuts of it can beat: all of its work spread evenly over its ranks. Shapes are priced in
the order of their bounds, until no bound that is left beats the best price.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from shardwise.cost.case import Case
from shardwise.cost.estimate import Estimate, Spent
from shardwise.cost.pricer import Pricer
from shardwise.machine.cluster import Cluster
from shardwise.plan.plan import Plan
from shardwise.search.cuts import Cuts, cut_places
from shardwise.search.space import Shape, Space

_SHARE = 1e-12
"""Relative difference of two prices that rounding makes."""
_OTHERS, _LONGEST, _TRIED = 10, 60, 3
"""How many plans that are split differently are wanted beside the best, how many shapes are looked at for them, and how
many of those are priced that have a mesh in common."""


@dataclass(frozen=True)
class Priced:
    """A plan and its price."""

    plan: Plan
    estimate: Estimate

    def value(self, objective: str) -> float:
        """What an objective asks to be small: seconds, device-seconds, seconds a chunk of many, or bytes."""
        return self.estimate.peak if objective == "memory" else _seconds(self.plan, self.estimate, objective)


@dataclass
class Found:
    """What a search found.

    Attributes:
        objective: what was looked for.
        priced: plans that fit and run, the best first; those priced before the best was known to be the best.
        tight: the plan that came nearest to fitting, where none fits.
        bound: no plan of the space is better, with whatever cuts.
        floor: no cuts of the shapes that were priced without trying all are better.
        shapes: how many shapes the space has.
        small: how many of them are known to have too little memory however they are cut.
        complete: whether the search came to its end.
    """

    objective: str
    priced: list[Priced] = field(default_factory=list)
    tight: Priced | None = None
    bound: float = 0.0
    floor: float = math.inf
    shapes: int = 0
    small: int = 0
    complete: bool = False

    @property
    def best(self) -> Priced | None:
        """The best plan; None where none fits."""
        return self.priced[0] if self.priced else None

    @property
    def different(self) -> list[Priced]:
        """The best plan of each mesh, with weights sharded or not; the best first."""
        found: dict[object, Priced] = {}
        for priced in self.priced:
            found.setdefault(_way(priced.plan), priced)
        return list(found.values())

    @property
    def gap(self) -> float:
        """The part by which the best plan may be worse than the best there is."""
        best = self.best
        return math.inf if best is None else max(0.0, 1 - self.bound / best.value(self.objective))


class _Next(NamedTuple):
    """The shape of a family that is to be looked at next: its bound, the family's number, and its place there.

    A place of -1 is that of the first shape that may fit, which is not found yet; the bound is that of all of them. One
    that is `alone` is out of its family's turn: it was looked at more closely, and its bound is now higher.
    """

    bound: float
    number: int
    place: int
    alone: bool
    family: list[Shape]

    @property
    def shape(self) -> Shape:
        return self.family[self.place]


class Planner:
    """Looks for the best plan of a space.

    Args:
        pricer: prices plans.
        cluster: where they run.
        space: what to look at.
        runs: whether the program of a plan can be made.
        model: fingerprint of the graph, for plans.
        precision: of the job.
    """

    def __init__(
        self,
        pricer: Pricer,
        cluster: Cluster,
        space: Space,
        runs: Callable[[Plan], bool],
        model: str = "",
        precision: str = "fp32",
    ) -> None:
        self.pricer, self.cluster, self.space, self.runs = pricer, cluster, space, runs
        self._more = {"model": model, "precision": precision}
        self.ids = [op.id for op in pricer.graph.ops]
        self._last: tuple[Shape, Case] | None = None

    def search(self, tell: Callable[[Found, int], None] | None = None) -> Found:
        """The best plans of the space.

        Args:
            tell: called before each shape is priced, with what is found so far and how many shapes are left.

        An interrupt (Ctrl-C) ends the search with what is found so far.
        """
        objective = self.space.options.objective
        found = Found(objective)
        queue: list[_Next] = []
        small: list[Shape] = []
        try:
            for number, family in enumerate(self.space.families()):
                found.shapes += len(family)
                place = self._first(family)
                found.small += abs(place)
                if place < len(family):
                    queue.append(_Next(self._least(family[max(place, 0)]), number, place, False, family))
                else:
                    small.append(family[-1])
            heapq.heapify(queue)
            while queue:
                each = queue[0]
                found.bound = min(each.bound, found.floor, found.best.value(objective) if found.best else math.inf)
                if self._settled(found, each.bound):
                    break
                if tell is not None:
                    tell(found, len(queue))
                if each.place >= 0:
                    cuts, closer = self._cuts(each.shape), each.bound
                    if each.alone:
                        heapq.heappop(queue)
                    else:
                        closer = self._closer(each.shape, cuts, each.bound)
                        self._replace(queue, each.place + 1)
                    if closer == math.inf:
                        found.small += 1
                        small.append(each.shape)
                    elif not each.alone and queue and queue[0].bound < closer:
                        heapq.heappush(queue, each._replace(bound=closer, alone=True))
                    elif not self._price(each.shape, found, cuts):
                        small.append(each.shape)
                    elif not cuts.exact(objective):
                        found.floor = min(found.floor, closer)
                else:
                    place = 1 + bisect_left(each.family[1:], True, key=self._may_fit)
                    found.small += place - 1
                    small.append(each.family[place - 1])
                    self._replace(queue, place)
            else:
                self._settled(found, math.inf)
                found.bound = min(found.floor, found.best.value(objective)) if found.best else math.inf
            if found.best is None:
                self._nearest(small, found)
            found.complete = True
            self._others([each.shape for each in sorted(queue) if each.place >= 0], found)
        except KeyboardInterrupt:
            pass
        return found

    def _first(self, family: list[Shape]) -> int:
        """The place of the first shape of a family that may fit; -1 where it is not the first of all, as many as there
        are where none does.

        The more blocks are computed again the less memory a shape needs, once there are any.
        """
        if self._may_fit(family[0]):
            return 0
        return -1 if len(family) > 1 and self._may_fit(family[-1]) else len(family)

    def _replace(self, queue: list[_Next], place: int) -> None:
        """Put another shape of its family in place of the first in the queue, if there is one at this place."""
        _, number, _, _, family = heapq.heappop(queue)
        if place < len(family):
            heapq.heappush(queue, _Next(self._least(family[place]), number, place, False, family))

    def price(self, shape: Shape, cuts: Cuts | None = None) -> Priced | None:
        """A shape with its best cuts; None where it has too few places for them or too little memory."""
        cuts = cuts or self._cuts(shape)
        found = cuts.best(self.space.options.objective)
        if found is None:
            return None
        return Priced(shape.plan([self.ids[i] for i in found], **self._more), cuts.case.estimate(found))

    def fits(self, priced: Priced) -> bool:
        """Whether a plan fits the devices and the limit."""
        return self.missing(priced) <= 0

    def missing(self, priced: Priced) -> float:
        """Bytes that a plan needs on its fullest device and that neither the device nor the limit gives."""
        limit = self.space.options.memory
        return max(priced.estimate.over, priced.estimate.peak - limit if limit is not None else -math.inf)

    def bound(self, shape: Shape) -> float:
        """What no cuts of a shape can beat; infinite where none fit."""
        return self._least(shape) if self._may_fit(shape) else math.inf

    def _least(self, shape: Shape) -> float:
        """What no cuts of a shape can beat, whether they fit or not."""
        case = self._case(shape)
        ranks, micros, objective = shape.pipeline, shape.micros, self.space.options.objective
        if objective == "memory":
            return self._least_memory(case, shape)
        if ranks == 1:
            return _seconds(case.plan, case.spent([]), objective)
        rest, pace, through, forward = self._end(case)
        if objective == "throughput":
            return micros * pace / case.plan.replicas
        staged = _least_1f1b(ranks, micros, through, forward) if len(case.alike) == 1 else micros * pace
        halved = least_filling(ranks, shape.chunks) * pace if len(case.alike) == 1 else 0.0
        filling = {"zero-bubble": 0.0, "interleaved": halved}.get(shape.schedule, staged - micros * pace)
        step = micros * pace + max(filling, 0.0) * case.lost + rest
        return step * (case.plan.ranks if objective == "cost" else 1)

    def _end(self, case: Case) -> tuple[float, float, float, float]:
        """Seconds behind the last micro-batch that some rank needs at least; those of a fair share of a micro-batch.

        Then those of one micro-batch through all of the model, both ways, and there.
        """
        ranks, micros = case.plan.pipeline, case.plan.micro_batches
        speed, through, rest = 0.0, math.inf, math.inf
        for alike in case.alike:
            times = case.times(alike[0], case.tables[alike[0]].whole)
            forward = float(times.forward)
            both = forward + float(times.backward)
            speed += len(alike) / both
            through = min(through, both)
        # Devices that are not alike share a micro-batch by their speed.
        pace = 1 / speed
        for rank, *_ in case.alike:
            # Some rank has a fair share of the weights or more; what takes longer to go backward takes longer a step.
            whole = case.tables[rank].whole_held
            share = replace(whole.scaled(1 / ranks), tensors=0 * whole.tensors)  # it may be few large ones
            behind = np.array(pace if micros > 1 else through)
            shown, _, others = case.reduction(rank, share, behind)
            more = max(float(shown), *(float(o) for o in others.values()), 0.0)
            rest = min(rest, more + float(case.update(rank, share)))
        return rest, pace, through, forward

    def _closer(self, shape: Shape, cuts: Cuts, bound: float) -> float:
        """What no cuts of a shape can beat where the places to cut at are looked at; infinite where none fit."""
        objective = self.space.options.objective
        if shape.pipeline == 1 or objective == "memory" or (cuts.few and shape.chunks > 1):
            return bound  # where all cuts are tried, stages need not keep to their share of a rank's memory
        if objective == "throughput":
            return cuts.pace() / cuts.case.plan.replicas
        rest, pace, _, _ = self._end(cuts.case)
        lost, busy = cuts.case.lost, shape.micros * pace
        step = lost * (cuts.least() + (rest if shape.chunks > 1 else 0.0)) + (1 - lost) * (busy + rest)
        return max(bound, step * (cuts.case.plan.ranks if objective == "cost" else 1))

    def _may_fit(self, shape: Shape) -> bool:
        """Whether the bound of a shape's memory leaves room for it."""
        case = self._case(shape)
        return self._least_memory(case, shape) <= self._room(case)

    def _room(self, case: Case) -> float:
        """Bytes that the largest device gives."""
        return min(max(p.memory for p in case.places), self.space.options.memory or math.inf)

    def _least_memory(self, case: Case, shape: Shape) -> float:
        """Bytes that some rank needs however a shape is cut.

        Each rank has some of the weights and of what is kept for backward, the latter once for each micro-batch
        in flight. With weights y of ranks that add up to 1 the fullest needs the mean by y or more: a share of the
        model's weights counts with the least y, and a share of what is kept with the least y × flight. What is kept
        for all of backward and what for its second half alone are two bounds.
        """
        held = [case.held[rank].whole_held for rank, *_ in case.alike]
        if shape.pipeline == 1:
            return float(sum(case.memory(held[0], 1.0).values()))
        items = [case.memory(s, 0.0) for s in held]
        static = min(sum(float(item[key]) for key in ("parameters", "gradients", "optimizer")) for item in items)
        flight = np.array([case.flight.least(rank, shape.chunks) for rank in range(shape.pipeline)])
        half = np.array([case.flight.half_done(rank) for rank in range(shape.pipeline)]) / shape.chunks
        kept, halved = (min(float(getattr(s, name)) for s in held) for name in ("kept", "halved"))
        bounds = [static / shape.pipeline]
        for each, count in ((kept, flight - half), (halved, half)):
            count = np.maximum(count, _SHARE)  # there is none where backward is in one piece
            least = 1 / np.maximum(1.0, count[:, None] / count[None, :]).sum(axis=1)
            bounds.append(float(((static + each * count) * least).max()))
        return max(bounds) * (1 + case.reserve)

    def _settled(self, found: Found, bound: float) -> bool:
        """Whether the best plan beats this bound; a best one whose program cannot be made is dropped."""
        while found.best is not None and bound >= found.best.value(found.objective) * (1 - _SHARE):
            if self.runs(found.best.plan):
                return True
            found.priced.pop(0)
        return False

    def _case(self, shape: Shape) -> Case:
        # What is asked whether it may fit is asked next for its bound.
        if self._last is None or self._last[0] is not shape:
            self._last = shape, self.pricer.case(shape.plan(**self._more), self.cluster, self.space.batch)
        return self._last[1]

    def _cuts(self, shape: Shape) -> Cuts:
        return Cuts(self._case(shape), shape.chunks, self.space.options.memory)

    def _price(self, shape: Shape, found: Found, cuts: Cuts | None = None) -> bool:
        """Add a shape's best plan to what is found; False where none fits."""
        priced = self.price(shape, cuts)
        if priced is None or not self.fits(priced):
            found.small += 1
            return False
        found.priced.append(priced)
        found.priced.sort(key=lambda p: (p.value(found.objective), p.estimate.step))
        return True

    def _others(self, shapes: Sequence[Shape], found: Found) -> None:
        """Price some shapes more, so that there is something to compare the best plan with."""
        tried: Counter[object] = Counter()
        for shape in shapes[:_LONGEST]:
            if found.best is None or len(found.different) > _OTHERS:
                return
            tried[_way(shape)] += 1
            if tried[_way(shape)] <= _TRIED:
                self._price(shape, found)

    def _nearest(self, shapes: Sequence[Shape], found: Found) -> None:
        """Of shapes that do not fit the one that comes nearest."""
        cases = [(self._least_memory(case, shape), shape, case) for shape in shapes for case in [self._case(shape)]]
        for least, shape, case in sorted(cases, key=lambda each: each[0]):
            if found.tight is not None and least - self._room(case) >= self.missing(found.tight):
                return
            places = cut_places(case.tables[0])
            stages = shape.pipeline * shape.chunks
            if len(places) < stages - 1 or shape.chunks > 1:
                continue
            cuts = [places[len(places) * k // stages] for k in range(1, stages)]
            priced = Priced(shape.plan([self.ids[i] for i in cuts], **self._more), case.estimate(cuts))
            if found.tight is None or self.missing(priced) < self.missing(found.tight):
                found.tight = priced


def _seconds(plan: Plan, spent: Spent, objective: str) -> float:
    """What an objective asks to be small, unless it is memory."""
    if objective == "throughput":
        return spent.pace / plan.replicas
    return spent.step * (plan.ranks if objective == "cost" else 1)


def _way(plan: Plan | Shape) -> object:
    """What plans that are not told apart have in common: the mesh, and whether weights are sharded."""
    return tuple((axis.name, axis.size) for axis in plan.axes), plan.zero == 3


def _least_1f1b(ranks: int, micros: int, through: float, forward: float) -> float:
    """Seconds that 1F1B takes at least on alike ranks, however a model is cut.

    Before a rank's first micro-batch and after its last is the way there and back: stages that get shorter by one in
    `micros` each have all ranks done at once, which is the best that this allows. And a rank has done as many forwards
    as there are ranks from it on when its first backward may begin, which is behind all of the way there and the way
    back to it; what it then still has to do adds up, over all ranks, to all work less these forwards.

    Args:
        ranks: along the pipeline.
        micros: micro-batches.
        through: seconds of one micro-batch through all of the model, both ways.
        forward: of its way there.
    """
    shrinking = through / (1 - (1 - 1 / micros) ** ranks)
    ahead = min(ranks, micros) - 1
    return max(shrinking, through + ((micros - 1) * through - ahead * forward) / ranks)


def least_filling(ranks: int, chunks: int) -> float:
    """What filling and draining add at least to interleaved stages of alike ranks, in paces, however a model is cut.

    A rank's first micro-batch of its k-th stage comes through all stages before that one, and until then it has as many
    micro-batches as there are ranks of each of its stages before; backward is the mirror image. That is a bound for
    each rank and k. Of all of them take the mean, where those of k = 0 weigh more the later their rank is, by
    (rank − (ranks − 1) / 2) / (micro-batches × ranks × chunks): in this sum every stage counts as much, or more. Even
    stages need twice as much to fill, and uneven ones do come below that.
    """
    return (ranks - 1) / chunks / 2
