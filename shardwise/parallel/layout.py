"""Layout: on every mesh axis, which dim each operator splits, and so where every tensor is cut, whole or partial.

One pass in execution order. On each axis an operator takes the first of the axis's dims that it has. Its output is then

- cut, where it has the dim,
- partial (to be summed over the axis), where it summed over the dim,
- whole, where it split nothing.

Where an operator needs a tensor otherwise than it is, the edge converts it (`parallel.convert`). Gradients mirror
this: a tensor that is whole but feeds an operator that splits gets a partial gradient ("varies"). For a weight under
a batch split that partial gradient is data parallel's gradient all-reduce. What is made of weights alone, such as a
reshaped bias, passes its partial gradient on to them, so that it is summed with theirs, once a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from torch import fx

from shardwise.errors import PlanError
from shardwise.graph.dims import BATCH, Dim, Size, product
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Letter, Slot, Value
from shardwise.graph.rules.order import Region
from shardwise.graph.rules.shape import NOMINAL_BATCH


@dataclass(frozen=True, order=True)
class Cut:
    """The tensor is cut along one leaf of one position."""

    pos: int
    leaf: int


@dataclass(frozen=True)
class Whole:
    """Every rank has all of it. `varies`: the gradients of this use differ by rank and are to be summed."""

    varies: bool = False


@dataclass(frozen=True)
class Partial:
    """The tensor is the sum of what the ranks have."""


State = Cut | Whole | Partial
States = tuple[State, ...]
TIME = "micro-batches"
"""Name of the axis of micro-batches, over which nothing can be sent."""
WHOLE, VARIES, PARTIAL = Whole(), Whole(True), Partial()


@dataclass(frozen=True)
class SplitAxis:
    """A mesh axis as the algebra sees it: its size, and the dims it splits, in order of preference (with wildcards)."""

    name: str
    size: int
    dims: tuple[str, ...]

    def matches(self, dim: str) -> int | None:
        """How early `dim` is among this axis's dims; None where it is not."""
        return next((i for i, pattern in enumerate(self.dims) if fnmatchcase(dim, pattern)), None)


class Choice(NamedTuple):
    """What an operator does on one axis: splits a letter, passes partial sums of some inputs on, or runs whole.

    One that runs whole may be `late`: its backward passes partial gradients on, which are summed with parameters'.
    """

    letter: Letter | None = None
    passes: frozenset[Slot] = frozenset()
    late: bool = False


