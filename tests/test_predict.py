"""`sw.predict` against a loop over the plain module in evaluation mode, for every kind of plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Subset

import shardwise as sw
from shardwise.errors import PlanError
from shardwise.graph.capture import caller
from shardwise.graph.eager import Lifted
from shardwise.graph.output import taken_apart
from shardwise.job import Job, lift
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import apart, cuts, data, pipeline, tensor
from tests.pool import Pool
from tests.weights import several_files
from tests.zoo import hf, plain

COUNT = 21
"""Samples of a proof: two chunks of 8 and one of 5."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
FEW = (plain.qkv_attention, plain.convnet_bn)
"""Of all models, which `make prove` tries, those unlike each other."""


def on_one_device(job: Job, dtype: torch.dtype) -> list[Any]:
    """What a loop over the module gives, chunk by chunk."""
    module = lift(job.build(), dtype).eval()
    call, samples, size = caller(module), job.samples() or 0, job.global_batch
    # Some models make float32 of what they are given.
    with torch.inference_mode(), Lifted(dtype):
        chunks = [range(start, min(start + size, samples)) for start in range(0, samples, size)]
        return [call(lift(job.batch(chunk), dtype)) for chunk in chunks]


def worst(found: list[Any], expected: list[Any]) -> float:
    """The largest relative difference; infinite where the structure or the number of chunks is another."""
    if len(found) != len(expected):
        return float("inf")
    errors = [0.0]
    for a, b in zip(found, expected, strict=True):
        (form, tensors), (wanted, true) = taken_apart(a), taken_apart(b)
        if form != wanted or [t.shape for t in tensors] != [t.shape for t in true]:
            return float("inf")
        errors += [apart(x.double(), y.double(), 1e-6) for x, y in zip(tensors, true, strict=True)]
    return max(errors)


def compare(job: Job, plans: dict[str, Plan], dtype: torch.dtype) -> dict[str, float | str]:
    """On every rank of a pool: how far each plan's outputs are from one device's, on rank 0."""
    warnings.simplefilter("ignore")
    job = job.with_(data=Subset(job.data, range(COUNT)))
    found: dict[str, float | str] = {}
    for name, plan in plans.items():
        try:
            outputs = list(sw.predict(job, None, plan, dtype=dtype))
        except PlanError as error:
            if "samples are coupled" not in str(error):
                found[name] = str(error)
                continue
            outputs = list(sw.predict(job, None, plan.with_(micro_batches=1), dtype=dtype))
        if dist.get_rank() == 0:
            found[name] = worst(outputs, on_one_device(job, dtype))
        else:
            found[name] = float(len(outputs))
    return found


def two(job: Job) -> dict[str, Plan]:
    return {
        "data": Plan((data(),)),
        "tensor": Plan((tensor(),)),
        "pipeline": Plan((pipeline(),), cuts(job, 2), micro_batches=2),
    }


def four(job: Job) -> dict[str, Plan]:
    return {
        "pipeline x data": Plan((pipeline(), data()), cuts(job, 2)),
        "data x tensor": Plan((data(), tensor()), micro_batches=2),
        "pipeline x tensor": Plan((pipeline(), tensor()), cuts(job, 2), micro_batches=3),
    }


def check(found: list[dict[str, float | str]], dtype: torch.dtype = torch.float64) -> None:
    for name, error in found[0].items():
        assert isinstance(error, float), error
        assert error <= TOLERANCE[dtype], (name, error)
    assert all(count == 0.0 for each in found[1:] for count in each.values()), "another rank than 0 got outputs"


@pytest.mark.slow
@pytest.mark.parametrize("model", FEW, ids=lambda m: m.__name__)
def test_two_ranks_give_what_one_device_gives(pool: Pool, model: Callable[[], Job]) -> None:
    check(pool(2).run(compare, model(), two(model()), torch.float64, timeout=200))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(plain.qkv_attention, marks=pytest.mark.slow),
        pytest.param(hf.llama, marks=pytest.mark.prove),
        pytest.param(hf.t5, marks=pytest.mark.prove),
    ],
    ids=lambda m: m.__name__,
)
def test_four_ranks_give_what_one_device_gives(pool: Pool, model: Callable[[], Job]) -> None:
    check(pool(4).run(compare, model(), four(model()), torch.float64, timeout=250))


@pytest.mark.prove
def test_eight_ranks_over_three_axes(pool: Pool) -> None:
    job = plain.qkv_attention()
    plan = Plan((pipeline(), data(), tensor()), cuts(job, 2), micro_batches=2)
    check(pool(8).run(compare, job, {"all": plan}, torch.float64, timeout=250))


@pytest.mark.prove
@pytest.mark.parametrize("model", [plain.unet], ids=lambda m: m.__name__)
def test_float32_is_as_near(pool: Pool, model: Callable[[], Job]) -> None:
    check(pool(2).run(compare, model(), two(model()), torch.float32, timeout=200), torch.float32)


@pytest.mark.slow
def test_weights_from_files_predict_as_on_one_device(pool: Pool, tmp_path: Path) -> None:
    job = plain.tied_lm()
    job = job.with_(weights=several_files(job, tmp_path))
    check(pool(2).run(compare, job, two(job), torch.float64, timeout=200))


@pytest.mark.slow
def test_other_dims_are_split(pool: Pool) -> None:
    job = plain.qkv_attention()
    plans = {
        "sequence": Plan((tensor("heads*", "sequence*"),)),
        "batch within a replica": Plan((PlanAxis("both", 2, ("heads*", "batch")),), micro_batches=2),
        "stages go round": Plan((pipeline(),), cuts(job, 4), micro_batches=2, schedule="interleaved"),
        "more micro-batches than samples": Plan((tensor(),), micro_batches=6),
    }
    check(pool(2).run(compare, job, plans, torch.float64, timeout=200))


@pytest.mark.prove
@pytest.mark.parametrize("model", [*plain.MODELS, *hf.MODELS], ids=lambda m: m.__name__)
def test_every_model_predicts_by_every_plan(pool: Pool, model: Callable[[], Job]) -> None:
    job = model()
    found = pool(2).run(compare, job, two(job), torch.float64, timeout=250)
    if "fixes its batch" in str(found[0].get("tensor")):
        found = [{name: error for name, error in each.items() if name == "data"} for each in found]
    check(found)
