"""Prices: what they are made of is exact where it can be, and moves the right way where it cannot."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd.graph import saved_tensors_hooks

from shardwise.cost.estimate import Estimate
from shardwise.cost.kernels import Kernels
from shardwise.cost.pairs import NEIGHBOURS
from shardwise.cost.place import places
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES, profile
from shardwise.cost.timeline import pipeline_seconds
from shardwise.cost.traits import Traits
from shardwise.cost.work import Product, Work
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import joined
from shardwise.errors import MachineError, PlanError
from shardwise.graph.blocks import blocks
from shardwise.graph.capture import LossModule
from shardwise.graph.graph import Graph
from shardwise.graph.saved import saved
from shardwise.job import Job, batch_tensors
from shardwise.machine.cluster import Cluster
from shardwise.machine.device import device
from shardwise.machine.quantity import Quantity
from shardwise.parallel.layout import SplitAxis
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.strategies import Maker
from tests.pool import Pool
from tests.zoo import ZOO, graph_of

H100 = Cluster.load("2x8xh100-sxm")


def long(*values: Any) -> list[Any]:
    """Values of a test that `make prove` alone runs."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=pytest.mark.prove) for case in cases]


@cache
def pricer_of(name: str, framework: str = "shardwise") -> Pricer:
    return Pricer(graph_of(name), profile(framework))


@cache
def tensor_dims(name: str, ranks: int) -> tuple[str, ...]:
    plan = Maker(ZOO[name](), graph_of(name)).candidate("tensor", ranks).plan
    assert plan is not None
    return plan.axes[0].dims


def stages(name: str, count: int) -> tuple[str, ...]:
    block = max(blocks(graph_of(name)), key=lambda b: b.count)
    return tuple(graph_of(name).ops[block.start + k * block.length].id for k in range(1, count))


def price(name: str, plan: Plan, batch: int = 8, framework: str = "shardwise", cluster: Cluster = H100) -> Estimate:
    return pricer_of(name, framework).price(plan, cluster, batch)


def data(size: int, zero: int = 0) -> Plan:
    return Plan((PlanAxis("data", size, ("batch",)),), zero=zero)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_state_are_counted_whole() -> None:
    count = sum(p.numel() for p in ZOO["gpt2_dropout"]().build("meta").parameters())
    memory = price("gpt2_dropout", Plan()).memory
    assert memory["parameters"] == memory["gradients"] == 4 * count
    assert memory["optimizer"] == 8 * count


@pytest.mark.parametrize(("zero", "shared"), [(0, ()), (1, ("optimizer",)), (2, ("optimizer", "gradients")),
                                              (3, ("optimizer", "gradients", "parameters"))])  # fmt: skip
def test_zero_shares_what_its_stage_says(zero: int, shared: tuple[str, ...]) -> None:
    whole, found = price("gpt2_dropout", data(4)).memory, price("gpt2_dropout", data(4, zero)).memory
    for item in ("parameters", "gradients", "optimizer"):
        assert found[item] == whole[item] / (4 if item in shared else 1)


def test_ranks_that_share_the_batch_share_its_activations() -> None:
    two, four = (price("gpt2_dropout", data(ranks)).memory["activations"] for ranks in (2, 4))
    gradient = 4 * max(v.numel().at(1) for v in graph_of("gpt2_dropout").params.values())
    assert two / 2 <= four <= two / 2 + gradient, "backward makes gradients of parameters whole"


