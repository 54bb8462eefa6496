"""Inference precisions: what int8 and bf16 weights compute, what they are held in, and how far that is from fp32."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import shardwise as sw
from shardwise.cli import main
from shardwise.engine.launch import Ranks, joined
from shardwise.errors import JobError
from shardwise.graph.graph import Graph
from shardwise.graph.output import taken_apart
from shardwise.graph.products import factors
from shardwise.inference.accuracy import accuracy, difference
from shardwise.inference.precision import Arithmetic
from shardwise.inference.prediction import GraphPrediction, ModulePrediction, build
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.weights.int8 import Int8Weight, held_bytes, quantize
from shardwise.weights.save import save_weights
from tests.conftest import pipeline, tensor
from tests.pool import Pool
from tests.test_predict import COUNT, two, worst
from tests.test_predict_memory import Large
from tests.zoo import hf, plain

slow = pytest.mark.slow


def by_hand(weight: Tensor) -> Tensor:
    """What a matrix is after it was held in int8, by the formula."""
    rows = []
    for row in weight.tolist():
        scale = max(abs(x) for x in row) / 127 or 1.0
        rows.append([round(x / scale) * scale for x in row])
    return torch.tensor(rows, dtype=weight.dtype)


# --- a weight ---------------------------------------------------------------------------------------------------------


def test_a_weight_is_rounded_to_127_levels_of_each_row() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    weight[3] = 0
    torch.testing.assert_close(quantize(weight.clone(), (0,)).whole(), by_hand(weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(quantize(weight.t().clone(), (1,)).whole(), by_hand(weight).t(), rtol=0, atol=1e-12)


def test_operators_take_a_weight_in_int8_for_the_tensor_it_stands_for() -> None:
    held = quantize(torch.randn(3000, 200, dtype=torch.float64), (0,))  # more than is turned back at a time
    x, bias, index = torch.randn(4, 3, 200).double(), torch.randn(3000).double(), torch.tensor([[1, 2999], [0, 7]])
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda w: nn.functional.linear(x, w),
        lambda w: nn.functional.linear(x, w, bias),
        lambda w: x @ w.T,
        lambda w: torch.addmm(bias, x[0], w.t()),
        lambda w: nn.functional.embedding(index, w),
        lambda w: w[3:5],
        lambda w: torch.einsum("bsi,oi->bso", x, w),
        lambda w: w.transpose(0, 1) + 1,
    ]
    with torch.inference_mode():
        for n, use in enumerate(uses):
            torch.testing.assert_close(use(held), use(held.whole()), rtol=0, atol=1e-10, msg=str(n))
        with pytest.raises(RuntimeError, match="held in int8"):
            held.mul_(2)
    assert held_bytes(held) == 3000 * 200 + 3000 * 8


def test_factors_of_products_are_found_with_the_dims_that_come_out() -> None:
    gpt2 = factors(Graph.of(hf.gpt2(), purpose="predict"))
    assert gpt2["transformer.h.0.mlp.c_fc.weight"] == (1,)  # kept as [in, out]
    assert gpt2["transformer.wte.weight"] == (0,)  # a table that is the output layer too
    assert "transformer.wpe.weight" not in gpt2 and "transformer.h.0.ln_1.weight" not in gpt2
    convnet = factors(Graph.of(plain.convnet_bn(), purpose="predict"))
    assert convnet["blocks.0.0.weight"] == (0,) and "blocks.0.1.weight" not in convnet


# --- splits -----------------------------------------------------------------------------------------------------------


def outputs(job: Job, plans: dict[str, Plan], precision: Any, dtype: torch.dtype | None) -> dict[str, list[Any]]:
    """On every rank of a pool, what each plan gives; on rank 0."""
    warnings.simplefilter("ignore")
    job = job.with_(data=Subset(job.data, range(COUNT)))
    found = {n: list(sw.predict(job, None, p, precision=precision, dtype=dtype)) for n, p in plans.items()}
    return found if dist.get_rank() == 0 else {}


def off(found: Sequence[Any], true: Sequence[Any]) -> float:
    return difference(found, true, "", "").relative


@slow
@pytest.mark.parametrize(
    "model",
    [
        plain.tied_lm,
        *(
            pytest.param(m, marks=pytest.mark.prove)
            for m in (plain.convnet_bn, plain.moe_mlp, hf.gpt2, hf.llama, hf.t5)
        ),
    ],
    ids=lambda m: m.__name__,
)
def test_int8_on_two_ranks_is_int8_on_one_device(pool: Pool, model: Callable[[], Job]) -> None:
    alone = pool(1).run(outputs, model(), {"one": Plan()}, "int8", torch.float64, timeout=200)[0]["one"]
    plain_fp32 = pool(1).run(outputs, model(), {"one": Plan()}, None, torch.float64, timeout=200)[0]["one"]
    split = pool(2).run(outputs, model(), two(model()), "int8", torch.float64, timeout=250)[0]
    assert set(split) == {"data", "tensor", "pipeline"}
    for name, found in split.items():
        assert worst(found, alone) < 1e-12, name
    assert 1e-4 < off(alone, plain_fp32) < 0.03, "int8 has an error of its own, and a small one"


@slow
@pytest.mark.parametrize(
    "model",
    [plain.qkv_attention, *(pytest.param(m, marks=pytest.mark.prove) for m in (plain.convnet_bn, hf.llama, hf.t5))],
    ids=lambda m: m.__name__,
)
def test_bf16_is_near_fp32_under_every_plan(pool: Pool, model: Callable[[], Job]) -> None:
    true = pool(1).run(outputs, model(), {"one": Plan()}, "fp32", None, timeout=200)[0]["one"]
    alone = pool(1).run(outputs, model(), {"one": Plan()}, "bf16", None, timeout=200)[0]
    split = pool(2).run(outputs, model(), two(model()), "bf16", None, timeout=250)[0]
    for name, found in {**alone, **split}.items():
        assert 1e-4 < off(found, true) < 0.02, name
        assert any(t.dtype == torch.bfloat16 for t in taken_apart(found[0])[1]), name


class Wide(nn.Module):
    """Makes numbers of its own in fp32, as a model does that was written for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(8, dtype=torch.float32) * 1000.0 + 1.0  # which bf16 has not
        found: Tensor = self.layer(self.norm(x + (place - place.round()))) + place[7:]
        return found


