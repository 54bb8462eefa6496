"""Again: which operators backward computes once more, and where stages may begin for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardwise.cost.traits import ATTENTION, PRODUCT, Traits
from shardwise.graph.fold import Folded
from shardwise.graph.graph import CASTS, Op
from shardwise.graph.rules import Value
from shardwise.graph.saved import Saved
from shardwise.parallel.recompute import blocks_by

Flags = npt.NDArray[np.bool_]


class Again:
    """What is computed again in backward.

    Args:
        folded: the graph without what only repeats.
        patterns: names of the blocks.
        traits: of its operators.
        saved: what they keep.
        selective: "attention": so is attention everywhere; "products": attention and every second product are not.
        stops: whether computing again stops where a block keeps nothing more.

    Attributes:
        blocks: for each operator its block; empty for none.
        inside: whether it has one.
        spared: whether it is kept as it is made, though it has.
        more: whether it keeps nothing.
        entering: operators that are the first of their block to need a tensor, and the tensors' numbers.
    """

    def __init__(
        self,
        folded: Folded,
        patterns: Sequence[str],
        traits: Traits,
        saved: Mapping[Op, Saved],
        *,
        selective: str = "",
        stops: bool = False,
    ) -> None:
        graph = self._graph = folded.whole
        self._folded, self._traits, self._saved, self._stops = folded, traits, saved, stops
        block_of = blocks_by(patterns)
        of = {module: block_of(module) for module in {op.module for op in graph.ops}} if patterns else {}
        self.blocks = [of[op.module] if of else "" for op in graph.ops]
        self.inside = np.array([bool(b) for b in self.blocks])
        self.spared = self._every_second() if selective == "products" else np.zeros_like(self.inside)
        self.more: Flags = self.inside & ~self.spared | self._are(ATTENTION) & (selective == "attention")
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
    def twice(self) -> Flags:
        """Whether an operator runs once more: if it keeps nothing, and its block keeps something behind it."""
        if not self._stops or not self.more.any():
            return self.more
        keeps = [bool(self._saved[op].values or self._saved[op].others) for op in self._folded.graph.ops]
        keeping = self._folded.each(keeps)
        last = {block: i for i, block in enumerate(self.blocks) if block and keeping[i]}
        tails = np.array([bool(b) and i >= last.get(b, 0) for i, b in enumerate(self.blocks)])
        found: Flags = self.more & ~tails
        return found

    @cached_property
    def borders(self) -> Sequence[int]:
        """Operators at which a stage may begin: not inside of a block, and not at a cast, which other dtypes lack."""
        graph, blocks = self._graph, self.blocks
        return [
            op.index for op in graph.ops[1:]
            if any(v in graph.learned for v in op.outputs) and op.name not in CASTS
            and (not blocks[op.index] or blocks[op.index] != blocks[op.index - 1])
        ]  # fmt: skip

    def _every_second(self) -> Flags:
        """Of each block its attention, its first product, its third and so on."""
        attention, products = self._are(ATTENTION), self._are(PRODUCT)
        seen: dict[str, int] = {}
        found = np.zeros(len(self.blocks), dtype=bool)
        for i, block in enumerate(self.blocks):
            if block and attention[i]:
                found[i] = True
            elif block and products[i]:
                seen[block] = seen.get(block, 0) + 1
                found[i] = seen[block] % 2 == 1
        return found

    def _are(self, kind: str) -> Flags:
        """Whether operators are of a kind."""
        return self._folded.each([k == kind for k in self._traits.kinds.values()]).astype(bool)
