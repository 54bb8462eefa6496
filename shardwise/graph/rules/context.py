"""What an operator's rule is written with: its tensors, the ties between their positions, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from shardwise.graph import dims
from shardwise.graph.dims import ONE, Dim, Size
from shardwise.graph.rules.order import KnownRows, Region

_NOTHING = Size(0)


@dataclass(eq=False)
class Value:
    """One tensor of the graph: the size and the dim of each position, and its dtype."""

    name: str
    sizes: tuple[Size, ...]
    dims: tuple[Dim, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    def numel(self) -> Size:
        return self._numel

    def bytes(self) -> Size:
        return self._bytes

    @cached_property
    def _numel(self) -> Size:
        return dims.product(self.sizes)

    @cached_property
    def _bytes(self) -> Size:
        return self._numel * self.dtype.itemsize

    def leaves(self) -> tuple[tuple[Dim, ...], ...]:
        """For each position its leaves, major first."""
        return tuple(dim.leaves() for dim in self.dims)


class Slot(NamedTuple):
    """A tensor of an operator: the n-th input or the n-th output."""

    side: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing needs


class Operand(NamedTuple):
    """A tensor at a slot of an operator."""

    slot: Slot
    value: Value

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def size(self, pos: int) -> Size:
        return self.value.sizes[pos]


FROM_A_START = frozenset({"vocabulary", "classes", "queries", "experts"})
"""Lowerings that are told where a rank's range of a position begins."""


class Place(NamedTuple):
    """One leaf of one position of one operand."""

    slot: Slot
    pos: int
    leaf: int


@dataclass(eq=False)
class Letter:
    """A dim that one operator ties over its operands, as a letter of einsum does.

    `sums`: outputs without the letter are sums over it, so a split leaves partial sums there.
    `special`: the operator must be lowered specially where this letter is split; names the lowering.
    `partials`: inputs that are not summed where it is split, each rank's being of its own rows.
    `region`: for rows in the order of a sort, the operators that have to split them alike.
    """

    dim: Dim
    places: tuple[Place, ...]
    sums: bool
    special: str
    partials: frozenset[Slot] = frozenset()
    region: Region | None = None

    def place(self, slot: Slot) -> Place | None:
        return self._by_slot.get(slot)

    @cached_property
    def _by_slot(self) -> Mapping[Slot, Place]:
        return {place.slot: place for place in reversed(self.places)}


class _Tie(NamedTuple):
    left: tuple[tuple[Slot, int], ...]
    right: tuple[tuple[Slot, int], ...]
    skip_left: Size
    skip_right: Size


