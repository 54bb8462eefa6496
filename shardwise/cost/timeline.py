"""Timeline: when a pipeline is done, by running its schedule's order with the stages' times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from shardwise.parallel.schedule import Action, orders

_MANY = 20_000
"""Actions beyond which a pipeline is not run but reckoned by its slowest stage."""
_TIE = 0.02
"""Share of a bubble that is always lost: of stages that would take as long even ones are taken."""


def pipeline_seconds(
    schedule: str,
    ranks: int,
    micros: int,
    forward: Sequence[float],
    backward: Sequence[float],
    sends: Sequence[float],
    turns: Sequence[float] = (),
    later: Sequence[float] = (),
) -> float:
    """Seconds from the first forward to the last backward.

    Args:
        schedule: as in a plan.
        ranks: along the pipeline.
        micros: micro-batches.
        forward, backward: seconds of each stage for one micro-batch; stages go round the ranks.
        sends: seconds to carry a micro-batch from each stage to the next, one fewer than stages.
        turns: seconds that a stage's backward takes besides where a forward came just before it on its rank.
        later: of a backward in two halves the seconds of the second; without it half of them.
    """
    stages = len(forward)
    turns = turns or [0.0] * stages
    later = later or [b / 2 for b in backward]
    if stages == 1:
        return micros * (forward[0] + backward[0])
    if schedule != "zero-bubble" and micros >= ranks and stages * micros > _MANY:
        slower = [b + t for b, t in zip(backward, turns, strict=True)]
        return steady_seconds(schedule, ranks, micros, forward, slower, sends)
    back = [*backward, *(b - w for b, w in zip(backward, later, strict=True)), *later]
    takes = [*forward, *back, *(b + turn for b, turn in zip(back, [*turns] * 3, strict=True))]
    hops = [*sends, 0.0]
    done, clock = [0.0], [0.0] * ranks
    for rank, kind, before, hop in _steps(schedule, ranks, stages, micros):
        start, ready = clock[rank], done[before] + hops[hop]
        clock[rank] = end = (ready if ready > start else start) + takes[kind]
        done.append(end)
    return max(clock)


def steady_seconds(
    schedule: str, ranks: int, micros: int, forward: Sequence[float], backward: Sequence[float], sends: Sequence[float]
) -> float:
    """The same for many micro-batches: filling, draining, and in between the slowest rank.

    In 1F1B a stage may also wait for the way to the end and back: of the micro-batches on that way it has no more than
    there are stages. Interleaved stages fill and drain as many times sooner as a rank has of them (Narayanan et al.,
    2021).
    """
    stages = len(forward)
    fill = sum(forward) + sum(backward) + 2 * sum(sends)
    if schedule == "gpipe" and stages == ranks:
        return fill + (micros - 1) * (max(forward) + max(backward))
    if stages > ranks:
        each = stages // ranks
        busiest = max(sum(forward[rank::ranks]) + sum(backward[rank::ranks]) for rank in range(ranks))
        return micros * busiest + (ranks - 1) * busiest / each + 2 * sum(sends) / each
    pace = way = 0.0
    for stage in reversed(range(stages)):
        both = forward[stage] + backward[stage]
        way += both + (2 * sends[stage] if stage < stages - 1 else 0.0)
        pace = max(pace, both, way / (stages - stage))
    return fill + (micros - 1) * pace


def ahead_seconds(
    most: int,
    micros: int,
    forward: Sequence[float],
    backward: Sequence[float],
    sends: Sequence[float],
    later: Sequence[float] = (),
) -> float:
    """The same with one stage on each rank, backward in two halves, and up to `most` micro-batches held.

    A rank goes back as soon as it can, forward while it may hold more, and computes gradients of weights, the second
    half, where there is nothing else to do (the heuristic of Qi et al., 2024).
    """
    stages = len(forward)
    later = later or [b / 2 for b in backward]
    takes = {"F": forward, "I": [b - w for b, w in zip(backward, later, strict=True)], "W": later}
    done: dict[Action, float] = {}
    clock, counts = [0.0] * stages, [{"F": 0, "I": 0, "W": 0} for _ in forward]
    for _ in range(3 * micros * stages):
        best: tuple[float, int, int, Action] | None = None
        for stage, count in enumerate(counts):
            for rank, kind in enumerate("IFW"):
                action = Action(stage, kind, count[kind])
                if count[kind] == micros or (kind == "F" and count["F"] - count["W"] >= most):
                    continue
                ready = _ready(action, stages, done, sends)
                if ready is not None:
                    best = min(best or (math.inf, 0, 0, action), (max(clock[stage], ready), rank, stage, action))
        assert best is not None
        start, _, stage, action = best
        clock[stage] = done[action] = start + takes[action.kind][stage]
        counts[stage][action.kind] += 1
    return max(clock)


def bubble_lost(ranks: int, micros: int, crowd: float) -> float:
    """Share of a pipeline's bubble in which processors wait too, where ranks share them.

    While a pipeline fills and drains some of its ranks wait, and the others have their part of the processors, up to
    as many times as much as ranks share one. With as many ranks at work as there are processors nothing is lost.

    Args:
        ranks: along the pipeline.
        micros: micro-batches.
        crowd: how many ranks share a processor; 1 where each has its own.
    """
    if ranks == 1 or crowd <= 1:
        return 1.0
    most = min(ranks, micros)
    # How many ranks have a micro-batch, one after the other, and what it takes them, to all ranks at work.
    at_work = [*range(1, most), *[most] * (abs(micros - ranks) + 1), *range(1, most)]
    seconds = math.fsum(max(count / ranks, 1 / crowd) for count in at_work)
    return max((seconds - micros) / (ranks - 1), _TIE)


class _Step(NamedTuple):
    """One action: its rank, which of the times it takes, the step that it waits for (0 for none), over which hop."""

    rank: int
    kind: int
    before: int
    hop: int


@lru_cache(maxsize=128)
def _steps(schedule: str, ranks: int, stages: int, micros: int) -> Sequence[_Step]:
    """A schedule's actions as they can follow each other, the first as number 1, whatever each of them takes.

    Times are those of all stages' forward, backward, its first half, its second, and of these three behind a forward.
    """
    order = orders(schedule, ranks, stages, micros)
    number: dict[Action, int] = {}
    steps: list[_Step] = []
    at, moved = [0] * ranks, True
    while moved:
        moved = False
        for rank, mine in enumerate(order):
            while at[rank] < len(mine):
                action = mine[at[rank]]
                waits, hop = _waits(action, stages)
                before = next((number[a] for a in waits if a in number), None if waits else 0)
                if before is None:
                    break
                turned = action.kind != "F" and at[rank] > 0 and mine[at[rank] - 1].kind == "F"
                kind = "FBIW".index(action.kind) + 3 * turned
                steps.append(_Step(rank, kind * stages + action.stage, before, hop))
                number[action] = len(steps)
                at[rank] += 1
                moved = True
    return steps


def _waits(action: Action, stages: int) -> tuple[tuple[Action, ...], int]:
    """The actions one of which is done before another begins, none for those that wait for none; and over which hop.

    The hop is that behind a stage; -1 where both are of one.
    """
    stage, kind, micro = action
    if kind == "F":
        return ((Action(stage - 1, "F", micro),), stage - 1) if stage else ((), -1)
    if kind == "W":
        return (Action(stage, "I", micro),), -1
    if stage == stages - 1:
        return (Action(stage, "F", micro),), -1
    return (Action(stage + 1, "B", micro), Action(stage + 1, "I", micro)), stage


def _ready(action: Action, stages: int, done: Mapping[Action, float], sends: Sequence[float]) -> float | None:
    """When what an action needs is there; None while that is not known."""
    waits, hop = _waits(action, stages)
    before = next((done[a] for a in waits if a in done), None if waits else 0.0)
    return before if before is None or hop < 0 else before + sends[hop]
