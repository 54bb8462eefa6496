"""Table: what the operators of a graph take on one rank, summed up, so that a stage is one difference.

A table is for one split of the operators, one size of micro-batch, one device and one choice of recompute. Of many
bounds at once it gives the stretches between all of them, which is what the search for cuts needs, or those between
neighbours, which are a plan's stages. What several tables have in common is reckoned once: `Weights` of a split, `Rows`
of a split and a micro-batch, `Again` of recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shardwise.cost.kernels import Kernels
from shardwise.cost.pairs import NEIGHBOURS, Array, Bounds, Pairs, tops
from shardwise.cost.traits import ATTENTION, PRODUCT
from shardwise.cost.weights import Weights
from shardwise.cost.work import Message, Task, Work
from shardwise.graph.fold import Folded
from shardwise.graph.graph import CASTS
from shardwise.graph.rules import Value
from shardwise.parallel.recompute import blocks_by


@dataclass(frozen=True)
class Held:
    """What stretches of operators hold for one micro-batch, an entry for each stretch.

    Attributes:
        kept: bytes kept for backward.
        halved: bytes kept from the first half of a backward to the second, which gives the gradients of parameters.
        late: bytes of the largest gradient that the second half makes.
        inside: bytes that the largest recomputed block keeps while it is computed again.
        largest: bytes of the largest gradient, and of the tensor that it is of; or, followed through backward, by which
            its fullest moment exceeds what is kept.
        growing: the same where gradients of parameters are made in this backward, less those that are not there yet.
        passed: bytes that are received from the stages before and behind.
        weights: entries of parameters.
        weight_bytes: bytes of them.
        tensors: how many parameters.
        summed: for each axis, entries of parameters whose gradients are summed over it.
    """

    kept: Array
    halved: Array
    late: Array
    inside: Array
    largest: Array
    growing: Array
    passed: Array
    weights: Array
    weight_bytes: Array
    tensors: Array
    summed: Mapping[str, Array]

    @property
    def activations(self) -> Array:
        """Bytes that one micro-batch takes at most."""
        return self.kept + self.inside + self.largest

    def pick(self, which: Any) -> Self:
        """Some of the stretches, by an index of their arrays."""
        return self._with(lambda name, array: array[which])

    def scaled(self, share: float) -> Self:
        """A share of every stretch."""
        return self._with(lambda name, array: array * share)

    def together(self) -> Held:
        """What the stretches along the first dim hold together: of stages of one rank."""
        held = {name: getattr(self, name) for name in Held.__dataclass_fields__}
        return Held(**held)._with(lambda name, array: array.max(axis=0) if name in _ONE else array.sum(axis=0))

    def _with(self, change: Callable[[str, Array], Array]) -> Self:
        def changed(name: str, item: Any) -> Any:
            if isinstance(item, Mapping):
                return {key: changed(name, value) for key, value in item.items()}
            return tuple(changed(name, each) for each in item) if isinstance(item, tuple) else change(name, item)

        return replace(self, **{name: changed(name, item) for name, item in vars(self).items()})


@dataclass(frozen=True)
class Stretches(Held):
    """What they hold, and what they take.

    Attributes:
        forward, backward: seconds of the device.
        later: of backward in two halves those of the second: of products that give gradients of parameters.
        again: seconds of forward that backward does once more.
        calls, calls_back: operators that the host starts.
        meets: operators at which parameters meet what a stage received.
        sent, sent_back: for each axis and kind of collective, how many and their bytes.
    """

    forward: Array
    backward: Array
    later: Array
    again: Array
    calls: Array
    calls_back: Array
    meets: Array
    sent: Mapping[tuple[str, str], tuple[Array, Array]]
    sent_back: Mapping[tuple[str, str], tuple[Array, Array]]


_ONE = {"inside", "largest", "growing", "late"}
"""What stages of one rank do not hold at the same time."""


class Rows:
    """What each operator takes for a micro-batch on a device.

    Args:
        folded: the graph without what only repeats.
        work: what its operators do.
        samples: of a micro-batch on this rank.
        kernels: seconds of an operator.
        gradients: lives of gradients, as of tensors in `folded`, where memory is followed through backward.
        tensors: lives of tensors where there is no backward, and memory is followed through forward.
        parts: of how many micro-batches the outputs are then joined.
    """

    def __init__(
        self,
        folded: Folded,
        work: Work,
        samples: int,
        kernels: Kernels,
        gradients: npt.NDArray[np.int_] | None = None,
        tensors: npt.NDArray[np.int_] | None = None,
        parts: int = 1,
    ) -> None:
        self.folded, self._work, self._samples, self._kernels = folded, work, samples, kernels
        self.kept = self.each(work.kept(samples, attention="fused" if kernels.flash else "scores"))
        most = [work.largest(op, samples) for op in work.graph.ops]
        self.meets = self.each([work.traits.of[op].weighted for op in work.graph.ops])
        self.halves = self.each([work.traits.of[op].halves for op in work.graph.ops])
        self.halved, self.late = (self.each(each) for each in zip(*work.halved(samples), strict=True))
        if gradients is None:  # as other frameworks' figures bear out
            made = self.each([work.made(op, samples) for op in work.graph.ops])
            self.halved = self.meets * self.products * (self.kept + made)
        self.largest = self.each(most)
        self.bytes = np.array([work.local_bytes(v, samples) for v in folded.distinct])
        self.live = self._crossing(folded.lives)
        self._gradients = gradients
        if tensors is not None:
            self.kept = self.halved = self.late = np.zeros_like(self.kept)
            self.largest = self._there(tensors)[:-1]
            outputs = sum(work.local_bytes(v, samples) for v in work.graph.results.values())
            if parts > 1:  # their outputs wait, and are there twice while they are joined
                self.largest[-1] = max(self.largest[-1] + (parts - 1) * outputs, 2 * parts * outputs)

    # Most splits of a large model need too much memory, and their times are never asked for.

    @cached_property
    def back(self) -> tuple[Array, Array, Array] | None:
        """While each operator's backward runs: bytes of parameters' gradients it makes, and of all else not kept.

        First of gradients that this rank has alone, then of those that are summed over an axis. None where memory is
        not followed through backward.
        """
        if self._gradients is None:
            return None
        mine, summed, rest = np.array(self._work.back(self._samples)).reshape(-1, 3).T
        # What comes back to an operator is what crosses the cut behind it.
        return self.each(mine), self.each(summed), self.each(rest) + self._crossing(self._gradients)[1:]

    def _crossing(self, lives: npt.NDArray[np.int_]) -> Array:
        """Bytes of tensors of such lives that cross the cut before each operator, and at the end."""
        begins, ends, numbers = lives
        return self._there(np.array([begins + 1, ends, numbers]))

    def _there(self, lives: npt.NDArray[np.int_]) -> Array:
        """Bytes of tensors of such lives while each operator runs, and at the end."""
        change = np.zeros(len(self.folded.whole.ops) + 2)
        begins, ends, numbers = lives
        np.add.at(change, begins, self.bytes[numbers])
        np.add.at(change, ends + 1, -self.bytes[numbers])
        return np.cumsum(change)[:-1]

    @cached_property
    def _tasks(self) -> Sequence[Task]:
        return self._work.tasks(self._samples)

    @cached_property
    def forward(self) -> Array:
        return self.each([self._kernels.forward(t) for t in self._tasks])

    @cached_property
    def backward(self) -> Array:
        return self.each([self._kernels.backward(t) for t in self._tasks])

    @cached_property
    def calls(self) -> Array:
        return self.each([t.calls for t in self._tasks])

    @cached_property
    def gradients(self) -> Array:
        return self.each([min(t.gradients, 2) for t in self._tasks])

    @cached_property
    def keeps(self) -> Array:
        saved = self._work.saved
        return self.each([bool(saved[op].values or saved[op].others) for op in self._work.graph.ops]).astype(bool)

    @cached_property
    def products(self) -> Array:
        return self.each([kind == PRODUCT for kind in self._work.traits.kinds.values()]).astype(bool)

    @cached_property
    def attention(self) -> Array:
        return self.each([kind == ATTENTION for kind in self._work.traits.kinds.values()]).astype(bool)

    @cached_property
    def sent(self) -> dict[tuple[str, str], Array]:
        return self._spread([t.forward for t in self._tasks])

    @cached_property
    def sent_back(self) -> dict[tuple[str, str], Array]:
        return self._spread([t.backward for t in self._tasks])

    def each(self, values: Sequence[float] | Array) -> Array:
        """Values of the folded graph's operators as values of all operators."""
        return np.array(values, dtype=float)[self.folded.index]

    def _spread(self, messages: Sequence[Sequence[Message]]) -> dict[tuple[str, str], Array]:
        """For each axis and kind how many messages each operator sends, and their bytes."""
        found = {(m.axis, m.kind): np.zeros((2, len(messages))) for those in messages for m in those}
        for i, those in enumerate(messages):
            for m in those:
                found[m.axis, m.kind][:, i] += (1, m.size)
        return {key: rows[:, self.folded.index] for key, rows in found.items()}


