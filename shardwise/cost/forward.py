"""Forward: a plan as it predicts: the way there alone, chunk after chunk, with what is needed and no longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shardwise.cost.case import Case
from shardwise.cost.pairs import Array
from shardwise.cost.stretches import Held, Stretches
from shardwise.cost.traits import is_view
from shardwise.graph.fold import Folded
from shardwise.graph.rules import Value
from shardwise.plan.plan import Plan

_FRAMES = 1.7
"""How many times as much as its operators need a module keeps, at most: 1.02 to 1.70 times, measured on ten models."""


class Forward(Case):
    """A plan as it predicts but for where its stages begin; arguments as for `Case`.

    Its step is a chunk on each replica: axes that split the batch alone make replicas, which wait for nobody. Micro-
    batches go through the stages one behind the other, and so do chunks.
    """

    ways = 1

    def sharing(self, plan: Plan) -> int:
        """Replicas share no weights."""
        return 1

    def memory(self, s: Held, flight: float | Array, half: float | Array = 0.0) -> dict[str, Array]:
        """As of a `Case`; a module that runs as it is has more, for its functions' variables live until they return."""
        found = super().memory(s, flight, half)
        if self.plan.replica().ranks == 1 and self.plan.micro_batches == 1:
            more = found["activations"] * (_FRAMES - 1)
            found["activations"] = found["activations"] + more
            found["reserve"] = found["reserve"] + self.reserve * more
        return found

    def reduction(self, rank: int, s: Stretches, backward: Array) -> tuple[Array, Array, dict[str, Array]]:
        """No gradients are summed."""
        none = np.zeros_like(s.weights)
        return none, none, {}

    def update(self, rank: int, s: Stretches) -> Array:
        """Nothing is updated."""
        return np.zeros_like(s.weights)

    def pace(self, stages: Mapping[str, Sequence[float]], sends: Sequence[float]) -> float:
        """Seconds from one chunk to the next in a pipeline that is full: its slowest stage's."""
        return self.plan.micro_batches * _slowest(stages["forward"], sends)

    def _through(self, stages: Mapping[str, Sequence[float]], sends: Sequence[float]) -> float:
        forward = stages["forward"]
        return sum(forward) + sum(sends) + (self.plan.micro_batches - 1) * _slowest(forward, sends)

    def _step(self) -> float:
        return 0.0


def _slowest(forward: Sequence[float], sends: Sequence[float]) -> float:
    """Seconds of a micro-batch on the slowest stage, with carrying it on."""
    return max(f + s for f, s in zip(forward, [*sends, 0.0], strict=True))


def tensor_lives(folded: Folded) -> npt.NDArray[np.int_]:
    """Of tensors that depend on parameters three rows: what makes them, what reads them last, their numbers.

    A view is not a tensor of its own: what it is a view of lives as long as it is read. What the model returns is read
    at the end.
    """
    whole, numbers = folded.whole, folded.numbers
    roots: dict[Value, Value] = {}
    last: dict[Value, int] = {}
    for op in whole.ops:
        for value in op.inputs:
            last[roots.get(value, value)] = op.index
        if is_view(op) and op.inputs:
            roots |= dict.fromkeys(op.outputs, roots.get(op.inputs[0], op.inputs[0]))
    last |= dict.fromkeys((roots.get(v, v) for v in whole.results.values()), len(whole.ops))
    made = [(v, op.index) for v, op in whole.producer.items() if v in whole.learned and v not in roots]
    return np.array([(at, last.get(v, at), numbers[v]) for v, at in made], dtype=int).reshape(-1, 3).T
