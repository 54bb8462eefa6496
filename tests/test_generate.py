"""`sw.generate` against loops over the plain module that keep nothing of earlier tokens, for every kind of plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import JobError, UserError
from shardwise.graph.capture import Purpose
from shardwise.graph.eager import Lifted
from shardwise.inference.generate import generate, groups
from shardwise.inference.limits import Demand
from shardwise.inference.sampling import Sampling
from shardwise.inference.steps import Steps, build_steps
from shardwise.job import Job, lift
from shardwise.machine.backend import Backend
from shardwise.measure.traffic import Collectives
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.search.strategies import maker_of
from tests.conftest import apart, data, pipeline, tensor
from tests.pool import Pool
from tests.zoo import generating, hf
from tests.zoo.generating import LONGEST, VOCAB, logits_without_cache

PROMPTS = [
    [1, 2, 3, 4, 5],
    [7, 8, 9],
    [5, 4, 3, 2, 1],
    [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110],
    [64],
    [11, 12, 13, 14, 15],
]
PIECE = 4
NEW = 8
ModelOf = Callable[[], Job]


def one_device(job: Job, prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling) -> list[list[int]]:
    """The tokens behind each prompt alone, all of the sequence computed again for each."""
    module = lift(job.build(), torch.float64).eval()
    found = []
    with torch.inference_mode(), Lifted(torch.float64):
        for number, prompt in enumerate(prompts):
            ids = list(prompt)
            for _ in range(tokens):
                logits = logits_without_cache(module, torch.tensor([ids]))
                ids.append(int(sampling.choose(logits, [number], len(ids))))
            found.append(ids[len(prompt) :])
    return found


@dataclass(frozen=True)
class Found:
    """Of a plan on one rank: how far logits are from one device's, the tokens, and bytes of the cache.

    `gathered` are the bytes of what the last token's step put together from the parts of ranks, or exchanged.
    """

    error: float
    tokens: list[list[int]]
    state: int
    gathered: int
    piece: int


def steps_of(job: Job, plan: Plan) -> Found:
    """Two prompts and what follows, logits compared at each token; on every rank of a pool."""
    warnings.simplefilter("ignore")
    ids = torch.tensor([PROMPTS[0], PROMPTS[5]])
    longest = ids.shape[1] + NEW
    demand = Demand(longest, PIECE, VOCAB - 1)
    steps = build_steps(job, plan, Mesh.build(plan.axes), demand, Backend.cpu().device(0), torch.float64)
    module = lift(job.build(), torch.float64).eval()
    steps.begin(steps.fixed or 2)
    copies = [0, 1, *[1] * ((steps.fixed or 2) - 2)]
    error = 0.0
    for start, stop in [(0, PIECE), *((at, at + 1) for at in range(PIECE, longest))]:
        size = stop - start
        pieces = [(start, stop)] if size in (1, steps.piece) else [(at, at + 1) for at in range(start, stop)]
        seen = Collectives()
        for a, b in pieces:
            with seen:
                logits = steps.step(ids[copies, a:b], a)
        gathered = sum(each.bytes for each in seen.take() if each.kind in ("all_gather", "all_to_all"))
        if stop < len(PROMPTS[0]):
            continue
        if logits is not None:
            with torch.inference_mode(), Lifted(torch.float64):
                error = max(error, apart(logits[:2], logits_without_cache(module, ids), 1e-6))
        chosen = logits.argmax(-1) if logits is not None else torch.empty(len(copies), dtype=torch.int64)
        ids = torch.cat([ids, steps.agree(chosen)[:2].unsqueeze(1)], 1)
    return Found(error, ids[:, len(PROMPTS[0]) :].tolist(), steps.state_bytes(), gathered, steps.piece)


def steps_by(job: Job, plans: dict[str, Plan]) -> dict[str, Found]:
    return {name: steps_of(job, plan) for name, plan in plans.items()}


def cut(job: Job, stages: int) -> tuple[str, ...]:
    """Cuts of a step into about equal stages, before norms of layers."""
    from shardwise.graph.capture import capture_step
    from shardwise.graph.graph import Graph
    from shardwise.graph.step import step_of

    graph = Graph(capture_step(step_of(job.build(), job.global_batch, 16), job.global_batch, 1), frozenset())
    learned = [op for op in graph.ops if any(v in graph.learned for v in op.outputs)]
    near = [len(learned) * k // stages for k in range(1, stages)]
    return tuple(learned[at].id for at in near)


def two(job: Job) -> dict[str, Plan]:
    return {"tensor": Plan((tensor(),)), "pipeline": Plan((pipeline(),), cut(job, 2))}


def check(found: list[dict[str, Found]], job: Job) -> None:
    """All ranks agree on tokens, which are one device's, as the logits are."""
    expected = one_device(job, [PROMPTS[0], PROMPTS[5]], NEW + 1, Sampling())
    for name in found[0]:
        assert max(each[name].error for each in found) <= 1e-9, name
        for each in found:
            assert each[name].tokens == expected, name
            assert each[name].piece == PIECE, "prompts went by single positions"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(generating.buffered, marks=pytest.mark.slow),
        pytest.param(generating.llama, marks=pytest.mark.prove),
        pytest.param(generating.gpt2, marks=pytest.mark.prove),
        pytest.param(generating.window, marks=pytest.mark.prove),
    ],
    ids=lambda m: m.__name__,
)
def test_two_ranks_have_the_logits_and_tokens_of_one_device(pool: Pool, model: ModelOf) -> None:
    job = model()
    found = pool(2).run(steps_by, job, {"one": Plan((data(),)), **two(job)}, timeout=250)
    check(found, job)
    # One replica each has all of the cache, two ranks half of it each.
    whole = found[0]["one"].state
    assert whole > 0
    for each in found:
        assert each["tensor"].state == each["pipeline"].state == whole // 2
        assert each["tensor"].gathered == 0


