"""Pipeline schedules: for each rank, in which order its stages go forward and backward over the micro-batches.

An action prints as torch prints it: `0F2` is stage 0 forward on micro-batch 2, `B` a backward, `I` and `W` the two
halves of a backward: gradients of inputs, then of weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    if stages % ranks:
        raise PlanError(f"{ranks} pipeline ranks do not divide {stages} stages")
    if schedule == "gpipe":
        mine = [s for s in range(stages) if stage_rank(s, ranks) == rank]
        return forward_only(mine, micro) + [Action(s, "B", m) for s in reversed(mine) for m in range(micro)]
    if schedule == "1f1b" and stages == ranks:
        return _one_forward_one_backward(rank, ranks, micro)
    if schedule == "1f1b":
        raise PlanError(
            f"schedule 1f1b runs one stage on each rank, but there are {stages} stages on {ranks} ranks; "
            "use schedule interleaved, zero-bubble or gpipe"
        )
    return _from_torch(schedule, rank, ranks, stages, micro)


def forward_only(mine: Sequence[int], micro: int) -> list[Action]:
    """The order of a rank that has stages `mine` where there is no backward."""
    return [Action(s, "F", m) for s in mine for m in range(micro)]


def _one_forward_one_backward(rank: int, ranks: int, micro: int) -> list[Action]:
    warm = min(ranks - rank - 1, micro)
    found = [Action(rank, "F", m) for m in range(warm)]
    for m in range(micro - warm):
        found += [Action(rank, "F", warm + m), Action(rank, "B", m)]
    return found + [Action(rank, "B", m) for m in range(micro - warm, micro)]


def _from_torch(schedule: str, rank: int, ranks: int, stages: int, micro: int) -> list[Action]:
    """The order that torch.distributed.pipelining's schedule of this name computes."""
    from torch.distributed.pipelining import schedules

    kinds: dict[str, Any] = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    }
    stubs = [_stub(s, rank, ranks, stages) for s in range(stages) if stage_rank(s, ranks) == rank]
    maker = _order_only(kinds[schedule])
    try:
        order: Sequence[Any] = maker(stubs, micro).pipeline_order[rank]
    except ValueError as error:
        sizes = f"{stages} stages, {ranks} ranks, {micro} micro-batches"
        raise PlanError(f"schedule {schedule} with {sizes}: {error}") from error
    found = [_PRINTED.fullmatch(str(a)) for a in order if a is not None]
    return [Action(int(m[1]), m[2], int(m[3])) for m in found if m is not None]


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
