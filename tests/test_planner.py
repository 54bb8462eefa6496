"""The planner: its pick is the one that trying everything picks, and it says how far it looked."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cost.pricer import Pricer
from shardwise.cost.timeline import pipeline_seconds
from shardwise.errors import PlanError
from shardwise.graph.blocks import blocks
from shardwise.graph.capture import Purpose
from shardwise.graph.fold import fold
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.cluster import Cluster, Node
from shardwise.machine.device import device, network
from shardwise.machine.quantity import Quantity
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.search.choose import planner_of, search
from shardwise.search.cuts import cut_places
from shardwise.search.explain import explain
from shardwise.search.planner import Found, Planner, Priced, least_filling
from shardwise.search.space import Options
from shardwise.search.strategies import Maker
from tests import zoo


def perceptron(widths: Sequence[int], batch: int) -> Job:
    def model() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)))

    return Job(
        model=model,
        data=TensorDataset(torch.zeros(512, widths[0]), torch.zeros(512, widths[-1])),
        loss=lambda output, batch: (output - batch[1]).square().mean(),
        optimizer=torch.optim.AdamW,
        global_batch=batch,
    )


class Mixture(nn.Module):
    """Tokens, products with one of four matrices each, and classes. Which matrix does not matter here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 64), nn.Linear(width, 8)
        self.experts = nn.Parameter(torch.zeros(4, 64, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids).flatten(0, 1).bfloat16()
        ends = torch.bincount(ids.flatten() % 4, minlength=4).cumsum(0).to(torch.int32)
        found = torch._grouped_mm(rows, self.experts.bfloat16(), ends).float()
        classes: torch.Tensor = self.head(found.view(*ids.shape, -1))
        return classes


def mixture(width: int, batch: int) -> Job:
    return Job(
        model=lambda: Mixture(width),
        data=TensorDataset(torch.zeros(64, 16, dtype=torch.long)),
        loss=lambda output, batch: output.square().mean(),
        optimizer=torch.optim.AdamW,
        global_batch=batch,
    )


@cache
def graph_of(widths: tuple[int, ...], purpose: Purpose = "train") -> Graph:
    """Of a mixture for one width, of a perceptron for several."""
    return Graph.of(job_of(widths, 8), purpose=purpose)


def job_of(widths: tuple[int, ...], batch: int) -> Job:
    return perceptron(widths, batch) if len(widths) > 1 else mixture(widths[0], batch)


def planner(widths: tuple[int, ...], batch: int, cluster: Cluster, options: Options) -> Planner:
    graph = graph_of(widths, options.purpose)
    return planner_of(Maker(job_of(widths, batch), graph, cluster), cluster, cluster.ranks, options)


def everything(planner: Planner) -> float | None:
    """The best value of every shape of a space with every choice of cuts; None where nothing fits."""
    best = None
    for shape in planner.space.shapes():
        case = planner._case(shape)
        bound = planner.bound(shape)
        places = cut_places(case.tables[0])
        for cuts in itertools.combinations(places, shape.pipeline * shape.chunks - 1):
            priced = Priced(shape.plan([planner.ids[i] for i in cuts]), case.estimate(cuts))
            if planner.fits(priced):
                value = priced.value(planner.space.options.objective)
                assert bound <= value * (1 + 1e-9), "no cuts beat a shape's bound"
                best = value if best is None else min(best, value)
    return best


def cluster_of(name: str) -> Cluster:
    """A known cluster; of a crowded one two ranks share each processor."""
    cluster = Cluster.load(name.partition(",")[0])
    crowd = Quantity(2.0, "for this test") if name == CROWD else None
    return replace(cluster, nodes=tuple(replace(n, device=replace(n.device, crowd=crowd)) for n in cluster.nodes))


Widths = tuple[int, ...]
Wanted = tuple[str, float | None, dict[str, int]]
LAYERS = st.lists(st.sampled_from([64, 256, 2048]), min_size=3, max_size=3).map(tuple)
WIDTHS = LAYERS | st.sampled_from([(64,), (2048,), (256, 256, 256), (2048, 2048, 2048)])
CROWD = "4xcpu-core, crowded"
CLUSTERS = st.sampled_from(
    ["2xh100-sxm", "2x1xh100-sxm", "4x1xa100-80gb+ethernet-1", "2x2xh100-sxm", "4xcpu-core", CROWD]
)
SPLITS = st.sampled_from([{}, {"data": 1}, {"data": 1, "tensor": 1}, {"pipeline": 1}])
OPTIONS = st.tuples(st.sampled_from(["time", "time", "memory"]), st.sampled_from([None, 0.9, 0.6]), SPLITS)


@settings(max_examples=5)
@given(WIDTHS, st.sampled_from([8, 64]), CLUSTERS, OPTIONS)
def test_the_pick_is_the_best_of_everything(widths: Widths, batch: int, name: str, wanted: Wanted) -> None:
    check_pick(widths, batch, name, wanted)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@settings(max_examples=300)
@given(WIDTHS, st.sampled_from([8, 64]), CLUSTERS, OPTIONS)
def test_many_picks_are_the_best_of_everything(widths: Widths, batch: int, name: str, wanted: Wanted) -> None:
    check_pick(widths, batch, name, wanted)


def check_pick(widths: Widths, batch: int, name: str, wanted: Wanted, purpose: Purpose = "train") -> None:
    cluster = cluster_of(name)
    objective, share, fixed = wanted
    whole = Pricer(graph_of(widths, purpose)).price(Plan(), cluster, batch).peak
    options = Options(objective, None if share is None else share * whole, fixed, purpose=purpose)
    made = planner(widths, batch, cluster, options)
    found, best = made.search(), everything(made)
    if best is None:
        assert found.best is None and found.tight is not None and not made.fits(found.tight)
        return
    assert found.best is not None and found.complete
    assert found.best.value(objective) == pytest.approx(best, rel=1e-9)
    assert found.bound <= best * (1 + 1e-9) and found.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["4x1xh100-sxm", CROWD])
