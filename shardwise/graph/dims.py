"""The dims of a graph: every position of every shape is an ordered product of logical dims, found by unification.

A position starts as one `Dim`. An operator ties positions to each other; where a position of 64 meets positions of 4
and 16, the dim splits into two, major first, everywhere at once. What is left unsplit are the leaves: two positions
that share a leaf can be cut alike. Sizes are `coefficient * batch**power`, because the number of samples is not known
at capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Size(NamedTuple):
    """A size `coefficient * batch**power`; `expression` names one that is neither (such a size is never tied)."""

    coefficient: int
    power: int = 0
    expression: str = ""

    def at(self, batch: int) -> int:
        """The number, for a batch of `batch` samples."""
        return self.coefficient * int(batch**self.power)

    def __mul__(self, other: object) -> Size:
        if isinstance(other, int):
            other = Size(other)
        assert isinstance(other, Size)
        joined = "*".join(e for e in (self.expression, other.expression) if e)
        return Size(self.coefficient * other.coefficient, self.power + other.power, joined)

    def divide(self, other: Size) -> Size | None:
        """The quotient, or None where it is not whole for every batch."""
        if self.expression or other.expression:
            return Size(1) if self == other else None
        if other.coefficient == 0 or self.coefficient % other.coefficient or self.power < other.power:
            return None
        return Size(self.coefficient // other.coefficient, self.power - other.power)

    @property
    def one(self) -> bool:
        return self == ONE


ONE = Size(1)
BATCH = Size(1, 1)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes; of none, one."""
    total = ONE
    for size in sizes:
        total = total * size
    return total


@dataclass(eq=False)
class Dim:
    """One logical dim, or a product of finer ones once it has been split.

    `label` says what kind of dim it is, in the words of the field; `owners` are the parameters that have it.
    """

    size: Size
    label: str = ""
    owners: list[str] = field(default_factory=list)
    name: str = ""
    _same: Dim | None = None
    _parts: tuple[Dim, ...] = ()

    def root(self) -> Dim:
        dim = self
        while dim._same is not None:
            dim = dim._same
        return dim

    def leaves(self) -> tuple[Dim, ...]:
        """The finest known dims of this one, major first; none for a size of one."""
        root = self.root()
        if root.size.one:
            return ()
        if not root._parts:
            return (root,)
        return tuple(leaf for part in root._parts for leaf in part.leaves())

    def split(self, major: Size) -> tuple[Dim, Dim] | None:
        """Split a leaf in two, its major part of size `major`; None where it does not divide."""
        minor = self.size.divide(major)
        if minor is None:
            return None
        self._parts = (Dim(major, self.label), Dim(minor, self.label))
        return self._parts

    def hint(self, label: str) -> None:
        """Say what the leaves of this dim are called; a word that says more than another replaces it."""
        for leaf in self.leaves():
            leaf.label = _telling(leaf.label, label)


def tie(left: Sequence[Dim], right: Sequence[Dim]) -> bool:
    """Make two products of dims the same, major first, splitting where one side is finer.

    Returns whether all of it could be tied. Where two sizes share no whole quotient (2·3 against 3·2), what lies before
    them stays tied, which is sound: equal prefixes of equal products have equal strides.
    """
    todo_left = [leaf for dim in left for leaf in dim.leaves()][::-1]
    todo_right = [leaf for dim in right for leaf in dim.leaves()][::-1]
    while todo_left and todo_right:
        a, b = todo_left.pop(), todo_right.pop()
        # A split made for one pair may have refined a dim that waits in the other list.
        fresh_a, fresh_b = a.leaves(), b.leaves()
        if fresh_a != (a,) or fresh_b != (b,):
            todo_left.extend(fresh_a[::-1])
            todo_right.extend(fresh_b[::-1])
            continue
        if a is b:
            continue
        if a.size == b.size:
            _unite(a, b)
        elif parts := a.split(b.size):
            todo_left.extend(parts[::-1])
            todo_right.append(b)
        elif parts := b.split(a.size):
            todo_right.extend(parts[::-1])
            todo_left.append(a)
        else:
            return False
    return not todo_left and not todo_right


def _telling(a: str, b: str) -> str:
    """The label that says more; of two alike, the first."""
    rank = {"": 0, "width": 1, "sequence": 3, "batch": 4}
    return b if rank.get(b, 2) > rank.get(a, 2) else a


def _unite(a: Dim, b: Dim) -> None:
    a.owners.extend(b.owners)
    a.label = _telling(a.label, b.label)
    b._same = a


def carve(dims: Sequence[Dim], count: Size) -> tuple[list[Dim], list[Dim]] | None:
    """Leaves of a product, parted into those that make its major `count` and the rest, splitting one if needed."""
    todo = [leaf for dim in dims for leaf in dim.leaves()][::-1]
    major: list[Dim] = []
    want = count
    while not want.one:
        if not todo:
            return None
        leaf = todo.pop()
        rest = want.divide(leaf.size)
        if rest is not None:
            major.append(leaf)
            want = rest
            continue
        parts = leaf.split(want)
        if parts is None:
            return None
        todo.extend(parts[::-1])
    return major, todo[::-1]
