"""Rows: what each operator takes for a micro-batch on one rank, an entry for each: seconds of a device, and bytes.

Most splits of a large model need too much memory, and their seconds are never asked for; of those that are only
compared by their seconds nobody asks for bytes. So all is reckoned when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardwise.cost.kernels import Kernels
from shardwise.cost.pairs import Array
from shardwise.cost.traits import PRODUCT
from shardwise.cost.work import Message, Task, Work
from shardwise.graph.fold import Folded


class Seconds:
    """What each operator takes of a device and its host, and what it sends.

    Args:
        folded: the graph without what only repeats.
        work: what its operators do.
        samples: of a micro-batch on this rank.
        kernels: seconds of an operator.
    """

    def __init__(self, folded: Folded, work: Work, samples: int, kernels: Kernels) -> None:
        self._folded, self._work, self._samples, self._kernels = folded, work, samples, kernels

    @cached_property
    def _tasks(self) -> Sequence[Task]:
        return self._work.tasks(self._samples)

    @cached_property
    def forward(self) -> Array:
        """Seconds of forward."""
        return self._folded.each([self._kernels.forward(t) for t in self._tasks])

    @cached_property
    def backward(self) -> Array:
        """Seconds of backward."""
        return self._folded.each([self._kernels.backward(t) for t in self._tasks])

    @cached_property
    def later(self) -> Array:
        """Of backward in two halves those of the second."""
        traits = self._work.traits
        return self.backward * self._folded.each(traits.each("halves")) / np.maximum(self.gradients, 1)

    @cached_property
    def calls(self) -> Array:
        """Operators that the host starts."""
        return self._folded.each([t.calls for t in self._tasks])

    @cached_property
    def gradients(self) -> Array:
        """How many inputs get a gradient, two at most."""
        return self._folded.each([min(t.gradients, 2) for t in self._tasks])

    @cached_property
    def meets(self) -> Array:
        """Whether parameters meet what a stage received."""
        return self._folded.each(self._work.traits.each("weighted"))

    @cached_property
    def sent(self) -> dict[tuple[str, str], Array]:
        """For each axis and kind of collective how many messages, and their bytes."""
        return self._spread([t.forward for t in self._tasks])

    @cached_property
    def sent_back(self) -> dict[tuple[str, str], Array]:
        """The same of backward."""
        return self._spread([t.backward for t in self._tasks])

    def _spread(self, messages: Sequence[Sequence[Message]]) -> dict[tuple[str, str], Array]:
        found = {(m.axis, m.kind): np.zeros((2, len(messages))) for those in messages for m in those}
        for i, those in enumerate(messages):
            for m in those:
                found[m.axis, m.kind][:, i] += (1, m.size)
        return {key: rows[:, self._folded.index] for key, rows in found.items()}


class Bytes:
    """What each operator keeps, makes and hands on.

    Args:
        folded: the graph without what only repeats.
        work: what its operators do.
        samples: of a micro-batch on this rank.
        attention: as of `Work.kept`.
        gradients: lives of gradients, as of tensors in `folded`, where memory is followed through backward.
        tensors: lives of tensors where there is no backward, and memory is followed through forward.
        parts: of how many micro-batches the outputs are then joined.
    """

    def __init__(
        self,
        folded: Folded,
        work: Work,
        samples: int,
        attention: str = "fused",
        gradients: npt.NDArray[np.int_] | None = None,
        tensors: npt.NDArray[np.int_] | None = None,
        parts: int = 1,
    ) -> None:
        self._folded, self._work, self._samples, self._attention = folded, work, samples, attention
        self._gradients, self._tensors, self._parts = gradients, tensors, parts

    @cached_property
    def tensors(self) -> Array:
        """Bytes of each tensor of `Folded.distinct`."""
        return np.array([self._work.local_bytes(v, self._samples) for v in self._folded.distinct])

    @cached_property
    def live(self) -> Array:
        """What crosses the cut before each operator, and at the end."""
        return self._crossing(self._folded.lives)

    @cached_property
    def kept(self) -> Array:
        """What is kept for backward."""
        if self._tensors is not None:
            return self._nothing
        return self._folded.each(self._work.kept(self._samples, attention=self._attention))

    @cached_property
    def halved(self) -> Array:
        """What is kept from the first half of a backward to the second."""
        if self._gradients is not None:
            return self._halves[0]
        if self._tensors is not None:
            return self._nothing
        # As other frameworks' figures bear out.
        work, traits = self._work, self._work.traits
        products = [traits.kinds[op] == PRODUCT and traits.of[op].weighted for op in work.graph.ops]
        made = self._folded.each([work.made(op, self._samples) for op in work.graph.ops])
        return self._folded.each(products) * (self.kept + made)

    @cached_property
    def late(self) -> Array:
        """The largest gradient that the second half makes."""
        return self._nothing if self._tensors is not None else self._halves[1]

    @cached_property
    def largest(self) -> Array:
        """What an operator makes and its gradient; without backward all that is there while it runs."""
        work = self._work
        if self._tensors is None:
            return self._folded.each([work.largest(op, self._samples) for op in work.graph.ops])
        found = self._there(self._tensors)[:-1]
        outputs, parts = sum(work.local_bytes(v, self._samples) for v in work.graph.results.values()), self._parts
        if parts > 1:  # their outputs wait, and are there twice while they are joined
            found[-1] = max(found[-1] + (parts - 1) * outputs, 2 * parts * outputs)
        return found

    @cached_property
    def back(self) -> tuple[Array, Array, Array] | None:
        """While each operator's backward runs: bytes of parameters' gradients it makes, and of all else not kept.

        First of gradients that this rank has alone, then of those that are summed over an axis. None where memory is
        not followed through backward.
        """
        if self._gradients is None:
            return None
        mine, summed, rest = map(self._folded.each, zip(*self._work.back(self._samples), strict=True))
        # What comes back to an operator is what crosses the cut behind it.
        return mine, summed, rest + self._crossing(self._gradients)[1:]

    @cached_property
    def _halves(self) -> tuple[Array, Array]:
        halved, late = zip(*self._work.halved(self._samples), strict=True)
        return self._folded.each(halved), self._folded.each(late)

    @cached_property
    def _nothing(self) -> Array:
        return np.zeros(len(self._folded.index))

    def _crossing(self, lives: npt.NDArray[np.int_]) -> Array:
        """Bytes of tensors of such lives that cross the cut before each operator, and at the end."""
        begins, ends, numbers = lives
        return self._there(np.array([begins + 1, ends, numbers]))

    def _there(self, lives: npt.NDArray[np.int_]) -> Array:
        """Bytes of tensors of such lives while each operator runs, and at the end."""
        change = np.zeros(len(self._folded.whole.ops) + 2)
        begins, ends, numbers = lives
        np.add.at(change, begins, self.tensors[numbers])
        np.add.at(change, ends + 1, -self.tensors[numbers])
        return np.cumsum(change)[:-1]