@dataclass(eq=False)
class OpContext:
    """One operator application under analysis. Rules call its methods; `letters` reads the result."""

    node: fx.Node
    arguments: dict[str, Any]
    inputs: list[Operand]
    outputs: list[Operand]
    ties: list[_Tie] = field(default_factory=list)
    sums: dict[tuple[Slot, int], str] = field(default_factory=dict)
    specials: dict[tuple[Slot, int], str] = field(default_factory=dict)
    blocked: set[tuple[Slot, int]] = field(default_factory=set)
    made: set[tuple[Slot, int]] = field(default_factory=set)
    majors: dict[tuple[Slot, int], Size] = field(default_factory=dict)
    iota: dict[Slot, int] = field(default_factory=dict)
    independent: set[Slot] = field(default_factory=set)
    constant: set[Slot] = field(default_factory=set)
    rows: KnownRows = field(default_factory=KnownRows)
    unsummed: dict[tuple[Slot, int], frozenset[Slot]] = field(default_factory=dict)
    linear: tuple[frozenset[Slot], ...] = ()
    size_args: dict[str, Slot] = field(default_factory=dict)
    work: Size = _NOTHING

    @property
    def out(self) -> Operand:
        return self.outputs[0]

    def tensor(self, name: str) -> Operand | None:
        """The tensor argument of this name, or None."""
        value = self.arguments.get(name)
        return value if isinstance(value, Operand) else None

    def the(self, name: str) -> Operand:
        """The tensor argument of this name, which must be there."""
        value = self.arguments[name]
        assert isinstance(value, Operand), name
        return value

    def tie(self, a: Operand, i: int, b: Operand, j: int) -> None:
        """Positions `i` of `a` and `j` of `b` are the same dim."""
        self.tie_products([(a, i)], [(b, j)])

    def tie_products(
        self,
        left: Sequence[tuple[Operand, int]],
        right: Sequence[tuple[Operand, int]],
        *,
        skip_left: Size = ONE,
        skip_right: Size = ONE,
    ) -> None:
        """Two products of positions are the same, less a major part of `skip_left` and `skip_right`."""
        places = _Tie(
            tuple((a.slot, a.value.ndim + i if i < 0 else i) for a, i in left),
            tuple((a.slot, a.value.ndim + i if i < 0 else i) for a, i in right),
            skip_left,
            skip_right,
        )
        lhs, rhs = self._minor(places.left, skip_left), self._minor(places.right, skip_right)
        if lhs is None or rhs is None:
            return
        dims.tie(lhs, rhs)
        self.ties.append(places)

    def same(self, a: Operand, b: Operand, *, but: Sequence[int] = ()) -> None:
        """All positions of two tensors of one rank are the same, except those in `but`."""
        skip = {i % a.ndim for i in but}
        for i in range(a.ndim):
            if i not in skip:
                self.broadcast(a, i, b, i)

    def broadcast(self, a: Operand, i: int, b: Operand, j: int) -> None:
        """As `tie`, where a size of one meets any size."""
        if not a.size(i).one and not b.size(j).one and a.size(i) == b.size(j):
            self.tie(a, i, b, j)

    def elementwise(self, operands: Sequence[Operand], out: Operand | None = None) -> None:
        """Every operand broadcasts to the output, aligned at the last position."""
        out = out or self.out
        for operand in operands:
            for back in range(1, operand.ndim + 1):
                self.broadcast(operand, operand.ndim - back, out, out.ndim - back)

    def sum_over(self, a: Operand, i: int, special: str = "") -> None:
        """The operator sums over this position; split, it leaves partial sums."""
        key = (a.slot, i % max(a.ndim, 1))
        self.sums[key] = special

    def special(self, a: Operand, i: int, lowering: str) -> None:
        """Splitting this position needs the named lowering."""
        self.specials[a.slot, i % a.ndim] = lowering

    def block(self, a: Operand, i: int) -> None:
        """The operator needs this position whole."""
        self.blocked.add((a.slot, i % a.ndim))

    def leave_partial(self, a: Operand, i: int, other: Operand) -> None:
        """Where this position is split, each rank takes its own part of a sum: `other` is not summed over the ranks."""
        self.unsummed[a.slot, i % a.ndim] = frozenset({other.slot})

    def linear_in(self, *groups: Operand | Sequence[Operand]) -> None:
        """The operator is linear in each group of operands taken together, so partial sums may pass through it."""
        sets = [(g,) if isinstance(g, Operand) else tuple(g) for g in groups]
        self.linear = tuple(frozenset(operand.slot for operand in group) for group in sets)

    def tie_major(self, a: Operand, i: int, b: Operand, j: int) -> None:
        """Position `j` of `b` is the major part of position `i` of `a`."""
        parts = dims.carve([a.value.dims[i]], b.size(j))
        if parts is not None and dims.tie(parts[0], [b.value.dims[j]]):
            self.ties.append(_Tie(((a.slot, i % a.ndim),), ((b.slot, j % b.ndim),), ONE, ONE))

    def parts(self, a: Operand, i: int, count: Size) -> bool:
        """Split position `i` into `count` major parts; whether it divides."""
        return dims.carve([a.value.dims[i]], count) is not None

    def only_major(self, a: Operand, i: int, count: Size) -> None:
        """Of position `i`, only the major `count` can be split."""
        self.majors[a.slot, i % a.ndim] = count

    def tie_parts(self, count: Size, places: Sequence[tuple[Operand, int]]) -> None:
        """The major `count` of each position is the same dim, and the only part that can be split."""
        carved = [dims.carve([a.value.dims[i]], count) for a, i in places]
        if any(parts is None for parts in carved):
            return
        (first, i), first_parts = places[0], carved[0]
        for (a, j), parts in zip(places[1:], carved[1:], strict=True):
            assert parts is not None and first_parts is not None
            dims.tie(first_parts[0], parts[0])
            self.ties.append(_Tie(((first.slot, i),), ((a.slot, j),), ONE, ONE))
        for a, j in places:
            self.only_major(a, j, count)

    def fresh(self, a: Operand, i: int) -> None:
        """The operator makes this position itself, so any part of it can be made alone."""
        key = (a.slot, i % a.ndim)
        self.specials.setdefault(key, "")
        self.made.add(key)

    def keep(self, x: Operand, out: Operand, reduced: Sequence[int]) -> None:
        """Ties of a reduction over `reduced`, whether or not the reduced positions are kept with size one."""
        if out.ndim == x.ndim:
            self.same(x, out, but=reduced)
        else:
            kept = [i for i in range(x.ndim) if i not in reduced]
            for j, i in enumerate(kept):
                self.tie(x, i, out, j)

    def reduced(self, x: Operand) -> list[int]:
        """The positions that a reduction's `dim` names; all of them where it names none."""
        spec = self.arguments.get("dim")
        if spec is None or spec == []:
            return list(range(x.ndim))
        listed = spec if isinstance(spec, (list, tuple)) else [spec]
        return sorted(int(d) % max(x.ndim, 1) for d in listed) if x.ndim else []

    def node_name(self) -> str:
        """The operator's name without overload."""
        return operator_name(self.node.target)

    def hint(self, a: Operand, i: int, label: str) -> None:
        """What the field calls this dim."""
        a.value.dims[i].hint(label)

    def _minor(self, places: Sequence[tuple[Slot, int]], skip: Size) -> list[Dim] | None:
        whole = [self.operand(slot).value.dims[pos] for slot, pos in places]
        if skip.one:
            return whole
        parts = dims.carve(whole, skip)
        return None if parts is None else parts[1]

    def operand(self, slot: Slot) -> Operand:
        return (self.inputs if slot.side == "in" else self.outputs)[slot.index]

    def letters(self) -> list[Letter]:
        """The dims that this operator can be split on; to be asked once every operator has made its ties."""
        links: dict[Place, Place] = {}

        def root(place: Place) -> Place:
            while links.get(place, place) != place:
                place = links[place]
            return place

        for t in self.ties:
            left, right = self._leaf_places(t.left, t.skip_left), self._leaf_places(t.right, t.skip_right)
            for a, b in zip(left, right, strict=False):
                if self._leaf(a) is not self._leaf(b):
                    break
                links.setdefault(a, a)
                links[root(b)] = root(a)
                links.setdefault(b, root(a))
        for slot, pos in [*self.sums, *self.specials]:
            for place in self._leaf_places([(slot, pos)], ONE):
                links.setdefault(place, place)
        groups: dict[Place, list[Place]] = {}
        for place in links:
            groups.setdefault(root(place), []).append(place)
        found = [self._letter(places) for places in groups.values()]
        return [letter for letter in found if letter is not None]

    def _letter(self, places: list[Place]) -> Letter | None:
        at = [(p.slot, p.pos) for p in places]
        if len({p.slot for p in places}) < len(places) or any(key in self.blocked for key in at):
            return None
        fused = [p for p in places if (p.slot, p.pos) in self.majors]
        if any(p not in self._leaf_places_major(p, self.majors[p.slot, p.pos]) for p in fused):
            return None
        dim = self._leaf(places[0])
        summed = [self.sums[key] for key in at if key in self.sums]
        special = next((s for s in summed if s), "") or next((self.specials[k] for k in at if k in self.specials), "")
        present = {p.slot for p in places}
        missing = [o.slot for o in self.outputs if o.slot not in present and o.slot not in self.independent]
        if missing and not summed and not special:
            return None
        if dim.size.expression or (dim.size.power and dim.size != dims.BATCH):
            return None
        if special in FROM_A_START and any(not self._is_range(p) for p, key in zip(places, at, strict=True)):
            return None
        partials = frozenset[Slot]().union(*(self.unsummed.get(key, ()) for key in at))
        return Letter(dim, tuple(sorted(places)), bool(summed), special, partials)

    def _is_range(self, place: Place) -> bool:
        """Whether a part of a leaf is one range of its position, as long for any number of samples."""
        leaves = self.operand(place.slot).value.dims[place.pos].leaves()
        return place.leaf == 0 and not any(leaf.size.power or leaf.size.expression for leaf in leaves)

    def _leaf_places(self, places: Sequence[tuple[Slot, int]], skip: Size) -> list[Place]:
        found = []
        left = skip
        for slot, pos in places:
            for k, leaf in enumerate(self.operand(slot).value.dims[pos].leaves()):
                if left.one:
                    found.append(Place(slot, pos, k))
                    continue
                rest = left.divide(leaf.size)
                if rest is None:
                    return []
                left = rest
        return found

    def _leaf_places_major(self, place: Place, count: Size) -> list[Place]:
        whole = self._leaf_places([(place.slot, place.pos)], ONE)
        minor = self._leaf_places([(place.slot, place.pos)], count)
        return whole[: len(whole) - len(minor)]

    def _leaf(self, place: Place) -> Dim:
        return self.operand(place.slot).value.dims[place.pos].leaves()[place.leaf]


Rule = Callable[[OpContext], None]


def operator_name(target: Any) -> str:
    """`aten.linear` for `torch.ops.aten.linear.default`; the qualified name for a plain function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target)
    if isinstance(target, str):
        return target.replace("::", ".")
    return getattr(target, "operator_name", f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}")