def test_no_cuts_of_a_deep_model_beat_a_bound(name: str) -> None:
    """More cuts than are tried: whatever the schedule, some at random are no faster than is said that any can be."""
    draw, widths = random.Random(0), (256, 2048, 256, 64) * 6
    made = planner(widths, 64, cluster_of(name), Options(fixed={"pipeline": 4}, zero=(0,)))
    found, schedules = made.search(), set()
    assert found.best is not None and found.bound <= found.best.value("time")
    for shape in made.space.shapes():
        cuts, case = made._cuts(shape), made._case(shape)
        closer = made._closer(shape, cuts, made.bound(shape))
        assert found.bound <= closer * (1 + 1e-9), "the gap has room for cuts that were not tried"
        for _ in range(10):
            some = sorted(draw.sample(cuts.places, shape.pipeline * shape.chunks - 1))
            step = case.estimate(some).step
            assert not cuts.few and closer <= step * (1 + 1e-9), shape
            schedules.add(shape.schedule)
    assert schedules == {"1f1b", "interleaved", "zero-bubble"}


@pytest.mark.parametrize(("ranks", "chunks", "micros"), [(2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 2, 4)])
def test_uneven_interleaved_stages_fill_sooner_than_even_ones_but_not_below_their_bound(
    ranks: int, chunks: int, micros: int
) -> None:
    draw, stages = random.Random(0), ranks * chunks

    def seconds(sizes: Sequence[float]) -> float:
        forward, backward = ([size * share / sum(sizes) for size in sizes] for share in (1 / 3, 2 / 3))
        return pipeline_seconds("interleaved", ranks, micros, forward, backward, [0.0] * (stages - 1))

    best = [1.0] * stages
    even = seconds(best)
    for _ in range(1500):
        best = min(best, [size * math.exp(draw.gauss(0, 0.1)) for size in best], key=seconds)
    assert (micros + least_filling(ranks, chunks)) / ranks <= seconds(best) < 0.99 * even


