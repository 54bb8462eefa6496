"""Masks drawn by each rank: as many kept as should be, others where ranks hold other parts, the same where copies."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.job import Job
from shardwise.parallel import lower
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Pool, data

DROPPED = 0.3
SAMPLES, WIDTH, HIDDEN = 16, 64, 128
TENSOR = PlanAxis("tensor", 2, ("width#2",))


class Net(nn.Module):
    """Dropout of what every tensor rank has, of what it has a part of, and of what has no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(DROPPED)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.drop(x + 2 + 0 * self.bias)
        cut = self.drop(self.first(whole).sigmoid())
        return self.second(cut) + self.drop(self.bias)  # type: ignore[no-any-return]


def job() -> Job:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(*(torch.rand(64, WIDTH, generator=generator) for _ in range(2)))

    def loss(output: Tensor, batch: Any) -> Tensor:
        return ((output - batch[1]) ** 2).mean()

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)

    return Job(model=model, data=rows, loss=loss, optimizer=sgd, global_batch=SAMPLES)


def masks(plan: Plan, steps: int = 1) -> list[list[Tensor]]:
    """For each of the three dropouts what it multiplied by, in every forward pass of this rank, in order."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    seen: dict[int, list[Tensor]] = {}
    plain = lower.dropout_per_rank

    def watched(x: Tensor, p: float, op: int, key: int, part: int, first: int) -> Tensor:
        found = plain(x, p, op, key, part, first)
        seen.setdefault(op, []).append((found / x).detach())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "dropout_per_rank", watched)
        engine = parallelize(job(), plan.with_(dropout="per-rank"), dtype=torch.float64)
        for n in range(steps):
            engine.step(job().batch(range(SAMPLES * n, SAMPLES * (n + 1))))
    return [seen[op] for op in sorted(seen)]


@pytest.mark.slow
def test_as_many_are_kept_as_should_be_and_they_are_scaled(pool: Pool) -> None:
    for rank in pool(2).run(masks, Plan((data(),)), 4):
        for found in rank:
            values = torch.cat([m.flatten() for m in found])
            kept = values[values != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - DROPPED)))
            # Five standard deviations of a binomial.
            margin = 5 * math.sqrt(DROPPED * (1 - DROPPED) / len(values))
            assert len(kept) / len(values) == pytest.approx(1 - DROPPED, abs=margin)


@pytest.mark.slow
def test_ranks_with_other_samples_drop_others_and_copies_drop_the_same(pool: Pool) -> None:
    first, second = pool(2).run(masks, Plan((data(),)))
    for a, b in zip(first[:2], second[:2], strict=True):
        assert _alike(a[0], b[0]) == pytest.approx(_by_chance(), abs=0.1)
    # What has no samples is on both.
    assert torch.equal(first[2][0], second[2][0])


@pytest.mark.slow
def test_tensor_ranks_drop_the_same_of_copies_and_others_of_parts(pool: Pool) -> None:
    first, second = pool(2).run(masks, Plan((TENSOR,)))
    assert first[1][0].shape == (SAMPLES, HIDDEN // 2), "the plan cuts what the second dropout takes"
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[2][0], second[2][0])
    assert _alike(first[1][0], second[1][0]) == pytest.approx(_by_chance(), abs=0.1)


@pytest.mark.slow
def test_steps_and_micro_batches_drop_others(pool: Pool) -> None:
    (found,) = pool(1).run(masks, Plan(micro_batches=2), 2)
    for passes in found[:2]:
        assert len(passes) == 4
        for i, j in ((0, 1), (0, 2), (1, 3)):
            assert _alike(passes[i], passes[j]) == pytest.approx(_by_chance(), abs=0.1)
    # What has no samples is there once in a step, and so dropped once.
    one, same, two, also = found[2]
    assert torch.equal(one, same) and torch.equal(two, also) and not torch.equal(one, two)


@pytest.mark.slow
def test_a_run_can_be_repeated_and_recomputed(pool: Pool) -> None:
    ((first,), (second,), (again,)) = (
        pool(1).run(masks, plan) for plan in (Plan(), Plan(), Plan(recompute=("drop", "first")))
    )
    for a, b, twice in zip(first, second, again, strict=True):
        assert torch.equal(a[0], b[0])
        assert len(twice) == 2 and torch.equal(twice[0], a[0]) and torch.equal(twice[1], a[0])


def _by_chance() -> float:
    """How many places two independent masks agree in."""
    return DROPPED**2 + (1 - DROPPED) ** 2


def _alike(a: Tensor, b: Tensor) -> float:
    return float(((a == 0) == (b == 0)).double().mean())
