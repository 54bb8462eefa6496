"""Timeline: when a pipeline is done, by running its schedule's order with the stages' times."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.parallel.schedule import Action, orders


def pipeline_seconds(
    schedule: str, ranks: int, micros: int, forward: Sequence[float], backward: Sequence[float], send: float
) -> float:
    """Seconds from the first forward to the last backward.

    Args:
        schedule: as in a plan.
        ranks: along the pipeline.
        micros: micro-batches.
        forward, backward: seconds of each stage for one micro-batch; stages go round the ranks.
        send: seconds to carry a micro-batch from one stage to the next.
    """
    stages = len(forward)
    if ranks == 1 and stages == 1:
        return micros * (forward[0] + backward[0])
    if schedule in ("1f1b", "gpipe") and stages == ranks and micros >= ranks and stages * micros > 20_000:
        return _closed(micros, forward, backward, send)
    order = orders(schedule, ranks, stages, micros)
    done: dict[Action, float] = {}
    clock, at = [0.0] * ranks, [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while at[rank] < len(order[rank]):
                action = order[rank][at[rank]]
                ready = _ready(action, stages, done, send)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = done[action] = start + _takes(action, forward, backward)
                at[rank] += 1
                moved = True
    return max(clock)


def _takes(action: Action, forward: Sequence[float], backward: Sequence[float]) -> float:
    if action.kind == "F":
        return forward[action.stage]
    return backward[action.stage] * (1.0 if action.kind == "B" else 0.5)


def _ready(action: Action, stages: int, done: dict[Action, float], send: float) -> float | None:
    """When what an action needs is there; None while that is not known."""
    stage, kind, micro = action
    if kind == "F":
        return 0.0 if stage == 0 else _plus(done.get(Action(stage - 1, "F", micro)), send)
    if kind == "W":
        return done.get(Action(stage, "I", micro))
    if stage == stages - 1:
        return done.get(Action(stage, "F", micro))
    after = done.get(Action(stage + 1, "B", micro), done.get(Action(stage + 1, "I", micro)))
    return _plus(after, send)


def _plus(seconds: float | None, send: float) -> float | None:
    return None if seconds is None else seconds + send


def _closed(micros: int, forward: Sequence[float], backward: Sequence[float], send: float) -> float:
    """The same for many micro-batches: each stage once, and the slowest for all others."""
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    return sum(both) + 2 * send * (len(forward) - 1) + (micros - 1) * max(both)
