"""Where gradients flow and where they do not: parts without them, statistics, complex weights, buffers of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.plan.plan import Plan
from tests.conftest import Pool, compare, cuts, data, pipeline
from tests.zoo.data import Vectors
from tests.zoo.plain import class_loss, sgd


class Distilled(nn.Module):
    """A student, a teacher without gradients that has a part with them again, and one BatchNorm for all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.PReLU())
        self.head, self.scale = nn.Linear(32, 8), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        student = self.head(self.body(x))
        with torch.no_grad():
            teacher = self.head(self.body(x * 0.9)).softmax(-1)
            with torch.enable_grad():
                scale = self.scale.exp()
        return student * teacher * scale + self.head(self.body(x.flip(-1)))


class Waves(nn.Module):
    """Complex weights on the low frequencies, and a layer whose norm is kept by a power iteration at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(5, 3, dtype=torch.cfloat) * 0.3)
        self.mix = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(x)
        kept = torch.zeros_like(waves)
        kept[:, 1:4] = waves[:, :5] @ self.low
        scores: Tensor = self.head(F.gelu(self.mix(torch.fft.irfft(kept, n=16) + x)))
        return scores


class Encoder(nn.Module):
    """torch's own layer, with dropout in its attention and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x.unflatten(-1, (4, 4))).flatten(1))
        return scores


def job(model: Any) -> Job:
    return Job(model=model, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=8)


def test_what_is_computed_without_gradients_has_none() -> None:
    graph = Graph.of(job(Distilled))
    (teacher,) = [op for op in graph.ops if op.name == "aten.softmax"]
    (scale,) = [op for op in graph.ops if op.name == "aten.exp"]
    assert teacher.outputs[0] not in graph.needs_grad and scale.outputs[0] in graph.needs_grad
    norms = [op for op in graph.ops if "batch_norm" in op.name]
    assert len(norms) == 3 and not any(v in graph.needs_grad for op in norms for v in op.outputs[1:])


STAGES = Plan((pipeline(),), cuts(job(Waves), 2), micro_batches=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (Distilled, Plan((data(),))), (Distilled, Plan((data(),), zero=3)), (Waves, STAGES),
        (Waves, Plan((data(),), zero=2, micro_batches=2)), (Encoder, Plan((data(),))),
    ],
    ids=lambda x: x.title() if isinstance(x, Plan) else x.__name__,
)  # fmt: skip
def test_gradients_are_those_of_one_device(model: Any, plan: Plan, pool: Pool) -> None:
    for errors in pool(2).run(compare, job(model), plan, 3, (8, 5, 7), timeout=100):
        assert errors.worst < 1e-9, errors
        assert errors.traffic == ""