class Table(nn.Module):
    """A large table, whose gradient is there twice while it is added to another, and an LSTM, which needs room."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(4096, 128), nn.LSTM(128, 128, batch_first=True)
        self.logits = nn.Linear(128, 512)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.layer(self.table(ids))[0]).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("micros", [1, 4])
def test_memory_is_what_torch_allocates_at_the_peak(micros: int) -> None:
    samples = [(torch.arange(64) * i % 4096, torch.tensor(i)) for i in range(16)]
    whole = Job(
        model=Table, data=samples, loss=lambda out, batch: F.cross_entropy(out, batch[1]), global_batch=16,
        optimizer=lambda params: torch.optim.AdamW(params, fused=True),
    )  # fmt: skip
    graph, plan = Graph.of(whole), Plan(micro_batches=micros)
    batch = whole.batch(range(16))

    def steps() -> None:
        engine = parallelize(whole, plan, graph=graph)
        for _ in range(2):
            engine.step(batch)

    foretold = Pricer(graph).price(plan, Cluster.load("1xh100-sxm"), 16).memory
    assert sum(foretold.values()) - foretold["reserve"] == pytest.approx(allocated(steps), rel=0.05)


def allocated(run: Callable[[], object]) -> int:
    """Bytes that torch has allocated at the fullest moment of a run, and not freed."""
    now, most = 0, 0
    # What others left must not be freed meanwhile: the profiler takes it for what it saw come at that address before.
    gc.collect()
    gc.disable()
    # As little as a profiler can be: what torch allocates and frees, in order.
    torch.autograd._enable_profiler_legacy(  # type: ignore[attr-defined]
        ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    )
    try:
        kept = run()
    finally:
        gc.enable()
        threads = torch.autograd._disable_profiler_legacy()  # type: ignore[attr-defined]
    for events in threads:
        for event in events:
            now += event.cpu_memory_usage() if event.kind() == "memory_alloc" else 0
            most = max(most, now)
    del kept
    return most


def test_stages_have_each_weight_once() -> None:
    graph = graph_of("llama")
    cuts = stages("llama", 2)
    plan = Plan((PlanAxis(PIPELINE, 2),), cuts, micro_batches=4)
    whole = sum(v.numel().at(1) for v in graph.params.values()) * 4
    tied = graph.params["model.embed_tokens.weight"].numel().at(1) * 4 if "lm_head.weight" not in graph.params else 0
    assert sum(rank["parameters"] for rank in price("llama", plan).ranks) == whole + tied


def test_a_plan_for_more_ranks_than_there_are_is_refused() -> None:
    with pytest.raises(PlanError, match="needs 32 ranks, but cluster 2x8xh100-sxm has 16"):
        price("llama", data(32), 32)


# A trace of some models has masks that they leave out when they are run; of these it has none.
@pytest.mark.parametrize(
    "name", ["gpt2", "unet", "convnet_bn", "lstm_tagger", *long("bert", "vit", "resnet", "qkv_attention")]
)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    whole = ZOO[name]()
    module, batch = whole.build(), whole.batch(range(whole.global_batch))
    given_ = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in given_:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    alive: list[Any] = []
    tensors = batch_tensors(batch)
    given_ |= {t.untyped_storage().data_ptr() for t in tensors}
    with saved_tensors_hooks(lambda t: (alive.append(t), pack(t))[1], lambda t: t):
        LossModule(module, whole, batch).train()(*tensors)
    graph = graph_of(name)
    counted = sum(Work(graph, (), saved(graph)).kept(whole.global_batch, attention="observed"))
    assert counted == pytest.approx(sum(kept.values()), rel=0.05)


@pytest.mark.parametrize("name", ["llama", *long("gpt2", "bert")])
def test_what_is_fused_keeps_less(name: str) -> None:
    graph = graph_of(name)
    kept = [
        sum(Work(graph, (), saved(graph), Traits(graph, fused=fused)).kept(8)) for fused in ("none", "modules", "all")
    ]
    assert kept[0] >= kept[1] >= kept[2] > 0


def test_a_bias_runs_inside_of_its_product_and_keeps_nothing_of_its_own() -> None:
    graph = graph_of("gpt2")
    traits = Traits(graph, fused="modules")
    biased = {op for op in graph.ops if traits.of[op].bias}
    products = {op for op in graph.ops if traits.kinds[op] == "product"} - set(traits.heads)
    assert len(biased) == len(products) > 0
    work = Work(graph, (), saved(graph), traits)
    assert not any(task.moved or task.calls for task in work.tasks(8) if task.op in biased)
    # What an activation is of is kept once: it is the product's own output, and no sum next to it.
    wide = next(op for op in graph.ops if op in biased and op.module.endswith("mlp.c_fc"))
    act = [op for op in graph.ops if op.module.endswith("h.0.mlp.act")]
    assert sum(size for op, size in zip(graph.ops, work.kept(8), strict=True) if op in act) == pytest.approx(
        work.local_bytes(wide.outputs[0], 8)
    )


def test_recompute_keeps_less_and_takes_longer() -> None:
    plain, again = price("llama", Plan()), price("llama", Plan(recompute=("model.layers.*",)))
    assert again.memory["activations"] < 0.7 * plain.memory["activations"]
    width = graph_of("llama").params["model.norm.weight"].numel().at(1)
    inputs = 8 * 16 * width * 4 * pricer_of("llama").copies
    assert again.memory["activations"] > inputs, "each layer keeps what it is given"
    assert 1.1 < again.seconds["compute"] / plain.seconds["compute"] < 1.5


def test_whether_it_fits() -> None:
    small = Cluster.load("1xt4")
    assert price("gpt2", Plan(), cluster=small).fits
    assert not price("gpt2", Plan(), batch=10**7, cluster=small).fits


# --- messages ---------------------------------------------------------------------------------------------------------


def edges(whole: Job, plan: Plan) -> Counter[tuple[str, int]]:
    """The collectives of the edges of a rank's program: kind and bytes of the whole tensor. Runs on each rank."""
    found: Counter[tuple[str, int]] = Counter()
    with joined():
        engine = parallelize(whole, plan)
        model, samples = engine.model, whole.global_batch
        for program in model.programs.values():
            for node in program.module.graph.nodes:
                for kind, axis, value, _, *more in [*node.meta.get("sends", []), *node.meta.get("answers", [])]:
                    if axis.size > 1:
                        dtype, times = more or (value.dtype, 1)
                        found[kind, value.numel().at(samples) * dtype.itemsize * times] += 1
    return found


