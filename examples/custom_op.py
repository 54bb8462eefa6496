"""A custom operator, and the rule that lets Shardwise split it: `shardwise verify examples/custom_op.py:job --ranks 2`.

Without the rule everything still computes the same: an operator that is not known runs whole on every rank. The
operator and its rule are registered where this file is imported, so every rank has to import it: name the job by this
SPEC, or keep the operator in a module of your own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.data import Dataset

import shardwise as sw


@library.custom_op("example::squared_relu", mutates_args=())
def squared_relu(x: Tensor, scale: float) -> Tensor:
    """scale · relu(x)²: an operator that torch does not have, e.g. a kernel of your own."""
    return scale * x.clamp(min=0).square()


@squared_relu.register_fake
def _of_the_same_shape(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return 2 * ctx.scale * x.clamp(min=0) * grad, None


squared_relu.register_autograd(_backward, setup_context=_save)


@sw.rule("example::squared_relu")
def _squared_relu(c: Any) -> None:
    """Each output depends on the input at its own place alone, so it can be split on every dim."""
    c.elementwise(c.inputs)


class Net(nn.Module):
    """Two layers with the custom operator between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.down(torch.ops.example.squared_relu(self.up(x), 0.5))
        return scores


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Random points, each with the number of a random direction that it is closest to."""

    def __init__(self, count: int = 512) -> None:
        draw = torch.Generator().manual_seed(0)
        self.points = torch.randn(count, 32, generator=draw)
        self.classes = (self.points @ torch.randn(32, 10, generator=draw)).argmax(1)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.classes[index]


def job() -> sw.Job:
    """What `shardwise train`, `plan` and `verify` take."""
    return sw.Job(
        model=Net, data=Digits(), loss=lambda logits, batch: F.cross_entropy(logits, batch[1]), global_batch=32
    )
