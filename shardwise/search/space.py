"""Space: the plans that a search looks at, but for where their stages begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis

OBJECTIVES = ("time", "cost", "memory")
AXES = ("pipeline", "data", "tensor")
_CHUNKS = (2, 4)
"""Stages of each rank that interleaved schedules are tried with."""


@dataclass(frozen=True)
class Options:
    """What to look for.

    Attributes:
        objective: "time" of a step; "cost", the device-seconds of a step, where fewer devices may be used; or "memory"
            of the fullest rank.
        memory: bytes that a rank may use, where it is less than its device has.
        fixed: sizes of axes that are given; 1 forbids an axis.
        zero: ZeRO stages that are allowed.
        recompute: whether blocks may be computed again.
    """

    objective: str = "time"
    memory: float | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    zero: Sequence[int] = (0, 1, 2, 3)
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise PlanError(f"the objective must be one of {', '.join(OBJECTIVES)}, but is {self.objective!r}")
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
        pipeline, data, tensor: ranks along each axis.
        dims: what the tensor axis splits.
        micros: micro-batches.
        schedule, chunks: the pipeline's, and how many stages each rank has.
        zero: ZeRO stage.
        recompute: patterns of the blocks that are computed again.
    """

    pipeline: int
    data: int
    tensor: int
    dims: tuple[str, ...]
    micros: int
    schedule: str
    chunks: int
    zero: int
    recompute: tuple[str, ...]

    def plan(self, cuts: Sequence[str] = (), **more: str) -> Plan:
        """As a plan with these cuts; without any, with cuts that name no operator."""
        axes = (
            PlanAxis(PIPELINE, self.pipeline), PlanAxis("data", self.data, ("batch",)),
            PlanAxis("tensor", self.tensor, self.dims),
        )  # fmt: skip
        cuts = tuple(cuts) or ("-",) * (self.pipeline * self.chunks - 1)
        return Plan(
            tuple(a for a in axes if a.size > 1), cuts, self.micros, self.schedule, self.zero, self.recompute,
            **more,  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True)
class Space:
    """The shapes of plans for so many ranks.

    Attributes:
        ranks: how many.
        batch: samples of a step.
        dims: what a tensor axis of each size may split, each a choice.
        most_stages: at most so many stages.
        splits_batch: whether samples can be spread over ranks.
        splits_time: whether a batch can be cut into micro-batches.
        recompute: choices of the blocks that are computed again.
        options: what to look for.
    """

    ranks: int
    batch: int
    dims: Mapping[int, Sequence[tuple[str, ...]]]
    most_stages: int
    splits_batch: bool
    splits_time: bool
    recompute: Sequence[tuple[str, ...]]
    options: Options

    def shapes(self) -> Iterator[Shape]:
        """Every shape."""
        for pipeline, data, tensor in self.meshes():
            for micros in self.micro_batches(pipeline, data):
                for dims in self.dims.get(tensor, ()) if tensor > 1 else ((),):
                    for schedule, chunks in self.schedules(pipeline, micros):
                        for zero in self.options.zero if data > 1 else (0,):
                            for recompute in self.recompute:
                                if schedule == "zero-bubble" and (zero == 3 or recompute):
                                    continue
                                if zero == 2 and micros > 1:  # whole gradients are accumulated, as under ZeRO-1
                                    continue
                                yield Shape(
                                    pipeline, data, tensor, dims, micros, schedule, chunks, zero, recompute
                                )  # fmt: skip

    def meshes(self) -> Iterator[tuple[int, int, int]]:
        """Sizes of the pipeline, data and tensor axes whose product is the number of ranks."""
        fixed = self.options.fixed
        for pipeline in divisors(self.ranks):
            for tensor in divisors(self.ranks // pipeline):
                data = self.ranks // pipeline // tensor
                sizes = {"pipeline": pipeline, "data": data, "tensor": tensor}
                if any(sizes[name] != size for name, size in fixed.items()):
                    continue
                if pipeline > self.most_stages or (tensor > 1 and not self.dims.get(tensor)):
                    continue
                if data > 1 and (not self.splits_batch or self.batch % data):
                    continue
                yield pipeline, data, tensor

    def micro_batches(self, pipeline: int, data: int) -> Iterator[int]:
        """Numbers of equal micro-batches: those whose size is a power of two, and all at once."""
        samples = self.batch // data
        if not self.splits_time:
            yield 1
            return
        for micros in divisors(samples):
            size = samples // micros
            if size & (size - 1) == 0 or micros == 1:
                yield micros

    def schedules(self, pipeline: int, micros: int) -> Iterator[tuple[str, int]]:
        """Schedules, and how many stages each rank has; where memory counts, the one that keeps least."""
        yield "1f1b", 1
        if pipeline == 1 or micros < 2 or self.options.objective == "memory":
            return
        if micros % pipeline == 0:
            for chunks in _CHUNKS:
                if pipeline * chunks <= self.most_stages:
                    yield "interleaved", chunks
            if micros * pipeline <= _MOST_HALVES:
                yield "zero-bubble", 1


_MOST_HALVES = 512
"""Micro-batches times ranks beyond which backward in two halves is not tried: filling takes a small part of a step."""


def divisors(number: int) -> list[int]:
    """The divisors of a number, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def layer_patterns(graph: Graph) -> tuple[str, ...]:
    """Patterns for the modules that are held in lists, the outermost, such as `model.layers.*`; none without lists."""
    found: dict[str, set[str]] = {}
    for op in graph.ops:
        parts = op.module.split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            found.setdefault(".".join([*parts[:at], "*"]), set()).add(parts[at])
    return tuple(pattern for pattern, members in found.items() if len(members) > 1)
