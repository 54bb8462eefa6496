"""Weights: the parameters that each stretch of operators reads, each of them once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from shardwise.cost.pairs import Array, Bounds, Pairs
from shardwise.cost.work import Work
from shardwise.graph.fold import Folded
from shardwise.graph.rules import Value


class Weights:
    """The parameters of a split.

    Args:
        folded: the graph without what only repeats.
        work: what its operators do.
        each: bytes of a parameter's entry; 0 for its own dtype's.
    """

    def __init__(self, folded: Folded, work: Work, each: int) -> None:
        graph = folded.whole
        # Those over the batch are summed apart, together.
        self.axes = [axis.name for axis in work.axes if axis.size > 1 and axis.dims != ("batch",)]
        first = np.zeros((len(graph.ops) + 1, 4 + len(self.axes)))
        self._repeated: list[tuple[int, int, Array]] = []

        def row_of(value: Value) -> list[float]:
            entries = work.local(value, 1)
            over = {work.axes[a].name for a in work.layout.grad_axes(value)}
            size = entries * (each or value.dtype.itemsize)
            alone = over.isdisjoint(self.axes)
            return [entries, size, 1, entries * alone, *(entries * (axis in over) for axis in self.axes)]

        numbers = {value: n for n, value in enumerate(dict.fromkeys(value for value, _ in folded.reads))}
        rows = np.array([row_of(value) for value in numbers]).reshape(-1, 4 + len(self.axes))
        places = [numbers[value] for value, _ in folded.reads]
        np.add.at(first, [uses[0] + 1 for _, uses in folded.reads], rows[places])
        for place, (_, uses) in zip(places, folded.reads, strict=True):
            self._repeated += [(before, use, rows[place]) for before, use in pairwise(uses)]
        self._running = np.cumsum(first, axis=0)

    def gradients(self) -> Array:
        """Bytes of gradients in fp32 of what operators before each, and before the end, are the first to read.

        Those that are summed over an axis are left out: they are collected in buckets, which are there throughout.
        """
        found: Array = 4 * self._running[:, 3]
        return found

    def between(self, at: Bounds, pairs: Pairs) -> dict[str, Any]:
        """What each stretch reads, each parameter once: the fields of `Stretches`."""
        found = pairs.ends(self._running[at]) - pairs.starts(self._running[at])
        for before, use, row in self._repeated:
            # A stretch that begins between two uses has the second without the first.
            begins = (at > before) & (at <= use)
            if begins.any():
                found += (pairs.starts(begins) & pairs.ends(at > use))[..., None] * row
        summed = {axis: found[..., 4 + k] for k, axis in enumerate(self.axes)}
        return {"weights": found[..., 0], "weight_bytes": found[..., 1], "tensors": found[..., 2], "summed": summed}
