"""The engine's features against one device: odd batches, frozen and tied weights, clipping, precision, buffers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.engine.engine import parallelize
from shardwise.engine.launch import joined
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Pool, compare, cuts, data, pipeline, tensor
from tests.zoo.data import CausalTokens, Images, Vectors
from tests.zoo.plain import CausalLM, ConvNet, FrozenLM, adamw_cosine, class_loss, moe_mlp, next_token_loss, sgd

pytestmark = pytest.mark.slow

DATA, ZERO1, ZERO2, ZERO3 = (Plan((data(),), zero=zero) for zero in range(4))
SHARED = Plan((replace(data(), shares=(3, 1)),))
HEADS = Plan((tensor("heads*", "width@blocks.0.mlp", "vocabulary*", "classes*"),))
SEQUENCE = Plan((tensor("heads*", "width@blocks.0.mlp", "sequence"),))


def language(model: Callable[..., nn.Module] = CausalLM, optimizer: Any = sgd, **changes: Any) -> Job:
    """One causal block; samples have different numbers of labels."""
    options = {} if model is FrozenLM else {"layers": 1, **changes}
    return Job(
        model=partial(model, **options), data=CausalTokens(vocab=128), loss=next_token_loss, optimizer=optimizer,
        global_batch=8, clip_norm=0.05,
    )  # fmt: skip


def staged(job: Job, *, schedule: str = "1f1b", stages: int = 2, **changes: Any) -> Plan:
    return Plan((pipeline(),), cuts(job, stages), **{"micro_batches": 2, "schedule": schedule, **changes})


def check(pool: Pool, job: Job, plan: Plan, sizes: tuple[int, ...] = (), steps: int = 2) -> None:
    for errors in pool(plan.ranks).run(compare, job, plan, steps, sizes, timeout=100):
        assert errors.worst < 1e-9, errors
        assert errors.traffic == ""


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [DATA, DATA.with_(micro_batches=2), ZERO1, ZERO3, ZERO2.with_(micro_batches=2), SEQUENCE, Plan(micro_batches=3),
     SHARED, SHARED.with_(zero=3)],
    ids=Plan.title,
)  # fmt: skip
def test_batches_that_do_not_divide_and_differ(pool: Pool, plan: Plan) -> None:
    check(pool, language(), plan, (8, 5, 7))


def test_samples_queries_and_heads_are_cut_at_once(pool: Pool) -> None:
    context = PlanAxis("context", 2, ("sequence*",))
    for axes in ((data(), context), (context, tensor("heads*", "width@blocks.0.mlp", "sequence"))):
        check(pool, language(), Plan(axes, micro_batches=2), (8, 5), steps=1)


def test_experts_are_cut_where_samples_are_elsewhere(pool: Pool) -> None:
    experts = PlanAxis("expert", 2, ("width@1", "width@2", "batch"))
    check(pool, moe_mlp(), Plan((experts,), micro_batches=2), steps=1)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble"])
def test_stages_take_batches_that_do_not_divide(pool: Pool, schedule: str) -> None:
    check(pool, language(), staged(language(), schedule=schedule), (8, 5))


def fed(job: Job, plan: Plan) -> tuple[list[float], list[float], list[int]]:
    """Losses of steps on shares and on whole batches, and how many samples the shares had."""
    batches = [job.batch(range(8)), job.batch(range(8, 13))]
    engine, other = (parallelize(job, plan, dtype=torch.float64) for _ in range(2))
    shares, sizes = [], []
    for share in engine.feed(batches):
        sizes.append(len(share["input_ids"]))
        shares.append(engine.step(share))
    return shares, [other.step(batch) for batch in batches], sizes


def test_a_rank_is_fed_its_share_of_each_batch(pool: Pool) -> None:
    first, second = pool(2).run(fed, language(), DATA)
    assert first[0] == first[1] == second[0] == second[1], "the loss is the same number on every rank"
    assert [a + b for a, b in zip(first[2], second[2], strict=True)] == [8, 5]


def test_ranks_with_unequal_shares_are_fed_by_them(pool: Pool) -> None:
    first, second = pool(2).run(fed, language(), SHARED)
    assert first[0] == first[1] == second[0] == second[1], "the loss is the same number on every rank"
    assert (first[2], second[2]) == ([6, 4], [2, 1])


# --- parameters -------------------------------------------------------------------------------------------------------


def kept(job: Job, plan: Plan) -> tuple[bool, list[str], list[str], list[str]]:
    """Whether the state loads, parameters that changed, those that did not, and those with a gradient."""
    module, engine = job.build().double(), parallelize(job, plan, dtype=torch.float64)
    engine.forward_backward(job.batch(range(8)))
    grads = engine.gradients()
    engine.update()
    state = engine.state_dict()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    module.load_state_dict(state)
    same = [name for name in before if torch.equal(before[name], state[name])]
    learned = [name for name, grad in grads.items() if bool(grad.any())]
    return list(state) == list(module.state_dict()), sorted(set(before) - set(same)), same, learned


@pytest.mark.parametrize("plan", [DATA, ZERO1, ZERO2, ZERO3, HEADS, staged(language(FrozenLM))], ids=Plan.title)
def test_frozen_and_unused_parameters_stay_as_they_were(pool: Pool, plan: Plan) -> None:
    job = language(FrozenLM)
    for _, changed, same, learned in pool(2).run(kept, job, plan):
        frozen = {n for n, p in job.build("meta").named_parameters() if not p.requires_grad}
        assert len(frozen) == 13
        assert set(same) == frozen | {"unused"}
        assert set(learned) == set(changed)
    check(pool, job, plan)


@pytest.mark.parametrize(
    "plan",
    [DATA, ZERO3, HEADS, staged(language(tied=True)), staged(language(tied=True), stages=4, schedule="interleaved"),
     staged(language(tied=True), stages=4, schedule="gpipe", micro_batches=3)],
    ids=lambda plan: f"{plan.title()} {plan.schedule}",
)  # fmt: skip
def test_tied_weights_stay_one(pool: Pool, plan: Plan) -> None:
    check(pool, language(tied=True), plan)
    for names, *_ in pool(2).run(kept, language(tied=True), plan):
        assert names, "the state has both names, in the module's order"


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))


def perceptron() -> Job:
    return Job(model=layers, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=8)


def stored(job: Job, plan: Plan) -> tuple[int, int]:
    """Elements of parameters and of optimizer state that a rank keeps after two steps."""
    engine = parallelize(job, plan)
    for start in (0, 8):
        engine.step(job.batch(range(start, start + 8)))
    params = sum(p.numel() for p in [*engine.model.params.values(), *(b.shard for b in engine._reduction.buckets)])
    state = [v for s in engine.optimizer.state.values() for v in s.values() if v.ndim]
    return params, sum(v.numel() for v in state)


@pytest.mark.parametrize(("zero", "params", "state"), [(0, 1.0, 1.0), (1, 1.5, 0.5), (2, 1.5, 0.5), (3, 0.5, 0.5)])
def test_zero_keeps_parts(pool: Pool, zero: int, params: float, state: float) -> None:
    """A shard of ZeRO 1 and 2 is counted twice here: it is a view of the whole."""
    job = perceptron()
    whole = sum(p.numel() for p in job.build("meta").parameters())
    for found in pool(2).run(stored, job, Plan((data(),), zero=zero)):
        assert found[0] == pytest.approx(params * whole, rel=0.01)
        assert found[1] == pytest.approx(state * whole, rel=0.01)


# --- updates ----------------------------------------------------------------------------------------------------------


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def rms(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=1e-3)


@pytest.mark.parametrize("optimizer", [adam, rms])
@pytest.mark.parametrize("plan", [ZERO1, ZERO3], ids=Plan.title)
def test_optimizers_of_entries_run_on_parts(pool: Pool, optimizer: Any, plan: Plan) -> None:
    # Adam makes whole steps of the rounding noise of a key's bias, whose gradient is zero; this job has no biases.
    job = Job(
        model=partial(nn.Linear, 16, 9, bias=False), data=Vectors(classes=9), loss=class_loss, optimizer=optimizer,
        global_batch=8,
    )  # fmt: skip
    check(pool, job, plan, steps=3)


def clipped(job: Job, plan: Plan) -> tuple[float, float]:
    """The norm before clipping, and the size of a step of plain SGD with rate 1, which is the norm after it."""
    engine = parallelize(job, plan, dtype=torch.float64)
    before = engine.state_dict()
    engine.step(job.batch(range(8)))
    after = engine.state_dict()
    assert engine.grad_norm is not None
    return engine.grad_norm, float(torch.stack([(after[n] - before[n]).norm() for n in before]).norm())


def unit(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


@pytest.mark.parametrize("plan", [DATA, ZERO1, ZERO3, HEADS, SEQUENCE, staged(language())], ids=Plan.title)
def test_the_norm_that_is_clipped_is_the_whole_gradient_s(pool: Pool, plan: Plan) -> None:
    job = language(optimizer=unit)
    (true, true_step) = clipped(job, Plan())
    assert true > 0.05
    for norm, step in pool(2).run(clipped, job, plan):
        assert norm == pytest.approx(true, rel=1e-12)
        assert step == pytest.approx(true_step, rel=1e-9) == pytest.approx(0.05, rel=1e-4)


def scheduled(job: Job, plan: Plan) -> tuple[int, float]:
    engine = parallelize(job, plan)
    for start in (0, 8, 16):
        engine.step(job.batch(range(start, start + 8)))
    return engine.scheduler.last_epoch, engine.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("plan", [DATA.with_(micro_batches=4), ZERO3, staged(language())], ids=Plan.title)
def test_the_scheduler_steps_once_per_update(pool: Pool, plan: Plan) -> None:
    job = language(optimizer=adamw_cosine)
    alone = scheduled(job, Plan())
    assert alone[0] == 3
    assert pool(2).run(scheduled, job, plan) == [alone] * 2


def reductions(job: Job, plan: Plan) -> int:
    """Bytes of all-reduces over the data axis in one step."""
    engine = parallelize(job, plan)
    engine.step(job.batch(range(8)))
    return sum(t.bytes for t in engine.traffic() if (t.kind, t.axis) == ("all_reduce", "data"))


def test_nothing_is_sent_while_gradients_accumulate(pool: Pool) -> None:
    once, often = (pool(2).run(reductions, perceptron(), DATA.with_(micro_batches=n))[0] for n in (1, 4))
    gradients = 4 * sum(p.numel() for p in perceptron().build("meta").parameters())
    # The rest are the losses and the counts of labels of the micro-batches.
    assert 0 < once - gradients < 20 and 0 < often - gradients < 4 * 20


# --- precision --------------------------------------------------------------------------------------------------------


def halved(job: Job, plan: Plan) -> dict[str, Any]:
    """A few steps: their losses, the dtypes of what is kept, and of a product."""
    warnings.simplefilter("ignore")
    engine = parallelize(job, plan)
    products: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
                products.add(found.dtype)
            return found

    losses = []
    for n in range(4):
        with Watch():
            losses.append(engine.forward_backward(job.batch(range(8 * n, 8 * n + 8))))
        grads = {p.grad.dtype for p in engine.model.params.values() if p.grad is not None}
        engine.update()
    state = {v.dtype for s in engine.optimizer.state.values() for v in s.values() if v is not None and v.ndim}
    params = {p.dtype for p in [*engine.model.params.values(), *engine.state_dict().values()]}
    return {"losses": losses, "products": products, "grads": grads, "state": state, "params": params}


@pytest.mark.parametrize("plan", [Plan(), DATA, ZERO1, HEADS], ids=Plan.title)
def test_bf16_computes_in_bf16_and_keeps_fp32(pool: Pool, plan: Plan) -> None:
    job = language()
    (exact,) = pool(1).run(halved, job, Plan())
    assert exact["products"] == {torch.float32}
    for found in pool(plan.ranks).run(halved, job.with_(precision="bf16"), plan.with_(precision="bf16")):
        assert found["products"] == {torch.bfloat16}
        assert found["grads"] <= {torch.float32} and found["state"] == found["params"] == {torch.float32}
        assert found["losses"] == pytest.approx(exact["losses"], rel=0.02)
        assert found["losses"] != exact["losses"]


# --- dropout ----------------------------------------------------------------------------------------------------------


class DroppedBlock(nn.Module):
    """Attention and a hidden layer with dropout inside, at the end, and of whole channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.dropout(self.embed(input_ids), 0.1, self.training)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2 if self.training else 0.0)
        x = x + F.dropout1d(self.out(attended.transpose(1, 2).flatten(2)), 0.2, self.training)
        x = x + F.dropout(self.down(F.dropout(F.gelu(self.up(x)), 0.3, self.training)), 0.1, self.training)
        return self.head(x * (1 + 0.1 * torch.randn_like(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(micro_batches=3),
        DATA.with_(micro_batches=2),
        ZERO3,
        Plan((PlanAxis("tensor", 2, ("heads*", "width@*")),)),
        Plan((PlanAxis("tensor", 2, ("sequence",)),)),
    ],
    ids=Plan.title,
)
def test_dropout_does_not_depend_on_the_plan(pool: Pool, plan: Plan) -> None:
    check(pool, language(DroppedBlock).with_(model=DroppedBlock), plan, (8, 5))


def test_dropout_does_not_depend_on_the_stages(pool: Pool) -> None:
    job = language().with_(model=DroppedBlock)
    check(pool, job, staged(job), (8, 5))


def cheaply(job: Job, plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps, and what this rank then has of each parameter."""
    engine = parallelize(job, plan, dtype=torch.float64)
    losses = [engine.step(job.batch(range(8 * n, 8 * n + 8))) for n in range(2)]
    return losses, {name: param.detach() for name, param in engine.model.params.items()}


@pytest.mark.parametrize("plan", [DATA, DATA.with_(micro_batches=2), Plan((tensor("heads*"),))], ids=Plan.title)
def test_masks_per_rank_are_a_choice_and_agree_where_ranks_hold_the_same(pool: Pool, plan: Plan) -> None:
    job = language().with_(model=DroppedBlock)
    (first, mine), (second, theirs) = pool(2).run(cheaply, job, plan.with_(dropout="per-rank"))
    assert first == second
    whole = {name: p.shape for name, p in job.build("meta").named_parameters()}
    replicated = [name for name in mine if mine[name].shape == whole[name]]
    assert replicated and all(torch.equal(mine[name], theirs[name]) for name in replicated)
    (exact, _), _ = pool(2).run(cheaply, job, plan)
    assert first != exact and first == pytest.approx(exact, rel=0.05)
    assert pool(2).run(cheaply, job, plan.with_(dropout="per-rank"))[0][0] == first, "a run can be repeated"


# --- batch norm -------------------------------------------------------------------------------------------------------


def convolved() -> Job:
    return Job(
        model=partial(ConvNet, classes=8), data=Images(classes=8), loss=class_loss, optimizer=sgd, global_batch=8
    )


@pytest.mark.parametrize(
    "plan",
    [DATA, ZERO1, ZERO3, SHARED, Plan((tensor("channels*", "classes*"),)), staged(convolved(), micro_batches=1)],
    ids=Plan.title,
)
def test_batch_norm_and_its_buffers_are_those_of_the_whole_batch(pool: Pool, plan: Plan) -> None:
    check(pool, convolved(), plan, (8, 5))


def normalised(job: Job, plan: Plan) -> dict[str, Tensor]:
    engine = parallelize(job, plan, dtype=torch.float64)
    engine.step(job.batch(range(8)))
    state = engine.state_dict()
    return {name: state[name] for name in ("blocks.0.1.running_mean", "blocks.0.1.num_batches_tracked")}


def test_statistics_per_micro_batch_are_a_choice(pool: Pool) -> None:
    """As in a plain loop that accumulates gradients: every micro-batch moves the running statistics."""
    plan = DATA.with_(micro_batches=2, batch_norm="per-micro-batch")
    job = convolved()
    (whole,), (first, second) = pool(1).run(normalised, job, Plan()), pool(2).run(normalised, job, plan)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(whole["blocks.0.1.num_batches_tracked"]) == 1
    assert not torch.allclose(first["blocks.0.1.running_mean"], whole["blocks.0.1.running_mean"], rtol=1e-3)
    module = job.build().double().train()
    for part in job.batch(range(8))["pixel_values"].double().split(4):
        module(part)
    assert torch.allclose(first["blocks.0.1.running_mean"], module.state_dict()["blocks.0.1.running_mean"], rtol=1e-12)
    assert int(first["blocks.0.1.num_batches_tracked"]) == 2


class Spectrum(nn.Module):
    """Complex numbers between two layers, and a tensor that is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        written = torch.zeros_like(y)
        written[:, 8:] = y[:, 8:].tanh()
        written[:, :8] = x[:, :8].sum(1, keepdim=True)
        return self.head(torch.fft.fft(written).real)  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [DATA, Plan((tensor("width*"),))], ids=Plan.title)
def test_gradients_flow_through_complex_numbers_and_what_is_written_over(pool: Pool, plan: Plan) -> None:
    check(pool, Job(model=Spectrum, data=Vectors(classes=8), loss=class_loss, global_batch=8), plan)


def threads_of_plans(job: Job, plans: list[Plan]) -> list[int]:
    """Threads of this rank after a step under each plan."""
    found = []
    with joined():
        for plan in plans:
            parallelize(job, plan).step(job.batch(range(job.global_batch)))
            found.append(len(os.listdir("/proc/self/task")))
    return found


def test_plans_one_after_another_leave_no_threads(pool: Pool) -> None:
    job = language(CausalLM)
    plans = [DATA, HEADS, staged(job)]
    for found in pool(2).run(threads_of_plans, job, plans * 4):
        assert found[-3:] == found[3:6], "each plan has its own, and the next ones theirs again"


def fails_then_runs(job: Job, plan: Plan) -> tuple[str, list[float]]:
    """A step that fails at its first backward, with messages under way; then losses of a new engine."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no backward")

    with joined():
        broken = parallelize(job, plan)
        broken._pipeline._backward = fails  # type: ignore[method-assign]
        try:
            broken.step(job.batch(range(job.global_batch)))
            told = ""
        except RuntimeError as error:
            told = str(error)
        engine = parallelize(job, plan)
        return told, [engine.step(job.batch(range(k, k + job.global_batch))) for k in (8, 16)]


def test_a_step_that_failed_leaves_nothing_to_the_next_engine(pool: Pool) -> None:
    job = language(CausalLM)
    plan = staged(job)
    _, one = pool(1).run(fails_then_runs, job, Plan())[0]
    for told, losses in pool(2).run(fails_then_runs, job, plan):
        assert told == "no backward"
        assert losses == pytest.approx(one, rel=1e-5)
