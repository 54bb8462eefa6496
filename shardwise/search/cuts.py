"""Where to cut a pipeline: so that its slowest stage is as fast as can be, by dynamic programming over all places.

Exact for the pace of a steady pipeline (`cost.timeline.steady_seconds`) among the places that are looked at, which is
not quite that of the other schedules nor of a few micro-batches. Where there are few cuts all are priced. A large
model's places are thinned out: of each short stretch the one that the fewest bytes cross.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardwise.cost.case import Case
from shardwise.cost.pairs import ALL, Array, Bounds
from shardwise.cost.stretches import Held, Taken
from shardwise.cost.table import Table

_PLACES = 192
"""Of how many places to cut at most one is found to be best."""
_PACES = 24
"""How many slower paces than the best are tried for a shorter way through all stages."""
_CEILINGS = 24
"""How many times cuts are looked for whose gradients and updates take less than those before."""
_TABLES = 16
"""Tables of which all stretches are held at a time, some megabytes each."""
_FEW = 128
"""Cuts of which all are priced in full."""
_SCORED = 4
"""How many of the cuts found are priced in full."""
_SHARES = 8
"""How many sets of ranks, each of the last ones, are looked at for what they have to do at least."""
_ROUNDING = 1e-9
"""Relative difference of bytes that rounding may make, with room."""


def cut_places(table: Table, most: int = _PLACES) -> list[int]:
    """Operators at which a stage may begin, in order.

    Not inside of a recomputed block, which would keep what its two parts are given, and not at a cast, of which a model
    has others in another dtype.
    """
    return list(_cut_places(table, most))


@lru_cache(maxsize=1024)
def _cut_places(table: Table, most: int) -> tuple[int, ...]:
    found = table.again.borders
    if len(found) <= most:
        return tuple(found)
    time = table.seconds
    window = {i: int(time[i] / time[-1] * most) for i in found}
    best: dict[int, int] = {}
    for i in found:
        kept = best.setdefault(window[i], i)
        if table.live[i] < table.live[kept]:
            best[window[i]] = i
    return tuple(sorted(best.values()))


def best_cuts(case: Case, chunks: int, limit: float | None = None, *, objective: str = "time") -> list[int] | None:
    """The operators at which stages begin, the first at none; None where no cuts leave every rank enough memory.

    Args:
        case: the plan but for its cuts.
        chunks: stages of each rank.
        limit: bytes that a rank may use, where it is less than it has; infinite for cuts that need not fit.
        objective: as in `search.space.Options`.
    """
    return Cuts(case, chunks, limit).best(objective)


class Cuts:
    """The cuts of a plan; arguments as for `best_cuts`."""

    def __init__(self, case: Case, chunks: int, limit: float | None = None) -> None:
        self.case, self.chunks, self.limit = case, chunks, limit
        self.stages = case.plan.pipeline * chunks
        self.places = cut_places(case.tables[0]) if self.stages > 1 else []
        self.enough = len(self.places) >= self.stages - 1
        self.few = math.comb(len(self.places), self.stages - 1) <= _FEW
        self._bounds = [0, *self.places, len(case.tables[0].graph.ops)]

    def exact(self, objective: str) -> bool:
        """Whether the best ones are the best of all that there are, and not of those with a steady pace."""
        return self.few or objective in ("memory", "throughput")

    @cached_property
    def _grid(self) -> _Grid | None:
        return _grid(self.case, self._bounds, self.chunks, self.limit)

    def best(self, objective: str) -> list[int] | None:
        """As `best_cuts`."""
        if self.stages == 1:
            return []
        if not self.enough:
            return None
        if objective != "memory" and self.few:
            return _best_of_all(self.case, self.places, self.stages, self.limit, objective)
        if self._grid is None:
            return None
        if objective == "memory":
            found = [_through(_fastest(self._grid.used))[1]]
        elif objective == "throughput":
            # Of the cuts with the best pace those whose way is the shortest.
            found = [_through(_fastest(self._grid.times))[1]]
        else:
            found = _candidates(self._grid, self.case.plan.micro_batches)
        cuts = [[self._bounds[i] for i in path[1:-1]] for path in found]
        if len(cuts) < 2:
            return cuts[0] if cuts else None
        return min(cuts, key=lambda c: self.case.spent(c).step)

    def pace(self) -> float:
        """Seconds from one chunk to the next that no cuts beat, in prediction; infinite where none fit."""
        if not self.enough or self._grid is None:
            return math.inf
        return self.case.plan.micro_batches * _slowest(self._grid.times)

    def least(self) -> float:
        """Seconds of a step, less its end where ranks have several stages, that no cuts beat; infinite where none fit.

        A rank begins when the first micro-batch has come through the stages before its own, and what it did last goes
        back through them. In between it has all micro-batches, and the update comes after. In 1F1B, moreover, a
        micro-batch begins when one is back that began as many before it as there are stages.
        """
        if not self.enough or self._grid is None:
            return math.inf
        grid, micros = self._grid, self.case.plan.micro_batches
        if self.chunks > 1:
            return max(self._share(first) for first in sorted({grid.ranks * k // _SHARES for k in range(_SHARES)}))
        alone = {id(takes): micros * takes.busy + takes.tails for takes in grid.takes}
        reached = _none_but_last(self._bounds)
        for takes, fit in zip(reversed(grid.takes), reversed(grid.fits), strict=True):
            total = np.maximum(alone[id(takes)], takes.ways + reached[None, :])
            reached = np.where(fit, total, np.inf).min(axis=1)
        returns = self.case.plan.schedule == "1f1b" and self.case.ways > 1
        rounds = -(-micros // self.stages) if returns else 0
        return max(float(reached[0]), rounds * _through(grid.times)[0] + _slowest(grid.tails))

    def _share(self, first: int) -> float:
        """Seconds of the ranks from `first` on in the mean, as few as can be: those before have less room for more."""
        assert self._grid is not None
        grid, reached = self._grid, _none_but_last(self._bounds)
        for stage in reversed(range(self.stages)):
            rank = stage % grid.ranks
            busy = grid.takes[rank].busy if rank >= first else 0.0
            reached = np.where(grid.fits[rank], busy + reached[None, :], np.inf).min(axis=1)
        return self.case.plan.micro_batches * float(reached[0]) / (grid.ranks - first)


def _none_but_last(bounds: Sequence[int]) -> Array:
    """Of each bound what is still to come behind it: nothing behind the last, and the others do not end a pipeline."""
    found = np.full(len(bounds), np.inf)
    found[-1] = 0.0
    return found


def _best_of_all(
    case: Case, places: Sequence[int], stages: int, limit: float | None, objective: str
) -> list[int] | None:
    """The best of all cuts, each priced in full."""
    found = [(case.estimate(cuts), cuts) for cuts in map(list, combinations(places, stages - 1))]
    if limit != math.inf:
        found = [(e, cuts) for e, cuts in found if e.fits and (limit is None or e.peak <= limit)]
    if objective == "throughput":
        found.sort(key=lambda each: each[0].pace)
    else:
        found.sort(key=lambda each: each[0].step)
    return found[0][1] if found else None


class _Takes(NamedTuple):
    """What every stretch takes on a rank.

    Attributes:
        times: seconds of a micro-batch, and of carrying it on.
        busy: the same without.
        ways: seconds that the next stage has its first micro-batch later than this, and this its last than the next.
        tails: seconds behind the last micro-batch.
    """

    times: Array
    busy: Array
    ways: Array
    tails: Array


@dataclass(frozen=True)
class _Grid:
    """What every stretch takes as each stage: of each rank, and how often they are gone round.

    Attributes:
        takes: seconds.
        needs: bytes.
        fits: whether there is memory enough.
        rounds: stages of each rank.
        lost: as of a `Case`.
        carried: of the seconds that carrying a micro-batch takes how many times as many a step has besides its bubble.
    """

    takes: Sequence[_Takes]
    needs: Sequence[Array]
    fits: Sequence[npt.NDArray[np.bool_]]
    rounds: int
    lost: float
    carried: float

    @property
    def ranks(self) -> int:
        return len(self.takes)

    @cached_property
    def times(self) -> Sequence[Array]:
        """Seconds of each stage; infinite where it has too little memory."""
        return self._where_it_fits([takes.times for takes in self.takes])

    @cached_property
    def paces(self) -> Sequence[Array]:
        """Seconds by which each micro-batch but one makes a step longer where the stage is the slowest, likewise."""
        return self._where_it_fits([self.lost * takes.times for takes in self.takes])

    @cached_property
    def lengths(self) -> Sequence[Array]:
        """Seconds by which each stage makes a step longer besides, but for what no cuts change; likewise."""
        more = (1 - self.lost) * self.carried
        return self._where_it_fits([self.lost * t.times + more * (t.times - t.busy) for t in self.takes])

    @cached_property
    def tails(self) -> Sequence[Array]:
        """Seconds behind each stage's last micro-batch, likewise."""
        return self._where_it_fits([takes.tails for takes in self.takes])

    @cached_property
    def used(self) -> Sequence[Array]:
        """Bytes of each stage, likewise."""
        return self._where_it_fits(self.needs)

    def _where_it_fits(self, found: Sequence[Array]) -> Sequence[Array]:
        return [np.where(fit, those, np.inf) for fit, those in zip(self.fits, found, strict=True)] * self.rounds


