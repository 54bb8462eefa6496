"""The device mesh at run time: for each axis this rank's place, its process group, and a record of what was sent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shardwise.errors import PlanError
from shardwise.machine.backend import wait_at_exit
from shardwise.machine.shared_memory import register
from shardwise.plan.plan import PlanAxis


class Traffic(NamedTuple):
    """One kind of collective on one axis: how often, and the bytes this rank hands in, together."""

    kind: str
    axis: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing needs
    bytes: int


@dataclass
class Recorder:
    """Counts collectives as they are called."""

    counts: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, kind: str, axis: str, size: int) -> None:
        entry = self.counts.setdefault((kind, axis), [0, 0])
        entry[0] += 1
        entry[1] += size

    def take(self) -> list[Traffic]:
        """What was counted since the last call, in a fixed order."""
        found = [Traffic(kind, axis, n, size) for (kind, axis), (n, size) in sorted(self.counts.items())]
        self.counts.clear()
        return found


@dataclass(eq=False)
class Axis:
    """One mesh axis on this rank.

    Attributes:
        name: what the plan calls it.
        size: ranks along it.
        rank: this rank's place along it.
        group: its process group; None for a size of one, or where nothing is sent.
        ranks: the global ranks along it.
        shares: how the samples that the axis splits are shared out; empty for equally.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    recorder: Recorder
    shares: tuple[int, ...] = ()

    @property
    def parts(self) -> int | tuple[int, ...]:
        """Into what it splits samples: so many equal parts, or parts of these shares."""
        return self.shares or self.size

    @property
    def largest(self) -> int:
        """The place along it with the largest part of the samples."""
        return self.shares.index(max(self.shares)) if self.shares else 0

    def record(self, kind: str, size: int) -> None:
        self.recorder.add(kind, self.name, size)


@dataclass(eq=False)
class Mesh:
    """All axes of a plan on this rank, outermost first. The last axis has neighbouring ranks."""

    axes: tuple[Axis, ...]
    rank: int
    recorder: Recorder

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def __getitem__(self, name: str) -> Axis:
        return next(axis for axis in self.axes if axis.name == name)

    def __contains__(self, name: str) -> bool:
        return any(axis.name == name for axis in self.axes)

    def get(self, name: str) -> Axis | None:
        """The axis of this name, or None."""
        return next((axis for axis in self.axes if axis.name == name), None)

    def columns(self, axis: Axis) -> list[list[int]]:
        """For every place on the other axes the ranks along one axis; the same list on every rank."""
        index = self.axes.index(axis)
        stride = math.prod(a.size for a in self.axes[index + 1 :])
        return [
            [base + inner + k * stride for k in range(axis.size)]
            for base in range(0, self.size, stride * axis.size)
            for inner in range(stride)
        ]

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """While ranks send to each other: what fails in between leaves messages behind, that no later mesh may take."""
        try:
            yield
        except BaseException:
            if dist.group.WORLD is not None:
                _OPEN.pop(dist.group.WORLD, None)
            raise

    def coordinates(self) -> tuple[int, ...]:
        return tuple(axis.rank for axis in self.axes)

    @classmethod
    def build(cls, planned: Sequence[PlanAxis], rank: int | None = None) -> Mesh:
        """The mesh of the default process group; without one, a mesh that only one rank can use.

        Args:
            planned: the axes of a plan.
            rank: this rank, for a mesh over which nothing is sent.

        Raises:
            PlanError: the axes' product is not the number of ranks.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        me = rank if rank is not None else (dist.get_rank() if dist.is_initialized() else 0)
        sizes = [(axis.name, axis.size) for axis in planned]
        total = math.prod(size for _, size in sizes)
        if total != world and rank is None:
            shape = " x ".join(f"{name} {size}" for name, size in sizes) or "one rank"
            raise PlanError(f"the plan is for {total} ranks ({shape}), but {world} are running; start {total} ranks")
        recorder = Recorder()
        axes = []
        for index, axis in enumerate(planned):
            mine, group = _group(sizes, index, me, real=rank is None)
            axes.append(Axis(axis.name, axis.size, mine.index(me), group, tuple(mine), recorder, axis.shares))
        return cls(tuple(axes), me, recorder)


_OPEN: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], dist.ProcessGroup]] = WeakKeyDictionary()
"""The groups of every default group. Each has threads and connections, that live as long as the default group."""


def open_group(ranks: Sequence[int], axis: str, use: str = "") -> tuple[dist.ProcessGroup, bool]:
    """A process group of these ranks. All ranks ask for all groups, in the same order.

    Args:
        ranks: of the default group.
        axis: name of the mesh axis that it is of, by which its traffic is told apart.
        use: what else than the axis's collectives it is for.

    Returns:
        the group, and whether it is new. One that an earlier mesh opened for the same is taken again.
    """
    assert dist.group.WORLD is not None
    for ended in [world for world in _OPEN if world is not dist.group.WORLD]:
        del _OPEN[ended]
    groups = _OPEN.setdefault(dist.group.WORLD, {})
    key = (axis, use, *ranks)
    new = key not in groups
    if new:
        backend = register() if dist.get_backend() == "gloo" else None  # else the default group's
        groups[key] = dist.new_group(ranks, timeout=_timeout(dist.group.WORLD), backend=backend, group_desc=axis)
        wait_at_exit()
    return groups[key], new


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group waits for a rank. A new one would wait as torch does without being told, for half an hour."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout  # type: ignore[no-any-return]
    return None


def _group(
    sizes: Sequence[tuple[str, int]], index: int, me: int, *, real: bool
) -> tuple[list[int], dist.ProcessGroup | None]:
    """The ranks along one axis through `me`, and their group. Every rank makes all groups, in the same order."""
    shape = [size for _, size in sizes]
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    others = [range(n) if i != index else range(1) for i, n in enumerate(shape)]
    mine: list[int] = []
    group = None
    for at in product(*others):
        base = sum(c * s for c, s in zip(at, strides, strict=True))
        ranks = [base + k * strides[index] for k in range(shape[index])]
        made = None
        if real and shape[index] > 1:
            made, _ = open_group(ranks, sizes[index][0])
        if me in ranks:
            mine, group = ranks, made
    return mine, group


@contextmanager
def recording(mesh: Mesh) -> Iterator[Recorder]:
    """Forget what was counted before, and count."""
    mesh.recorder.take()
    yield mesh.recorder