class Again:
    """What is computed again in backward.

    Args:
        folded: the graph without what only repeats.
        patterns: names of the blocks.

    Attributes:
        blocks: for each operator its block; empty for none.
        inside: whether it has one.
        entering: operators that are the first of their block to need a tensor, and the tensors' numbers.
    """

    def __init__(self, folded: Folded, patterns: Sequence[str]) -> None:
        graph = self._graph = folded.whole
        block_of = blocks_by(patterns)
        of = {module: block_of(module) for module in {op.module for op in graph.ops}} if patterns else {}
        self.blocks = [of[op.module] if of else "" for op in graph.ops]
        self.inside = np.array([bool(b) for b in self.blocks])
        self.entering: list[tuple[int, int]] = []
        entered: set[tuple[str, Value]] = set()
        for op, block in zip(graph.ops, self.blocks, strict=True):
            for value in op.inputs if block else ():
                producer = graph.producer.get(value)
                if producer is None or self.blocks[producer.index] == block or value not in graph.learned:
                    continue
                if (block, value) not in entered:
                    entered.add((block, value))
                    self.entering.append((op.index, folded.numbers[value]))

    @cached_property
    def borders(self) -> Sequence[int]:
        """Operators at which a stage may begin: not inside of a block, and not at a cast, which other dtypes lack."""
        graph, blocks = self._graph, self.blocks
        return [
            op.index for op in graph.ops[1:]
            if any(v in graph.learned for v in op.outputs) and op.name not in CASTS
            and (not blocks[op.index] or blocks[op.index] != blocks[op.index - 1])
        ]  # fmt: skip