class Layout:
    """The layout of a graph over mesh axes.

    Attributes:
        axes: the mesh axes, outermost first.
        choices: for each operator and axis what it does.
        states: for each tensor and axis how it is produced. Parameters are as they are stored.
    """

    def __init__(self, graph: Graph, axes: Sequence[SplitAxis]) -> None:
        self.graph = graph
        self.axes = tuple(axes)
        self.choices: dict[Op, tuple[Choice, ...]] = {}
        self.states: dict[Value, States] = {}
        self._rows = {region: self._rows_of(region) for region in graph.regions}
        self._readers = Counter(v for op in graph.ops for v in set(op.inputs))
        self._ranks: list[dict[str, int | None]] = [{} for _ in axes]
        self._needs: dict[Op, Mapping[Slot, States]] = {}
        self._place_inputs()
        for op in graph.ops:
            self._place(op)
        self._postpone()
        self._place_params()

    # -- reading -----------------------------------------------------------------------------------------------------

    def needs(self, op: Op, slot: Slot) -> States:
        """How an operator needs one of its inputs."""
        if op not in self._needs:
            self._needs[op] = {o.slot: self._need(op, o.slot, o.value) for o in op.context.inputs}
        return self._needs[op][slot]

    def _need(self, op: Op, slot: Slot, value: Value) -> States:
        found: list[State] = []
        for choice in self.choices[op]:
            if choice.letter is not None:
                place = choice.letter.place(slot)
                apart = PARTIAL if slot in choice.letter.partials else VARIES
                found.append(Cut(place.pos, place.leaf) if place else apart)
            elif choice.passes:
                found.append(PARTIAL if slot in choice.passes else VARIES)
            else:
                found.append(VARIES if choice.late else WHOLE)
        if value not in self.graph.needs_grad:
            found = [WHOLE if state == VARIES else state for state in found]
        return tuple(found)

    @cached_property
    def uses(self) -> Mapping[Value, list[States]]:
        """How each tensor is needed, by each of its uses."""
        found: dict[Value, list[States]] = {}
        for op in self.graph.ops:
            for operand in op.context.inputs:
                found.setdefault(operand.value, []).append(self.needs(op, operand.slot))
        return found

    def parts(self, dim_size: Size, axes: Sequence[int]) -> int:
        """Into how many parts these axes cut a dim."""
        total = 1
        for axis in axes:
            total *= self.axes[axis].size
        return total

    def local_size(self, value: Value, pos: int, states: States) -> tuple[Size, tuple[int, ...]]:
        """The size of a position on one rank, less its cut of the batch; and the axes that cut the batch in it."""
        sizes = []
        batch_axes: tuple[int, ...] = ()
        for k, leaf in enumerate(value.dims[pos].leaves()):
            cutting = tuple(a for a, s in enumerate(states) if s == Cut(pos, k))
            if leaf.size == BATCH:
                batch_axes = cutting
                sizes.append(leaf.size)
                continue
            parts = 1
            for a in cutting:
                parts *= self.axes[a].size
            sizes.append(Size(leaf.size.coefficient // parts, leaf.size.power, leaf.size.expression))
        return product(sizes), batch_axes

    def share(self, op: Op) -> float:
        """The part of an operator's work that one rank does."""
        part = 1.0
        for axis, choice in enumerate(self.choices[op]):
            if choice.letter is not None:
                part /= self.axes[axis].size
        return part

    # -- placing -----------------------------------------------------------------------------------------------------

    def _produced(self, value: Value) -> States:
        return self.states.get(value, (WHOLE,) * len(self.axes))

    def _place_inputs(self) -> None:
        for node, values in self.graph.values.items():
            if node.op != "placeholder":
                continue
            value = values[0]
            states: list[State] = [WHOLE] * len(self.axes)
            if node.name in self.graph.captured.inputs and value.ndim and value.sizes[0] == BATCH:
                for a, axis in enumerate(self.axes):
                    if axis.matches("batch") is not None:
                        states[a] = Cut(0, 0)
            self.states[value] = tuple(states)

    def _place(self, op: Op) -> None:
        chosen: list[Choice] = []
        cut_by: dict[Letter, int] = {}
        for a, axis in enumerate(self.axes):
            letter = self._pick(op, axis, cut_by)
            if letter is not None:
                cut_by[letter] = cut_by.get(letter, 1) * axis.size
                chosen.append(Choice(letter))
            else:
                chosen.append(Choice(passes=self._passes(op, a)))
        self.choices[op] = tuple(chosen)
        for operand in op.context.outputs:
            states: list[State] = []
            for choice in chosen:
                if choice.letter is not None:
                    place = choice.letter.place(operand.slot)
                    if place is not None:
                        states.append(Cut(place.pos, place.leaf))
                    else:
                        free = operand.slot in op.context.independent
                        states.append(PARTIAL if choice.letter.sums and not free and not _whole(choice) else WHOLE)
                else:
                    states.append(PARTIAL if choice.passes else WHOLE)
            self.states[operand.value] = tuple(states)

    def _pick(self, op: Op, axis: SplitAxis, cut_by: Mapping[Letter, int]) -> Letter | None:
        learned = any(o.value in self.graph.learned for o in op.context.outputs)
        a = self.axes.index(axis)
        region = self.graph.region.get(op)
        rows = self._rows[region][a] if region is not None else None
        if rows is not None:
            return next(letter for letter in op.letters if letter.region is region and letter.dim is rows)
        ranks = self._ranks[a]
        best: tuple[int, int, int] | None = None
        found = None
        for n, letter in enumerate(op.letters):
            name = letter.dim.name
            rank = ranks[name] if name in ranks else ranks.setdefault(name, axis.matches(name))
            if rank is None or letter.region is not None or not divides(letter, axis.size * cut_by.get(letter, 1)):
                continue
            # What depends on the batch alone is cheap to compute and needs no gradient: only the batch itself is cut.
            if not learned and letter.dim.size != BATCH:
                continue
            # Of equals, first what an input is already cut along, then what stays in the output.
            arrives = any(
                self._produced(op.context.operand(p.slot).value)[a] == Cut(p.pos, p.leaf)
                for p in letter.places
                if p.slot.side == "in"
            )
            key = (rank, 0 if arrives else 1, n + (1000 if letter.sums else 0))
            if best is None or key < best:
                best, found = key, letter
        return found

    def _rows_of(self, region: Region) -> tuple[Dim | None, ...]:
        """For each axis the dim of rows that a region's operators split: all of them, where rows come first, or none.

        What comes first is the first of the axis's dims that any of them has.
        """
        found: list[Dim | None] = []
        ops = [self.graph.ops[index] for index in region.ops]
        letters = [letter for op in ops for letter in op.letters if any(v in self.graph.learned for v in op.outputs)]
        for axis in self.axes:
            best: tuple[int, bool] | None = None
            pick = None
            for letter in letters:
                rank, mine = axis.matches(letter.dim.name), letter.region is region
                parts = axis.size * math.prod(a.size for a, d in zip(self.axes, found, strict=False) if d is letter.dim)
                if rank is not None and divides(letter, parts) and (best is None or (rank, mine) < best):
                    best, pick = (rank, mine), letter.dim if mine else None
            found.append(pick)
        return tuple(found)

    def _passes(self, op: Op, axis: int) -> frozenset[Slot]:
        """The inputs whose partial sums an operator passes on, being linear in them together; none if it should not."""
        none: frozenset[Slot] = frozenset()
        partial = frozenset(o.slot for o in op.context.inputs if self._produced(o.value)[axis] == PARTIAL)
        tallies = frozenset(s for s in partial if op.context.operand(s).value in self.graph.tallies)
        if tallies and all(v in self.graph.tallies for v in op.outputs):
            return tallies
        learned = frozenset(s for s in partial if op.context.operand(s).value in self.graph.learned)
        if self.axes[axis].name == TIME:
            # Sums over micro-batches of what depends on the batch alone are made beforehand.
            return next((group for group in op.context.linear if learned and learned <= group), none)
        # What depends on the batch alone (a count of labels) is summed early, and need not be waited for.
        partial = learned or partial
        if not partial or partial not in op.context.linear:
            return none
        # Where another operator needs the sum, it is made once, for both.
        if any(self._readers[op.context.operand(s).value] > 1 for s in partial):
            return none
        largest = max(op.context.operand(slot).value.numel().at(NOMINAL_BATCH) for slot in partial)
        return partial if all(v.numel().at(NOMINAL_BATCH) <= largest for v in op.outputs) else none

    def _postpone(self) -> None:
        """Find the operators on parameters alone whose gradients differ by rank."""
        varied: dict[Value, set[int]] = {}
        for op in reversed(self.graph.ops):
            if all(v in self.graph.steady for v in op.outputs):
                partial = set().union(*(varied.get(v, ()) for v in op.outputs))
                self.choices[op] = tuple(
                    choice._replace(late=a in partial and choice == Choice() and self.axes[a].name != TIME)
                    for a, choice in enumerate(self.choices[op])
                )
            for operand in op.context.inputs:
                needs = self.needs(op, operand.slot)
                varied.setdefault(operand.value, set()).update(a for a, state in enumerate(needs) if state != WHOLE)

    def _place_params(self) -> None:
        """Store a parameter, or what steps renew, cut where all its uses need the same cut of it."""
        for value in [*self.graph.params.values(), *(old for old, _ in self.graph.state.values())]:
            uses = self.uses.get(value, [])
            states: list[State] = []
            for a in range(len(self.axes)):
                wanted = {use[a] for use in uses}
                first = next(iter(wanted), WHOLE)
                states.append(first if len(wanted) == 1 and isinstance(first, Cut) else WHOLE)
            self.states[value] = tuple(states)

    def grad_axes(self, value: Value) -> tuple[int, ...]:
        """The axes over which a tensor's gradient is summed after backward: a parameter's own, or with parameters'."""
        if value not in self.graph.needs_grad:
            return ()
        if value in self.graph.producer:
            return tuple(a for a, choice in enumerate(self.choices[self.graph.producer[value]]) if choice.late)
        stored = self.states[value]
        return tuple(
            a
            for a in range(len(self.axes))
            if not isinstance(stored[a], Cut) and any(use[a] != WHOLE for use in self.uses.get(value, []))
        )


def _whole(choice: Choice) -> bool:
    """Lowerings that reduce inside, so that their outputs are whole."""
    return choice.letter is not None and choice.letter.special in ("classes", "batch_norm")


def divides(letter: Letter, parts: int) -> bool:
    """Whether a letter can be cut into equal parts; samples can be cut into unequal ones."""
    return letter.dim.size == BATCH or letter.dim.size.coefficient % parts == 0


def check_axes(graph: Graph, axes: Sequence[SplitAxis]) -> None:
    """Check that every pattern of every axis names a dim that its size divides.

    Raises:
        PlanError: an unknown dim, or one that does not divide.
    """
    names = {dim.name: dim for dim in graph.dims()}
    for axis in axes:
        for pattern in axis.dims:
            hits = [d for name, d in names.items() if fnmatchcase(name, pattern)]
            if not hits and not any(c in pattern for c in "*?["):
                near = ", ".join(sorted(names)[:12])
                raise PlanError(
                    f"axis {axis.name} splits dim {pattern!r}, but the model has no such dim; it has: {near}"
                )
            exact = [d for d in hits if d.name == pattern and d.size != BATCH]
            for dim in exact:
                if dim.size.coefficient % axis.size:
                    raise PlanError(
                        f"axis {axis.name} of size {axis.size} cannot split dim {dim.name} of size "
                        f"{dim.size.coefficient}: {axis.size} does not divide {dim.size.coefficient}; "
                        "choose another dim or another axis size"
                    )


def node_of(graph: Graph, value: Value) -> fx.Node:
    """The fx node that produces a tensor (its operator, for one of several results)."""
    return next(node for node, values in graph.values.items() if value in values)