@pytest.mark.prove
@pytest.mark.parametrize("model", [generating.llama, generating.buffered], ids=lambda m: m.__name__)
def test_four_ranks_have_the_logits_and_tokens_of_one_device(pool: Pool, model: ModelOf) -> None:
    job = model()
    plans = {
        "pipeline x tensor": Plan((pipeline(), tensor()), cut(job, 2)),
        "data x tensor": Plan((data(), tensor())),
        "stages go round": Plan((pipeline(), tensor()), cut(job, 4), schedule="interleaved", micro_batches=2),
    }
    check(pool(4).run(steps_by, job, plans, timeout=250), job)


@pytest.mark.prove
def test_fewer_heads_of_keys_than_ranks(pool: Pool) -> None:
    job = generating.llama(num_key_value_heads=1)
    found = pool(2).run(steps_by, job, {"one": Plan((data(),)), "tensor": Plan((tensor(),))}, timeout=250)
    check(found, job)
    # There is nothing to cut but each head's own numbers: every rank has all of it.
    assert found[0]["tensor"].state == found[0]["one"].state


# -- sw.generate -------------------------------------------------------------------------------------------------------


def generated(job: Job, plans: dict[str, Plan], settings: dict[str, object]) -> dict[str, list[list[int]]]:
    """On every rank of a pool: what each plan gives."""
    warnings.simplefilter("ignore")
    kept: dict[str, object] = {"tokens": NEW, "piece": PIECE, "dtype": torch.float64, **settings}
    return {
        name: [found.tolist() for found in generate(job, PROMPTS, plan, **kept)]  # type: ignore[arg-type]
        for name, plan in plans.items()
    }


def both() -> dict[str, Plan]:
    return {"data": Plan((data(),)), "tensor": Plan((tensor(),))}


SAMPLED = Sampling(1.5, 40, 0.95, 7)
DRAWN: dict[str, object] = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 7}


@pytest.mark.slow
def test_the_same_seed_draws_the_same_tokens_by_data_and_by_tensor(pool: Pool) -> None:
    """Of prompts of unlike lengths, in their order."""
    job = generating.buffered()
    expected = one_device(job, PROMPTS, NEW, SAMPLED)
    rank0, rank1 = pool(2).run(generated, job, both(), DRAWN, timeout=200)
    assert rank0 == {"data": expected, "tensor": expected}
    assert rank1 == {"data": [], "tensor": []}


