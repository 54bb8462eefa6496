"""Random small models under random plans on two ranks compute what one device computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from shardwise.graph.dims import BATCH
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Errors, Pool, outcome, pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

Spec = tuple[tuple[Any, ...], ...]
SEQUENCE, WIDTH, VOCABULARY, TARGETS, BATCH_SIZE = 4, 8, 12, 6, 6


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """Token ids or features, and targets of one of three kinds."""

    tokens: bool
    loss: str

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1000 + index)
        if self.tokens:
            x = torch.randint(0, VOCABULARY, (SEQUENCE,), generator=draw)
        else:
            x = torch.randn(SEQUENCE, WIDTH, generator=draw)
        if self.loss == "mse":
            return x, torch.randn(SEQUENCE, TARGETS, generator=draw)
        labels = torch.randint(0, TARGETS, (SEQUENCE,), generator=draw)
        labels[: index % SEQUENCE] = -100
        return x, labels


class Net(nn.Module):
    """A chain of drawn operators over [samples, sequence, width], with residual adds to earlier values."""

    def __init__(self, tokens: bool, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if tokens else None
        self.parts = nn.ModuleList()
        width = WIDTH
        for kind, *rest in spec:
            part = nn.Module()
            if kind in ("linear", "matmul", "fused"):
                out = rest[0]
                total = 3 * out if kind == "fused" else out
                if kind == "matmul":
                    part.weight = nn.Parameter(torch.randn(width, total) * width**-0.5)
                else:
                    part.linear = nn.Linear(width, total, bias=bool(rest[1]))
                width = out
            elif kind in ("heads", "attention"):
                heads = rest[0]
                if kind == "heads":
                    part.weight = nn.Parameter(torch.randn(heads, width // heads, width // heads) * 0.5)
                    part.scale = nn.Parameter(torch.randn(width // heads))
                else:
                    part.qkv = nn.Linear(width, 3 * width)
            elif kind == "norm":
                part.norm = nn.LayerNorm(width)
            elif kind == "scale":
                part.weight = nn.Parameter(torch.randn(width))
            elif kind == "mlp":
                part.up = nn.Linear(width, 2 * width)
                part.down = nn.Linear(2 * width, width)
            self.parts.append(part)
        self.head = nn.Linear(width, TARGETS)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        seen = [x]
        for (kind, *rest), part in zip(self.spec, self.parts, strict=True):
            x = self.apply_one(kind, rest, part, x, seen)
            seen.append(x)
        return self.head(x)  # type: ignore[no-any-return]

    def apply_one(self, kind: str, rest: list[Any], part: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        if kind == "linear":
            return part.linear(x)  # type: ignore[no-any-return]
        if kind == "matmul":
            return x @ part.weight
        if kind == "fused":
            a, b, c = part.linear(x).chunk(3, dim=-1)
            return a * torch.tanh(b) + c
        if kind == "heads":
            split = x.view(*x.shape[:2], rest[0], -1).transpose(1, 2)
            mixed = torch.matmul(split, part.weight) * part.scale
            if rest[1] == "softmax":
                mixed = mixed.softmax(-1)
            elif rest[1] == "norm":
                mixed = F.layer_norm(mixed, mixed.shape[-1:])
            return mixed.transpose(1, 2).reshape(x.shape)
        if kind == "attention":
            q, k, v = (t.unflatten(-1, (rest[0], -1)).transpose(1, 2) for t in part.qkv(x).chunk(3, dim=-1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=rest[1]).transpose(1, 2).flatten(2)
        if kind == "norm":
            return part.norm(x)  # type: ignore[no-any-return]
        if kind == "scale":
            return x * part.weight
        if kind == "mlp":
            return x + part.down(F.gelu(part.up(x)))  # type: ignore[no-any-return]
        if kind == "softmax":
            return x.softmax(rest[0])
        if kind == "gelu":
            return F.gelu(x)
        if kind == "dropout":
            return F.dropout(x, 0.3, self.training)
        if kind == "mean":
            return x + x.mean(dim=rest[0], keepdim=True)
        if kind == "sum":
            return x - 0.1 * x.sum(dim=rest[0], keepdim=True)
        assert kind == "residual"
        same = [s for s in seen if s.shape == x.shape]
        return x + same[rest[0] % len(same)]


def squared(output: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(output, batch[1])


def crossed(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def counted(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    valid = batch[1] != -100
    losses = F.cross_entropy(output.transpose(1, 2), batch[1], reduction="none")
    return (losses * valid).sum(), valid.sum()


LOSSES = {"mse": squared, "cross": crossed, "count": counted}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def job(tokens: bool, spec: Spec, loss: str) -> Job:
    return Job(
        model=partial(Net, tokens, spec), data=Samples(tokens, loss), loss=LOSSES[loss], optimizer=sgd,
        global_batch=BATCH_SIZE, clip_norm=0.5,
    )  # fmt: skip


WIDTHS = st.sampled_from([8, 16])
HEADS = st.sampled_from([2, 4])
DIM = st.sampled_from([1, 2, -1])
OPERATORS = st.one_of(
    st.tuples(st.just("linear"), WIDTHS, st.booleans()),
    st.tuples(st.just("matmul"), WIDTHS),
    st.tuples(st.just("fused"), WIDTHS, st.booleans()),
    st.tuples(st.just("heads"), HEADS, st.sampled_from(["none", "softmax", "norm"])),
    st.tuples(st.just("attention"), HEADS, st.booleans()),
    st.tuples(st.just("mlp")),
    st.tuples(st.sampled_from(["norm", "scale", "gelu", "dropout"])),
    st.tuples(st.sampled_from(["softmax", "mean", "sum"]), DIM),
    st.tuples(st.just("residual"), st.integers(0, 5)),
)
JOBS = st.tuples(st.booleans(), st.lists(OPERATORS, min_size=1, max_size=5).map(tuple), st.sampled_from(sorted(LOSSES)))


def some_dims(draw: Any, graph: Graph, label: str) -> tuple[str, ...]:
    names = [d.name for d in graph.dims() if d.size != BATCH and d.size.coefficient % 2 == 0]
    chosen = draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=3, unique=True), label=label)
    return tuple(chosen)


def a_plan(draw: Any, graph: Graph, ranks: int) -> Plan:
    """A plan for 2 ranks, or for 4: two axes."""
    micro = draw(st.sampled_from([1, 2, 3]), label="micro-batches")
    kinds = ["data", "tensor", "pipeline"]
    if ranks == 2:
        chosen = [draw(st.sampled_from(kinds), label="axis")]
    else:
        chosen = sorted(draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=2), label="axes"), reverse=True)
        if chosen == ["pipeline", "pipeline"]:
            chosen = ["pipeline", "data"]
    axes: list[PlanAxis] = []
    changes: dict[str, Any] = {}
    for n, kind in enumerate(chosen):
        if kind == "data":
            axes.append(PlanAxis(f"data{n}", 2, ("batch",)))
        elif kind == "tensor":
            dims = some_dims(draw, graph, "dims")
            if draw(st.integers(0, 5), label="batch last") == 0:
                dims = (*dims, "batch")
            axes.append(PlanAxis(f"tensor{n}", 2, dims))
        else:
            axes.append(pipeline())
            learned = [op.id for op in graph.ops if any(v in graph.learned for v in op.outputs)]
            count = draw(st.sampled_from([1, 1, 3]), label="cuts") if len(learned) > 4 else 1
            inner = st.lists(st.integers(1, len(learned) - 1), min_size=count, max_size=count, unique=True)
            at = sorted(draw(inner, label="at"))
            micro = draw(st.sampled_from([1, 2, 4]), label="pipeline's micro-batches")
            schedules = ["gpipe", "1f1b", "zero-bubble"] if count == 1 else ["gpipe", "interleaved", "zero-bubble"]
            changes = {"cuts": tuple(learned[i] for i in at), "schedule": draw(st.sampled_from(schedules))}
    if "data" in chosen:
        changes["zero"] = draw(st.sampled_from([0, 1, 2, 3]), label="zero")
    if changes.get("schedule") != "zero-bubble" and draw(st.integers(0, 3), label="recompute") == 0:
        blocks = sorted({op.module for op in graph.ops if op.module})
        changes["recompute"] = (draw(st.sampled_from(["*", *blocks]), label="block"),)
    elif changes.get("schedule") == "zero-bubble":
        changes["zero"] = min(changes.get("zero", 0), 2)
    return Plan(tuple(axes), micro_batches=micro, bucket_bytes=draw(st.sampled_from([64, 100_000])), **changes)


def check(pool: Pool, tokens: bool, spec: Spec, loss: str, plan: Plan) -> None:
    found = pool(plan.ranks).run(outcome, job(tokens, spec, loss), plan, 2, timeout=60)
    for errors in found:
        if isinstance(errors, str):
            # The only refusals there may be: the samples are coupled, or too few.
            assert "coupled" in errors or "cannot be cut into" in errors or errors.startswith("schedule"), errors
        else:
            assert isinstance(errors, Errors)
            assert errors.worst < 1e-9, errors
            assert errors.traffic == ""


@settings(max_examples=6)
@given(st.data())
def test_two_ranks_compute_what_one_does(pool: Pool, drawn: st.DataObject) -> None:
    tokens, spec, loss = drawn.draw(JOBS, label="job")
    plan = a_plan(drawn.draw, Graph.of(job(tokens, spec, loss)), 2)
    check(pool, tokens, spec, loss, plan)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 4])
@settings(max_examples=300)
@given(st.data())
def test_many_random_graphs(pool: Pool, ranks: int, drawn: st.DataObject) -> None:
    tokens, spec, loss = drawn.draw(JOBS, label="job")
    plan = a_plan(drawn.draw, Graph.of(job(tokens, spec, loss)), ranks)
    check(pool, tokens, spec, loss, plan)


def test_a_cut_inside_of_one_that_goes_is_made_anew(pool: Pool) -> None:
    # Both axes cut the samples of the input; the first of them then cuts what the first operator sums over.
    axes = (PlanAxis("a", 2, ("width@parts.0", "batch")), PlanAxis("b", 2, ("classes@head", "batch")))
    check(pool, False, (("matmul", 8), ("mlp",), ("heads", 2, "norm")), "cross", Plan(axes, bucket_bytes=64))


def test_a_stage_that_keeps_nothing_of_its_block_gathers_once(pool: Pool) -> None:
    # The second stage of the block adds a bias, which leaves nothing to compute again.
    spec = (("residual", 3),)
    learned = [op for op in Graph.of(job(False, spec, "mse")).ops if op.name == "aten.add" and op.module == "head"]
    axes = (pipeline(), PlanAxis("data", 2, ("batch",)))
    changes = {"cuts": (learned[0].id,), "schedule": "gpipe", "zero": 3, "recompute": ("*",), "bucket_bytes": 64}
    check(pool, False, spec, "mse", Plan(axes, micro_batches=2, **changes))