@slow
def test_what_a_model_computes_in_fp32_stays_in_fp32() -> None:
    job = Job(model=Wide, data=TensorDataset(torch.randn(8, 8)), global_batch=4)
    for plan in (Plan(), Plan(micro_batches=2)):  # the module as it is, and captured
        with joined():
            found = torch.cat(list(sw.predict(job, None, plan, precision="bf16")))
        assert found.dtype == torch.float32
        assert (found - 7001.0).abs().max() < 5, "7001 is 7008 in bf16"


# --- memory -----------------------------------------------------------------------------------------------------------


def weights_held(job: Job, plan: Plan, precision: Any) -> tuple[int, int]:
    """Bytes of this rank's weights, and how many entries those in int8 have."""
    with joined() as place:
        example = job.batch(range(2))
        found = build(job, plan, Mesh.build(plan.axes), example, place.device, Arithmetic.of(plan, precision, None))
        if isinstance(found, ModulePrediction):
            held: list[Tensor] = list(found._module.parameters())
        else:
            assert isinstance(found, GraphPrediction)
            held = list(next(iter(found._forwards.values())).model.params.values())
        return sum(map(held_bytes, held)), sum(t.numel() for t in held if isinstance(t, Int8Weight))


def test_weights_take_half_in_bf16_and_a_quarter_in_int8(pool: Pool) -> None:
    job = plain.qkv_attention()
    plans = two(job)
    for name in ("data", "tensor", "pipeline"):
        true, half, quarter = (
            pool(2).run(weights_held, job, plans[name], p, timeout=100) for p in ("fp32", "bf16", "int8")
        )
        for rank in range(2):
            assert half[rank][0] * 2 == true[rank][0]
            entries = quarter[rank][1]
            rest = true[rank][0] - 4 * entries
            assert entries > 0.5 * true[rank][0] / 4, "most of these weights are factors of products"
            assert entries <= quarter[rank][0] - rest <= 1.1 * entries


