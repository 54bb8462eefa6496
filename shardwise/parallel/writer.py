"""What the writers of a rank's program share: its graph, its mesh axes, and sizes, which are plain numbers or nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from shardwise.graph.dims import BATCH, Size
from shardwise.graph.rules import Value
from shardwise.parallel import lower
from shardwise.parallel.layout import Cut, State
from shardwise.parallel.mesh import Axis

Number = int | fx.Node


class Writer:
    """Adds nodes to the program of one rank.

    Args:
        axes: the mesh axes of this rank, in the layout's order; None stands for micro-batches.

    Attributes:
        out: the graph that is written.
        root: has the graph's attributes.
        samples, total, first, key: the program's first arguments; see `Program`.
        block: of the nodes that are added, the block that they are recomputed with; see `recompute`.
    """

    def __init__(self, axes: Sequence[Axis | None]) -> None:
        self.axes = tuple(axes)
        self.out = fx.Graph()
        self.root = nn.Module()
        self.samples, self.total, self.first, self.key = (
            self.out.placeholder(n) for n in ("samples", "total", "first", "key")
        )
        self.block = ""
        self._cache: dict[Any, fx.Node] = {}
        for i, axis in enumerate(self.axes):
            if axis is not None:
                setattr(self.root, f"axis_{i}", axis)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `target`."""
        node = self.out.call_function(target, args, kwargs)
        if self.block:
            node.meta["block"] = self.block
        return node

    def number_call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call that makes a number, which belongs to no block."""
        return self.out.call_function(target, args)

    def axis(self, index: int) -> fx.Node:
        """A mesh axis, to hand to a collective."""
        key = ("axis", index)
        if key not in self._cache:
            self._cache[key] = self.out.get_attr(f"axis_{index}")
        return self._cache[key]

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _chain(self, value: Value, pos: int, leaf: int, states: Sequence[State], but: int | None = None) -> list[Axis]:
        """The mesh axes that cut one leaf, outermost first."""
        cut = Cut(pos, leaf)
        return [x for a, x in enumerate(self.axes) if x is not None and a != but and states[a] == cut]

    def _samples(self, pos: int, leaf: int, states: Sequence[State]) -> fx.Node:
        """The samples over all ranks: of the micro-batch where it cuts this leaf, else of the whole step."""
        timed = (state for axis, state in zip(self.axes, states, strict=True) if axis is None)
        return self.samples if next(timed, Cut(pos, leaf)) == Cut(pos, leaf) else self.total

    def number(self, size: Size, batch_axes: Sequence[Axis] = (), samples: fx.Node | None = None) -> Number:
        """A size on this rank: a plain number, or a node where it depends on the number of samples."""
        if size.power == 0:
            return size.coefficient
        samples = samples if samples is not None else self.samples
        chain = tuple((axis.parts, axis.rank) for axis in batch_axes)
        key = ("count", chain, samples)
        if key not in self._cache:
            self._cache[key] = self.number_call(lower.local_count, samples, chain) if chain else samples
        count: Number = self._cache[key]
        for _ in range(size.power - 1):
            count = self.times(count, self._cache[key])
        return self.times(count, size.coefficient)

    def times(self, a: Number, b: Number) -> Number:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 1 or b == 1:
            return b if a == 1 else a
        key = ("times", a, b)
        if key not in self._cache:
            self._cache[key] = self.number_call(lower.times, a, b)
        return self._cache[key]

    def leaf_size(self, value: Value, pos: int, leaf: int, states: Sequence[State], but: int | None = None) -> Number:
        """The size of one leaf on this rank, not counting the cut by axis `but`."""
        dim = value.dims[pos].leaves()[leaf]
        chain = self._chain(value, pos, leaf, states, but)
        samples = self._samples(pos, leaf, states)
        if dim.size == BATCH:
            return self.number(BATCH, chain, samples)
        parts = 1
        for axis in chain:
            parts *= axis.size
        return self.number(Size(dim.size.coefficient // parts, dim.size.power), (), samples)

    def shape(self, value: Value, states: Sequence[State]) -> list[Number]:
        """The shape of a tensor on this rank."""
        found: list[Number] = []
        for pos, dim in enumerate(value.dims):
            total: Number = 1
            if value.sizes[pos].expression:
                total = value.sizes[pos].coefficient
            else:
                for k in range(len(dim.leaves())):
                    total = self.times(total, self.leaf_size(value, pos, k, states))
            found.append(total)
        return found

    def geometry(self, value: Value, states: Sequence[State], a: int, cut: Cut) -> tuple[int, Number, Any]:
        """(pos, lead, sizes) of a cut by axis `a`, the other axes as in `states`."""
        axis = self.axes[a]
        assert axis is not None
        lead: Number = 1
        for k in range(cut.leaf):
            lead = self.times(lead, self.leaf_size(value, cut.pos, k, states))
        dim = value.dims[cut.pos].leaves()[cut.leaf]
        if dim.size == BATCH:
            chain = tuple((x.parts, x.rank) for x in self._chain(value, cut.pos, cut.leaf, states, but=a))
            samples = self._samples(cut.pos, cut.leaf, states)
            return cut.pos, lead, self.number_call(lower.part_sizes, samples, chain, axis.parts)
        whole = self.leaf_size(value, cut.pos, cut.leaf, states, but=a)
        assert isinstance(whole, int)
        return cut.pos, lead, (whole // axis.size,) * axis.size

    def start(self, value: Value, pos: int, leaf: int, states: Sequence[State]) -> Number:
        """Where this rank's part of a leaf starts; samples are counted over the whole step."""
        dim = value.dims[pos].leaves()[leaf]
        axes = self._chain(value, pos, leaf, states)
        if dim.size == BATCH:
            chain = tuple((x.parts, x.rank) for x in axes)
            samples = self._samples(pos, leaf, states)
            first: Number = self.first if samples is self.samples else 0
            if not chain:
                return first
            own = self.number_call(lower.local_start, samples, chain)
            return self.number_call(lower.plus, first, own)
        start, size = 0, dim.size.coefficient
        for axis in axes:
            size //= axis.size
            start += size * axis.rank
        return start

    def part(self, states: Sequence[State]) -> tuple[int, Number]:
        """Which part of a tensor this rank has, the same number on ranks that have copies; and its first sample.

        The sample is that of the micro-batch, and 0 for what is the same in all of them.
        """
        part = 0
        first: Number = 0
        for axis, state in zip(self.axes, states, strict=True):
            if not isinstance(state, Cut):
                continue
            if axis is None:
                first = self.first
            else:
                part = part * axis.size + axis.rank
        return part, first

    def span(self, value: Value, states: Sequence[State]) -> Any:
        """For each position its leaves as (start, size here, whole size); see `lower.Span`."""
        return tuple(
            tuple(
                (
                    self.start(value, pos, k, states),
                    self.leaf_size(value, pos, k, states),
                    self.total if leaf.size == BATCH else leaf.size.coefficient,
                )
                for k, leaf in enumerate(dim.leaves())
            )
            for pos, dim in enumerate(value.dims)
        )
