"""Pipeline schedules: none waits for ever, and zero-bubble leaves the gradients of parameters to the second half."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.errors import PlanError
from shardwise.job import Job
from shardwise.parallel import channels
from shardwise.parallel.defer import Tape
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.schedule import Action, actions, check, orders
from shardwise.plan.plan import SCHEDULES, Plan
from tests.conftest import Pool, compare, cuts, data, pipeline, tensor
from tests.zoo import ZOO
from tests.zoo.data import Vectors
from tests.zoo.plain import class_loss

SIZES = [
    (schedule, ranks, each, micro)
    for schedule, ranks, each, micro in product(SCHEDULES, (2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 5, 6, 8))
]


def test_every_schedule_ends_or_is_refused() -> None:
    """Also where there are fewer micro-batches than stages."""
    ended, refused = 0, {}
    for schedule, ranks, each, micro in SIZES:
        try:
            order = orders(schedule, ranks, ranks * each, micro)
        except PlanError as error:
            refused[schedule, each] = str(error)
            continue
        assert check(order, ranks * each, micro) == "", (schedule, ranks, each, micro)
        ended += 1
    assert ended > len(SIZES) // 2
    for (schedule, each), message in refused.items():
        assert "multiple" in message or (schedule == "1f1b" and each > 1)


def test_a_rank_that_waits_for_ever_is_named() -> None:
    first = [Action(0, "F", 0), Action(0, "B", 0), Action(0, "F", 1), Action(0, "B", 1)]
    second = [Action(1, "F", 0), Action(1, "F", 1), Action(1, "B", 0), Action(1, "B", 1)]
    assert check([first, second], 2, 2) == "rank 0 waits at 0B0, rank 1 waits at 1F1"


@pytest.mark.parametrize("kind", ["F", "B"])
def test_micro_batches_out_of_order_are_found(kind: str) -> None:
    """Channels without tags tell the tensors of two micro-batches apart by their order alone."""
    order = orders("gpipe", 2, 2, 3)
    at = [i for i, a in enumerate(order[1]) if a.kind == kind]
    order[1][at[0]], order[1][at[1]] = order[1][at[1]], order[1][at[0]]
    assert check(order, 2, 3).startswith("stage 1 takes micro-batches [1, 0, 2]")


def test_a_stuck_schedule_is_a_plan_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.parallel.schedule.check", lambda *given: "rank 1 waits at 1F1")
    with pytest.raises(PlanError, match="cannot run 2 micro-batches through 2 stages on 2 ranks: rank 1 waits"):
        actions("gpipe", 0, 2, 2, 2)


@pytest.mark.parametrize("change", [{"zero": 3}, {"recompute": ("*",)}])
def test_zero_bubble_refuses_what_it_would_undo(change: dict[str, object]) -> None:
    plan = Plan((pipeline(), data()), ("linear.1",), micro_batches=2)
    with pytest.raises(PlanError, match="zero-bubble"):
        plan.with_(schedule="zero-bubble", **change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "stages", "micro"),
    [("zero-bubble", 2, 4), ("zero-bubble", 4, 1), ("interleaved", 4, 1), ("gpipe", 4, 2), ("1f1b", 2, 1)],
)
@pytest.mark.parametrize("name", ["t5", "skip_regressor"])
def test_schedules_compute_what_one_device_does(pool: Pool, name: str, schedule: str, stages: int, micro: int) -> None:
    job = ZOO[name]()
    plan = Plan((pipeline(),), cuts(job, stages), micro_batches=micro, schedule=schedule)
    for found in pool(2).run(compare, job, plan):
        assert found.worst < 1e-12, found


def in_order_alone(patch: pytest.MonkeyPatch) -> None:
    """Messages as NCCL knows them: without tags, the n-th that is sent is the n-th that is received."""
    patch.setattr(channels, "has_tags", lambda device: False)
    patch.setattr(channels.Channels, "_tag", lambda *given: 0)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 2), ("gpipe", 4), ("interleaved", 4), ("zero-bubble", 4)])
def test_channels_need_no_tags(pool: Pool, schedule: str, stages: int) -> None:
    job = ZOO["skip_regressor"]()
    plan = Plan((pipeline(),), cuts(job, stages), micro_batches=4, schedule=schedule)
    for found in pool(2).run(compare, job, plan, 2, (), in_order_alone):
        assert found.worst < 1e-12, found


def halves(name: str, plan: Plan) -> list[tuple[str, int]]:
    """What each half of backward changed on this rank: its kind and how many parameters got another gradient."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    job = ZOO[name]()
    engine = parallelize(job, plan, dtype=torch.float64)
    params = list(engine.model.params.values())
    seen: list[tuple[str, int]] = []

    def versions() -> list[object]:
        return [None if p.grad is None else (p.grad.data_ptr(), p.grad._version) for p in params]

    with pytest.MonkeyPatch.context() as patch:
        for label, owner, method in [("input", Pipeline, "_backward"), ("weight", Tape, "play")]:
            plain = getattr(owner, method)

            def watched(*given: object, _plain: object = plain, _label: str = label, **more: object) -> None:
                before = versions()
                _plain(*given, **more)  # type: ignore[operator]
                seen.append((_label, sum(a != b for a, b in zip(before, versions(), strict=True))))

            patch.setattr(owner, method, watched)
        engine.forward_backward(job.batch(range(job.global_batch)))
    return [*seen, ("all", len(params))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied_lm", "lstm_tagger"])
def test_zero_bubble_defers_every_gradient_of_parameters(pool: Pool, name: str) -> None:
    plan = Plan((pipeline(),), cuts(ZOO[name](), 2), micro_batches=4, schedule="zero-bubble")
    for seen in pool(2).run(halves, name, plan):
        count = dict(seen)["all"]
        assert [changed for half, changed in seen if half == "input"] == [0] * 4
        assert [changed for half, changed in seen if half == "weight"] == [count] * 4


class Backwards(TorchDispatchMode):
    """Counts the operators that are some operator's backward, but for those that compute what they are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "backward" in name and "convolution" not in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Several(nn.Module):
    """Layers whose backward gives the gradients of what came in and of weights in one go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 128), nn.Linear(32, 8)
        self.norm, self.recurrent, self.bend = nn.LayerNorm(32), nn.LSTM(32, 32, batch_first=True), nn.PReLU(32)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(self.norm(self.up(x).view(-1, 4, 32)))[0]
        return self.head(self.bend(states[:, -1]))  # type: ignore[no-any-return]