def peak(job: Job, plan: Plan, precision: Any) -> int:
    """Bytes at the peak of predicting above what the rank had before."""
    backend = Backend.cpu()
    small = job.with_(model=lambda: Large(64), data=TensorDataset(torch.ones(4, 64)), weights=None)
    list(sw.predict(small, None, plan, precision=precision))
    backend.reset_peak_memory()
    before = backend.peak_memory()
    list(sw.predict(job, None, plan, precision=precision))
    return backend.peak_memory() - before


@pytest.mark.prove
@pytest.mark.timeout(300)
def test_no_rank_ever_has_the_whole_model_in_fp32(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    whole = 16 * 2048**2 * 4
    save_weights(Large().state_dict(), file)
    job = Job(model=Large, data=TensorDataset(torch.ones(8, 2048)), global_batch=4, weights=file)
    plans = {"one": Plan(), "tensor": Plan((tensor("width*"),)), "pipeline": Plan((pipeline(),), ("linear.8",))}
    for name, plan in plans.items():
        with Ranks(plan.ranks, threads=1) as ranks:
            found = {p: ranks.run(peak, job, plan, p, timeout=100) for p in ("bf16", "int8")}
        print(name, {p: [f"{b / whole:.2f}" for b in each] for p, each in found.items()}, "of the weights in fp32")
        share = 1 / plan.ranks
        # Beside its weights, one weight at a time in fp32, and what capture takes.
        assert max(found["bf16"]) < (0.5 * share + 0.2) * whole, name
        assert max(found["int8"]) < (0.25 * share + 0.2) * whole, name


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_difference_is_what_it_says() -> None:
    true = [{"scores": torch.tensor([[1.0, 3.0], [2.0, 0.0]])}, {"scores": torch.tensor([[0.0, math.inf]])}]
    found = [{"scores": torch.tensor([[1.0, 3.5], [1.0, 2.0]])}, {"scores": torch.tensor([[0.0, math.inf]])}]
    far = difference(found, true, "int8", "fp32")
    assert (far.samples, far.rows, far.same, far.largest) == (3, 3, 2 / 3, 2.0)
    assert far.relative == pytest.approx(math.sqrt(5.25 / 14))
    assert far.text() == (
        "int8 against fp32 on the first 3 samples: off by 61.24% of the norm, at most 2 in an entry; "
        "same argmax in 66.67% of 3 rows"
    )
    assert difference([torch.tensor([math.nan])], [torch.ones(1)], "int8", "fp32").largest == math.inf


@slow
def test_predict_can_be_asked_how_far_int8_is_from_fp32() -> None:
    far = accuracy(plain.sum_count_mlp(), precision="int8", ranks=1)
    assert 0 < far.relative < 0.03 and far.samples == plain.sum_count_mlp().global_batch


@slow
def test_the_command_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.py").write_text("from tests.zoo.plain import sum_count_mlp as job\n")
    out = tmp_path / "out.npz"
    arguments = ["predict", f"{tmp_path}/spec.py:job", "--output", str(out), "--precision", "bf16", "--ranks", "1"]
    assert main([*arguments, "--batch", "16"]) == 0
    assert "bf16 against fp32 on the first 16 samples: off by 0." in capsys.readouterr().out
    assert next(iter(np.load(out).values())).dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, "precision must be one of fp32, bf16, int8 to predict, but is 'int4'"),
        (
            {"precision": "bf16", "dtype": torch.float64},
            "weights cannot be held in bf16 where everything runs in float64",
        ),
    ],
)
def test_what_cannot_be_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        sw.predict(plain.sum_count_mlp(), ranks=1, **settings)


def test_int8_without_products_and_for_training_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x)  # type: ignore[no-any-return]

    job = Job(model=Table, data=TensorDataset(torch.arange(10)), global_batch=5)
    with joined(), pytest.raises(JobError, match="int8 holds the weights of matrix products, but Table has none"):
        list(sw.predict(job, None, Plan(), precision="int8"))
    with pytest.raises(JobError, match="one of fp32, bf16, but is 'int8'; to predict with weights in int8, give it to"):
        job.with_(precision="int8")