@pytest.mark.prove
def test_the_same_seed_draws_the_same_tokens_by_pipeline(pool: Pool) -> None:
    job = generating.buffered()
    expected = one_device(job, PROMPTS, NEW, SAMPLED)
    assert expected != one_device(job, PROMPTS, NEW, Sampling())
    assert expected != one_device(job, PROMPTS, NEW, Sampling(1.5, 40, 0.95, 8))
    plans = {"pipeline": Plan((pipeline(),), cut(job, 2))}
    assert pool(2).run(generated, job, plans, DRAWN, timeout=200)[0] == {"pipeline": expected}


@pytest.mark.prove
@pytest.mark.parametrize("purpose", ["train", "predict"])
def test_plans_for_something_else_are_carried_over(pool: Pool, purpose: Purpose) -> None:
    job = hf.llama().with_(global_batch=4)
    maker = maker_of(job, purpose=purpose)
    plans = {name: maker.candidate(name, 2).plan for name in ("tensor", "pipeline")}
    assert all(plan is not None and plan.model for plan in plans.values())
    expected = one_device(job, PROMPTS, NEW, Sampling())
    assert pool(2).run(generated, job, plans, {}, timeout=250)[0] == dict.fromkeys(plans, expected)


@pytest.mark.slow
def test_nothing_follows_an_end(pool: Pool) -> None:
    job = generating.buffered()
    everything = one_device(job, PROMPTS, NEW, Sampling())
    end = everything[0][3]
    expected = [row[: row.index(end) + 1] if end in row else row for row in everything]
    assert len(expected[0]) <= 4 and expected[0][-1] == end
    plans = {"data": Plan((data(),))}
    assert pool(2).run(generated, job, plans, {"end": end}, timeout=200)[0] == {"data": expected}


def first_alone(job: Job, plan: Plan) -> list[list[int]]:
    """On every rank of a pool: the first tokens, and then nothing more; the ranks go on together."""
    warnings.simplefilter("ignore")
    found = generate(job, PROMPTS, plan, tokens=NEW, dtype=torch.float64)
    first = [row.tolist() for row, _ in zip(found, range(1), strict=False)]
    found.close()
    dist.barrier()
    return first


@pytest.mark.slow
def test_who_has_enough_may_stop(pool: Pool) -> None:
    job = generating.buffered()
    rank0, rank1 = pool(2).run(first_alone, job, Plan((data(),)), timeout=100)
    assert rank0 == one_device(job, PROMPTS[:1], NEW, Sampling())
    assert rank1 == []