class Table:
    """What the operators of a graph take on one rank.

    Args:
        rows: what each takes.
        weights: the parameters.
        again: what is computed again in backward.
        selective: "attention": so is attention everywhere; "products": attention and every second product are not.
        stops: whether computing again stops where a block keeps nothing more.
    """

    def __init__(self, rows: Rows, weights: Weights, again: Again, *, selective: str = "", stops: bool = False) -> None:
        self.rows, self.weights, self.graph, self.blocks = rows, weights, rows.folded.whole, again.blocks
        self.again = again
        self.live = rows.live
        spared = self._spared() if selective == "products" else np.zeros_like(again.inside)
        self._more = again.inside & ~spared | rows.attention * (selective == "attention")
        self._twice = self._more & np.logical_not(self._tails()) if stops else self._more
        self._inside = np.where(again.inside, rows.kept, 0.0)
        # What is spared is kept as it is made.
        kept = np.where(self._more, 0.0, np.where(spared, rows.largest / 2, rows.kept))
        for op, number in again.entering:
            kept[op] += rows.bytes[number]
        self._kept = _running(kept)
        self._halved = _running(rows.halved)

    def _spared(self) -> npt.NDArray[np.bool_]:
        """Of each block its attention, its first product, its third and so on."""
        seen: dict[str, int] = {}
        found = np.zeros(len(self.blocks), dtype=bool)
        for i, block in enumerate(self.blocks):
            if block and self.rows.attention[i]:
                found[i] = True
            elif block and self.rows.products[i]:
                seen[block] = seen.get(block, 0) + 1
                found[i] = seen[block] % 2 == 1
        return found

    def _tails(self) -> Array:
        """Of each block that is computed again, the operators from the last that keeps anything on."""
        last: dict[str, int] = {}
        for i, block in enumerate(self.blocks):
            if block and self.rows.keeps[i]:
                last[block] = i
        return np.array([bool(b) and i >= last.get(b, 0) for i, b in enumerate(self.blocks)])

    @cached_property
    def _sums(self) -> Mapping[str, Array]:
        rows, more = self.rows, self._twice
        return {
            "forward": _running(rows.forward),
            "backward": _running(rows.backward),
            "later": _running(rows.backward * rows.halves / np.maximum(rows.gradients, 1)),
            "again": _running(rows.forward * more),
            "calls": _running(rows.calls),
            "calls_back": _running(rows.calls * (rows.gradients + more)),
            "meets": _running(rows.meets),
        }

    @cached_property
    def _messages(self) -> Sequence[Mapping[tuple[str, str], tuple[Array, Array]]]:
        rows, back = self.rows, dict(self.rows.sent_back)
        for key, sent in rows.sent.items() if self._twice.any() else ():
            # What is computed again is sent again.
            back[key] = back.get(key, 0.0) + sent * self._twice
        return [{k: (_running(r[0]), _running(r[1])) for k, r in way.items()} for way in (rows.sent, back)]

    @property
    def seconds(self) -> Array:
        """For each operator, and for the end, the seconds of all operators before it, both ways."""
        return self._sums["forward"] + self._sums["backward"]

    @cached_property
    def whole(self) -> Stretches:
        """All operators as one stretch."""
        return self.between([0, len(self.graph.ops)], NEIGHBOURS).pick(0)

    @cached_property
    def whole_held(self) -> Held:
        """What all operators hold."""
        return self.held([0, len(self.graph.ops)], NEIGHBOURS).pick(0)

    def held(self, bounds: Sequence[int], pairs: Pairs) -> Held:
        """What stretches between two of these operators hold; arguments as for `between`."""
        at = np.array(bounds)
        entries, sizes, tensors, summed = self.weights.between(at, pairs)
        largest, growing = self._most_back(at, pairs)
        # What the model returns crosses the end, and goes to no stage.
        crossing = np.where(at == len(self.graph.ops), 0.0, self.live[at])
        return Held(
            kept=pairs.ends(self._kept[at]) - pairs.starts(self._kept[at]),
            halved=pairs.ends(self._halved[at]) - pairs.starts(self._halved[at]),
            late=pairs.real(pairs.most(tops(self.rows.late, at))),
            inside=pairs.most(self._most_inside(at)),
            largest=largest,
            growing=growing,
            passed=pairs.real(pairs.starts(crossing) + pairs.ends(crossing)),
            weights=entries,
            weight_bytes=sizes,
            tensors=tensors,
            summed=summed,
        )

    def between(self, bounds: Sequence[int], pairs: Pairs) -> Stretches:
        """What stretches between two of these operators take.

        Args:
            bounds: indices of operators, growing; the number of operators stands for the end.
            pairs: which two of them.
        """
        at = np.array(bounds)

        def taken(running: Array) -> Array:
            return pairs.ends(running[at]) - pairs.starts(running[at])

        ways = [{key: (taken(calls), taken(sizes)) for key, (calls, sizes) in way.items()} for way in self._messages]
        sums: dict[str, Any] = {name: taken(running) for name, running in self._sums.items()}
        sums["meets"] = sums["meets"] * (pairs.starts(at) > 0)  # the first stage receives nothing
        return Stretches(**vars(self.held(bounds, pairs)), **sums, sent=ways[0], sent_back=ways[1])

    def _most_back(self, at: Bounds, pairs: Pairs) -> tuple[Array, Array]:
        """What backward of every stretch makes at its fullest moment besides what is kept: `largest` and `growing`."""
        if self.rows.back is None:
            largest = pairs.most(tops(self.rows.largest, at))
            return largest, largest
        grads, summed, others = self.rows.back
        # Behind an operator nothing is kept any more.
        moments, kept = self._kept[1:] + others + summed, pairs.ends(self._kept[at])
        largest = pairs.most(tops(moments + grads, at)) - kept
        made = self.weights.gradients()
        growing = pairs.most(tops(moments - made[:-1], at)) + pairs.starts(made[at]) - kept
        return pairs.real(largest), pairs.real(growing)

    def _most_inside(self, at: Bounds) -> Array:
        """Bytes of the largest block between neighbouring bounds while it is computed again."""
        most = []
        for a, b in pairwise(at) if self._inside.any() else ():
            totals: dict[str, float] = {}
            for i in range(a, b):
                totals[self.blocks[i]] = totals.get(self.blocks[i], 0.0) + self._inside[i]
            most.append(max(totals.values(), default=0.0))
        return np.array(most) if most else np.zeros(len(at) - 1)


def _running(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])
