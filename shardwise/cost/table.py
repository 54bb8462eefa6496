"""Table: what the operators of a graph take on one rank, summed up, so that a stage is one difference.

A table is for one split of the operators, one size of micro-batch, one device and one choice of recompute. Of many
bounds at once it gives the stretches between all of them, which is what the search for cuts needs, or those between
neighbours, which are a plan's stages. What several tables have in common is reckoned once: `Weights` of a split,
`Bytes` of a split and a micro-batch, `Seconds` of both and a device, `Again` of recompute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from shardwise.cost.again import Again
from shardwise.cost.pairs import NEIGHBOURS, Array, Bounds, Pairs, tops
from shardwise.cost.rows import Bytes, Seconds
from shardwise.cost.stretches import Held, Taken
from shardwise.cost.weights import Weights
from shardwise.graph.graph import Graph


class Table:
    """What the operators of a graph take on one rank.

    Args:
        graph: the captured model.
        seconds: what each takes of a device.
        bytes: what each keeps.
        weights: the parameters.
        again: what is computed again in backward.
    """

    def __init__(self, graph: Graph, seconds: Seconds, bytes: Bytes, weights: Weights, again: Again) -> None:
        self.graph, self.weights, self.again = graph, weights, again
        self._rows, self._bytes = seconds, bytes

    @property
    def live(self) -> Array:
        """Bytes that cross the cut before each operator, and at the end."""
        return self._bytes.live

    @cached_property
    def _kept(self) -> Array:
        again, rows = self.again, self._bytes
        # What is spared is kept as it is made.
        kept = np.where(again.more, 0.0, np.where(again.spared, rows.largest / 2, rows.kept))
        for op, number in again.entering:
            kept[op] += rows.tensors[number]
        return _running(kept)

    @cached_property
    def _halved(self) -> Array:
        return _running(self._bytes.halved)

    @cached_property
    def _sums(self) -> Mapping[str, Array]:
        rows, more = self._rows, self.again.twice
        return {
            "forward": _running(rows.forward),
            "backward": _running(rows.backward),
            "later": _running(rows.later),
            "again": _running(rows.forward * more),
            "calls": _running(rows.calls),
            "calls_back": _running(rows.calls * (rows.gradients + more)),
            "meets": _running(rows.meets),
        }

    @cached_property
    def _messages(self) -> Sequence[Mapping[tuple[str, str], tuple[Array, Array]]]:
        rows, more, back = self._rows, self.again.twice, dict(self._rows.sent_back)
        for key, sent in rows.sent.items() if more.any() else ():
            # What is computed again is sent again.
            back[key] = back.get(key, 0.0) + sent * more
        return [{k: (_running(r[0]), _running(r[1])) for k, r in way.items()} for way in (rows.sent, back)]

    @property
    def seconds(self) -> Array:
        """For each operator, and for the end, the seconds of all operators before it, both ways."""
        return self._sums["forward"] + self._sums["backward"]

    @cached_property
    def whole(self) -> Taken:
        """What all operators take."""
        return self.taken([0, len(self.graph.ops)], NEIGHBOURS).pick(0)

    @cached_property
    def whole_held(self) -> Held:
        """What all operators hold."""
        return self.held([0, len(self.graph.ops)], NEIGHBOURS).pick(0)

    def held(self, bounds: Sequence[int], pairs: Pairs) -> Held:
        """What stretches between two of these operators hold.

        Args:
            bounds: indices of operators, growing; the number of operators stands for the end.
            pairs: which two of them.
        """
        at = np.array(bounds)
        largest, growing = self._most_back(at, pairs)
        # What the model returns crosses the end, and goes to no stage.
        crossing = np.where(at == len(self.graph.ops), 0.0, self.live[at])
        return Held(
            **self.weights.between(at, pairs),
            kept=_between(self._kept, at, pairs),
            halved=_between(self._halved, at, pairs),
            late=pairs.real(pairs.most(tops(self._bytes.late, at))),
            inside=pairs.most(self._most_inside(at)),
            largest=largest,
            growing=growing,
            passed=pairs.real(pairs.starts(crossing) + pairs.ends(crossing)),
        )

    def taken(self, bounds: Sequence[int], pairs: Pairs) -> Taken:
        """What stretches between two of these operators take; arguments as for `held`."""
        at = np.array(bounds)
        sent, sent_back = (
            {key: (_between(calls, at, pairs), _between(sizes, at, pairs)) for key, (calls, sizes) in way.items()}
            for way in self._messages
        )
        sums: dict[str, Any] = {name: _between(running, at, pairs) for name, running in self._sums.items()}
        sums["meets"] = sums["meets"] * (pairs.starts(at) > 0)  # the first stage receives nothing
        return Taken(**self.weights.between(at, pairs), **sums, sent=sent, sent_back=sent_back)

    def _most_back(self, at: Bounds, pairs: Pairs) -> tuple[Array, Array]:
        """What backward of every stretch makes at its fullest moment besides what is kept: `largest` and `growing`."""
        if self._bytes.back is None:
            largest = pairs.most(tops(self._bytes.largest, at))
            return largest, largest
        grads, summed, others = self._bytes.back
        # Behind an operator nothing is kept any more.
        moments, kept = self._kept[1:] + others + summed, pairs.ends(self._kept[at])
        largest = pairs.most(tops(moments + grads, at)) - kept
        made = self.weights.gradients()
        growing = pairs.most(tops(moments - made[:-1], at)) + pairs.starts(made[at]) - kept
        return pairs.real(largest), pairs.real(growing)

    def _most_inside(self, at: Bounds) -> Array:
        """Bytes of the largest block between neighbouring bounds while it is computed again."""
        found, blocks = np.zeros(len(at) - 1), self.again.blocks
        if self.again.inside.any():
            kept = self._bytes.kept.tolist()
            for n, (a, b) in enumerate(pairwise(at)):
                totals: dict[str, float] = {}
                for i in range(a, b):
                    if blocks[i]:
                        totals[blocks[i]] = totals.get(blocks[i], 0.0) + kept[i]
                found[n] = max(totals.values(), default=0.0)
        return found


def _running(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _between(running: Array, at: Bounds, pairs: Pairs) -> Array:
    """What each stretch has of what is summed up."""
    found: Array = pairs.ends(running[at]) - pairs.starts(running[at])
    return found
