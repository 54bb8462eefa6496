"""How far two runs of a job are apart, and how far rounding alone takes one run from itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shardwise.measure.reference import Trace, real

_NOISE = 1e-6
"""A tensor counts as at least this part of all tensors together; one whose true gradient is zero as all of them."""


class Errors(NamedTuple):
    """Errors of one run against another, each the largest over steps and tensors; see `relative`.

    Attributes:
        loss: of the loss.
        grad: of every parameter's gradient and of the gradient norm.
        param: of every parameter and floating-point buffer after the steps.
    """

    loss: float
    grad: float
    param: float

    def within(self, others: Errors, factor: float, least: float) -> bool:
        """Whether each is at most so many times the other's, or at most `least`."""
        return all(error <= max(least, factor * other) for error, other in zip(self, others, strict=True))


def compare(found: Trace, true: Trace) -> tuple[Errors, str]:
    """A run's errors against another, and the tensor with the largest gradient error."""
    losses = (_relative(a, b) for a, b in zip(found.losses, true.losses, strict=True))
    grads = {
        (step, name): relative(mine.get(name, torch.zeros_like(grad)), grad, norm)
        for step, (mine, norm) in enumerate(zip(found.grads, true.norms, strict=True))
        for name, grad in true.grads[step].items()
    }
    grads |= {
        (step, "the gradient norm"): _relative(a, b)
        for step, (a, b) in enumerate(zip(found.norms, true.norms, strict=True))
    }
    worst = max(grads, key=lambda key: grads[key], default=(0, ""))
    scale = float(torch.stack([real(p).double().norm() for p in true.params.values()]).norm()) if true.params else 0.0
    params = (
        relative(found.params[name], value, scale / _NOISE if _is_noise(true, name) else scale)
        for name, value in true.params.items()
    )
    return Errors(max(losses), grads.get(worst, 0.0), max(params, default=0.0)), worst[1]


def relative(found: Tensor, true: Tensor, scale: float) -> float:
    """‖found − true‖ / max(‖true‖, 1e-6·scale), in float64; 0 for equal ones, infinity where one is not a number."""
    found, true = real(found).double().cpu(), real(true).double().cpu()
    if found.shape != true.shape:
        return float("inf")
    off = float(torch.linalg.vector_norm(found - true))
    return _sure(off / max(float(torch.linalg.vector_norm(true)), _NOISE * scale)) if off else 0.0


def _relative(found: float, true: float) -> float:
    return _sure(abs(found - true) / max(abs(true), 1e-30))


def _sure(error: float) -> float:
    return math.inf if math.isnan(error) else error  # NaN is less than nothing, and would pass


def _is_noise(true: Trace, name: str) -> bool:
    """Whether a parameter's true gradient is zero (a key's bias), so that its steps are rounding noise made large."""
    norms = [(float(g[name].norm()) if name in g else 0.0, n) for g, n in zip(true.grads, true.norms, strict=True)]
    return any(norm for norm, _ in norms) and all(norm <= 1e-12 * whole for norm, whole in norms)


def change_last_bits(module: nn.Module) -> None:
    """Make every weight the next larger or smaller number.

    What a run then differs by is what rounding does to it: a stable algorithm gives what exact arithmetic would of
    inputs changed that much (Higham, Accuracy and Stability of Numerical Algorithms, 1.5).
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            weight = real(parameter.detach())
            ends = torch.randint(0, 2, weight.shape, generator=draw).to(weight).mul_(2).sub_(1).mul_(torch.inf)
            weight.copy_(torch.nextafter(weight, ends))
