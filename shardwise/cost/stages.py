"""Stages: what the stages of a plan's pipeline ranks take, those of ranks that are alike together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwise.cost.pairs import Array
from shardwise.cost.stretches import Taken


@dataclass(frozen=True)
class Times:
    """Seconds of a stage for one micro-batch.

    Attributes:
        forward, backward: in all.
        later: of backward in two halves the second.
        compute: of the device, both ways.
        waits: for the host, both ways.
        turn: for the host besides, where forward and backward of micro-batches alternate; part of neither.
        lead: share of a micro-batch by which the host is through before the device.
        sent, hidden: of each axis's collectives, both ways: what nothing hides, and what computing hides.
    """

    forward: Array
    backward: Array
    later: Array
    compute: Array
    waits: Array
    turn: Array
    lead: Array
    sent: Mapping[str, Array]
    hidden: Mapping[str, Array]


class Group(NamedTuple):
    """Pipeline ranks that are alike; arrays of their stages are [stages of a rank, ranks].

    Attributes:
        ranks: which.
        stages: which stages are theirs.
        own: what these take.
        times: their seconds.
    """

    ranks: npt.NDArray[np.int_]
    stages: npt.NDArray[np.int_]
    own: Taken
    times: Times


def by_rank(groups: Sequence[Group], arrays: Iterable[Array]) -> Array:
    """Arrays of each group's ranks as one of all ranks, and of several stages each as one of all stages."""
    arrays = list(arrays)
    found = np.empty((*arrays[0].shape[:-1], sum(len(group.ranks) for group in groups)))
    for group, array in zip(groups, arrays, strict=True):
        found[..., group.ranks] = array
    return found.ravel()


def by_axis(stages: Sequence[Mapping[str, Array]], times: float) -> dict[str, float]:
    """What stages take by axis, summed."""
    found: dict[str, float] = {}
    for stage in stages:
        for axis, seconds in stage.items():
            found[axis] = found.get(axis, 0.0) + float(np.sum(seconds)) * times
    return found