@pytest.mark.parametrize(
    ("name", "sequence"),
    [("llama", True), *long(("llama", False), ("gpt2", True), ("gpt2", False), ("vit", False))],
)
def test_messages_of_a_tensor_axis_are_those_of_the_program(pool: Pool, name: str, sequence: bool) -> None:
    dims = (*tensor_dims(name, 2), "sequence") if sequence else tensor_dims(name, 2)
    plan = Plan((PlanAxis("tensor", 2, dims),))
    counted: Counter[tuple[str, int]] = Counter()
    whole = ZOO[name]()
    graph = graph_of(name)
    for task in Work(graph, (SplitAxis("tensor", 2, dims),), saved(graph)).tasks(whole.global_batch):
        counted.update((m.kind, int(m.size)) for m in (*task.forward, *task.backward))
    assert counted == pool(2).run(edges, whole, plan, timeout=60)[0]


# --- seconds ----------------------------------------------------------------------------------------------------------


def test_a_large_product_reaches_what_the_device_reaches() -> None:
    h100 = device("h100-sxm")
    seconds = Kernels(h100).product(Product(1, 16384, 16384, 16384), torch.bfloat16)
    rate = 2 * 16384**3 / seconds
    assert rate == pytest.approx(h100.peak("bf16") * h100.matmul.value, rel=0.05)


def test_a_thin_product_is_bound_by_memory() -> None:
    h100 = device("h100-sxm")
    seconds = Kernels(h100).product(Product(1, 1, 16384, 16384), torch.bfloat16)
    assert seconds == pytest.approx(2 * 16384**2 / (h100.bandwidth.value * h100.reached.value), rel=0.01)


@given(st.integers(0, 14), st.integers(0, 14), st.integers(0, 14), st.integers(1, 3))
def test_a_larger_product_never_takes_less(rows: int, columns: int, depth: int, more: int) -> None:
    kernels = Kernels(device("a100-80gb"))
    small = kernels.product(Product(1, 2**rows, 2**columns, 2**depth), torch.bfloat16)
    large = kernels.product(Product(1, 2 ** (rows + more), 2**columns, 2**depth), torch.bfloat16)
    assert small <= large * 1.0001


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 12), st.floats(0.1, 2), st.floats(0.1, 4))
def test_equal_stages_take_what_the_formula_says(ranks: int, times: int, forward: float, backward: float) -> None:
    micros = ranks * times
    found = pipeline_seconds("1f1b", ranks, micros, [forward] * ranks, [backward] * ranks, [0.0] * (ranks - 1))
    assert found == pytest.approx((micros + ranks - 1) * (forward + backward))


@pytest.mark.parametrize(("ranks", "micros"), [(1, 3), (2, 5), (4, 8)])
def test_a_turn_is_lost_where_forward_and_backward_alternate(ranks: int, micros: int) -> None:
    found = pipeline_seconds("1f1b", ranks, micros, [1.0] * ranks, [2.0] * ranks, [0.0] * (ranks - 1), [0.5] * ranks)
    # Every backward of the last rank follows its forward; filling and draining loses none.
    assert found == pytest.approx((ranks - 1) * 3.0 + micros * (3.0 + 0.5 * (ranks > 1)))
    # With all forwards before all backwards each rank turns once, one behind the other.
    gpipe = pipeline_seconds("gpipe", ranks, micros, [1.0] * ranks, [2.0] * ranks, [0.0] * (ranks - 1), [0.5] * ranks)
    assert gpipe == pytest.approx((ranks - 1) * 3.0 + micros * 3.0 + 0.5 * ranks * (ranks > 1))


