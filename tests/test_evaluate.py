"""`Engine.evaluate` against the plain module in evaluation mode, in float64, while the split model trains."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import JobError
from shardwise.graph.capture import caller
from shardwise.job import Batch, Job, batch_size, map_batch
from shardwise.plan.plan import Plan
from tests.conftest import Pool, cuts, data, pipeline, tensor

CLASSES, IGNORED = 6, -100


class Net(nn.Module):
    """BatchNorm and dropout, which evaluation changes; and evaluation needs the first weight at the end, too."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.more = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.more(self.features(image)).mean((2, 3))
        if not self.training:
            features = features * (1 + self.features[0].weight.abs().mean())
        return self.head(features)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention with dropout: written out in training, one operator in evaluation."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(32, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        p = 0.2 if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(-2)))  # type: ignore[no-any-return]


def images() -> Job:
    torch.manual_seed(0)
    rows = TensorDataset(torch.randn(96, 3, 6, 6), torch.randint(0, CLASSES, (96,)))

    def loss(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1])

    return Job(model=_seeded(Net), data=rows, loss=loss, optimizer=_sgd, global_batch=8)


def tokens() -> Job:
    """The loss is a sum and a count, and batches have very different counts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (96, 8), generator=generator)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, 96)[:, None]] = IGNORED

    def loss(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        flat, target = output.flatten(0, 1), batch[1].flatten()
        total = nn.functional.cross_entropy(flat, target, ignore_index=IGNORED, reduction="sum")
        return total, (target != IGNORED).sum()

    return Job(model=_seeded(Attention), data=TensorDataset(ids, labels), loss=loss, optimizer=_sgd, global_batch=8)


def _seeded(kind: type[nn.Module]) -> Any:
    def build() -> nn.Module:
        torch.manual_seed(7)
        return kind()

    return build


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.3)


JOBS = {"images": images, "tokens": tokens}


def plain(job: Job, state: dict[str, Tensor], batches: list[Batch]) -> float:
    """The weighted mean loss of the user's own module in evaluation mode."""
    module = job.build().double()
    module.load_state_dict(state)
    module.eval()
    assert job.loss is not None
    total = weight = 0.0
    with torch.no_grad():
        for batch in batches:
            batch = map_batch(batch, lambda t: t.double() if t.is_floating_point() else t)
            found = job.loss(caller(module)(batch), batch)
            loss, count = found if isinstance(found, tuple) else (found * batch_size(batch), batch_size(batch))
            total, weight = total + float(loss), weight + float(count)
    return total / weight


def difference(name: str, plan: Plan) -> tuple[list[float], list[float], bool]:
    """Losses of `evaluate` between steps, the plain module's, and whether training went on as without it."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    job = JOBS[name]()
    held_out = [job.batch(range(40, 48)), job.batch(range(56, 64)), job.batch(range(80, 85))]
    engine = parallelize(job, plan, dtype=torch.float64)
    twin = parallelize(job, plan, dtype=torch.float64)
    found, expected, same = [], [], True
    for step in range(3):
        found.append(engine.evaluate(iter(held_out)))
        expected.append(plain(job, engine.state_dict(), held_out))
        batch = job.batch(range(8 * step, 8 * step + 8))
        same = same and engine.step(batch) == twin.step(batch) and engine.traffic() == twin.traffic()
    ours, theirs = engine.state_dict(), twin.state_dict()
    same = same and all(torch.equal(ours[n], theirs[n]) for n in ours)
    if dist.is_initialized():
        every = [torch.zeros(3, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor(found, dtype=torch.float64))
        assert all(torch.equal(other, every[0]) for other in every), "ranks differ"
    return found, expected, same


def _plans(job: Job) -> dict[str, Plan]:
    return {
        "one": Plan(micro_batches=1),
        "data": Plan((data(),)),
        "tensor": Plan((tensor(),)),
        "pipeline": Plan((pipeline(),), cuts(job, 2), micro_batches=2, batch_norm="per-micro-batch"),
        "zero 3": Plan((data(),), zero=3),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one", "data", "tensor", "pipeline", "zero 3"])
@pytest.mark.parametrize("name", list(JOBS))
def test_evaluate_is_the_plain_modules_loss_and_leaves_training_alone(pool: Pool, name: str, way: str) -> None:
    plan = _plans(JOBS[name]())[way]
    for found, expected, same in pool(plan.ranks).run(difference, name, plan):
        assert found == pytest.approx(expected, rel=1e-12)
        assert len(set(found)) == 3, "training changed nothing"
        assert same


def nothing_to_evaluate() -> str:
    from shardwise.engine.engine import parallelize

    with pytest.raises(JobError) as error:
        parallelize(images(), Plan()).evaluate([])
    return str(error.value)


def test_no_batch_is_an_error() -> None:
    assert "no batch" in nothing_to_evaluate()
