"""A user's mistakes on live ranks: one clear message with fact, numbers and remedy, and the ranks go on."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.engine.engine import parallelize
from shardwise.errors import JobError, PlanError, UserError
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Pool, compare, data, pipeline, tensor
from tests.test_optimize import Unit
from tests.zoo.data import Images, Vectors
from tests.zoo.plain import ConvNet, class_loss, sgd

pytestmark = pytest.mark.slow


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def job(**changes: Any) -> Job:
    given = {"model": layers, "data": Vectors(classes=8), "loss": class_loss, "optimizer": sgd, "global_batch": 8}
    return Job(**{**given, **changes})


def step(job: Job, plan: Plan, samples: int) -> float:
    return parallelize(job, plan).step(job.batch(range(samples)))


def squared(output: Tensor, batch: Any) -> Tensor:
    return output.square()


def convolved() -> Job:
    return job(model=partial(ConvNet, classes=8), data=Images(classes=8))


DATA = Plan((data(),))
MISTAKES: dict[str, tuple[Job, Plan, int, type[UserError], str]] = {
    "ranks": (job(), Plan((data(4),)), 8, PlanError, "the plan is for 4 ranks (data 4), but 2 are running; start"),
    "model": (
        job(), DATA.with_(model="0123456789ab"), 8, PlanError,
        r"the plan is for model 0123456789ab, but this one is ",
    ),
    "batch": (
        job(), DATA.with_(micro_batches=2), 3, PlanError,
        "a batch of 3 samples cannot be cut into 4 parts (2 micro-batches on 2 data ranks); give at least 4 samples",
    ),
    "dim": (job(), Plan((tensor("depth*", "deep"),)), 8, PlanError, "axis tensor splits dim 'deep', but the model"),
    "operator": (
        job(), Plan((pipeline(),), ("conv2d.0",)), 8, PlanError, "the plan cuts before 'conv2d.0', but the model"
    ),
    "coupled": (
        convolved(), Plan((pipeline(),), ("conv2d.2",), micro_batches=2), 8, PlanError,
        "takes statistics over the whole batch, which micro-batches would change; use one micro-batch, or",
    ),
    "optimizer": (job(optimizer=Unit), DATA.with_(zero=1), 8, PlanError, "the optimizer couples the entries"),
    "no optimizer": (job(optimizer=lambda params: None), DATA, 8, JobError, "must return a torch Optimizer, but"),
    "loss": (job(loss=squared), DATA, 8, JobError, "loss must be a scalar tensor or (sum, count), but is"),
    "no parameters": (job(model=nn.ReLU), DATA, 8, JobError, "ReLU has no parameters, so there is nothing to train"),
    "too few samples": (
        job(data=Vectors(classes=8, count=4)), DATA, 8, JobError, "the dataset has 4 samples, but sample 7 is needed"
    ),
    "no samples": (job(data=Vectors(classes=8, count=0)), DATA, 8, JobError, "the dataset has 0 samples, but sample"),
    "ragged": (
        job(collate=lambda rows: (torch.zeros(4, 16), torch.zeros(5, dtype=torch.int64))), DATA, 8, JobError,
        "every tensor of a batch must have the samples as its first dim, but the first dims are [4, 5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_once_and_the_ranks_go_on(pool: Pool, name: str) -> None:
    wrong, plan, samples, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=re.escape(message)) as error:
        pool(2).run(step, wrong, plan, samples, timeout=60)
    assert error.value.exit_status == 2
    assert "Traceback" not in str(error.value)
    assert pool(2).usable


def test_an_optimizer_that_couples_entries_runs_where_parameters_are_whole(pool: Pool) -> None:
    for errors in pool(2).run(compare, job(optimizer=Unit), DATA):
        assert errors.worst < 1e-9


class Sized(nn.Module):
    """A model that was written for one batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.zeros(8, 8)  # type: ignore[no-any-return]


def test_a_model_that_fixes_its_batch_is_not_cut_along_it(pool: Pool) -> None:
    fixed = job(model=Sized)
    with pytest.raises(PlanError, match=r"fixes its batch at 8 samples .*write the model with tensor.shape\[0\]"):
        pool(2).run(step, fixed, DATA, 8)
    for errors in pool(2).run(compare, fixed, Plan((PlanAxis("tensor", 2, ("width*", "classes*")),))):
        assert errors.worst < 1e-9
    with pytest.raises(PlanError, match="the model fixes its batch at 8 samples, but a batch has 6"):
        pool(2).run(step, fixed, Plan((PlanAxis("tensor", 2, ("width*", "classes*")),)), 6)


def test_a_dataset_of_tensors_is_enough(pool: Pool) -> None:
    plain = job(data=TensorDataset(torch.randn(16, 16), torch.arange(16) % 8))
    first, second = pool(2).run(step, plain, DATA, 8)
    assert first == second