def _grid(case: Case, bounds: Sequence[int], chunks: int, limit: float | None) -> _Grid | None:
    """What every stretch takes as each stage; infinite where it has too little memory. None where no stages fit."""
    ranks, n = case.plan.pipeline, len(bounds)
    upper = np.triu(np.ones((n, n), dtype=bool), k=1)
    bytes_of: dict[int, tuple[Array, Array, Array, Array]] = {}
    passed: dict[int, Array] = {}
    half_done = [case.flight.half_done(rank) for rank in range(ranks)]
    for table in {id(t): t for t in case.held}.values():
        held = _held(table, tuple(bounds))
        bytes_of[id(table)] = _by_flight(case, held, any(half_done))
        passed[id(table)] = case.rooms(held) * (1 + case.reserve)
    fixed = case.profile.fixed * (1 + case.reserve)

    def needs(rank: int, begins: Any) -> Array:
        """Bytes of the stretches that begin at some bounds, as one of a rank's stages."""
        alone, halved, each, more = (values[begins] for values in bytes_of[id(case.held[rank])])
        half, most = half_done[rank], case.flight.most(rank, ranks * chunks)
        found: Array = halved + (most * each + half * more) / chunks if half else alone + most / chunks * each
        return found

    rooms = []
    for rank in range(ranks):
        room = np.inf if limit == np.inf else min(case.places[rank].memory, limit or np.inf)
        rooms.append((room - fixed) / chunks + fixed)  # each of several stages on a rank may use its share
    at = 0
    for stage in range(ranks * chunks):
        # As far as it goes: a stage that begins later needs no more memory, but for what crosses its cuts.
        rank = stage % ranks
        row = (needs(rank, at) - passed[id(case.held[rank])][at])[at + 1 :]
        at += int(max(np.flatnonzero(row <= rooms[rank] * (1 + _ROUNDING)) + 1, default=0))
    if at < n - 1:
        return None
    used_by = [needs(rank, slice(None)) for rank in range(ranks)]
    fits_by = [upper & (some <= room) for some, room in zip(used_by, rooms, strict=True)]
    if not _possible(fits_by * chunks):
        return None
    live = np.array([case.tables[0].live[b] for b in bounds])
    found: dict[int, _Takes] = {}
    for alike in case.alike:
        rank = alike[0]
        s = _taken(case.tables[rank], tuple(bounds))
        times = case.times(rank, s)
        sends = case.ways * case.sends(rank, live)
        sends[-1] = 0.0  # nothing is carried out of the last
        shown, _, others = case.reduction(rank, s, times.backward)
        tail = sum(others.values(), shown) + case.update(rank, s)
        busy = times.forward + times.backward
        # In two halves of backward, the second may fill what the way back leaves.
        halves = case.plan.schedule == "zero-bubble"
        way = times.forward + sends[None, :] / 2 if halves else busy + sends[None, :]
        found |= dict.fromkeys(alike, _Takes(busy + sends[None, :], busy, way, tail))
    takes = [found[rank] for rank in range(ranks)]
    return _Grid(takes, used_by, fits_by, chunks, case.lost, case.plan.micro_batches / ranks)


