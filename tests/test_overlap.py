"""Gradients are sent while backward goes on, in the last micro-batch only, whatever they are reduced to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.job import Job
from shardwise.parallel.data import Bucket, by_size
from shardwise.parallel.sharded import ScatteredBucket
from shardwise.plan.plan import Plan
from tests.conftest import Pool, compare, data

DEPTH, WIDTH = 6, 16
LAYER = 4 * (WIDTH * WIDTH + WIDTH)  # bytes
MICRO = 3


def stack() -> Job:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))

    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(*(torch.randn(24, WIDTH, generator=generator) for _ in range(2)))

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return ((output - batch[1]) ** 2).mean()

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    return Job(model=model, data=rows, loss=loss, optimizer=sgd, global_batch=12, clip_norm=0.1)


def events(plan: Plan) -> tuple[list[str], bool]:
    """What happens in a step, in order; and whether whole gradients are gone after it."""
    from shardwise.engine.engine import parallelize

    warnings.simplefilter("ignore")
    job = stack()
    engine: Any = parallelize(job, plan)
    seen: list[str] = []
    names = {id(p): n for n, p in engine.model.params.items()}
    for param in engine.model.params.values():
        param.register_post_accumulate_grad_hook(lambda p: seen.append(f"gradient {names[id(p)]}"))

    def noted(plain: Any, label: str) -> Any:
        def call(bucket: Bucket) -> None:
            plain(bucket)
            seen.append(f"{label} {names[id(bucket.params[0])]}")

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(bucket) for bucket in engine._reduction.sync.buckets}:
            for what in ("send", "wait"):
                patch.setattr(kind, what, noted(getattr(kind, what), what))
        engine.forward_backward(job.batch(range(12)))
    buckets = [b for b in engine._reduction.sync.buckets if isinstance(b, ScatteredBucket)]
    gone = all(p.grad is None for p in engine.model.params.values()) and all(b.views is None for b in buckets)
    return seen, gone


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_buckets_are_sent_during_the_last_backward(pool: Pool, zero: int) -> None:
    # A layer for each bucket.
    plan = Plan((data(),), micro_batches=MICRO, zero=zero, bucket_bytes=LAYER)
    (seen, gone), (others, _) = pool(2).run(events, plan)
    sent = [e for e in seen if e.startswith("send")]
    assert len(sent) == DEPTH
    assert sent == [e for e in others if e.startswith("send")], "ranks send in different orders"
    first = seen.index(sent[0])
    before = [e for e in seen[:first] if e.startswith("gradient")]
    # Two gradients in each layer. Nothing is sent before the last micro-batch, and then as soon as a layer is done: in
    # the hook of its second gradient, which is noted by the next hook.
    assert len(before) == 2 * DEPTH * (MICRO - 1) + 1
    assert [e.split(".")[0] for e in sent] == [f"send {i}" for i in reversed(range(DEPTH))]
    assert not any(e.startswith("wait") for e in seen[: seen.index(sent[-1])])
    assert gone == (zero == 2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("size", [LAYER // 3, LAYER, 10 * LAYER])
def test_buckets_of_any_size_compute_what_one_device_does(pool: Pool, zero: int, size: int) -> None:
    plan = Plan((data(),), micro_batches=MICRO, zero=zero, bucket_bytes=size)
    for found in pool(2).run(compare, stack(), plan):
        assert found.worst < 1e-12 and not found.traffic, found


def test_the_first_bucket_is_small() -> None:
    assert by_size([4, 4, 4, 4, 4, 4], 12, 4) == [[0], [1, 2, 3], [4, 5]]
    assert by_size([20, 4], 12, 4) == [[0], [1]]
    assert by_size([], 12, 4) == []
