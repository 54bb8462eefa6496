"""What profiles and groups of ranks change in a price: each number moves what it is said to move, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from shardwise.cost.estimate import Estimate
from shardwise.cost.kernels import Kernels
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES, Besides, Profile
from shardwise.cost.timeline import ahead_seconds, pipeline_seconds
from shardwise.cost.work import Product, Work
from shardwise.graph.saved import saved
from shardwise.machine.cluster import Cluster
from shardwise.machine.device import device
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.space import layer_patterns
from tests.zoo import ZOO, graph_of

NODES = Cluster.load("2x8xh100-sxm")
FSDP = PROFILES["fsdp"]
SIXTEEN = (PlanAxis("data", 16, ("batch",)),)


@cache
def pricer(profile: Profile = FSDP) -> Pricer:
    return Pricer(graph_of("llama"), profile)


def price(plan: Plan, profile: Profile = FSDP, *, cluster: Cluster = NODES, **more: Any) -> Estimate:
    return pricer(profile).price(plan, cluster, 16, **more)


def test_what_runs_behind_computing_slows_it() -> None:
    for zero in (0, 1, 3):
        plan = Plan(SIXTEEN, zero=zero)
        free, held, full = (price(plan, replace(FSDP, contention=share)) for share in (0.0, 0.35, 1.0))
        assert free.hidden["data"] > 0 and not full.hidden
        assert held.step - free.step == pytest.approx(0.35 * free.hidden["data"])
        assert full.step - free.step == pytest.approx(free.hidden["data"])


def test_weights_travel_in_their_own_width() -> None:
    thin, wide = (price(Plan(SIXTEEN, zero=3), replace(FSDP, send_weight=n, contention=1.0)) for n in (2, 4))
    own = price(Plan(SIXTEEN, zero=3), replace(FSDP, send_weight=0, weight=4, contention=1.0))
    assert thin.step < wide.step == pytest.approx(own.step)


def test_groups_of_ranks_hold_more_and_send_less_between_nodes() -> None:
    slow = Cluster.load("2x8xh100-sxm+ethernet-1")
    plan = Plan(SIXTEEN, zero=3)
    all_of_them, node = (price(plan, cluster=slow, besides=Besides(shards=shards)) for shards in (0, 8))
    assert node.step < all_of_them.step
    for item in ("parameters", "gradients", "optimizer"):
        assert node.memory[item] == pytest.approx(2 * all_of_them.memory[item])
    assert price(plan, besides=Besides(shards=16)).step == pytest.approx(price(plan).step)


def test_a_context_axis_shares_what_is_sharded() -> None:
    eight = (PlanAxis("data", 8, ("batch",)),)
    alone, spread = (price(Plan(eight, zero=3), besides=Besides(spread=spread)) for spread in (1, 2))
    for item in ("parameters", "gradients", "optimizer"):
        assert alone.memory[item] == pytest.approx(2 * spread.memory[item])
    assert alone.memory["activations"] == spread.memory["activations"]


def test_a_context_axis_shares_the_optimizer_alone_where_zero_does() -> None:
    axes = (PlanAxis("data", 4, ("batch",)), PlanAxis("context", 4, ("sequence",)))
    own, shared = (price(Plan(axes, zero=1), besides=Besides(spread=n)).memory for n in (1, 4))
    assert shared["optimizer"] == pytest.approx(own["optimizer"] / 4)
    assert shared["gradients"] == own["gradients"] and shared["parameters"] == own["parameters"]


def test_a_loss_in_one_operator_keeps_the_scores_alone() -> None:
    whole, batch = graph_of("llama"), ZOO["llama"]().global_batch
    (head,) = pricer().traits.heads
    scores = head.outputs[0].numel().at(batch)
    assert head.outputs[0].sizes[-1].coefficient == whole.params["lm_head.weight"].sizes[0].at(1)
    two, four = (sum(Work(whole, (), saved(whole), scores=n).kept(batch)) for n in (2.0, 4.0))
    assert four - two == pytest.approx(2 * scores)
    work = Work(whole, (), saved(whole), scores=2.0)
    behind = [op for op in whole.ops if work.traits.of[op].last]
    assert behind and not any(work.largest(op, batch) for op in behind)


def test_fetching_sharded_weights_takes_longer_than_their_bytes() -> None:
    def sent(fetch: float) -> float:
        framework = replace(FSDP, fetch=fetch, overlap_gather=0.0)
        return price(Plan(SIXTEEN, zero=3), framework).seconds["communication data"]

    starts = sent(0.0)
    assert starts > 0
    assert sent(3.0) - starts == pytest.approx(3 * (sent(1.0) - starts))


def test_a_broadcast_of_each_share_starts_as_often_as_there_are_ranks() -> None:
    plan = Plan(SIXTEEN, zero=1)
    gather, each = (price(plan, replace(FSDP, broadcasts=b, overlap_gather=0.0)) for b in (False, True))
    from_all = NODES.path(range(16)).parts("all_gather")[0]
    assert each.step - gather.step == pytest.approx(15 * from_all)


def test_computing_again_may_stop_where_a_block_keeps_nothing_more() -> None:
    plan = Plan(recompute=layer_patterns(graph_of("llama")))
    whole, part = (price(plan, replace(FSDP, stops=stops)).seconds["compute"] for stops in (False, True))
    none = price(Plan()).seconds["compute"]
    assert none < part < whole


def test_room_for_more_micro_batches_leaves_less_bubble() -> None:
    ranks, micros, times = 4, 12, ([1.0] * 4, [2.0] * 4, [0.1] * 3)
    once = pipeline_seconds("zero-bubble", ranks, micros, *times)
    single, double, many = (ahead_seconds(most, micros, *times) for most in (4, 8, 12))
    # The last rank begins after three forwards and sends; nothing is faster than its own work behind them.
    assert micros * 3 + 3.3 <= many <= double < single
    assert double < once < pipeline_seconds("1f1b", ranks, micros, *times)
    assert ahead_seconds(1, micros, *times) == pytest.approx(micros * (4 * 3 + 2 * 0.3 - 3 * 1.0), rel=0.01)


def test_every_second_product_may_be_kept_of_a_block_that_is_computed_again() -> None:
    plan = Plan(recompute=layer_patterns(graph_of("llama")))
    whole, part, none = price(plan), price(plan, besides=Besides(selective="products")), price(Plan())
    assert none.step < part.step < whole.step
    assert whole.memory["activations"] < part.memory["activations"] < none.memory["activations"]


def test_products_in_8_bits_are_those_of_layers() -> None:
    layers = pricer().layers
    names = {name for op in layers for name, v in pricer().folded.graph.params.items() if v in op.inputs}
    assert names and not any("lm_head" in name or "embed" in name for name in names)
    devices = device("h100-sxm"), device("a100-80gb")
    for kind, faster in zip(devices, (True, False), strict=True):
        task = next(t for t in pricer().work(()).tasks(1) if t.op in layers)
        task = replace(task, product=Product(1, 8192, 8192, 8192), dtype=torch.bfloat16)
        plain, eight = (Kernels(kind, eight=ops).backward(task) for ops in ((), layers))
        # A device without them computes in what it has, and rounds for nothing.
        assert eight < plain if faster else eight > plain


def test_attention_that_is_not_fused_keeps_its_scores() -> None:
    whole = graph_of("llama")
    work = Work(whole, (), saved(whole))
    batch = ZOO["llama"]().global_batch
    fused, scores = (sum(work.kept(batch, attention=how)) for how in ("fused", "scores"))
    ops = [op for op in whole.ops if work.traits.kinds[op] == "attention"]
    query = [op.context.inputs[0].value for op in ops]
    entries = sum(v.numel().at(batch) / v.sizes[-1].coefficient * v.sizes[-2].at(batch) for v in query)
    statistics = sum(v.numel().at(batch) / v.sizes[-1].coefficient * 4 for v in query)
    outputs = sum(op.outputs[0].bytes().at(batch) for op in ops)
    itemsize = query[0].dtype.itemsize
    # Its output is kept by the product behind it where attention does not keep it.
    assert entries * (2 * itemsize + 1) - statistics - outputs <= scores - fused
    assert scores - fused <= entries * (2 * itemsize + 1) - statistics


def test_attention_written_for_earlier_devices_is_slower_on_later_ones() -> None:
    ampere = Cluster.load("8xa100-80gb")
    for cluster, slower in ((NODES, True), (ampere, False)):
        own, portable = (
            price(Plan(), replace(FSDP, portable=p, call=0.0), cluster=cluster).step for p in (False, True)
        )
        assert own < portable if slower else own == portable
    assert device("a100-80gb").portable is None


def test_backward_in_two_halves_keeps_as_much_on_every_rank() -> None:
    plan = Plan((PlanAxis(PIPELINE, 4),), ("a", "b", "c"), micro_batches=8)
    whole = pricer().case(plan.with_(schedule="1f1b"), NODES, 16)
    halves = pricer().case(plan.with_(schedule="zero-bubble"), NODES, 16)
    assert [whole.flight.most(rank, 4) for rank in range(4)] == [4, 3, 2, 1]
    assert [halves.flight.most(rank, 4) for rank in range(4)] == [4, 4, 4, 4]
