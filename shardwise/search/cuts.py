"""Where to cut a pipeline: so that its slowest stage is as fast as can be, by dynamic programming over all places.

Exact for the pace of a steady pipeline (`cost.timeline.steady_seconds`) among the places that are looked at. A large
model's places are thinned out: of each short stretch the one that the fewest bytes cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from shardwise.cost.case import Case
from shardwise.cost.table import Array, Table
from shardwise.graph.graph import CASTS

_PLACES = 192
"""Of how many places to cut at most one is found to be best."""
_PACES = 24
"""How many slower paces than the best are tried for a shorter way through all stages."""


def cut_places(table: Table, most: int = _PLACES) -> list[int]:
    """Operators at which a stage may begin, in order.

    Not inside of a recomputed block, which would keep what its two parts are given, and not at a cast, of which a model
    has others in another dtype.
    """
    graph, blocks = table.graph, table.blocks
    found = [
        op.index for op in graph.ops[1:]
        if any(v in graph.learned for v in op.outputs) and op.name not in CASTS
        and (not blocks[op.index] or blocks[op.index] != blocks[op.index - 1])
    ]  # fmt: skip
    if len(found) <= most:
        return found
    time = table.seconds
    window = {i: int(time[i] / time[-1] * most) for i in found}
    best: dict[int, int] = {}
    for i in found:
        kept = best.setdefault(window[i], i)
        if table.live[i] < table.live[kept]:
            best[window[i]] = i
    return sorted(best.values())


def best_cuts(case: Case, chunks: int, limit: float | None = None) -> list[int] | None:
    """The operators at which stages begin, the first at none; None where no cuts leave every rank enough memory.

    Args:
        case: the plan but for its cuts.
        chunks: stages of each rank.
        limit: bytes that a rank may use, where it is less than it has; infinite for cuts that need not fit.
    """
    ranks = case.plan.pipeline
    stages = ranks * chunks
    if stages == 1:
        return []
    places = cut_places(case.tables[0])
    if len(places) < stages - 1:
        return None
    bounds = [0, *places, len(case.tables[0].graph.ops)]
    both = _stage_times(case, bounds, chunks, limit)
    micros = case.plan.micro_batches
    pace = _slowest(both)
    if not np.isfinite(pace):
        return None
    best_value, best_found = np.inf, None
    shortest = _through(both, np.inf)[0]
    # A slower pace pays where the way through all stages gets so much shorter.
    for _ in range(_PACES):
        if shortest + (micros - 1) * pace >= best_value:
            break
        length, found = _through(both, pace)
        slowest = max(both[s][i, j] for s, (i, j) in enumerate(pairwise(found)))
        value = length + (micros - 1) * slowest
        if value < best_value:
            best_value, best_found = value, found
        above = [b[np.isfinite(b) & (b > pace)] for b in {id(b): b for b in both}.values()]
        pace = min((float(a.min()) for a in above if a.size), default=np.inf)
    assert best_found is not None
    return [bounds[i] for i in best_found[1:-1]]


def _stage_times(case: Case, bounds: Sequence[int], chunks: int, limit: float | None) -> list[Array]:
    """For each stage the seconds of every stretch for one micro-batch; infinite where it has too little memory."""
    ranks, n = case.plan.pipeline, len(bounds)
    stretches = {id(t): t.between(bounds) for t in case.tables}
    upper = np.triu(np.ones((n, n), dtype=bool), k=1)
    live = np.array([case.tables[0].live[b] for b in bounds])
    base: dict[tuple[int, int], Array] = {}
    found = []
    for stage in range(ranks * chunks):
        rank = stage % ranks
        key = (id(case.tables[rank]), id(case.places[rank]))
        s = stretches[key[0]]
        if key not in base:
            times = case.times(rank, s)
            sends = 2 * case.sends(rank, live)
            sends[-1] = 0.0  # nothing is carried out of the last
            base[key] = np.where(upper, times.forward + times.backward + sends[None, :], np.inf)
        flight = case.in_flight(rank, ranks * chunks) / chunks
        used = sum(case.memory(s, flight).values())
        fixed = case.profile.fixed * (1 + case.profile.reserve)
        room = np.inf if limit == np.inf else min(case.places[rank].memory, limit or np.inf)
        # Each of several stages on a rank may use its share.
        found.append(np.where(used <= (room - fixed) / chunks + fixed, base[key], np.inf))
    return found


def _slowest(both: Sequence[Array]) -> float:
    """The pace of the slowest stage, as fast as it can be."""
    reached = both[0][0]
    for times in both[1:]:
        reached = np.maximum(reached[:, None], times).min(axis=0)
    return float(reached[-1])


def _through(both: Sequence[Array], pace: float) -> tuple[float, list[int]]:
    """The shortest way through all stages of which none is slower than `pace`, and its bounds."""
    first = both[0][0]
    reached = np.where(first <= pace, first, np.inf)
    came = []
    for times in both[1:]:
        total = reached[:, None] + np.where(times <= pace, times, np.inf)
        came.append(total.argmin(axis=0))
        reached = total.min(axis=0)
    at = len(reached) - 1
    path = [at]
    for back in reversed(came):
        at = int(back[at])
        path.append(at)
    return float(reached[-1]), [0, *path[::-1]]
