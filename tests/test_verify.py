"""Verify: the proof passes where a split is right, fails where it is not, and says what it did."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from shardwise.cli import main
from shardwise.errors import JobError, ProofError
from shardwise.job import Job
from shardwise.measure.compare import compare, relative
from shardwise.measure.reference import Trace
from shardwise.measure.verify import Row, verify
from shardwise.plan.plan import Plan, PlanAxis
from tests.pool import Pool
from tests.zoo import ZOO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AMONG_TESTS = [
    "gpt2_dropout", "llama", "resnet", "lstm_tagger", "moe_mlp", "big_embedding_mlp"
]  # fmt: skip
"""Models of every kind; all of them are proved by `make prove`."""


class Unseeded(Dataset[Any]):
    """Samples of a generator of its own, others whenever they are read."""

    def __init__(self) -> None:
        self.draw = torch.Generator()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.randn(16, generator=self.draw), torch.tensor(index % 8)


def passing(rows: list[Row]) -> dict[str, bool]:
    return {row.strategy: row.passed for row in rows if row.applicable}


@pytest.mark.parametrize("name", AMONG_TESTS)
def test_every_strategy_computes_what_one_device_computes(name: str, pool: Pool) -> None:
    rows = verify(ZOO[name](), 2, steps=2, pool=pool)
    assert passing(rows) == {"data": True, "sharded": True, "tensor": True, "pipeline": True}, rows
    assert [(row.strategy, row.applicable) for row in rows][-1] == ("hybrid", False)


@pytest.mark.parametrize(
    ("name", "ranks", "axes"), [pytest.param("bert_dropout", 4, 2, marks=pytest.mark.prove), ("tied_lm", 8, 3)]
)
def test_hybrids_compute_what_one_device_computes(name: str, ranks: int, axes: int, pool: Pool) -> None:
    (row,) = verify(ZOO[name](), ranks, strategies=["hybrid"], steps=2, pool=pool)
    assert row.passed and row.plan is not None, row
    assert len(row.plan.axes) == axes


def test_float32_takes_steps_of_plain_sgd(pool: Pool) -> None:
    rows = verify(ZOO["qkv_attention"](), 2, strategies=["data", "tensor"], dtype=torch.float32, steps=2, pool=pool)
    assert passing(rows) == {"data": True, "tensor": True}, rows
    assert all(row.param_error and row.param_error > 1e-12 for row in rows), "these are float32's errors, not float64's"


def wrong_mean(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss that depends on which rank computes it."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.nn.functional.cross_entropy(output, batch[1]) * (1 + rank)


def test_a_run_that_differs_between_ranks_does_not_pass() -> None:
    job = ZOO["sum_count_mlp"]().with_(loss=wrong_mean)
    (row,) = verify(job, 2, strategies=["data"], steps=1)
    assert row.applicable and not row.passed and not row.unclear
    assert row.grad_error is not None and row.grad_error > 0.1
    assert row.rounding is not None and 0 < row.rounding < 1e-12


def steep_loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss that turns a difference in the last bit into one in the sixth digit."""
    return (1e9 * output).sin().mean()


def test_what_rounding_decides_is_neither_passed_nor_failed() -> None:
    job = ZOO["sum_count_mlp"]().with_(loss=steep_loss)
    (row,) = verify(job, 2, strategies=["tensor"], steps=1)
    assert row.unclear and not row.passed, row
    assert row.grad_error is not None and row.rounding is not None
    assert 1e-9 < row.grad_error < 10 * row.rounding


def test_what_is_no_number_is_infinitely_far_off() -> None:
    true = Trace([1.0, 1.0], [1.0, 1.0], [{"a": torch.ones(2), "b": torch.ones(2)}] * 2, {"a": torch.ones(2)})
    assert compare(true, true) == ((0.0, 0.0, 0.0), "a")
    wrong = replace(true, grads=[true.grads[0], {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}])
    assert compare(wrong, true) == ((0.0, math.inf, 0.0), "b")
    assert compare(replace(true, losses=[1.0, math.nan]), true)[0].loss == math.inf


def test_more_plans_get_rows_of_their_own() -> None:
    plans = {"mine": Plan((PlanAxis("data", 2, ("batch",)),), zero=2), "unfit": Plan((PlanAxis("t", 2, ("nosuch",)),))}
    rows = verify(ZOO["sum_count_mlp"](), 2, strategies=[], plans=plans, steps=1)
    assert [(row.strategy, row.passed) for row in rows] == [("mine", True), ("unfit", False)]
    assert not rows[1].applicable and "nosuch" in rows[1].reason


def test_command_prints_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "tests.zoo.plain:sum_count_mlp"
    assert main(["verify", spec, "--ranks", "2", "--strategies", "data,hybrid", "--steps", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = {
        "strategy", "plan", "applicable", "reason", "loss_error", "grad_error", "param_error",
        "collectives_announced", "collectives_recorded", "passed", "worst", "unclear", "rounding",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in rows)
    data, hybrid = rows
    assert data["passed"] and data["grad_error"] < 1e-12
    assert data["collectives_recorded"] == data["collectives_announced"] != []
    assert Plan.parse(data["plan"]).title() == "data 2"
    assert not hybrid["applicable"] and "2 ranks" in hybrid["reason"]


def test_errors_are_relative_to_the_tensor_or_to_all() -> None:
    one = torch.ones(4)
    assert relative(one, one, 1.0) == 0.0
    assert relative(one * 1.5, one, 1.0) == pytest.approx(0.5)
    assert relative(torch.full((4,), 1e-9), torch.zeros(4), 1.0) == pytest.approx(2e-3)
    assert relative(torch.ones(3), one, 1.0) == float("inf")
    assert relative(one * torch.nan, one, 1.0) == float("inf")
    assert Trace().losses == []


def test_what_cannot_be_proved_is_said() -> None:
    job: Job = ZOO["sum_count_mlp"]()
    with pytest.raises(ProofError, match="float64 or float32"):
        verify(job, 2, dtype=torch.bfloat16)
    with pytest.raises(JobError, match="samples"):
        verify(job.with_(global_batch=10**7), 2)
    with pytest.raises(ProofError, match="other numbers when its first 8 samples were read again"):
        verify(job.with_(global_batch=8, data=Unseeded()), 2)
