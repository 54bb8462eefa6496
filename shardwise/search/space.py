"""Space: the plans that a search looks at, but for where their stages begin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.shares import fair_shares

OBJECTIVES = {"train": ("time", "cost", "memory"), "predict": ("throughput", "latency", "memory")}
"""What may be looked for, by what a plan is for; the first is usual."""
AXES = ("pipeline", "data", "expert", "context", "tensor")
"""What a mesh is made of, outermost axis first: neighbouring ranks talk most."""
SPLIT = ("expert", "context", "tensor")
"""Those that split other dims than the batch alone."""
_CHUNKS = (2, 4)
"""Stages of each rank that interleaved schedules are tried with."""


@dataclass(frozen=True)
class Options:
    """What to look for.

    Attributes:
        objective: to train, "time" of a step; "cost", the device-seconds of a step, where fewer devices may be used; or
            "memory" of the fullest rank. To predict, "throughput" of many chunks, "latency" of one, or "memory".
        memory: bytes that a rank may use, where it is less than its device has.
        fixed: sizes of axes that are given; 1 forbids an axis.
        zero: ZeRO stages that are allowed.
        recompute: whether blocks may be computed again.
        purpose: what the plan is for, "train" or "predict".
    """

    objective: str = ""
    memory: float | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    zero: Sequence[int] = (0, 1, 2, 3)
    recompute: bool = True
    purpose: Literal["train", "predict"] = "train"

    def __post_init__(self) -> None:
        known = OBJECTIVES[self.purpose]
        if not self.objective:
            object.__setattr__(self, "objective", known[0])
        if self.objective not in known:
            raise PlanError(
                f"the objective must be one of {', '.join(known)} for a plan to {self.purpose}, "
                f"but is {self.objective!r}"
            )
        if self.purpose == "predict":  # which keeps nothing for backward, and has no optimizer
            object.__setattr__(self, "zero", (0,))
            object.__setattr__(self, "recompute", False)
        if self.memory is not None and self.memory <= 0:
            raise PlanError(f"the memory limit must be above 0 bytes, but is {self.memory:g}; leave it out for none")
        for name, size in self.fixed.items():
            if name not in AXES or size < 1:
                raise PlanError(
                    f"axis {name!r} cannot be fixed at {size}; axes are {', '.join(AXES)}, sizes at least 1"
                )


class Shape(NamedTuple):
    """A plan but for its cuts.

    Attributes:
        axes: the mesh, outermost axis first.
        micros: micro-batches.
        schedule, chunks: the pipeline's, and how many stages each rank has.
        zero: ZeRO stage.
        recompute: patterns of the blocks that are computed again.
    """

    axes: tuple[PlanAxis, ...]
    micros: int
    schedule: str
    chunks: int
    zero: int
    recompute: tuple[str, ...]

    @property
    def pipeline(self) -> int:
        """Ranks along the pipeline."""
        return next((axis.size for axis in self.axes if axis.name == PIPELINE), 1)

    def plan(self, cuts: Sequence[str] = (), **more: str) -> Plan:
        """As a plan with these cuts; without any, with cuts that name no operator."""
        cuts = tuple(cuts) or ("-",) * (self.pipeline * self.chunks - 1)
        return Plan(self.axes, cuts, self.micros, self.schedule, self.zero, self.recompute, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Space:
    """The shapes of plans for so many ranks.

    Attributes:
        ranks: how many.
        batch: samples of a step.
        dims: for each axis but the pipeline and the data axis, and each of its sizes, what it may split, each a choice.
        most_stages: at most so many stages.
        splits_batch: whether samples can be spread over ranks.
        splits_time: whether a batch can be cut into micro-batches.
        recompute: choices of the blocks that are computed again, of none first and of the most last.
        options: what to look for.
        speeds: of each rank, where devices are not alike.
    """

    ranks: int
    batch: int
    dims: Mapping[str, Mapping[int, Sequence[tuple[str, ...]]]]
    most_stages: int
    splits_batch: bool
    splits_time: bool
    recompute: Sequence[tuple[str, ...]]
    options: Options
    speeds: Sequence[float] = ()

    def shapes(self) -> Iterator[Shape]:
        """Every shape."""
        for family in self.families():
            yield from family

    def families(self) -> Iterator[list[Shape]]:
        """Every shape, those together that differ in recompute alone: each takes longer than the one before it.

        Where memory counts a family has one shape, so that all of them are looked at.
        """
        for sizes in self.meshes():
            pipeline, several = sizes["pipeline"], sizes["data"] > 1
            for micros in self.micro_batches(sizes):
                for axes in self.axes(sizes, micros):
                    for schedule, chunks in self.schedules(pipeline, micros):
                        for zero in self.options.zero if several else (0,):
                            if schedule == "zero-bubble" and zero == 3:
                                continue
                            if zero == 2 and micros > 1:  # whole gradients are accumulated, as under ZeRO-1
                                continue
                            again = self.recompute[:1] if schedule == "zero-bubble" else self.recompute
                            family = [Shape(axes, micros, schedule, chunks, zero, blocks) for blocks in again]
                            if self.options.objective == "memory":
                                yield from ([shape] for shape in family)
                            else:
                                yield family

    def meshes(self) -> Iterator[dict[str, int]]:
        """Sizes of the axes whose product is the number of ranks."""
        for pipeline in self._sizes("pipeline", self.ranks):
            for others in product(*(self._sizes(name, self.ranks // pipeline) for name in SPLIT)):
                data, rest = divmod(self.ranks // pipeline, math.prod(others))
                sizes = {"pipeline": pipeline, "data": data, **dict(zip(SPLIT, others, strict=True))}
                if rest or not data or self.options.fixed.get("data", data) != data:
                    continue
                if math.prod(others) > MOST_INNER:
                    continue
                spread = self._spread(sizes)
                if spread > 1 and (not self.splits_batch or self.batch % spread):
                    continue
                yield sizes

    def _spread(self, sizes: Mapping[str, int]) -> int:
        """Over how many ranks the samples of a step are spread; to predict, those of a chunk, which a replica takes."""
        return sizes["expert"] * (1 if self.options.purpose == "predict" else sizes["data"])

    def _sizes(self, name: str, ranks: int) -> list[int]:
        """The sizes that an axis of so many ranks at most may have."""
        fixed = self.options.fixed.get(name)
        known = self.dims.get(name, {})
        return [
            n for n in divisors(ranks)
            if fixed in (None, n) and (n == 1 or (n <= self.most_stages if name == "pipeline" else bool(known.get(n))))
        ]  # fmt: skip

    def axes(self, sizes: Mapping[str, int], micros: int) -> Iterator[tuple[PlanAxis, ...]]:
        """Axes of these sizes, with each choice of what they split, and of how the batch is shared out."""
        always: Mapping[str, Sequence[tuple[str, ...]]] = {PIPELINE: [()], "data": [("batch",)]}
        choices = []
        for name in (name for name in AXES if sizes[name] > 1):
            dims = always.get(name) or self.dims[name][sizes[name]]
            axes = [PlanAxis(name, sizes[name], those) for those in dims]
            shares = self._shares(sizes, micros) if name == "data" else ()
            choices.append([*axes, PlanAxis(name, sizes[name], ("batch",), shares)] if shares else axes)
        yield from product(*choices)

    def _shares(self, sizes: Mapping[str, int], micros: int) -> tuple[int, ...]:
        """How ranks along the data axis share a micro-batch out by their speeds; none where equally."""
        if not self.speeds or self.options.purpose == "predict":
            return ()
        inner = math.prod(sizes[name] for name in SPLIT)
        # Seconds of each place along the axis, of its slowest device in each stage, over all stages.
        seconds = [0.0] * sizes["data"]
        for first in range(0, self.ranks, inner):
            seconds[first // inner % sizes["data"]] += 1 / min(self.speeds[first : first + inner])
        return fair_shares([1 / s for s in seconds], min(self.batch // micros, _FINEST * sizes["data"]))

    def micro_batches(self, sizes: Mapping[str, int]) -> Iterator[int]:
        """Numbers of equal micro-batches: those whose size is a power of two, and all at once.

        Samples are only cut along a context axis where there are too few of them: of a micro-batch of several, as many
        ranks along the data axis compute as much and send less.
        """
        samples = self.batch // self._spread(sizes)
        movable = self.splits_batch and not {"data", "context"} & self.options.fixed.keys()
        for micros in divisors(samples) if self.splits_time else (1,):
            size = samples // micros
            if size & (size - 1) and micros > 1:
                continue
            if movable and math.gcd(size, sizes["context"]) > 1:
                continue
            yield micros

    def schedules(self, pipeline: int, micros: int) -> Iterator[tuple[str, int]]:
        """Schedules, and how many stages each rank has; where memory counts, the one that keeps least.

        To predict there is but one, for they differ in when they go back.
        """
        yield "1f1b", 1
        if pipeline == 1 or micros < 2 or self.options.objective == "memory" or self.options.purpose == "predict":
            return
        if micros % pipeline == 0:
            for chunks in _CHUNKS:
                if pipeline * chunks <= self.most_stages:
                    yield "interleaved", chunks
            if micros * pipeline <= _MOST_HALVES:
                yield "zero-bubble", 1


_FINEST = 64
"""Shares for each rank in the mean at most, so that people can read them."""
MOST_INNER = 64
"""Ranks at most that a layer waits for, along all axes that split it."""
_MOST_HALVES = 512
"""Micro-batches times ranks beyond which backward in two halves is not tried: filling takes a small part of a step."""


_PARTS = 8
"""Into so many parts the layers are divided, of which some are computed again."""


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a number, the smallest first."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def layer_patterns(graph: Graph) -> tuple[str, ...]:
    """Patterns for the modules that are held in lists, the outermost, such as `model.layers.*`; none without lists."""
    return tuple(_layers(graph))


def recomputed(graph: Graph) -> list[tuple[str, ...]]:
    """Choices of the blocks that are computed again: none, an eighth of the layers, two eighths, and so on, and all.

    Layers are the modules that are held in lists. Those of a part are spread evenly over the model, so that every
    stretch of it has as large a part of them. Where they are not alike, there are no parts.
    """
    lists = _layers(graph)
    layers = {name: made for held in lists.values() for name, made in held.items()}
    count, alike = len(layers), len({tuple(made) for made in layers.values()}) == 1
    parts = sorted({round(count * k / _PARTS) for k in range(1, _PARTS)} - {0, count}) if alike else []
    spread = [
        tuple(name for i, name in enumerate(layers) if (i + 1) * part // count > i * part // count) for part in parts
    ]
    return [(), *spread, tuple(lists)] if lists else [()]


def _layers(graph: Graph) -> dict[str, dict[str, list[object]]]:
    """What the operators of the modules make that each list of several holds, by the list's pattern and their names."""
    found: dict[str, dict[str, list[object]]] = {}
    for op in graph.ops:
        parts = op.module.split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            names = found.setdefault(".".join([*parts[:at], "*"]), {})
            names.setdefault(".".join(parts[: at + 1]), []).append((op.name, *(tuple(v.sizes) for v in op.outputs)))
    return {pattern: names for pattern, names in found.items() if len(names) > 1}
