"""What predicting needs on each rank, and under a launch of others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardwise as sw
from shardwise.engine.launch import Ranks
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.plan.plan import Plan
from tests.conftest import pipeline, tensor
from tests.pool import Pool
from tests.test_joined import under_torchrun
from tests.test_predict_run import Stream, Who, samples

pytestmark = [pytest.mark.timeout(200), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
slow = pytest.mark.slow


# --- memory -----------------------------------------------------------------------------------------------------------


class Large(nn.Module):
    """Sixteen layers of four million weights each."""

    def __init__(self, width: int = 2048, layers: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def memory_of(plan: Plan) -> int:
    """Bytes that predicting needs at its peak on this rank, once the model is there."""
    backend = Backend.cpu()
    job = Job(model=Large, data=TensorDataset(torch.ones(8, 2048)), global_batch=4)
    # What torch needs to capture any model is there before.
    small = job.with_(model=lambda: Large(64), data=TensorDataset(torch.ones(8, 64)))
    list(sw.predict(small, None, plan))
    backend.reset_peak_memory()
    before = backend.peak_memory()
    list(sw.predict(job, None, plan))
    return backend.peak_memory() - before


@pytest.mark.prove
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_two_ranks_need_little_more_than_half_the_memory_each(way: str) -> None:
    plan = {"tensor": Plan((tensor("width*"),)), "pipeline": Plan((pipeline(),), ("linear.8",))}[way]
    with Ranks(1, threads=1) as one, Ranks(2, threads=1) as two:
        alone = one.run(memory_of, Plan(), timeout=60)[0]
        split = two.run(memory_of, plan, timeout=60)
    assert alone >= 16 * 2048**2 * 4
    assert max(split) <= 0.6 * alone, (split, alone)


# --- joined -----------------------------------------------------------------------------------------------------------

JOINED = """
import sys, torch
import torch.distributed as dist
import shardwise as sw
from shardwise.engine.launch import joined
from shardwise.plan.plan import Plan
from tests.conftest import data, tensor
from tests.test_predict_run import numbers, samples, structured

with joined(collective_timeout=30.0) as place:
    whole = samples(list(sw.predict(numbers(), ranks=2)))
    outputs = sw.predict(numbers(400))
    some = samples([next(outputs) for _ in range(7)]) if place.rank == 0 else list(outputs)
    outputs.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    again = [len(o.scores) for o in sw.predict(structured(), None, Plan((tensor("width*"),)))]
    words = [place.rank, len(whole), whole == sorted(whole), len(some), int(total), *again]
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
"""


@pytest.mark.prove
@pytest.mark.parametrize("shared", ["1", "0"], ids=["sharing memory", "over a store"])
def test_under_torchrun_rank_0_gets_the_outputs(shared: str, tmp_path: Path) -> None:
    lines = under_torchrun(JOINED, tmp_path, timeout=150, SHARDWISE_SHARED_MEMORY=shared)
    assert sorted(lines) == ["0 45 True 14 2 4 4 3", "1 0 True 0 2"]


@slow
def test_a_stream_is_shared_in_a_launch(pool: Pool) -> None:
    found = pool(2).run(streamed, timeout=60)
    assert found == [[float(i) for i in range(11)], []]


def streamed() -> list[float]:
    assert dist.is_initialized()
    return samples(list(sw.predict(Job(model=Who, data=Stream(11), global_batch=2))))