def test_what_axes_there_are_is_found_by_what_can_be_cut() -> None:
    cluster = Cluster.load("8xh100-sxm")
    spaces = [planner(widths, 4, cluster, Options()).space for widths in ((2048,), (64, 256, 2048))]
    axes = [{(axis.name, *axis.dims) for shape in space.shapes() for axis in shape.axes} for space in spaces]
    assert {("context", "sequence"), ("expert", "experts", "batch")} <= axes[0]
    assert not {name for name, *_ in axes[1]} & {"context", "expert"}, "a perceptron has neither sequences nor experts"
    made = planner((2048,), 4, cluster, Options(fixed={"context": 2, "expert": 4}))
    best = made.search().best
    assert best is not None and [(axis.name, axis.size) for axis in best.plan.axes] == [("expert", 4), ("context", 2)]


def test_no_more_is_computed_again_than_memory_asks_for() -> None:
    widths, batch, cluster = (2048,) * 9, 65536, Cluster.load("1xh100-sxm")
    whole = Pricer(graph_of(widths)).price(Plan(), cluster, batch).peak
    found = []
    for share in (1.0, 0.9, 0.8, 0.72, 0.6):
        made = planner(widths, batch, cluster, Options(memory=share * whole))
        made.space = replace(made.space, splits_time=False)  # micro-batches would save more
        found.append(made.search().best)
    plans = [best.plan.recompute for best in found if best is not None]
    assert [len(blocks) for blocks in plans[:3]] == [0, 5, 7] and plans[3:] == [("*",)], "and 0.6 is too little"
    steps = [best.estimate.step for best in found if best is not None]
    assert steps == sorted(steps)


