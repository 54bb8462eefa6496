"""The proof finds bugs: each of `tests.mutations`, put back in, makes it fail; without them it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.job import Job
from shardwise.measure.verify import TOLERANCE
from shardwise.plan.plan import Plan, PlanAxis
from tests import mutations as bugs
from tests.conftest import Errors, Pool, compare, cuts, data, pipeline, tensor
from tests.mutations import Bug
from tests.zoo.data import CausalTokens, Images, Vectors
from tests.zoo.plain import CausalLM, ConvNet, adamw_cosine, class_loss, next_token_loss, sgd

pytestmark = pytest.mark.slow


def language(optimizer: Any = sgd, **changes: Any) -> Job:
    """One causal block; samples have different numbers of labels, and the gradient is clipped."""
    return Job(
        model=partial(CausalLM, layers=1, **changes), data=CausalTokens(vocab=128), loss=next_token_loss,
        optimizer=optimizer, global_batch=8, clip_norm=0.05,
    )  # fmt: skip


class Dropped(nn.Module):
    """Dropout around a hidden layer, at both widths, and a scale that is used whole and in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(32))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(F.dropout(self.up(x), 0.3)) * self.scale, 0.3)
        return self.down(hidden) * self.scale.softmax(0).amax()


def dropped() -> Job:
    return Job(model=Dropped, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=8, clip_norm=0.05)


def regressed(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).square().mean()


def regression() -> Job:
    return Job(
        model=partial(nn.Linear, 16, 8), data=Vectors(targets=8), loss=regressed, optimizer=sgd, global_batch=7,
        clip_norm=0.05,
    )  # fmt: skip


def normed() -> Job:
    return Job(
        model=partial(ConvNet, classes=8), data=Images(classes=8), loss=class_loss, optimizer=sgd, global_batch=7
    )


class Padded(CausalLM):
    """One token is never learned."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.embed.padding_idx = 9


def padded() -> Job:
    return language().with_(model=Padded)


def decayed(params: Any) -> torch.optim.Optimizer:
    """Weight decay for matrices alone."""
    listed = list(params)
    groups = [
        {"params": [p for p in listed if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.05)


class Setting(NamedTuple):
    """A job and a plan of two ranks, or of one, and the sizes of the batches if not the job's."""

    job: Callable[[], Job]
    plan: Callable[[Job], Plan]
    sizes: tuple[int, ...] = ()


def fixed(plan: Plan) -> Callable[[Job], Plan]:
    return lambda job: plan


HEADS = Plan((tensor("heads*", "width@blocks.0.mlp"),))
VOCABULARY = Plan((tensor("vocabulary*", "classes*"),))


def staged(job: Job) -> Plan:
    return Plan((pipeline(),), cuts(job, 2), micro_batches=2)


SETTINGS = {
    "data": Setting(language, fixed(Plan((data(),)))),
    "data, 2 micro-batches": Setting(language, fixed(Plan((data(),), micro_batches=2))),
    "data, a scheduler": Setting(partial(language, adamw_cosine), fixed(Plan((data(),)))),
    "data, a mean": Setting(regression, fixed(Plan((data(),)))),
    "data, dropout": Setting(dropped, fixed(Plan((data(),)))),
    "data, batch norm": Setting(normed, fixed(Plan((data(),)))),
    "micro-batches": Setting(language, fixed(Plan(micro_batches=2))),
    "micro-batches, dropout": Setting(dropped, fixed(Plan(micro_batches=2))),
    "zero 1": Setting(language, fixed(Plan((data(),), zero=1))),
    "zero 1, groups": Setting(partial(language, decayed), fixed(Plan((data(),), zero=1))),
    "zero 3": Setting(language, fixed(Plan((data(),), zero=3))),
    "tensor": Setting(language, fixed(HEADS)),
    "tensor, dropout": Setting(dropped, fixed(Plan((PlanAxis("tensor", 2, ("width",)),)))),
    "tensor, vocabulary": Setting(language, fixed(VOCABULARY)),
    "tensor, padding": Setting(padded, fixed(VOCABULARY)),
    "sequence": Setting(language, fixed(Plan((tensor("sequence"),)))),
    "pipeline": Setting(language, staged),
    "pipeline, tied": Setting(partial(language, tied=True), staged),
}

