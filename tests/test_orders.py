"""Rows that a sort puts in order, and that come back: ranks sort what they have, and compute what one device does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # its grouped product runs in float64
from torch import Tensor, nn

from shardwise.engine.engine import parallelize
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Pool, compare, cuts, data, pipeline, tensor
from tests.zoo.data import CausalTokens
from tests.zoo.plain import next_token_loss, sgd

assert transformers.integrations.moe
EXPERTS, TAKEN, WIDTH = 4, 2, 16
ROWS = ["batch", "sequence"]


class Mixture(nn.Module):
    """Each token goes to two experts, by a sort of all tokens by expert. `back` is how they come back."""

    def __init__(self, back: str) -> None:
        super().__init__()
        self.back = back
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH) * 0.1)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, experts = self.router(tokens).softmax(-1).topk(TAKEN)
        keys, rows = torch.sort(experts.flatten())
        counts = torch.histc(keys.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        up = product(tokens[rows // TAKEN], self.up, ends) + self.bias[keys]
        found = product(F.gelu(up), self.down, ends) * weights.flatten()[rows].unsqueeze(-1)
        if self.back == "inverse":
            found = found[rows.argsort()].view(-1, TAKEN, WIDTH).sum(1)
        elif self.back == "written":
            places = torch.empty_like(rows)
            places[rows] = torch.arange(rows.shape[0])
            found = found[places].view(-1, TAKEN, WIDTH).sum(1)
        elif self.back == "added":
            found = torch.zeros_like(tokens).index_add(0, rows // TAKEN, found)
        elif self.back == "place":  # what a row is worth depends on where the sort puts it
            places = torch.arange(rows.shape[0]).clamp(max=3)
            found = (found * places.unsqueeze(-1))[rows.argsort()].view(-1, TAKEN, WIDTH).sum(1)
        elif self.back == "number":
            found = (found * rows.unsqueeze(-1))[rows.argsort()].view(-1, TAKEN, WIDTH).sum(1)
        elif self.back == "neighbour":
            found = (found + found.flip(0))[rows.argsort()].view(-1, TAKEN, WIDTH).sum(1)
        elif self.back == "stays":  # sorted rows are added to those that are not
            found = (found + tokens.repeat_interleave(TAKEN, 0)).view(-1, TAKEN, WIDTH).sum(1)
        return x + found.view_as(x)


class Model(nn.Module):
    def __init__(self, back: str, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(Mixture(back) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores


def job(back: str, layers: int) -> Job:
    return Job(
        model=partial(Model, back, layers), data=CausalTokens(vocab=32), loss=next_token_loss, optimizer=sgd,
        global_batch=8,
    )  # fmt: skip


def check(pool: Pool, job: Job, plan: Plan, sizes: tuple[int, ...] = ()) -> None:
    for errors in pool(plan.ranks).run(compare, job, plan, 2, sizes, timeout=100):
        assert errors.worst < 1e-9, errors
        assert errors.traffic == ""


@pytest.mark.parametrize("back", ["inverse", "written", "added"])
def test_rows_that_come_back_are_split_by_samples_and_tokens(back: str) -> None:
    graph = Graph.of(job(back, layers=2))
    assert [[dim.name for dim in region.dims] for region in graph.regions] == [ROWS, ROWS]


@pytest.mark.parametrize("back", ["place", "number", "neighbour", "stays"])
def test_rows_that_know_their_place_are_not(back: str) -> None:
    assert Graph.of(job(back, layers=1)).regions == []


def test_a_model_that_was_not_written_here_splits_its_tokens() -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, experts_implementation="grouped_mm",
    )  # fmt: skip
    graph = Graph.of(Job(model=lambda: transformers.MixtralForCausalLM(config), data=CausalTokens(vocab=64)))
    assert [[dim.name for dim in region.dims] for region in graph.regions] == [ROWS]


DATA = Plan((data(),))
SEQUENCE = Plan((PlanAxis("context", 2, ("sequence",)),))
EXPERT = Plan((PlanAxis("expert", 2, ("experts*", "batch")),))
WIDTHS = Plan((tensor("width@layers.0#2", "sequence"),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("back", "plan"),
    [
        ("inverse", DATA.with_(micro_batches=2)), ("written", DATA.with_(zero=3)), ("added", WIDTHS), ("place", DATA),
        ("inverse", Plan((data(), *EXPERT.axes))), ("added", Plan((data(), *SEQUENCE.axes), micro_batches=2)),
    ],
    ids=lambda x: x.title() if isinstance(x, Plan) else x,
)  # fmt: skip
def test_ranks_sort_what_they_have(back: str, plan: Plan, pool: Pool) -> None:
    check(pool, job(back, layers=1), plan, (8, 5))


@pytest.mark.slow
def test_stages_sort_each_micro_batch(pool: Pool) -> None:
    two = job("inverse", layers=2)
    check(pool, two, Plan((pipeline(),), cuts(two, 2), micro_batches=4), (8, 5))


@pytest.mark.slow
def test_no_token_is_sent_where_each_rank_sorts_its_own(pool: Pool) -> None:
    """Gradients and counts of labels are all that data parallel sends."""
    for sent in pool(2).run(_sends, job("inverse", layers=1), DATA, timeout=60):
        assert sent == {"all_reduce"}


def _sends(job: Job, plan: Plan) -> set[str]:
    engine = parallelize(job, plan, dtype=torch.float64)
    engine.step(job.batch(range(8)))
    return {traffic.kind for traffic in engine.traffic()}