def test_interleaved_stages_wait_less() -> None:
    whole = pipeline_seconds("1f1b", 4, 8, [2.0] * 4, [4.0] * 4, [0.0] * 3)
    parts = pipeline_seconds("interleaved", 4, 8, [1.0] * 8, [2.0] * 8, [0.0] * 7)
    halves = pipeline_seconds("zero-bubble", 4, 8, [1.0] * 8, [2.0] * 8, [0.0] * 7)
    work = 8 * 6.0
    # Narayanan et al. (2021): as many times less idle as there are stages on a rank.
    assert parts - work == pytest.approx((whole - work) / 2)
    assert halves <= parts


def test_a_bubble_is_filled_by_what_comes_in_halves() -> None:
    """By products, which leave the gradients of their weights for later, and not by recurrent layers, which cannot."""
    times = [1.0] * 4, [2.0] * 4, [0.0] * 3
    halves, whole = (pipeline_seconds("zero-bubble", 4, 8, *times, later=[later] * 4) for later in (1.0, 0.0))
    assert halves < whole == pytest.approx(pipeline_seconds("1f1b", 4, 8, *times))
    cluster = Cluster.load("2x8xh100-sxm")
    for name, op, share in (("gpt2", "aten.linear", 0.5), ("lstm_tagger", "aten.lstm", 0.0)):
        case = pricer_of(name).case(Plan((PlanAxis(PIPELINE, 2),), ("-",), schedule="zero-bubble"), cluster, 8)
        table = case.tables[1]
        for at in (i for i, each in enumerate(table.graph.ops) if each.name == op and each.inputs):
            stage = table.taken([at, at + 1], NEIGHBOURS).pick(0)
            assert float(stage.later) == pytest.approx(share * float(stage.backward)), (name, at)


def test_the_slowest_stage_sets_the_pace() -> None:
    found = pipeline_seconds("1f1b", 2, 100, [1.0, 3.0], [1.0, 3.0], [0.0])
    assert found == pytest.approx(100 * 6 + 2, rel=0.01)


def test_a_faster_network_is_never_slower() -> None:
    slow, fast = Cluster.load("2x8xh100-sxm+ethernet-1"), Cluster.load("2x8xh100-sxm")
    for plan in (data(16), data(16, 3), Plan((PlanAxis("tensor", 2, tensor_dims("llama", 2)),))):
        assert price("llama", plan, 16, cluster=fast).step <= price("llama", plan, 16, cluster=slow).step


def test_items_add_up() -> None:
    axes = (PlanAxis(PIPELINE, 2), PlanAxis("data", 2, ("batch",)), PlanAxis("tensor", 2, tensor_dims("llama", 2)))
    plan = Plan(axes, stages("llama", 2), micro_batches=4)
    found = price("llama", plan, 16, "megatron")
    assert {"compute", "communication data", "communication tensor", "bubble", "update"} <= set(found.seconds)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.step == pytest.approx(sum(found.seconds.values()))
    assert found.peak == pytest.approx(max(sum(rank.values()) for rank in found.ranks))


def test_of_what_is_gathered_the_own_part_is_kept() -> None:
    dims = (*tensor_dims("llama", 2), "sequence")
    plan = Plan((PlanAxis("tensor", 2, dims),))
    both = [
        Pricer(graph_of("llama"), replace(PROFILES["nanotron"], regather=regather, call=call)).price(plan, H100, 8)
        for regather, call in ((False, 0.0), (True, 0.0), (True, 1.0))
    ]
    whole, ahead, behind = (found.memory for found in both)
    assert ahead["activations"] == behind["activations"] < whole["activations"]
    # The rest waits for the device, unless the host is the slower.
    assert ahead["buffers"] > behind["buffers"] == whole["buffers"] == 0


def test_what_an_allocator_keeps_besides_gives_way_in_part() -> None:
    framework = replace(PROFILES["nanotron"], fragments=1.0, reserve=0.0, outside=0.0)
    plan = Plan((PlanAxis(PIPELINE, 2),), stages("llama", 2), micro_batches=4, schedule="gpipe")
    roomy = Pricer(graph_of("llama"), framework).price(plan, H100, 16)
    whole = Pricer(graph_of("llama"), replace(framework, fragments=0.0)).price(plan, H100, 16)
    loose = roomy.peak - whole.peak
    assert loose > 0
    for share, fits in ((0.9, True), (0.7, True), (0.5, False)):
        room = (whole.peak + share * loose) / roomy.limits[0]
        tight = Pricer(graph_of("llama"), framework).price(plan, H100.with_memory(room), 16)
        assert tight.fits == fits
        assert tight.peak == pytest.approx(whole.peak + max(share, 0.6) * loose)


