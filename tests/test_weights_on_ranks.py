"""Ranks whose weights are in files: each reads what it stores, and they compute what one device does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.weights import peak, plans, stack
from shardwise.engine.engine import GraphEngine, parallelize
from shardwise.engine.launch import Ranks, joined
from shardwise.engine.train import train
from shardwise.job import Job
from shardwise.plan.plan import Plan
from shardwise.weights.files import WeightFiles
from shardwise.weights.save import save_weights
from tests.conftest import cuts, data, outcome, pipeline, tensor
from tests.pool import Pool
from tests.weights import one_file, several_files, small_job
from tests.zoo import ZOO

PLANS = {
    "tensor": Plan(axes=(tensor(),)),
    "zero1": Plan(axes=(data(),), zero=1),
    "zero3": Plan(axes=(data(),), zero=3),
    "zero3 x tensor": Plan(axes=(data(), tensor()), zero=3),
    "zero2 x tensor": Plan(axes=(data(), tensor()), zero=2),
    "tensor x4": Plan(axes=(tensor(size=4),)),
}


def _stages(job: Job, **rest: object) -> Plan:
    return Plan(axes=(pipeline(), data()), cuts=cuts(job, 2), micro_batches=2, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        pytest.param("tied_lm", several_files, marks=pytest.mark.slow),
        pytest.param("gpt2", one_file, marks=pytest.mark.prove),
        pytest.param("llama", several_files, marks=pytest.mark.prove),
        pytest.param("convnet_bn", one_file, marks=pytest.mark.prove),
        pytest.param("moe_mlp", one_file, marks=pytest.mark.prove),
        pytest.param("frozen_lm", one_file, marks=pytest.mark.prove),
    ],
)
def test_ranks_compute_what_one_device_does_with_the_file(
    name: str, files: Callable[[Job, Path], Path], tmp_path: Path, pool: Pool
) -> None:
    job = ZOO[name]()
    job = job.with_(weights=files(job, tmp_path))
    ran = 0
    tried = {**PLANS, "pipeline x data": _stages(job), "pipeline x zero1": _stages(job, zero=1)}
    for title, plan in tried.items():
        found = pool(plan.ranks).run(outcome, job, plan, timeout=250)[0]
        if isinstance(found, str):
            assert "does not divide" in found or "takes statistics over the whole batch" in found, (title, found)
            continue
        ran += 1
        assert found.worst < 1e-9 and not found.traffic, (title, found)
    assert ran >= 5


def read_and_stored(job: Job, plan: Plan) -> tuple[int, int, int, int]:
    """Bytes that this rank asked the files for, that it read of them, and that its parameters and buffers are."""
    with joined():
        engine = parallelize(job, plan)
        assert isinstance(engine, GraphEngine)
        weights = engine.model._weights
        assert weights is not None
        reduction = engine._reduction
        flat = {id(p): p for b in reduction.buckets for p in b.pieces.values()}
        stored = [*reduction.plain.values(), *flat.values(), *engine._whole._buffers.values()]
        return weights.files.asked, weights.files.fetched, sum(t.nbytes for t in stored), plan.ranks


@pytest.mark.parametrize(
    "name",
    [pytest.param("qkv_attention", marks=pytest.mark.slow)]
    + [pytest.param(name, marks=pytest.mark.prove) for name in ("gpt2", "moe_mlp")],
)
def test_a_rank_reads_the_bytes_that_it_stores(name: str, tmp_path: Path, pool: Pool) -> None:
    job = ZOO[name]()
    job = job.with_(weights=one_file(job, tmp_path))
    whole = sum(math.prod(e.shape) * e.dtype.itemsize for e in WeightFiles(str(job.weights)).entries.values())
    for title in ("tensor", "zero1", "zero3", "zero3 x tensor"):
        plan = PLANS[title]
        for asked, _, stored, ranks in pool(plan.ranks).run(read_and_stored, job, plan, timeout=120):
            # Of a flat bucket the rows are read that a rank's part begins and ends in.
            spare = 0 if title == "tensor" else 0.15 * whole
            assert stored <= asked <= stored + spare, (title, asked, stored, whole, ranks)
    plan = Plan(axes=(pipeline(),), cuts=cuts(job, 2), micro_batches=2)
    found = pool(2).run(read_and_stored, job, plan, timeout=120)
    assert all(asked == stored < whole for asked, _, stored, _ in found), (found, whole)


@pytest.mark.prove
def test_the_peak_of_two_ranks_is_about_half_of_one_that_has_all(tmp_path: Path) -> None:
    width, blocks = 1024, 8  # 256 MiB
    job = stack(width, blocks, tmp_path / "x.safetensors")
    save_weights(job.with_(weights=None).build().state_dict(), tmp_path / "x.safetensors")
    small = stack(8, 2)
    ((_, one),) = _peaks(job, Plan(), small)
    assert one > 250 << 20, "one rank has all"
    for title, plan in plans(job, blocks).items():
        if title in ("tensor", "pipeline"):
            found = [most for _, most in _peaks(job, plan, small)]
            print(f"{title}: {[most >> 20 for most in found]} MiB at the peak, and one rank {one >> 20} MiB")
            assert max(found) <= 0.6 * one, (title, found, one)


def _peaks(job: Job, plan: Plan, small: Job) -> list[tuple[int, int]]:
    with Ranks(plan.ranks, threads=1) as ranks:
        return ranks.run(peak, job, plan, small, timeout=200)


@pytest.mark.prove
def test_what_training_saved_is_what_the_next_run_begins_with(tmp_path: Path) -> None:
    job = ZOO["tied_lm"]()
    saved = tmp_path / "trained.safetensors"
    plan = Plan(axes=(tensor(),))
    first = train(job, plan, steps=2, save=saved, progress=False)
    train(job, plan, steps=2, save=tmp_path / "trained.pt", progress=False)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".safetensors", ".pt")], "no parts are left"
    state = torch.load(tmp_path / "trained.pt", weights_only=True)
    again = job.with_(weights=saved).build().state_dict()
    assert again.keys() == state.keys() and all(torch.allclose(again[n], t, atol=1e-6) for n, t in state.items())
    begun = job.build().state_dict()
    assert not torch.allclose(again["head.weight"], begun["head.weight"], atol=1e-6), "trained"
    second = train(job.with_(weights=saved), Plan(axes=(data(),), zero=3), steps=1, progress=False)
    assert second.losses[0] < first.losses[0]


@pytest.mark.slow
def test_a_model_that_does_not_capture_begins_with_the_file(tmp_path: Path, pool: Pool) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), Branching(), nn.Linear(8, 4))

    job = small_job(model)
    job = job.with_(weights=one_file(job, tmp_path))
    for plan in (Plan(axes=(data(),)), Plan(axes=(data(),), zero=3)):
        found = pool(2).run(outcome, job, plan, timeout=120)[0]
        assert not isinstance(found, str) and found.worst < 1e-9, found


class Branching(nn.Module):
    """Depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().abs().sum()) > 0 else x