def _by_flight(case: Case, held: Held, halves: bool) -> tuple[Array, Array, Array, Array]:
    """Bytes of stretches: with nothing in flight, and the same where some are half through backward.

    Then by how much they grow with each micro-batch in flight, and with each that is half through; none is without
    `halves`.
    """

    def memory(*counts: float) -> Array:
        found: Array = np.add.reduce(list(case.memory(held, *counts).values()))
        return found

    alone = memory(0.0)
    each = memory(1.0) - alone
    if not halves:
        return alone, alone, each, np.zeros_like(each)
    half = memory(2.0, 1.0)
    more = memory(2.0, 2.0) - half
    return alone, half - 2 * each - more, each, more


# The same table is asked for again with another ZeRO stage, or another number of ranks.


@lru_cache(maxsize=_TABLES)
def _held(table: Table, bounds: tuple[int, ...]) -> Held:
    return table.held(bounds, ALL)


@lru_cache(maxsize=_TABLES)
def _taken(table: Table, bounds: tuple[int, ...]) -> Taken:
    return table.taken(bounds, ALL)


def _possible(fits: Sequence[npt.NDArray[np.bool_]]) -> bool:
    """Whether there are stages that all fit, one behind the other from the first bound to the last."""
    reached = fits[0][0]
    for fit in fits[1:]:
        reached = reached @ fit
    return bool(reached[-1])


