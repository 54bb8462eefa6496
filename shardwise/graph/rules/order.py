"""Order: which tensors have their rows in the order of a sort, so that each rank may sort the rows that it has.

A mixture of experts sorts its tokens by expert, computes on groups of rows, and puts the rows back. A rank that sorts
its own tokens alone has other rows in other places than the whole would, but once they are back it has the same: what
happened to a row between depends on that row alone. That holds where

- operators between take the rows one by one, in one and the same order;
- numbers of rows, which differ by rank, are used for nothing but to take rows and to put them;
- what was counted over rows (how many of each key) is used as each rank's own, for its own rows.

This follows the order of rows from operator to operator. Positions in an order have the dims of the rows that were
sorted; an operator that would mix two orders, or look at the number of a row as at any number, breaks its orders, whose
operators then run whole. `settle` takes from the operators of an order the letters that not all of them have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from shardwise.graph.dims import ONE, Dim, Size

if TYPE_CHECKING:
    from shardwise.graph.rules.context import Letter, OpContext, Operand, Slot, Value

NUMBERS, COUNTS, ENDS = "numbers", "counts", "ends"


@dataclass(eq=False)
class Order:
    """The order that a sort gives to rows; `keys` is the tensor that they are sorted by, smallest first."""

    keys: Value | None


class Meaning(NamedTuple):
    """What the numbers of a tensor stand for.

    NUMBERS: of rows that are in order `into` (None: as they came), or of groups of `each` of these; they are themselves
    in `order`. COUNTS: how often `keys` has each of 0, 1, 2, ...; ENDS: the sums of these so far.
    """

    kind: str
    order: Order | None = None
    into: Order | None = None
    each: Size = ONE
    keys: Value | None = None

    def orders(self) -> set[Order]:
        """The orders that it speaks of."""
        return {order for order in (self.order, self.into) if order is not None}


@dataclass(eq=False)
class KnownRows:
    """What is known of the rows of one operator's tensors.

    Attributes:
        orders: the orders of positions; none for rows as they came.
        means: what the numbers of tensors stand for.
        mixed: orders that the operator breaks.
        followed: whether its rule has said all that there is to say of orders.
        counts: the keys that it counts, if it does.
        sources: outputs that have the numbers of another tensor.
        source: the tensor that another has the numbers of.
    """

    orders: dict[tuple[Slot, int], Order] = field(default_factory=dict)
    means: dict[Slot, Meaning] = field(default_factory=dict)
    mixed: set[Order] = field(default_factory=set)
    followed: bool = False
    counts: Value | None = None
    sources: dict[Slot, Value] = field(default_factory=dict)
    source: Callable[[Value], Value] = lambda value: value


@dataclass(eq=False)
class Region:
    """Operators on rows in orders that meet: on each axis all of them split the rows, or none does.

    Attributes:
        dims: the dims of rows that all of them can split.
        ops: places of the operators in their graph.
    """

    dims: tuple[Dim, ...] = ()
    ops: list[int] = field(default_factory=list)


class _Touch(NamedTuple):
    """An operator on ordered rows: its place, the positions that have them, and one of their orders, or their keys.

    `own` where its ties hold for rows that each rank sorts by itself, and for no others.
    """

    place: int
    rows: frozenset[tuple[Slot, int]]
    order: Order | Value
    own: bool


COPIES = {
    "aten.clone", "aten.contiguous", "aten._to_copy", "aten.to", "aten.detach", "aten.alias", "aten.lift_fresh_copy",
}  # fmt: skip
"""Operators that change neither a number nor its place."""
AS_THEY_ARE = COPIES | {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.expand",
}  # fmt: skip
"""Operators that change no number."""
_BUT_SHAPES = {"aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like"}
_PLACED = {"shardwise.dropout", "shardwise.uniform", "shardwise.normal"}
"""Operators whose result depends on where an element is."""


class Orders:
    """The orders of a graph's tensors, found operator by operator.

    Attributes:
        tallies: tensors that were counted over keys that rows are sorted by, of each rank's own rows.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[Value, int], Order] = {}
        self._means: dict[Value, Meaning] = {}
        self._source: dict[Value, Value] = {}
        self._found: list[Order] = []
        self._met: dict[Order, Order] = {}
        self._broken: set[Order] = set()
        self._touched: list[_Touch] = []

    @property
    def tallies(self) -> frozenset[Value]:
        keys = {order.keys for order in self._found}
        return frozenset(v for v, m in self._means.items() if m.kind in (COUNTS, ENDS) and m.keys in keys)

    def enter(self, c: OpContext) -> None:
        """Tell an operator's rule what is known of its inputs."""
        c.rows.source = self.source
        if not self._of and not self._means:
            return
        for o in c.inputs:
            if o.value in self._means:
                c.rows.means[o.slot] = self._means[o.value]
            for pos in range(o.ndim):
                if (o.value, pos) in self._of:
                    c.rows.orders[o.slot, pos] = self._of[o.value, pos]

    def leave(self, index: int, c: OpContext) -> None:
        """Follow the orders through an operator whose rule has spoken."""
        if c.node_name() in AS_THEY_ARE and c.out.ndim == 1 and c.inputs[0].value.sizes == c.out.value.sizes:
            c.rows.sources[c.out.slot] = c.inputs[0].value
        for slot, value in c.rows.sources.items():
            self._source[c.operand(slot).value] = self.source(value)
        if not c.rows.orders and not c.rows.means:
            return
        if not c.rows.followed:
            self._follow(c)
        found = set(c.rows.orders.values()).union(*(meaning.orders() for meaning in c.rows.means.values()))
        for order in found:
            self._met[self._root(order)] = self._root(next(iter(found)))
        self._broken.update(c.rows.mixed)
        for o in c.outputs:
            if o.slot in c.rows.means:
                self._means[o.value] = c.rows.means[o.slot]
            for pos in range(o.ndim):
                if (o.slot, pos) in c.rows.orders:
                    order = self._of[o.value, pos] = c.rows.orders[o.slot, pos]
                    self._found += [order] if order not in self._found else []
        rows = set(c.rows.orders)
        if found and rows:
            self._touched.append(_Touch(index, frozenset(rows), next(iter(found)), c.rows.followed))
        if c.rows.counts is not None:
            # Each rank's counts are of its own rows, if these are of its own, too.
            self._touched.append(_Touch(index, frozenset({(c.inputs[0].slot, 0)}), c.rows.counts, False))

    def source(self, value: Value) -> Value:
        """The tensor that another has the numbers of, perhaps sorted, perhaps in another dtype."""
        return self._source.get(value, value)

    def settle(self, letters: Sequence[tuple[Letter, ...]]) -> tuple[list[Region], dict[int, tuple[Letter, ...]]]:
        """The regions; and the letters of their operators, less those of rows that not all in a region can split."""
        by_keys: dict[Value, Order] = {}
        for order in self._found:
            if order.keys is not None:
                self._met[self._root(order)] = self._root(by_keys.setdefault(order.keys, order))
        broken = {self._root(order) for order in self._broken}
        groups: dict[Order, list[_Touch]] = {}
        for touch in self._touched:
            met = touch.order if isinstance(touch.order, Order) else by_keys.get(touch.order)
            if met is not None:
                groups.setdefault(self._root(met), []).append(touch)
        regions: list[Region] = []
        kept: dict[int, tuple[Letter, ...]] = {}
        for root, touches in groups.items():
            fit = [[x for x in letters[t.place] if t.rows <= {(p.slot, p.pos) for p in x.places}] for t in touches]
            every = [{letter.dim for letter in own} for own in fit]
            shared = () if root in broken else tuple(x.dim for x in fit[0] if all(x.dim in dims for dims in every))
            region = Region(shared, [t.place for t in touches])
            regions += [region] if shared else []
            for t in touches:
                mine = [x for x in letters[t.place] if any((p.slot, p.pos) in t.rows for p in x.places)]
                for letter in mine:
                    letter.region = region if shared else None
                # Rows that stay whole at a sort are rows like any others behind it, in pieces of the sorted whole.
                own = t.own or bool(shared)
                out = {x for x in mine if x.dim not in shared and (own or x.partials)}
                kept[t.place] = tuple(x for x in kept.get(t.place, letters[t.place]) if x not in out)
        return regions, kept

    def _root(self, order: Order) -> Order:
        while self._met.get(order, order) is not order:
            order = self._met[order]
        return order

    def _follow(self, c: OpContext) -> None:
        """An operator that knows nothing of orders: what it ties has one order, and numbers of rows stay what they are.

        Where it ties rows in one order to rows in another, or makes other numbers of those of rows, these orders break.
        """
        name = c.node_name()
        for slot, meaning in list(c.rows.means.items()):
            if slot.side == "in" and name in AS_THEY_ARE:
                c.rows.means[c.out.slot] = meaning
            elif slot.side == "in" and meaning.kind == NUMBERS and name not in _BUT_SHAPES:
                c.rows.mixed.update(meaning.orders())
        if name in _PLACED:
            c.rows.mixed.update(c.rows.orders.values())
        for places in _tied(c):
            found = {c.rows.orders.get(place) for place in places if place[0].side == "in"}
            order = next((o for o in found if o is not None), None)
            if order is None:
                continue
            slots = [slot for slot, _ in places]
            if len(found) > 1 or len(set(slots)) < len(slots):
                c.rows.mixed.update(o for o in found if o is not None)
            for place in places:
                c.rows.orders[place] = order


