"""Search: which plans are found for a job, how they are ranked, and why some are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cost.work import exchanged
from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.parallel.layout import PARTIAL, VARIES, WHOLE, Cut
from shardwise.plan.plan import Plan
from shardwise.search.choose import choose
from shardwise.search.strategies import STRATEGIES, Candidate, Maker, strategies
from tests.zoo import ZOO, graph_of


def found(name: str, ranks: int, **changed: Any) -> dict[str, Candidate]:
    return {c.strategy: c for c in strategies(ZOO[name]().with_(**changed), ranks, graph_of(name))}


def plan_of(candidate: Candidate) -> Plan:
    assert candidate.plan is not None, candidate.reason
    return candidate.plan


def test_transformer_is_split_by_heads_and_width() -> None:
    dims = plan_of(found("llama", 2)["tensor"]).axes[0].dims
    assert any(d.startswith("heads@") for d in dims)
    assert any(d.startswith("width@") and "mlp" in d for d in dims)


def test_every_strategy_has_a_candidate_that_fits_the_ranks() -> None:
    for ranks in (2, 4, 8):
        for strategy, candidate in found("gpt2", ranks).items():
            if strategy == "hybrid" and ranks == 2:
                assert candidate.plan is None and "product of two axes" in candidate.reason
            elif candidate.plan is not None:
                assert candidate.plan.ranks == ranks
                assert Plan.parse(candidate.plan.text()) == candidate.plan
    assert [c.strategy for c in strategies(ZOO["gpt2"](), 2, graph_of("gpt2"))] == list(STRATEGIES)


def test_eight_ranks_make_a_product_of_three_axes() -> None:
    plan = plan_of(found("gpt2", 8)["hybrid"])
    assert [(a.name, a.size) for a in plan.axes] == [("pipeline", 2), ("data", 2), ("tensor", 2)]


def test_batch_that_does_not_divide_is_not_split() -> None:
    refused = found("gpt2", 4, global_batch=6)["data"]
    assert refused.plan is None
    assert "6 samples" in refused.reason and "4 or 8" in refused.reason


def test_stages_are_balanced_by_work() -> None:
    wide = [nn.Linear(16, 2048), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 8)]
    thin = [nn.Linear(8, 8) for _ in range(6)]
    sample = ZOO["sum_count_mlp"]()
    job = sample.with_(model=lambda: nn.Sequential(*wide, *thin), global_batch=512)
    maker = Maker(job, Graph.of(job))
    plan = maker.plan({"pipeline": 2})
    split = maker.split(plan)
    work = [sum(op.context.work.at(512) for op in split.graph.ops[a:b]) for a, b in split.bounds]
    # Cutting at the middle of ten layers would leave one stage with nearly all of the work.
    assert min(work) / sum(work) < 0.5 and len(split.graph.ops[: split.bounds[0][1]]) < len(split.graph.ops) / 2


def test_batch_norm_keeps_the_pipeline_at_one_micro_batch() -> None:
    assert plan_of(found("convnet_bn", 2)["pipeline"]).micro_batches == 1
    assert plan_of(found("gpt2", 2)["pipeline"]).micro_batches > 1


def test_plans_are_ranked_by_their_price() -> None:
    ranked = choose(ZOO["gpt2"](), 2, graph_of("gpt2"))
    assert [r.seconds for r in ranked] == sorted(r.seconds for r in ranked)
    assert all(r.seconds == pytest.approx(sum(r.terms.values())) for r in ranked)
    assert choose(ZOO["gpt2"](), 1, graph_of("gpt2"))[0].plan.ranks == 1


def test_slow_links_favour_the_plan_that_sends_least() -> None:
    job = ZOO["gpt2"]().with_(global_batch=512)
    graph = graph_of("gpt2")
    plans = {c.strategy: plan_of(c) for c in strategies(job, 2, graph) if c.plan is not None}
    slow, fast = Cluster.load("2x1xh100-sxm+ethernet-1"), Cluster.load("2xh100-sxm").with_links(100, instant=True)

    def seconds(name: str, cluster: Cluster) -> float:
        return Maker(job, graph, cluster).price(plans[name]).step

    # A tensor split sends activations, which grow with the batch; a data split sends gradients, which do not.
    assert seconds("data", slow) < seconds("tensor", slow)
    one = Maker(job, graph, Cluster.load("1xh100-sxm")).price(Plan()).step
    for name in ("data", "tensor"):
        assert seconds(name, fast) < one


def test_what_nothing_splits_is_refused_with_every_reason() -> None:
    odd = Job(
        model=lambda: nn.Linear(3, 5),
        data=TensorDataset(torch.zeros(14, 3), torch.zeros(14, 5)),
        loss=lambda out, batch: (out - batch[1]).square().mean(),
        global_batch=7,
    )
    with pytest.raises(PlanError, match=r"nothing splits .* over 64 ranks: data: .*tensor: .*pipeline: "):
        choose(odd, 64)
    with pytest.raises(PlanError, match="at least 1 rank"):
        strategies(odd, 0)


def test_conversions_and_their_gradients() -> None:
    cut, other = Cut(0, 0), Cut(1, 0)
    assert exchanged(PARTIAL, WHOLE) == (("all_reduce",), ())
    assert exchanged(PARTIAL, VARIES) == (("all_reduce",), ("all_reduce",))
    assert exchanged(PARTIAL, cut) == (("reduce_scatter",), ("all_gather",))
    assert exchanged(cut, VARIES) == (("all_gather",), ("reduce_scatter",))
    assert exchanged(cut, other) == (("all_to_all",), ("all_to_all",))
    assert exchanged(cut, cut) == ((), ())