MUTATIONS: list[tuple[Bug, str]] = [
    (bugs.no_sum_after_a_contraction, "tensor"),
    (bugs.no_sum_in_backward, "tensor"),
    (bugs.whole_gradient_summed_again, "tensor, dropout"),
    (bugs.no_sum_of_gradients, "data"),
    (bugs.gradients_averaged_over_ranks, "data"),
    (bugs.bias_added_on_every_rank, "tensor"),
    (bugs.skip_gradient_dropped_at_a_cut, "pipeline"),
    (bugs.each_rank_divides_by_its_own_count, "data"),
    (bugs.each_micro_batch_divides_by_one_count, "micro-batches"),
    (bugs.mean_of_the_rank_s_own_elements, "data, a mean"),
    (bugs.accumulation_averaged, "data, 2 micro-batches"),
    (bugs.accumulation_averaged, "pipeline"),
    (bugs.loss_scaled_twice, "pipeline"),
    (bugs.accumulation_wiped, "data, 2 micro-batches"),
    (bugs.gradients_sent_before_the_last_micro_batch, "data, 2 micro-batches"),
    (bugs.norm_of_a_shard_taken_for_the_whole, "zero 1"),
    (bugs.norm_of_a_shard_taken_for_the_whole, "tensor"),
    (bugs.replicated_parameters_counted_once_per_rank, "data"),
    (bugs.largest_entry_taken_for_the_norm, "data"),
    (bugs.tied_weights_not_summed_over_stages, "pipeline, tied"),
    (bugs.updated_parts_not_fetched, "zero 1"),
    (bugs.stale_gather, "zero 3"),
    (bugs.own_part_of_gradients_not_summed, "zero 1"),
    (bugs.own_part_of_gradients_not_summed, "zero 3"),
    (bugs.parts_joined_in_another_order, "tensor"),
    (bugs.fused_weight_cut_in_one_piece, "tensor"),
    (bugs.groups_made_by_the_shapes_of_parts, "zero 1, groups"),
    (bugs.same_mask_on_every_rank, "data, dropout"),
    (bugs.same_mask_for_every_micro_batch, "micro-batches, dropout"),
    (bugs.other_mask_on_every_rank, "tensor, dropout"),
    (bugs.same_mask_in_every_step, "data, dropout"),
    (bugs.same_mask_in_every_operator, "data, dropout"),
    (bugs.each_rank_draws_its_own_weights, "data"),
    (bugs.statistics_of_the_rank_s_own_samples, "data, batch norm"),
    (bugs.statistics_of_unequal_parts_averaged, "data, batch norm"),
    (bugs.every_rank_reads_the_same_samples, "data"),
    (bugs.scheduler_stepped_once_per_rank, "data, a scheduler"),
    (bugs.causal_mask_from_the_rank_s_own_start, "sequence"),
    (bugs.each_rank_subtracts_its_own_largest_logit, "tensor, vocabulary"),
    (bugs.rows_of_other_ranks_not_masked, "tensor, vocabulary"),
    (bugs.padding_row_learned, "tensor, padding"),
]
"""Bugs that change what is computed, each under a plan where it matters."""

MISCOUNTS: list[tuple[Bug, str]] = [
    (bugs.edges_not_announced, "tensor"),
    (bugs.gathered_twice, "sequence"),
    (bugs.gradients_sent_in_other_buckets, "data"),
]
"""Bugs that change what is sent, and nothing that is computed."""


def run(pool: Pool, setting: str, bug: Bug | None = None) -> list[Errors]:
    job, plan, sizes = SETTINGS[setting]
    made = job()
    split = plan(made)
    return pool(split.ranks).run(compare, made, split, 2, sizes, bug, timeout=60)


def some(cases: Iterable[Any], each: int = 3) -> list[Any]:
    """One of so many cases for every run of the tests; `make prove` has the others."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.prove if i % each else ())
            for i, c in enumerate(cases)]  # fmt: skip


@pytest.mark.parametrize("setting", some(SETTINGS))
def test_without_a_bug_the_proof_passes(pool: Pool, setting: str) -> None:
    for errors in run(pool, setting):
        assert errors.worst < TOLERANCE[torch.float64], errors
        assert errors.traffic == ""


@pytest.mark.parametrize(("bug", "setting"), some(MUTATIONS), ids=lambda x: getattr(x, "__name__", x))
def test_the_proof_fails_for_a_bug(pool: Pool, bug: Bug, setting: str) -> None:
    found = run(pool, setting, bug)
    assert max(errors.worst for errors in found) > TOLERANCE[torch.float64], "the bug went unnoticed"


@pytest.mark.parametrize(("bug", "setting"), some(MISCOUNTS), ids=lambda x: getattr(x, "__name__", x))
def test_collectives_that_were_not_announced_are_seen(pool: Pool, bug: Bug, setting: str) -> None:
    found = run(pool, setting, bug)
    assert all(errors.worst < TOLERANCE[torch.float64] for errors in found)
    assert all(errors.traffic for errors in found), "the bug went unnoticed"