def backwards(job: Job, plan: Plan) -> Counter[str]:
    from shardwise.engine.engine import parallelize

    engine = parallelize(job, plan)
    with Backwards() as counted:
        engine.forward_backward(job.batch(range(job.global_batch)))
    return counted.seen


def test_zero_bubble_computes_no_backward_twice(pool: Pool) -> None:
    job = Job(model=Several, data=Vectors(classes=8), loss=class_loss, global_batch=8)
    plan = Plan((pipeline(),), ("layer_norm.0",), micro_batches=2)
    whole, halves = (pool(2).run(backwards, job, plan.with_(schedule=schedule)) for schedule in ("1f1b", "zero-bubble"))
    assert whole == halves
    for backward in ("rnn_layer", "layer_norm", "prelu"):
        assert any(backward in op for op in whole[1]), whole


class Repeated(nn.Module):
    """A table that is repeated for each sample, so that its copy has a place for all of them and nothing of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8, 8))
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.up(x).view(-1, 1, 8)
        mixed = torch.bmm(queries, self.table.tanh().repeat(x.shape[0], 1, 1))
        return self.head(mixed.view(x.shape[0], 32))  # type: ignore[no-any-return]


@pytest.mark.parametrize("axis", ["pipeline", "tensor"])
def test_what_is_repeated_for_each_sample_is_whole_in_every_micro_batch(pool: Pool, axis: str) -> None:
    job = Job(model=Repeated, data=Vectors(classes=8), loss=class_loss, global_batch=8)
    plans = {
        "pipeline": Plan((pipeline(),), ("bmm.0",), micro_batches=4),
        "tensor": Plan((tensor("width#4", "width#2"),), micro_batches=4),
    }
    for errors in pool(2).run(compare, job, plans[axis], timeout=100):
        assert errors.worst < 1e-9 and errors.traffic == "", errors
