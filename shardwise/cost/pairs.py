"""Pairs: of which bounds the stretches between are looked at: of all, for the search, or of neighbours, for a plan."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bounds = npt.NDArray[np.int_]
Values = npt.NDArray[Any]


class Pairs(Protocol):
    """Which two bounds make a stretch; arrays have an entry, or rows, for each bound."""

    def starts(self, values: Values) -> Values:
        """Values at the first bound of each stretch."""

    def ends(self, values: Values) -> Values:
        """Values at its second."""

    def most(self, tops: Array) -> Array:
        """For each stretch the largest of what is given between neighbours."""

    def real(self, values: Array) -> Array:
        """Values of stretches, nothing of those that end before they start."""


class _All:
    """Entry [i, j] is that from bound i up to bound j."""

    def starts(self, values: Values) -> Values:
        return values[:, None]

    def ends(self, values: Values) -> Values:
        return values[None, :]

    def most(self, tops: Array) -> Array:
        n = len(tops) + 1
        found = np.zeros((n, n))
        for i in range(n - 1):
            found[i, i + 1 :] = np.maximum.accumulate(tops[i:])
        return found

    def real(self, values: Array) -> Array:
        return np.triu(values, 1)


class _Neighbours:
    """Entry [i] is that from bound i up to the next."""

    def starts(self, values: Values) -> Values:
        return values[:-1]

    def ends(self, values: Values) -> Values:
        return values[1:]

    def most(self, tops: Array) -> Array:
        return tops

    def real(self, values: Array) -> Array:
        return values


ALL: Pairs = _All()
NEIGHBOURS: Pairs = _Neighbours()


def tops(values: Array, at: Bounds) -> Array:
    """The largest value between neighbouring bounds."""
    return np.array([values[a:b].max(initial=-np.inf if a < b else 0.0) for a, b in pairwise(at)])
