"""What an optimizer keeps of each weight, observed on a weight that it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwise.job import Job

_SIDE = 64
_USUAL = 8  # Adam's two moments in fp32


def state_bytes(job: Job) -> int:
    """Bytes of optimizer state for each weight: 8 for Adam in fp32, 4 for SGD with momentum, 0 without."""
    weight = nn.Parameter(torch.zeros(_SIDE, _SIDE))
    weight.grad = torch.ones_like(weight)
    try:
        made = job.optimizer([weight])
        optimizer = made[0] if isinstance(made, tuple) else made
        optimizer.step()
    except Exception:  # whatever a user's function raises on one weight; it will tell when the job runs
        return _USUAL
    kept = [v for v in optimizer.state.get(weight, {}).values() if isinstance(v, Tensor)]
    return round(sum(t.numel() * t.element_size() for t in kept) / weight.numel())
