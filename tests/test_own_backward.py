"""Backward that a model writes itself: written with operators where it scales entries, refused where it does more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from shardwise.errors import CaptureError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.measure.verify import verify
from shardwise.plan.plan import Plan
from tests.conftest import Errors, cuts, data, outcome, pipeline, tensor
from tests.pool import Pool
from tests.zoo.data import Vectors
from tests.zoo.plain import class_loss, sgd


class Sign(Function):
    """Binarises; the gradient passes where the input is small (Hubara et al., 2016)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed = grad.clone()
        passed[x.abs() > 1] = 0
        return passed


class Rounded(Function):
    """Rounds to steps; the gradient passes as it is."""

    @staticmethod
    def forward(x: Tensor, steps: int) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.steps = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class Reversed(Function):
    """Passes on, and turns the gradient round (Ganin & Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.neg() * ctx.weight, None


class Swish(Function):
    """An activation that keeps its input alone, of two tensors multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * torch.sigmoid(x) * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        s = torch.sigmoid(x)
        return torch.where(x < -20, torch.zeros_like(grad), grad * y * s * (1 + x * (1 - s))), grad * x * s


class Own(nn.Module):
    """Four functions with a backward of their own, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = Reversed.apply(Sign.apply(self.first(x)), 0.3)
        found: Tensor = self.head(Rounded.apply(Swish.apply(self.second(hidden), hidden), 8))
        return found


def job(model: Callable[[], nn.Module]) -> Job:
    return Job(model=model, data=Vectors(classes=8), loss=class_loss, optimizer=sgd, global_batch=8)


@pytest.mark.slow
def test_functions_that_scale_gradients_are_split_like_operators(pool: Pool) -> None:
    whole = job(Own)
    plans = [
        Plan((data(),), micro_batches=2),
        Plan((tensor("width*", "classes*"),)),
        Plan((pipeline(),), cuts(whole, 2), micro_batches=4),
    ]
    for plan in plans:
        found = pool(2).run(outcome, whole, plan, 2, timeout=60)
        assert all(isinstance(errors, Errors) and errors.worst < 1e-9 for errors in found), (plan, found)


class Clipped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


class Stepped(Function):
    """Steps of a learned size, whose gradient is a sum over all entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(x, size)
        return (x / size).round() * size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, size = ctx.saved_tensors
        return grad, (grad * ((x / size).round() - x / size)).sum()


class Pair(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1

    @staticmethod
    def backward(ctx: Any, up: Tensor, down: Tensor) -> Tensor:
        return up + down


class Whole(Function):
    """Counts gradients in whole steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.div(grad, 0.01, rounding_mode="floor")


class Cast(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * 1000).long().to(grad.dtype)


class Filled(Function):
    """What begins as zeros and is written over is no zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, grad, torch.zeros_like(grad).add_(x))


class Applied(nn.Module):
    """A layer, something done to its output, and a head."""

    def __init__(self, done: Callable[..., Tensor]) -> None:
        super().__init__()
        self.done, self.layer, self.head = done, nn.Linear(16, 32), nn.Linear(32, 8)
        self.size = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.done(self.layer(x), self.size))
        return found


def clipped(x: Tensor, size: Tensor) -> Tensor:
    return Clipped.apply(x) * size  # type: ignore[no-any-return]


def stepped(x: Tensor, size: Tensor) -> Tensor:
    return Stepped.apply(x, size)  # type: ignore[no-any-return]


def pair(x: Tensor, size: Tensor) -> Tensor:
    return Pair.apply(x)[0] * size  # type: ignore[no-any-return]


def whole(x: Tensor, size: Tensor) -> Tensor:
    return Whole.apply(x) * size  # type: ignore[no-any-return]


def cast(x: Tensor, size: Tensor) -> Tensor:
    return Cast.apply(x) * size  # type: ignore[no-any-return]


def written_over(x: Tensor, size: Tensor) -> Tensor:
    return Filled.apply(x) * size  # type: ignore[no-any-return]


def hooked(x: Tensor, size: Tensor) -> Tensor:
    found = x * size
    if found.requires_grad:
        found.register_hook(lambda grad: grad / 2)
    return found


def with_hook(kind: str) -> nn.Module:
    module = Applied(torch.mul)
    if kind == "module":
        module.layer.register_full_backward_hook(lambda part, given, out: None)
    else:
        module.layer.weight.register_hook(lambda grad: grad / 2)
    return module


REFUSED = {
    "a gradient that is clipped": (lambda: Applied(clipped), "the backward of Clipped.*clamp"),
    "a sum over entries": (lambda: Applied(stepped), "the backward of Stepped.*sum"),
    "a gradient that is rounded": (lambda: Applied(whole), "the backward of Whole.*div"),
    "a gradient of whole numbers": (lambda: Applied(cast), "the backward of Cast.*_to_copy"),
    "zeros written over": (lambda: Applied(written_over), "the backward of Filled.*where"),
    "several outputs": (lambda: Applied(pair), "the backward of Pair.*several tensors"),
    "a hook on a tensor": (lambda: Applied(hooked), "a hook on the gradient of a tensor"),
    "a hook on a module": (lambda: with_hook("module"), "a hook on the backward of layer"),
    "a hook on a weight": (lambda: with_hook("weight"), "a hook on the gradient of layer.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_lose_is_refused_in_training_alone(name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(
        CaptureError,
        match=f"(?s)Applied does not capture, for its graph would lose {told}.*custom operator with register_autograd",
    ):
        Graph.of(job(make))
    assert Graph.of(job(make), purpose="predict").ops
    assert Function.apply.__qualname__ == "Function.apply" and Tensor.register_hook.__module__ == "torch._tensor"


@pytest.mark.slow
def test_what_is_refused_is_split_by_data_as_it_is(pool: Pool) -> None:
    rows = verify(job(REFUSED["a hook on a tensor"][0]), 2, steps=1, pool=pool)
    assert {row.strategy: row.passed for row in rows if row.applicable} == {"data": True, "sharded": True}, rows
    assert all("would lose a hook" in row.reason for row in rows if row.strategy == "tensor")