def _tied(c: OpContext) -> Iterable[list[tuple[Slot, int]]]:
    """The positions that an operator ties to each other, those of size one left out."""
    links: dict[tuple[Slot, int], tuple[Slot, int]] = {}

    def root(place: tuple[Slot, int]) -> tuple[Slot, int]:
        while links.setdefault(place, place) != place:
            place = links[place]
        return place

    for tie in c.ties:
        both = [p for p in (*tie.left, *tie.right) if not c.operand(p[0]).size(p[1]).one]
        for place in both[1:]:
            links[root(place)] = root(both[0])
    found: dict[tuple[Slot, int], list[tuple[Slot, int]]] = {}
    for place in list(links):
        found.setdefault(root(place), []).append(place)
    return found.values()


# -- what rules say of orders ------------------------------------------------------------------------------------------


def sort(c: OpContext, x: Operand, values: Operand | None, rows: Operand, ascending: bool) -> None:
    """`rows` are the numbers of the rows of `x`, which has one dim, in its order; `values` are what they have."""
    order = Order(c.rows.source(x.value) if ascending else None)
    for out in (values, rows):
        if out is not None:
            c.tie(x, 0, out, 0)
            c.rows.orders[out.slot, 0] = order
    if values is not None:
        c.rows.sources[values.slot] = x.value
    c.rows.means[rows.slot] = Meaning(NUMBERS, order, c.rows.orders.get((x.slot, 0)))
    meaning = c.rows.means.get(x.slot)
    if meaning is not None and meaning.kind == NUMBERS:
        c.rows.mixed.update(meaning.orders())
    c.rows.followed = True