def test_what_comes_behind_the_last_product_has_passes_of_its_own() -> None:
    def compute(passes: float, loss: float) -> float:
        framework = replace(PROFILES["nanotron"], passes=passes, loss=loss)
        return Pricer(graph_of("llama"), framework).price(Plan(), H100, 8).seconds["compute"]

    # Scores and loss take their part of what memory bounds, and not all of it.
    assert (
        compute(2.0, 0.0)
        == compute(2.0, 2.0)
        == pytest.approx(compute(1.0, 2.0) + compute(2.0, 1.0) - compute(1.0, 1.0))
    )
    assert compute(1.0, 1.0) < compute(1.0, 2.0) < compute(2.0, 2.0)


def test_shards_and_buckets_take_the_host_s_and_the_network_s_time() -> None:
    plain = replace(PROFILES["nanotron"], shard=0.0, bucket=0.0, overlap_data=0.0)
    entries = price("llama", data(8), 8, "nanotron").memory["parameters"] / 2
    count, start = len(graph_of("llama").params), H100.path(range(8)).parts("all_reduce")[0]
    for zero, more, expected in ((1, {"shard": 1e-3}, 8e-3 * count), (0, {"bucket": entries / 4}, 3 * start)):
        slower = replace(plain, **more)
        slow, fast = (Pricer(graph_of("llama"), p).price(data(8, zero), H100, 8) for p in (slower, plain))
        assert slow.step - fast.step == pytest.approx(expected)


def test_a_stage_sends_over_the_hop_behind_it() -> None:
    found = places(Plan((PlanAxis(PIPELINE, 4), PlanAxis("data", 4, ("batch",))), ("a", "b", "c")), H100)
    assert [place.routes[PIPELINE].nodes for place in found] == [1, 2, 1, 1]


def test_a_host_that_starts_operators_slowly_shows() -> None:
    slow = replace(PROFILES["shardwise"], call=1e-3)
    found = Pricer(graph_of("llama"), slow).price(Plan(), H100, 8)
    assert found.seconds["overhead"] > 10 * found.seconds["compute"]
    assert price("llama", Plan()).seconds["overhead"] == 0


def test_an_unknown_profile_is_one_clear_message() -> None:
    with pytest.raises(MachineError, match="no profile is called 'jax'; there are shardwise"):
        profile("jax")


# Two processors are busy as soon as two of 1, 2, 2, 2, 1 ranks are at work, or of 1, 2, 3, 4, ..., 3, 2, 1.
@pytest.mark.parametrize(("ranks", "micros", "lost"), [(2, 8, 0), (4, 1, 1 / 3), (4, 2, 1 / 6), (4, 8, 1 / 6)])
def test_a_rank_that_waits_leaves_its_processor_to_the_others(ranks: int, micros: int, lost: float) -> None:
    cluster = Cluster.load("4xcpu-core")
    kind = replace(cluster.nodes[0].device, crowd=Quantity(2.0, "a test"))
    shared = replace(cluster, nodes=(replace(cluster.nodes[0], device=kind),))
    plan = Plan((PlanAxis(PIPELINE, ranks),), stages("llama", ranks), micro_batches=micros)
    alone, crowded = (price("llama", plan, batch=32, cluster=c).seconds for c in (cluster, shared))
    messages, bubble = crowded["communication pipeline"], alone["bubble"]
    assert bubble > 0.05 * alone["compute"] and bubble > messages > 0
    assert crowded["bubble"] == pytest.approx((bubble - messages) * lost, abs=0.03 * bubble)
    assert crowded == alone | {name: crowded[name] for name in ("bubble", "communication pipeline")}


def test_gradients_of_tied_weights_are_summed_over_the_stages_that_use_them() -> None:
    plan = Plan((PlanAxis(PIPELINE, 2),), stages("gpt2_dropout", 2), micro_batches=2)
    tied = graph_of("gpt2_dropout").params["transformer.wte.weight"].numel().at(1)
    route = places(plan, H100)[0].routes[PIPELINE]
    fixed, each = route.parts("all_reduce")
    found = price("gpt2_dropout", plan).seconds
    assert found["communication pipeline"] == pytest.approx(fixed + 4 * tied * each)
    assert "communication pipeline" not in price("llama", replace(plan, cuts=stages("llama", 2))).seconds
