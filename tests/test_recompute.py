"""Recompute: the same numbers, fewer activations kept, and every collective that is done again announced."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import PlanError
from shardwise.job import Job
from shardwise.parallel import recompute
from shardwise.parallel.hybrid import Split
from shardwise.parallel.mesh import Mesh, Traffic
from shardwise.parallel.recompute import block_of
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import Pool, compare, cuts, data, pipeline, tensor
from tests.zoo import ZOO, graph_of

TENSOR = ("heads*", "width@*.*", "vocab*", "channels*", "classes*")
LAYERS = {"llama": "model.layers.*", "gpt2_dropout": "transformer.h.*"}


def plans(job: Job, blocks: str) -> dict[str, Plan]:
    again = Plan(recompute=(blocks,))
    return {
        "tensor": again.with_(axes=(tensor(),)),
        "sequence": again.with_(axes=(PlanAxis("tensor", 2, (*TENSOR, "sequence")),)),
        "zero 3": again.with_(axes=(data(),), zero=3, micro_batches=2),
        "pipeline": again.with_(axes=(pipeline(),), cuts=cuts(job, 2), micro_batches=2),
        "zero 3 x tensor": again.with_(axes=(data(), tensor()), zero=3),
    }


def traffic(name: str, plan: Plan) -> tuple[list[Traffic], int]:
    """The collectives of one step, and the segments of this rank's programs."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    job = ZOO[name]()
    engine = parallelize(job, plan, dtype=torch.float64)
    engine.step(job.batch(range(job.global_batch)))
    parts = sum(len(recompute.segments(p.module)) for p in engine.model.programs.values())
    return engine.traffic(), parts


CASES = [
    *(("llama", way) for way in ("sequence", "zero 3", "pipeline")), ("gpt2_dropout", "tensor"),
    pytest.param("llama", "zero 3 x tensor", marks=pytest.mark.prove),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), CASES)
def test_recompute_computes_what_one_device_does(pool: Pool, name: str, way: str) -> None:
    """With dropout, too: its masks are functions of position, and so the same when drawn again."""
    job = ZOO[name]()
    plan = plans(job, LAYERS[name])[way]
    for found in pool(plan.ranks).run(compare, job, plan):
        # Adam, which the zoo's models take, turns the rounding noise of small gradients into steps.
        assert max(found.loss, found.grad, found.norm) < 1e-12 and found.param < 1e-9, found
        assert not found.traffic


@pytest.mark.prove
def test_all_reduces_inside_a_block_are_done_again_and_those_at_its_end_are_not(pool: Pool) -> None:
    plan = plans(ZOO["llama"](), LAYERS["llama"])["tensor"]
    layers = len({block for op in graph_of("llama").ops if (block := block_of(op.module, ["model.layers.*"]))})
    (again, parts), (once, none) = (pool(2).run(traffic, "llama", p)[0] for p in (plan, plan.with_(recompute=())))
    assert (parts, none) == (layers, 0)
    counts = [sum(t.count for t in found if (t.kind, t.axis) == ("all_reduce", "tensor")) for found in (again, once)]
    # Attention's comes in the middle of a layer; that of the feed-forward part is the layer's last act.
    assert counts[0] - counts[1] == layers


@pytest.mark.slow
def test_buffers_are_updated_once(pool: Pool) -> None:
    """Running statistics are among what is compared."""
    plan = Plan((data(),), recompute=("*",))
    for found in pool(2).run(compare, ZOO["convnet_bn"](), plan):
        assert found.worst < 1e-12, found


def kept_bytes(plan: Plan) -> tuple[int, float]:
    """Bytes that a forward pass of a small deep model keeps for backward, and the loss."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    job = deep()
    engine = parallelize(job, plan)
    params = {p.untyped_storage().data_ptr() for p in engine.model.params.values()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its memory would be given to another
        return tensor

    plain = recompute.run_segment

    def watched(segment: Any, *given: Any) -> Any:
        # What a segment is given is kept outside of autograd's own list.
        for one in given:
            if isinstance(one, Tensor):
                keep(one)
        return plain(segment, *given)

    program = engine.model.programs[0].module
    for node in program.graph.nodes:
        if node.target is plain:
            node.target = watched
    program.recompile()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.model.start(engine._feeder.tensors(engine._feeder.share(job.batch(range(8)))), 8, 0)
        loss = engine.model.run(0, 0, {})["loss"]
    return sum(kept.values()), float(loss.detach())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def deep() -> Job:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), *(Block(32) for _ in range(8)), nn.Linear(32, 4))

    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(*(torch.randn(16, 64, width, generator=generator) for width in (16, 4)))
    return Job(model=model, data=rows, loss=lambda out, batch: ((out - batch[1]) ** 2).mean(), global_batch=8)


def test_recompute_keeps_only_what_blocks_are_given() -> None:
    everything, loss = kept_bytes(Plan())
    some, same = kept_bytes(Plan(recompute=("[1-4]",)))
    least, also = kept_bytes(Plan(recompute=("[1-8]",)))
    assert loss == same == also
    one = 8 * 64 * 32 * 4  # bytes of what one block gives to the next
    # Of each block the norm's input and output, the statistics, what goes into and comes out of gelu.
    inside = one * (1 + 4 + 4)
    assert everything - some == pytest.approx(4 * inside, rel=0.05)
    assert everything - least == pytest.approx(8 * inside, rel=0.05)
    assert least < everything / 5


def test_a_pattern_that_names_no_block_is_an_error() -> None:
    graph = graph_of("llama")
    with pytest.raises(PlanError) as error:
        Split(graph, Plan(recompute=("model.layers.*", "blocks.*")), Mesh.build([]))
    assert "'blocks.*'" in str(error.value)
    assert "model.layers.0, model.layers.1" in str(error.value)


@pytest.mark.parametrize(
    ("module", "patterns", "block"),
    [
        ("model.layers.0.mlp.up", ["model.layers.*"], "model.layers.0"),
        ("model.layers.0.mlp.up", ["*.mlp"], "model.layers.0.mlp"),
        ("model.layers.0.mlp.up", ["*.attention", "*.1"], ""),
        ("model.layers.0.mlp.up", ["*"], "model"),
        ("", ["*"], ""),
    ],
)
def test_a_block_is_the_outermost_module_that_is_named(module: str, patterns: list[str], block: str) -> None:
    assert block_of(module, patterns) == block
