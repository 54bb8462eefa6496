"""Orders of schedules: each action once, on the rank of its stage, and never before what it needs."""

from __future__ import annotations

from collections import Counter

import pytest

from shardwise.cost.flight import most_held
from shardwise.errors import PlanError
from shardwise.parallel.schedule import Action, actions, orders
from shardwise.plan.plan import SCHEDULES

SIZES = [
    (schedule, ranks, ranks * per_rank, micro)
    for schedule in SCHEDULES
    for ranks in (1, 2, 3, 4)
    for per_rank in (1, 2, 3)
    for micro in (1, 2, 3, 4, 5, 8)
    if schedule != "1f1b" or per_rank == 1
]


def all_orders(schedule: str, ranks: int, stages: int, micro: int) -> list[list[Action]] | None:
    """What every rank does; None where the schedule is refused."""
    try:
        return [actions(schedule, rank, ranks, stages, micro) for rank in range(ranks)]
    except PlanError:
        return None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_action_happens_once_on_the_rank_of_its_stage(schedule: str) -> None:
    ran = 0
    for name, ranks, stages, micro in SIZES:
        if name != schedule or (order := all_orders(schedule, ranks, stages, micro)) is None:
            continue
        ran += 1
        for rank, mine in enumerate(order):
            assert {a.stage % ranks for a in mine} <= {rank}
        seen = Counter(a for mine in order for a in mine)
        assert set(seen.values()) == {1}
        for stage in range(stages):
            for m in range(micro):
                kinds = {a.kind for a in seen if (a.stage, a.micro) == (stage, m)}
                assert kinds in ({"F", "B"}, {"F", "I", "W"}), (stage, m, kinds)
    assert ran >= 18


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_that_block_on_what_they_need_reach_the_end(schedule: str) -> None:
    """Each rank does its actions in order and waits at one whose inputs are not there yet."""
    for name, ranks, stages, micro in SIZES:
        if name != schedule or (order := all_orders(schedule, ranks, stages, micro)) is None:
            continue
        there: set[tuple[str, int, int]] = {("F", -1, m) for m in range(micro)}
        todo = [list(mine) for mine in order]
        while any(todo):
            before = sum(map(len, todo))
            for mine in todo:
                while mine and needs(mine[0], stages) <= there:
                    stage, kind, m = mine.pop(0)
                    there |= {("G", stage, m)} if kind in "BI" else {("F", stage, m)} if kind == "F" else set()
            assert sum(map(len, todo)) < before, f"{ranks} ranks, {stages} stages, {micro} micro-batches hang"


def needs(action: Action, stages: int) -> set[tuple[str, int, int]]:
    """What has to be there: activations `F`, and gradients `G` of a stage's inputs, by stage and micro-batch."""
    stage, kind, m = action
    if kind == "F":
        return {("F", stage - 1, m)}
    own = {("F", stage, m)}
    if kind == "W":
        return own | {("G", stage, m)}
    return own | ({("G", stage + 1, m)} if stage < stages - 1 else set())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 1), (4, 1), (4, 2), (4, 3), (8, 2)])
def test_more_stages_than_micro_batches_run(schedule: str, ranks: int, micro: int) -> None:
    assert all_orders(schedule, ranks, ranks, micro) is not None


def test_one_forward_one_backward_keeps_few_activations() -> None:
    """What rank r of n holds at once is at most n − r micro-batches (Narayanan et al. 2019); gpipe holds all."""

    def most(mine: list[Action]) -> int:
        held = peak = 0
        for action in mine:
            held += 1 if action.kind == "F" else -1
            peak = max(peak, held)
        return peak

    ranks, micro = 4, 12
    assert [most(actions("1f1b", r, ranks, ranks, micro)) for r in range(ranks)] == [4, 3, 2, 1]
    assert [most(actions("gpipe", r, ranks, ranks, micro)) for r in range(ranks)] == [micro] * ranks


def test_schedules_read_as_torch_prints_them() -> None:
    assert " ".join(map(str, actions("1f1b", 0, 2, 2, 3))) == "0F0 0F1 0B0 0F2 0B1 0B2"
    assert " ".join(map(str, actions("1f1b", 1, 2, 2, 3))) == "1F0 1B0 1F1 1B1 1F2 1B2"
    assert " ".join(map(str, actions("gpipe", 0, 1, 2, 2))) == "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1"
    assert {a.kind for a in actions("zero-bubble", 0, 2, 4, 4)} >= {"F", "I", "W"}


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "micro", "message"),
    [
        ("gpipe", 2, 3, 2, "2 pipeline ranks do not divide 3 stages"),
        ("1f1b", 2, 4, 2, "there are 4 stages on 2 ranks; use schedule interleaved, zero-bubble or gpipe"),
    ],
)
def test_stages_that_do_not_fit_are_refused(schedule: str, ranks: int, stages: int, micro: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        orders(schedule, ranks, stages, micro)


@pytest.mark.parametrize(
    ("ranks", "each", "micro"), [(2, 2, 4), (2, 2, 8), (4, 2, 8), (4, 4, 16), (4, 4, 4), (3, 2, 6)]
)
def test_the_earlier_of_a_ranks_stages_hold_more(ranks: int, each: int, micro: int) -> None:
    for rank, mine in enumerate(orders("interleaved", ranks, ranks * each, micro)):
        held, ways, most = [0] * each, set[tuple[int, ...]](), 0
        for action in mine:
            held[action.stage // ranks] += 1 if action.kind == "F" else -1
            ways = {tuple(held)} | (ways if sum(held) <= most else set()) if sum(held) >= most else ways
            most = max(most, sum(held))
        first, ahead = most_held(ranks, each, micro, rank)
        assert {first, ahead} <= ways
        assert all(max(way) <= max(ahead) and min(way) <= min(first) for way in ways)