class Sorted(nn.Module):
    """Rows in the order of their first entries, a layer, and back in the order they had, numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1024, 1024), nn.Linear(1024, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        order = y[:, 0].argsort()
        found: torch.Tensor = (self.second(y[order].relu()) + order.unsqueeze(1))[order.argsort()]
        return found


def test_samples_that_are_sorted_are_gathered_and_that_is_priced() -> None:
    """The rows travel before they are sorted and before they are put back, and their gradients too."""
    data = TensorDataset(torch.zeros(512, 1024), torch.zeros(512, 1024))
    job = Job(model=Sorted, data=data, loss=lambda out, batch: (out - batch[1]).square().mean(), global_batch=512)
    pricer, plain = Pricer(Graph.of(job)), Pricer(graph_of((1024, 1024, 1024)))
    cluster, plan = Cluster.load("2x1xa100-80gb"), Plan((PlanAxis("data", 2, ("batch",)),))
    one, two = (pricer.price(p, cluster, 100_000) for p in (Plan(), plan))
    assert not plain.coupled and pricer.coupled
    assert two.seconds["compute"] == pytest.approx(one.seconds["compute"] / 2, rel=0.1), "the products are split"
    sent = two.seconds["communication data"] - plain.price(plan, cluster, 100_000).seconds["communication data"]
    link = cluster.path([0, 1])
    assert sent > 3.5 * link.seconds("all_gather", 100_000 * 1024 * 4)


def test_an_interrupt_gives_the_best_so_far_and_its_gap() -> None:
    made = planner((64, 2048, 256, 64), 64, Cluster.load("4xh100-sxm"), Options(fixed={"data": 1, "tensor": 1}))

    def tell(found: Found, left: int) -> None:
        if found.best is not None:
            raise KeyboardInterrupt

    found = made.search(tell)
    assert found.best is not None and not found.complete
    assert found.bound <= made.search().priced[0].value("time") <= found.best.value("time")


def test_cost_takes_fewer_devices_where_more_bring_little() -> None:
    maker = Maker(perceptron((64, 256, 64), 8), graph_of((64, 256, 64)), Cluster.load("4x1xh100-sxm+ethernet-1"))
    quick, cheap = (search(maker, maker.cluster(4), Options(objective)).best for objective in ("time", "cost"))
    assert quick is not None and quick.plan.ranks == 4
    assert cheap is not None and cheap.plan.ranks == 1
    assert cheap.value("cost") < quick.value("cost")


def test_what_a_plan_was_chosen_from_is_told() -> None:
    widths, batch = (2048, 2048, 256), 64
    cluster = Cluster.load("2x2xh100-sxm")
    told = explain(Maker(perceptron(widths, batch), graph_of(widths), cluster), cluster)
    best = told.found.best
    assert best is not None and told.alone is not None and told.alone.plan.ranks == 1
    assert all(other.estimate.step >= best.estimate.step for other in told.others)
    assert len({other.plan for other in (best, *told.others)}) == len(told.others) + 1
    assert [known.best is not None for known in told.known] == [True, True, True]
    assert told.changes is not None and len(told.changes) == 3
    assert all(change is not None and change.estimate.step <= best.estimate.step for change in told.changes.values())


def test_faster_devices_get_more_of_the_model() -> None:
    fast, slow = device("h100-sxm"), device("p40")
    nodes = tuple(Node(1, d, network("ib-ndr")) for d in (slow, fast))
    cluster = Cluster("unlike", nodes)
    widths = (2048,) * 9
    made = planner(widths, 512, cluster, Options(fixed={"pipeline": 2}))
    best = made.search().best
    assert best is not None
    low = graph_of(widths).ops[[op.id for op in graph_of(widths).ops].index(best.plan.cuts[0])].index
    work = [
        sum(op.context.work.at(1) for op in part) for part in (made.pricer.graph.ops[:low], made.pricer.graph.ops[low:])
    ]
    assert work[1] > 3 * work[0], "an H100 computes many times as fast as a P40"


def test_too_little_memory_says_how_much_is_missing() -> None:
    small = replace(device("h100-sxm"), memory=Quantity(1e6, "a test"))
    cluster = Cluster("tiny", (Node(2, small, network("ib-ndr")),))
    found = planner((2048, 2048, 64), 8, cluster, Options()).search()
    assert found.best is None and found.tight is not None
    assert 0 < found.tight.estimate.over < found.tight.estimate.peak


@pytest.mark.parametrize(
    ("given_", "said"),
    [({"objective": "speed"}, "time, cost, memory for a plan to train, but is 'speed'"),
     ({"memory": 0}, "above 0 bytes"), ({"fixed": {"rows": 2}}, "axis 'rows' cannot be fixed at 2")],
)  # fmt: skip
def test_bad_options_are_one_clear_message(given_: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Options(**given_)  # type: ignore[arg-type]


# --- folding ----------------------------------------------------------------------------------------------------------


def layered(count: int) -> Graph:
    return Graph.of(perceptron((64,) * (count + 1), 8))


@pytest.mark.parametrize("name", ["llama", pytest.param("mamba", marks=pytest.mark.prove)])
def test_a_folded_graph_is_priced_as_the_whole(name: str) -> None:
    job = zoo.ZOO[name]()
    graph = zoo.graph_of(name)
    folded, whole = Pricer(graph), Pricer(graph)
    whole.folded = fold(graph, ())
    cluster = Cluster.load("8xh100-sxm")
    best = search(Maker(job, graph, cluster), cluster).best
    assert best is not None
    for plan in (Plan(), best.plan, Plan(recompute=("*.layers.*",))):
        one, other = folded.price(plan, cluster, 8), whole.price(plan, cluster, 8)
        assert one.seconds == pytest.approx(other.seconds) and one.memory == pytest.approx(other.memory)


def test_middle_copies_are_left_out_and_stood_for() -> None:
    graph = layered(12)
    folded = fold(graph, blocks(graph))
    assert len(folded.graph.ops) < len(graph.ops) / 2 and len(folded.index) == len(graph.ops)
    for op, place in zip(graph.ops, folded.index, strict=True):
        other = folded.graph.ops[place]
        assert (op.name, [v.sizes for v in op.outputs]) == (other.name, [v.sizes for v in other.outputs])
    assert sum(v.numel().at(1) for v in folded.graph.params.values()) < sum(
        v.numel().at(1) for v in graph.params.values()
    )
