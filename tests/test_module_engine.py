"""Models that do not capture run as they are, split by samples or by layers, and compute what one device computes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.errors import CaptureError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Errors, outcome
from tests.pool import Pool
from tests.zoo.plain import sgd

CLASSES, TOKENS = 7, 6


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Sequences with labels of which ever more are ignored; of the last ones in a batch of eight, all."""

    def __init__(self, count: int = 64) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, TOKENS, 8, generator=draw)
        self.y = torch.randint(0, CLASSES, (count, TOKENS), generator=draw)
        for i in range(count):
            self.y[i, max(0, TOKENS - 2 * (i % 8)) :] = -100

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Layer(nn.Module):
    """Asks for a number of its weights, which a trace does not know."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, out)

    def forward(self, x: Tensor) -> Tensor:
        if float(self.linear.weight.detach().abs().sum()) < 0:
            return x
        return torch.tanh(self.linear(x))


def model() -> nn.Module:
    return nn.Sequential(Layer(8, 16), Layer(16, 16), nn.Dropout(0.2), Layer(16, 16), nn.Linear(16, CLASSES))


def plain(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def by_class(output: Tensor, batch: Any) -> Tensor:
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=output.dtype)
    return nn.CrossEntropyLoss(weight)(output.transpose(1, 2), batch[1])


def likelihood(output: Tensor, batch: Any) -> Tensor:
    return F.nll_loss(output.log_softmax(-1).flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def counted(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten(), reduction="sum"), (batch[1] >= 0).sum()


LOSSES = {"cross_entropy": plain, "weighted": by_class, "nll": likelihood, "counted": counted}
PLANS = {
    "data": Plan((PlanAxis("data", 2, ("batch",)),)),
    "accumulated": Plan((PlanAxis("data", 2, ("batch",)),), micro_batches=2),
    "sharded": Plan((PlanAxis("data", 2, ("batch",)),), zero=3),
    "pipeline": Plan((PlanAxis("pipeline", 2),), ("3",), micro_batches=4),
}


def job(loss: Any, batch: int = 8) -> Job:
    return Job(model=model, data=Labelled(), loss=loss, optimizer=partial(sgd), global_batch=batch)


def test_the_model_does_not_capture() -> None:
    with pytest.raises(CaptureError):
        Graph.of(job(plain))


CASES = [
    pytest.param(loss, way, marks=[pytest.mark.prove] if loss != "cross_entropy" and way != "data" else [])
    for loss in LOSSES
    for way in PLANS
]


@pytest.mark.parametrize(("loss", "way"), CASES)
def test_a_mean_over_labels_is_one_of_the_whole_batch(pool: Pool, loss: str, way: str) -> None:
    # The second rank has fewer labels than the first, and the last micro-batch none at all.
    for errors in pool(2).run(outcome, job(LOSSES[loss]), PLANS[way], 2, timeout=60):
        assert isinstance(errors, Errors), errors
        assert errors.worst < 1e-9, errors
        assert errors.traffic == ""


@pytest.mark.parametrize("shares", [(), (1, 2)])
def test_batches_that_do_not_divide(pool: Pool, shares: tuple[int, ...]) -> None:
    for errors in pool(2).run(outcome, job(plain, 7), Plan((PlanAxis("data", 2, ("batch",), shares),)), 2, timeout=60):
        assert isinstance(errors, Errors), errors
        assert errors.worst < 1e-9, errors
