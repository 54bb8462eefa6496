"""Memory of ranks: what is foretold is what they allocate at the fullest moment, and an engine's goes with it."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from functools import cache
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.regret_rank import fullest, weigh
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import joined
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.machine.here import here
from shardwise.parallel.collectives import exchange_parts, join, sum_parts
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.schedule import orders
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.search.strategies import Maker
from tests.conftest import pipeline
from tests.pool import Pool


class Picks(nn.Module):
    """A matrix for each token, picked by what the token is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route, self.table = nn.Linear(width, 4), nn.Parameter(torch.randn(4, width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        picked = self.table[self.route(tokens).argmax(-1)]
        return x + torch.bmm(picked, tokens.unsqueeze(-1)).view_as(x)


class Model(nn.Module):
    """Two layers with a norm, two products and picked matrices each, and the mean over a sequence."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.picks = nn.ModuleList(Picks(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down, picks in zip(self.norms, self.ups, self.downs, self.picks, strict=True):
            x = picks(x + down(F.gelu(up(norm(x)))))
        return self.last(x).mean(1)  # type: ignore[no-any-return]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True)


@cache
def made() -> tuple[Job, Maker]:
    samples = [(torch.randn(64, 16), torch.tensor(i % 8)) for i in range(16)]
    job = Job(model=Model, data=samples, loss=loss, optimizer=adamw, global_batch=8)
    return job, Maker(job, Graph.of(job))


def plans() -> dict[str, Plan]:
    maker = made()[1]
    split, staged = maker.plan({"tensor": 2}), maker.plan({"pipeline": 2}).with_(micro_batches=4)
    (axis,) = split.axes
    return {
        "data": maker.plan({"data": 2}),
        "ZeRO-2": maker.plan({"data": 2}, zero=2),
        "tensor": split,
        "tensor, sequence": split.with_(axes=(PlanAxis(axis.name, 2, (*axis.dims, *maker.sequence_dims(2))),)),
        **{schedule: staged.with_(schedule=schedule) for schedule in ("gpipe", "1f1b", "zero-bubble")},
    }


def measured(job: Job, texts: list[str]) -> list[float]:
    """Bytes of each plan's fullest rank."""
    graph = Graph.of(job)
    batches = [job.batch(range(n, n + 8)) for n in (0, 8)]
    return [max(weigh(job, graph, Plan.parse(text), batches)) for text in texts]


def test_memory_of_ranks_is_what_they_allocate(pool: Pool) -> None:
    job, maker = made()
    found = pool(2).run(measured, job, [plan.text() for plan in plans().values()], timeout=100)[0]
    for (name, plan), most in zip(plans().items(), found, strict=True):
        foretold = Pricer(maker.graph, maker.pricer.profile).price(plan, here(2), job.global_batch).peak
        assert 0.95 <= foretold / most <= 1.05, (name, foretold, most)


class Wide(nn.Module):
    """Few weights, and much that crosses a cut: 0.5 MB a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 512), nn.Linear(512, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).mean(1)  # type: ignore[no-any-return]


def test_what_crosses_a_cut_is_received_ahead_and_there_until_it_is_sent(pool: Pool) -> None:
    samples = [(torch.randn(256, 16), torch.tensor(i % 8)) for i in range(16)]
    job = Job(model=Wide, data=samples, loss=loss, optimizer=adamw, global_batch=8)
    maker = Maker(job, Graph.of(job))
    cut = [op.id for op in maker.graph.ops if op.name == "aten.linear"][1]
    plans = [
        Plan((pipeline(2),), (cut,), micro_batches=n, schedule=how) for n in (2, 4) for how in ("1f1b", "zero-bubble")
    ]
    found = pool(2).run(measured, job, [plan.text() for plan in plans], timeout=100)[0]
    for plan, most in zip(plans, found, strict=True):
        foretold = Pricer(maker.graph, maker.pricer.profile).price(plan, here(2), job.global_batch).peak
        assert foretold / most >= 0.95, (plan.title(), foretold, most)


def test_what_is_allocated_where_something_was_says_that_it_was_freed() -> None:
    # One of two blocks is freed where nobody sees it; a smaller and a larger one take its place, one after the other.
    assert fullest([(0, 64), (64, 64), (80, 16), (80, -16), (64, 100), (0, -64), (64, -100)]) == 164
    assert fullest([(0, 64), (64, 64), (128, 16)]) == 144, "what nothing overlaps is there"
    assert fullest([(0, -64), (8, 8)]) == 8, "what was there before is not counted"


@pytest.mark.parametrize(("ranks", "micros"), list(itertools.product((2, 4), (1, 2, 4, 8))))
def test_half_through_backward_are_as_many_as_in_the_order_that_runs(ranks: int, micros: int) -> None:
    graph = made()[1].graph
    cuts = tuple(op.id for op in graph.ops if op.name == "aten.linear")[1:ranks]
    plan = Plan((pipeline(ranks),), cuts, micro_batches=micros, schedule="zero-bubble")
    case = Pricer(graph).case(plan, Cluster.load("4xh100-sxm"), 8)
    for rank, order in enumerate(orders("zero-bubble", ranks, ranks, micros)):
        whole = half = 0
        seen = set()
        for action in order:
            if action.kind in "IB":
                seen.add((whole + half, half))
            whole += {"F": 1, "B": -1, "I": -1}.get(action.kind, 0)
            half += {"I": 1, "W": -1}.get(action.kind, 0)
        assert max(seen) == (case.flight.most(rank, ranks), case.flight.half_done(rank))


def test_a_rank_of_cores_has_the_whole_model_before_it_takes_its_part() -> None:
    """With an optimizer without state, a part of weights and gradients is less than all weights soon."""
    layers, samples = 16, [(torch.randn(64), torch.tensor(0)) for _ in range(8)]
    job = Job(
        model=lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))), data=samples, loss=loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1), global_batch=8,
    )  # fmt: skip
    graph, size = Graph.of(job), 4 * layers * (64 * 64 + 64)
    plan, plain = Plan((PlanAxis("data", 8, ("batch",)),), zero=3), replace(PROFILES["shardwise"], state=0)
    assert Pricer(graph, plain).price(plan, here(8), 8).peak == pytest.approx(size * 9 / 8)
    files, far = replace(plain, whole=False), Cluster.load("8xh100-sxm")
    assert Pricer(graph, files).price(plan, here(8), 8).peak < size, "what is read from files is read in parts"
    assert Pricer(graph, plain).price(plan, far, 8).peak < size, "the host has it"


def exchanged() -> list[bool]:
    """Whether what collectives give is contiguous, and what it should be, of equal parts and of others."""
    axis = Mesh.build((PlanAxis("tensor", 2, ("width",)),))["tensor"]
    found = []
    whole = torch.arange(2 * 12 * 12.0).view(2, 12, 12)
    for sizes, lead, tail in (((3, 3), 1, 2), ((3, 3), 2, 1), ((4, 2), 1, 2), ((4, 2), 2, 1)):
        rows, columns = (
            [p.reshape(shape) for p in whole.view(cut).split(sizes, dim)]
            for shape, cut, dim in (((2, -1, 12), (2, lead, 6, tail, 12), 2), ((2, 12, -1), (2, 12, lead, 6, tail), 3))
        )
        at = (1, lead, sizes), (2, lead, sizes)
        for got, wanted in (
            (join(rows[axis.rank], axis, *at[0]), whole),
            (join(columns[axis.rank], axis, *at[1]), whole),
            (sum_parts(whole, axis, *at[0]), 2 * rows[axis.rank]),
            (sum_parts(whole.mT.contiguous().mT, axis, *at[1]), 2 * columns[axis.rank]),
            (exchange_parts(rows[axis.rank], axis, *at), columns[axis.rank]),
            (exchange_parts(columns[axis.rank].mT.contiguous().mT, axis, *at[::-1]), rows[axis.rank]),
        ):
            found += [got.equal(wanted), got.is_contiguous() or max(sizes) != min(sizes)]
    return found


def test_what_collectives_give_need_not_be_copied_to_be_read(pool: Pool) -> None:
    assert all(map(all, pool(2).run(exchanged, timeout=30)))


def kept(job: Job, texts: list[str]) -> list[str]:
    """Of each plan what is still there of an engine that nobody has any more."""
    found = []
    with joined():
        for text in texts:
            engine = parallelize(job, Plan.parse(text))
            engine.step(job.batch(range(8)))
            axis = ref(engine.mesh.axes[0])
            del engine
            gc.collect()
            found += [text] if axis() is not None else []
    return found


def test_an_engine_goes_with_all_that_it_had(pool: Pool) -> None:
    job, maker = made()
    texts = [plan.text() for plan in (*plans().values(), maker.plan({"data": 2}, zero=3))]
    assert pool(2).run(kept, job, texts, timeout=100) == [[], []]
