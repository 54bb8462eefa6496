"""Estimate: what a plan costs on a cluster, by item: seconds of a step, and bytes of every stage's fullest rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """What a plan takes of time.

    Attributes:
        seconds: of a step, by item: "compute", "overhead" (the host keeps the device waiting), "communication AXIS" of
            each axis (what nothing hides), "bubble", "update".
        hidden: seconds of communication behind computing, by axis.
        pace: seconds from one batch to the next where batches follow each other through a pipeline; 0 where each waits
            for the end of the step before.
    """

    seconds: Mapping[str, float]
    hidden: Mapping[str, float]
    pace: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate(Spent):
    """What a plan costs.

    Attributes:
        ranks: bytes of each pipeline rank, by item: "parameters", "gradients", "optimizer", "activations", "buffers",
            "reserve"; and on CPUs "whole model", by which this exceeds the others before a rank takes its part of it.
        limits: bytes that each pipeline rank has.
    """

    ranks: tuple[Mapping[str, float], ...]
    limits: tuple[float, ...]

    @property
    def memory(self) -> Mapping[str, float]:
        """Bytes of the fullest rank, by item."""
        return max(self.ranks, key=lambda items: sum(items.values()))

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def over(self) -> float:
        """Bytes by which the fullest rank exceeds what it has; below 0 the room that is left."""
        return max(sum(items.values()) - limit for items, limit in zip(self.ranks, self.limits, strict=True))

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.over <= 0
