"""Stretches: what stretches of operators read, hold and take as stages, an entry for each stretch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from shardwise.cost.pairs import Array


@dataclass(frozen=True)
class Stretches:
    """The parameters that stretches of operators read.

    Attributes:
        weights: entries of parameters.
        weight_bytes: bytes of them.
        tensors: how many parameters.
        summed: for each axis, entries of parameters whose gradients are summed over it.
    """

    weights: Array
    weight_bytes: Array
    tensors: Array
    summed: Mapping[str, Array]

    one: ClassVar[frozenset[str]] = frozenset()
    """What stages of one rank do not have at the same time."""

    def pick(self, which: Any) -> Self:
        """Some of the stretches, by an index of their arrays."""
        return self._with(lambda name, array: array[which])

    def scaled(self, share: float) -> Self:
        """A share of every stretch."""
        return self._with(lambda name, array: array * share)

    def together(self) -> Self:
        """What the stretches along the first dim have together: stages of one rank."""
        return self._with(lambda name, array: array.max(axis=0) if name in self.one else array.sum(axis=0))

    def _with(self, change: Callable[[str, Array], Array]) -> Self:
        def changed(name: str, item: Any) -> Any:
            if isinstance(item, Mapping):
                return {key: changed(name, value) for key, value in item.items()}
            return tuple(changed(name, each) for each in item) if isinstance(item, tuple) else change(name, item)

        return replace(self, **{name: changed(name, item) for name, item in vars(self).items()})


@dataclass(frozen=True)
class Held(Stretches):
    """What they hold for one micro-batch.

    Attributes:
        kept: bytes kept for backward.
        halved: bytes kept from the first half of a backward to the second, which gives the gradients of parameters.
        late: bytes of the largest gradient that the second half makes.
        inside: bytes that the largest recomputed block keeps while it is computed again.
        largest: bytes of the largest gradient, and of the tensor that it is of; or, followed through backward, by which
            its fullest moment exceeds what is kept.
        growing: the same where gradients of parameters are made in this backward, less those that are not there yet.
        passed: bytes that are received from the stages before and behind.
    """

    kept: Array
    halved: Array
    late: Array
    inside: Array
    largest: Array
    growing: Array
    passed: Array

    one = frozenset({"inside", "largest", "growing", "late"})

    @property
    def activations(self) -> Array:
        """Bytes that one micro-batch takes at most."""
        return self.kept + self.inside + self.largest


@dataclass(frozen=True)
class Taken(Stretches):
    """What they take.

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