def _candidates(grid: _Grid, micros: int) -> list[list[int]]:
    """Cuts of which one is best: for lower and lower ceilings of what comes last the best pace and way."""
    found: dict[tuple[int, ...], float] = {}
    least, ceiling = _slowest(grid.tails), np.inf
    at, paces, lengths, tails = _narrow(grid, micros, least)
    for _ in range(_CEILINGS):
        under = float(np.nextafter(ceiling, 0.0))
        path, value = _best_path(_within(paces, tails, under), _within(lengths, tails, under), micros)
        if path is None or (found and value + least >= min(found.values())):
            break
        ceiling = max(tail[i, j] for tail, (i, j) in zip(tails, pairwise(path), strict=True))
        found[tuple(path)] = value + ceiling
    best = sorted(found, key=lambda path: found[path])[:_SCORED]
    return [[int(those[i]) for those, i in zip(at, path, strict=True)] for path in best]


def _narrow(grid: _Grid, micros: int, least: float) -> tuple[list[Bounds], list[Array], list[Array], list[Array]]:
    """For each stage, and for the end, the bounds that better cuts than some may have there; paces, lengths and tails.

    No stage of better cuts is so slow that its pace alone, with the shortest way and what comes last at the least,
    takes as long as the cuts of the best pace do.
    """
    quickest, (shortest, _) = _slowest(grid.paces), _through(grid.lengths)
    pace = np.inf
    if micros > 1 and np.isfinite(quickest):
        length, path = _through(_within(grid.lengths, grid.paces, quickest))
        last = max(tail[i, j] for tail, (i, j) in zip(grid.tails, pairwise(path), strict=True))
        longer = length - shortest + last - least
        pace = max(quickest, quickest + longer / (micros - 1)) * (1 + _ROUNDING)
    fits = [paces <= pace for paces in grid.paces]
    ahead = [np.arange(len(fits[0])) == 0]
    for fit in fits:
        ahead.append(fit[ahead[-1]].any(axis=0))
    at: list[Bounds] = [np.flatnonzero(ahead[-1])[-1:]]
    for fit, there in zip(reversed(fits), reversed(ahead[:-1]), strict=True):
        begins = np.flatnonzero(there)
        at.append(begins[fit[np.ix_(begins, at[-1])].any(axis=1)])
    at.reverse()
    picks = [np.ix_(begins, ends) for begins, ends in pairwise(at)]
    narrow = ([some[pick] for some, pick in zip(e, picks, strict=True)] for e in (grid.paces, grid.lengths, grid.tails))
    paces, lengths, tails = narrow
    return at, paces, lengths, tails


def _best_path(paces: Sequence[Array], lengths: Sequence[Array], micros: int) -> tuple[list[int] | None, float]:
    """The bounds of stages whose way through and pace together are least, and their seconds."""
    quickest = _slowest(paces)
    if not np.isfinite(quickest):
        return None, np.inf

    def try_(pace: float) -> tuple[float, float, list[int]]:
        length, path = _through(_within(lengths, paces, pace))
        slowest = max(float(some[i, j]) for some, (i, j) in zip(paces, pairwise(path), strict=True))
        return length, slowest, path

    length, _, best = try_(quickest)
    value = length + (micros - 1) * quickest
    # A slower pace pays where the way through all stages gets so much shorter: from the slowest that may, downwards.
    shortest = _through(lengths)[0]
    pace = (value - shortest) / (micros - 1) if micros > 1 else np.inf
    for _ in range(_PACES):
        if pace <= quickest:
            break
        length, slowest, path = try_(pace)
        if length + (micros - 1) * slowest < value:
            value, best = length + (micros - 1) * slowest, path
        if length + (micros - 1) * quickest >= value:
            break
        pace = float(np.nextafter(slowest, 0.0))
    return best, value


def _fastest(times: Sequence[Array]) -> Sequence[Array]:
    """Times of the stages that no best pace leaves out; infinite of others."""
    return _within(times, times, _slowest(times))


def _within(lengths: Sequence[Array], paces: Sequence[Array], pace: float) -> Sequence[Array]:
    """Lengths of the stages that are no slower than a pace; infinite of others."""
    return [np.where(slow <= pace, length, np.inf) for length, slow in zip(lengths, paces, strict=True)]


def _slowest(both: Sequence[Array]) -> float:
    """The pace of the slowest stage, as fast as it can be."""
    reached = both[0][0]
    for times in both[1:]:
        reached = np.maximum(reached[:, None], times).min(axis=0)
    return float(reached[-1])


def _through(lengths: Sequence[Array]) -> tuple[float, list[int]]:
    """The shortest way through all stages, and its bounds."""
    reached = lengths[0][0]
    came = []
    for each in lengths[1:]:
        total = reached[:, None] + each
        came.append(total.argmin(axis=0))
        reached = total.min(axis=0)
    at = len(reached) - 1
    length, path = float(reached[-1]), [at]
    for back in reversed(came):
        at = int(back[at])
        path.append(at)
    return length, [0, *path[::-1]]