def numbered(c: OpContext, x: Operand, pos: int, at: Operand, others: Collection[tuple[Slot, int]] = ()) -> bool:
    """Whether `at` has numbers of rows, those of position `pos` of `x`; ties these to the numbers.

    `others` are positions that have to be in the order of the numbers.
    """
    meaning = c.rows.means.get(at.slot)
    if meaning is None or meaning.kind != NUMBERS or at.ndim != 1:
        return False
    known = {(x.slot, pos): meaning.into, (at.slot, 0): meaning.order, **dict.fromkeys(others, meaning.order)}
    given = {place: order for place, order in c.rows.orders.items() if place not in known}
    if given or any(c.rows.orders.get(place) is not order for place, order in known.items()):
        return False
    if meaning.each.one:
        c.tie(x, pos, at, 0)
    else:
        c.tie_major(at, 0, x, pos)
        c.only_major(at, 0, x.size(pos))
    c.rows.followed = True
    return True


def arrange(c: OpContext, out: Operand, pos: int, at: Operand) -> None:
    """Position `pos` of an output has rows in the order that the numbers `at` have."""
    meaning = c.rows.means[at.slot]
    if meaning.order is not None:
        c.rows.orders[out.slot, pos] = meaning.order


def arrange_as(c: OpContext, out: Operand, pos: int, x: Operand) -> None:
    """Position `pos` of an output has rows in the order that the same position of `x` has."""
    if (x.slot, pos) in c.rows.orders:
        c.rows.orders[out.slot, pos] = c.rows.orders[x.slot, pos]


def count(c: OpContext, x: Operand, out: Operand) -> None:
    """`out` is how often `x`, which has one dim, has each of 0, 1, 2, ..."""
    c.rows.counts = c.rows.source(x.value)
    c.rows.means[out.slot] = Meaning(COUNTS, keys=c.rows.counts)


def grouped(c: OpContext, x: Operand, ends: Operand) -> bool:
    """Whether the rows of `x` are sorted by what `ends` says the ends of, so that each rank takes its own of both."""
    order, meaning = c.rows.orders.get((x.slot, 0)), c.rows.means.get(ends.slot)
    if order is None or order.keys is None or meaning is None:
        return False
    return meaning.kind == ENDS and meaning.keys is order.keys and ends.ndim == 1