@pytest.mark.prove
def test_local_ranks_give_tensors_on_the_cpu() -> None:
    job = generating.buffered()
    plan = Plan((tensor(),))
    found = list(generate(job, PROMPTS, plan, tokens=NEW, dtype=torch.float64, threads=1))
    assert [row.tolist() for row in found] == one_device(job, PROMPTS, NEW, Sampling())
    assert all(row.dtype == torch.int64 and row.device.type == "cpu" for row in found)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; give tokens in one dim, at least one"),
        ([[[1, 2]]], {}, r"prompt 0 has the shape \[1, 2\]; give tokens in one dim"),
        ([[0.5]], {}, "prompt 0 is of torch.float32; tokens are whole numbers"),
        ([[3, -1]], {}, "prompt 0 has token -1; tokens are 0 or more"),
        ([[1]], {"tokens": 0}, "tokens must be a whole number of at least 1, but is 0"),
        ([[1]], {"piece": 1.5}, "piece must be a whole number of at least 1, but is 1.5"),
        ([[1]], {"temperature": 0.0}, "temperature must be above 0, but is 0.0; None takes the likeliest"),
        ([[1]], {"top_k": 5}, "nothing is drawn without a temperature"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k must be a whole number of at least 1, but is 0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, but is 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_rank_starts(prompts: object, settings: object, message: str) -> None:
    with pytest.raises(JobError, match=message):
        generate(generating.buffered(), prompts, ranks=1, **settings)  # type: ignore[arg-type]


def test_no_prompts_give_nothing() -> None:
    assert list(generate(generating.buffered(), [], ranks=2)) == []


class NoCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tokens(tokens)  # type: ignore[no-any-return]


def built(job: Job, plan: Plan, longest: int = 16, largest: int = VOCAB - 1) -> Steps:
    """As on the first rank of a plan; nothing can be sent."""
    mesh = Mesh.build(plan.axes, rank=0)
    return build_steps(job, plan, mesh, Demand(longest, 1, largest), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "longest", "largest", "message"),
    [
        (Plan((tensor(),)), 102, 3, f"its new tokens are 102 positions, but Buffered has {LONGEST}; give shorter"),
        (Plan((tensor(),)), 16, VOCAB, f"token {VOCAB} is in a prompt, but Buffered has a vocabulary of {VOCAB}; give"),
        (
            Plan((tensor("sequence*"),)), 16, 3,
            r"axis tensor of 2 ranks \(sequence\*\) splits nothing of a step, which has one token of each sample",
        ),
        (Plan((tensor(),), precision="bf16"), 16, 3, "the plan says bf16, but a cache has the model's own dtype"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_one_message(plan: Plan, longest: int, largest: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(generating.buffered(), plan, longest, largest)


@pytest.mark.parametrize(
    ("longest", "largest", "message"),
    [
        (102, 3, f"its new tokens are 102 positions, but Buffered has {LONGEST}; give shorter"),
        (
            16,
            5 * VOCAB,
            f"token {5 * VOCAB} is in a prompt, but Buffered has a vocabulary of {VOCAB}; give tokens from 0",
        ),
    ],
)
def test_a_model_that_runs_as_it_is_says_the_same(longest: int, largest: int, message: str) -> None:
    built(generating.buffered(), Plan(), LONGEST, VOCAB - 1)
    with pytest.raises(JobError, match=message):
        built(generating.buffered(), Plan(), longest, largest)


def test_a_model_that_runs_as_it_is_says_what_it_does_not_take() -> None:
    steps = built(generating.buffered(), Plan())
    steps.begin(1)
    with pytest.raises(JobError, match=f"Buffered does not take tokens up to {VOCAB} at positions up to 0: index out"):
        steps.step(torch.tensor([[VOCAB]]), 0)


def test_a_model_without_a_cache_is_refused() -> None:
    job = Job(model=NoCache, data=[], global_batch=4)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="NoCache keeps no cache to generate with: its forward takes no past_key_values"):
        built(job, Plan())


def test_a_cache_for_another_number_of_samples_is_refused() -> None:
    with pytest.raises(JobError, match=r"Buffered does not run on 3 samples \(global_batch\) of one token"):
        built(generating.buffered().with_(global_batch=3), Plan())


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_draws_have_the_chances_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).expand(4000, -1)
    drawn = Sampling(temperature=2.0, seed=3).choose(logits, range(4000), 9)
    shares = torch.bincount(drawn, minlength=5) / 4000
    assert (shares - (logits[0] / 2).softmax(-1)).abs().max() < 0.03
    few = Sampling(temperature=2.0, top_k=2, seed=3).choose(logits, range(4000), 9)
    assert set(few.tolist()) == {1, 2}
    # 0.38, 0.23, 0.18 and so on: two make less than 0.7, three do.
    nucleus = Sampling(temperature=2.0, top_p=0.7, seed=3).choose(logits, range(4000), 9)
    assert set(nucleus.tolist()) == {1, 2, 4}


def test_a_draw_does_not_depend_on_what_is_beside_it() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, seed=1)
    together = sampling.choose(logits, [4, 5, 6, 7, 8, 9], 3)
    alone = [int(sampling.choose(logits[i : i + 1], [4 + i], 3)) for i in range(6)]
    assert together.tolist() == alone
    assert together.tolist() != sampling.choose(logits, [4, 5, 6, 7, 8, 9], 4).tolist()


def test_prompts_are_grouped_by_length() -> None:
    assert groups([5, 3, 5, 5, 3, 1], 2) == [(0, 2), (1, 4), (3,), (5,)]
