"""Pipeline schedules: for each rank, in which order its stages go forward and backward over the micro-batches.

An action prints as torch prints it: `0F2` is stage 0 forward on micro-batch 2, `B` a backward, `I` and `W` the two
halves of a backward: gradients of inputs, then of weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from shardwise.errors import PlanError


class Action(NamedTuple):
    """One stage's work on one micro-batch."""

    stage: int
    kind: str
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


def stage_rank(stage: int, ranks: int) -> int:
    """The pipeline rank that has a stage: stages go round the ranks."""
    return stage % ranks


def actions(schedule: str, rank: int, ranks: int, stages: int, micro: int) -> list[Action]:
    """The actions of one pipeline rank.

    Raises:
        PlanError: the schedule cannot run this many stages or micro-batches.
    """
    order = orders(schedule, ranks, stages, micro)
    stuck = check(order, stages, micro)
    if stuck:
        raise PlanError(
            f"schedule {schedule} cannot run {micro} micro-batches through {stages} stages on {ranks} ranks: {stuck}; "
            f"give a multiple of {ranks} micro-batches, or use schedule gpipe"
        )
    return order[rank]


def orders(schedule: str, ranks: int, stages: int, micro: int) -> list[list[Action]]:
    """The actions of every pipeline rank.

    Raises:
        PlanError: the schedule is not made for this many stages or micro-batches.
    """
    if stages % ranks:
        raise PlanError(f"{ranks} pipeline ranks do not divide {stages} stages")
    if schedule == "gpipe":
        mine = [[s for s in range(stages) if stage_rank(s, ranks) == rank] for rank in range(ranks)]
        return [_all_forward_all_backward(own, micro) for own in mine]
    if schedule == "1f1b" and stages == ranks:
        return [_one_forward_one_backward(rank, ranks, micro) for rank in range(ranks)]
    if schedule == "1f1b":
        raise PlanError(
            f"schedule 1f1b runs one stage on each rank, but there are {stages} stages on {ranks} ranks; "
            "use schedule interleaved, zero-bubble or gpipe"
        )
    return _from_torch(schedule, ranks, stages, micro)


def check(order: Sequence[Sequence[Action]], stages: int, micro: int) -> str:
    """Run a schedule without computing anything: why it does not end well, or an empty text.

    Every stage has to go forward and backward once over each micro-batch, in order, which the ranks' channels rely on;
    and no rank may wait for what never comes.
    """
    for kinds in ("F", "BI", "BW"):
        for stage in range(stages):
            seen = [a.micro for rank in order for a in rank if a.stage == stage and a.kind in kinds]
            if seen != list(range(micro)):
                return f"stage {stage} takes micro-batches {seen} ({kinds}) and not each of {micro} in order"
    done: set[Action] = set()
    at = [0] * len(order)
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(order):
            while at[rank] < len(mine) and _ready(mine[at[rank]], done, stages):
                action = mine[at[rank]]
                done.add(action._replace(kind="I") if action.kind == "B" else action)
                at[rank] += 1
                moved = True
    waiting = [f"rank {r} waits at {mine[at[r]]}" for r, mine in enumerate(order) if at[r] < len(mine)]
    return ", ".join(waiting)


def _ready(action: Action, done: Collection[Action], stages: int) -> bool:
    stage, kind, m = action
    if kind == "F":
        return stage == 0 or Action(stage - 1, "F", m) in done
    if kind == "W":
        return Action(stage, "I", m) in done
    return Action(stage, "F", m) in done and (stage == stages - 1 or Action(stage + 1, "I", m) in done)


def _all_forward_all_backward(mine: Sequence[int], micro: int) -> list[Action]:
    return forward_only(mine, micro) + [Action(s, "B", m) for s in reversed(mine) for m in range(micro)]


def forward_only(mine: Sequence[int], micro: int) -> list[Action]:
    """The order of a rank that has stages `mine` where there is no backward."""
    return [Action(s, "F", m) for s in mine for m in range(micro)]


def _one_forward_one_backward(rank: int, ranks: int, micro: int) -> list[Action]:
    warm = min(ranks - rank - 1, micro)
    found = [Action(rank, "F", m) for m in range(warm)]
    for m in range(micro - warm):
        found += [Action(rank, "F", warm + m), Action(rank, "B", m)]
    return found + [Action(rank, "B", m) for m in range(micro - warm, micro)]


def _from_torch(schedule: str, ranks: int, stages: int, micro: int) -> list[list[Action]]:
    """The orders that torch.distributed.pipelining's schedule of this name computes."""
    from torch.distributed.pipelining import schedules

    kinds: dict[str, Any] = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    }
    stubs = [_stub(s, 0, ranks, stages) for s in range(stages) if stage_rank(s, ranks) == 0]
    maker = _order_only(kinds[schedule])
    try:
        found: dict[int, Sequence[Any]] = maker(stubs, micro).pipeline_order
    except ValueError as error:
        sizes = f"{stages} stages, {ranks} ranks, {micro} micro-batches"
        raise PlanError(f"schedule {schedule} with {sizes}: {error}") from error
    return [[_action(str(a)) for a in found[rank] if a is not None] for rank in range(ranks)]


def _action(printed: str) -> Action:
    match = _PRINTED.fullmatch(printed)
    assert match is not None, printed
    return Action(int(match[1]), match[2], int(match[3]))


_PRINTED = re.compile(r"(\d+)([FBIW])(\d+)")


def _stub(stage: int, rank: int, ranks: int, stages: int) -> Any:
    return SimpleNamespace(
        group_rank=rank, group_size=ranks, num_stages=stages, stage_index=stage, has_backward=True, is_first=stage == 0,
        is_last=stage == stages - 1, device="cpu", group=None, submod=None, stage_index_to_group_rank={},
        _has_backward=True,
    )  # fmt: skip


def _order_only(kind: Any) -> Any:
    """A schedule class that computes its order and none of its communication."""

    class OrderOnly(kind):  # type: ignore[misc]
        def _prepare_schedule_with_comms(self, *args: Any, **kwargs: Any) -> None:
            return None

        def __init__(self, stages: Any, micro: int) -> None:
            super().__init__(stages, micro, loss_fn=None)

    return OrderOnly
