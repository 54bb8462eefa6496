"""The user's optimizer on this rank's part of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.errors import JobError, PlanError
from shardwise.job import OptimizerFactory


def build_optimizer(
    factory: OptimizerFactory, module: nn.Module, local: Mapping[str, Sequence[nn.Parameter]]
) -> tuple[Optimizer, Any]:
    """The user's optimizer, and its scheduler or None, over local parameters.

    The factory sees stand-ins with the whole shapes, so that groups made by shape (no decay for vectors) come out as
    on one device; the stand-ins are then replaced by what this rank has.

    Args:
        factory: the job's optimizer function.
        module: the user's module, for its parameters' shapes and order.
        local: for each parameter's name this rank's tensors of it; empty where it has none.

    Raises:
        JobError: the factory does not return an Optimizer, or (Optimizer, LRScheduler).
    """
    standins: dict[nn.Parameter, str] = {}
    for name, param in module.named_parameters():
        standin = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        standins[standin] = name
    made = factory(list(standins))
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    if not isinstance(optimizer, Optimizer):
        raise JobError(f"optimizer(params) must return a torch Optimizer, but returned {type(optimizer).__name__}")
    groups = []
    for group in optimizer.param_groups:
        members = [p for standin in group["params"] for p in local.get(standins.get(standin, ""), ())]
        groups.append({**group, "params": members})
    if optimizer.state:
        # State made at construction belongs to the stand-ins: construct again.
        fresh = type(optimizer)([g for g in groups if g["params"]], **optimizer.defaults)
        optimizer.state = fresh.state
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = new["params"]
    return optimizer, scheduler


def check_elementwise(factory: OptimizerFactory) -> None:
    """Check that the optimizer updates each entry of a parameter by that entry's gradient alone.

    Probed, not listed: a small matrix is updated whole, and as two halves.

    Raises:
        PlanError: it does not, so that parts of a parameter cannot be updated apart.
    """
    generator = torch.Generator().manual_seed(0)
    value, grad = (torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def updated(parts: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
        params = [nn.Parameter(p.clone()) for p in parts]
        made = factory(params)
        optimizer = made[0] if isinstance(made, tuple) else made
        for _ in range(2):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    try:
        whole = updated([value], [grad])
        halves = updated(list(value.split(4)), list(grad.split(4)))
    except Exception as error:
        raise PlanError(f"the optimizer cannot be probed on a small matrix: {type(error).__name__}: {error}") from error
    if not torch.allclose(whole, halves, rtol=1e-12, atol=1e-14):
        raise PlanError(
            "the optimizer couples the entries of a parameter (it updates a matrix and its halves differently), so "
            "parameters cannot be cut; use a plan with data and pipeline axes only and zero 0"
        )


NORM_PIECE = 65536
"""Elements that are summed in their own precision; a longer float32 sum would lose digits (4e6 elements: 1e-4)."""


def squared_norm(grads: Sequence[tuple[torch.Tensor, float]], device: torch.device) -> torch.Tensor:
    """The sum of squares of gradients, each times its share, as one float64 number."""
    pieces: list[torch.Tensor] = []
    shares: list[float] = []
    for grad, share in grads:
        flat = grad.detach().reshape(-1)
        parts = (flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat).split(NORM_PIECE)
        pieces += parts
        shares += [share] * len(parts)
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(pieces)).double()
    return norms.square().dot(torch.tensor(shares, dtype=torch.float64, device=device))
