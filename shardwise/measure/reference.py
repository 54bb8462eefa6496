"""One device's run of a job, by the user's own module and torch's own autograd: what every split is compared with.

Two things differ from a plain loop, and only where the job asks for them: random numbers are drawn as the captured
graph draws them, and in a float64 proof no operator may fall back to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.graph.capture import LossModule
from shardwise.graph.eager import Lifted, Numbers, PlacedDraws, PlacedDropout
from shardwise.job import Batch, Job, batch_tensors, lift


@dataclass
class Trace:
    """What a run computed: per step the loss, the gradient norm and (first step) every gradient; then every parameter.

    Attributes:
        losses: per step.
        norms: 2-norm of the whole gradient, per step.
        grads: gradients of every step, by parameter.
        params: parameters after the last step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)


def real(tensor: Tensor) -> Tensor:
    """A tensor of real numbers; pairs of them in a last dim of two for complex ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def run_reference(
    job: Job,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    optimizer: Callable[..., Any],
    module: nn.Module | None = None,
) -> Trace:
    """Train a job on one device for one step per batch.

    Args:
        job: what to train.
        batches: global batches.
        dtype: of parameters, inputs and every operator.
        optimizer: as `Job.optimizer`.
        module: the module with its initial weights; None builds it.
    """
    module = lift(module if module is not None else job.build(), dtype)
    cast = [lift(batch, dtype) for batch in batches]
    wrapper = LossModule(module, job, cast[0]).train()
    made = optimizer(list(module.parameters()))
    update, scheduler = made if isinstance(made, tuple) else (made, None)
    trace = Trace()
    named = list(module.named_parameters())
    for step, batch in enumerate(cast):
        with torch.random.fork_rng(devices=[]):
            numbers = Numbers(job.seed, step)
            # Backward as well, for it may run a part of the model again.
            with Lifted(dtype), PlacedDraws(numbers, dtype), PlacedDropout(numbers):
                loss = wrapper(*batch_tensors(batch))
                loss.backward()
        grads = {n: p.grad.detach().clone() for n, p in named if p.grad is not None}
        squares = (real(g).double().pow(2).sum() for g in grads.values())
        norm = torch.sqrt(sum(squares, torch.zeros((), dtype=torch.float64)))
        trace.losses.append(float(loss.detach()))
        trace.norms.append(float(norm))
        trace.grads.append(grads)
        if job.clip_norm is not None and norm > job.clip_norm:
            for _, p in named:
                if p.grad is not None:
                    p.grad.mul_(job.clip_norm / (float(norm) + 1e-6))
        update.step()
        update.zero_grad(set_to_none=True)
        if scheduler is not None:
            scheduler.step()
    kept = module.state_dict()
    trace.params = {n: p.detach().clone() for n, p in named}
    trace.params |= {n: b.detach().clone() for n, b in module.named_buffers() if n in kept and b.is_floating_point()}
    return trace
