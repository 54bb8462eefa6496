"""Shares: how much of the batch devices get that are not alike."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def fair_shares(speeds: Sequence[float], samples: int) -> tuple[int, ...]:
    """Shares of `samples` by which ranks of these speeds are done as early as can be; none where all are equal.

    Each rank gets a sample, and each further sample goes to the one that is done with it first, which is optimal for
    whole samples.

    Args:
        speeds: samples a second of each rank.
        samples: of a micro-batch, at least one for each rank.
    """
    dealt = [1] * len(speeds)
    done = [(2 / speed, i) for i, speed in enumerate(speeds)]
    heapq.heapify(done)
    for _ in range(samples - len(speeds)):
        _, first = done[0]
        dealt[first] += 1
        heapq.heapreplace(done, ((dealt[first] + 1) / speeds[first], first))
    if len(set(dealt)) == 1:
        return ()
    whole = math.gcd(*dealt)
    return tuple(n // whole for n in dealt)
