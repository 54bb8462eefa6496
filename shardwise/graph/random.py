"""Random numbers that are functions of seed, step, operator and position, so that training does not depend on the plan.

Each element's number is a hash of its position in the whole tensor (a counter-based generator: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011; the mixer is the 32-bit finaliser of MurmurHash3). A rank that
holds a part of the tensor hashes the positions of its part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _MASK
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def stream(seed: int, step: int, op: int) -> int:
    """A 32-bit key for one operator at one step."""
    return _mix_int(_mix_int(_mix_int(seed & _MASK) + 0x9E3779B9 * (step + 1) & _MASK) + 0x7F4A7C15 * (op + 1) & _MASK)


def positions(size: Sequence[int], axes: Sequence[Tensor] | None, whole: Sequence[int], device: torch.device) -> Tensor:
    """The position in the whole tensor of each element of a part.

    Args:
        size: shape of the part.
        axes: for each position of the shape the whole tensor's indices that the part holds; None means all.
        whole: shape of the whole tensor.
        device: where the result goes.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for pos in range(len(size) - 1, -1, -1):
        index = torch.arange(size[pos], device=device) if axes is None else axes[pos]
        shape = [1] * len(size)
        shape[pos] = size[pos]
        total = total + (index * stride).view(shape)
        stride *= whole[pos]
    return total


def bits(at: Tensor, key: int) -> Tensor:
    """32 random bits for each position, as int64."""
    return _mix(_mix((at & _MASK) ^ key) + (at >> 32) & _MASK)


def uniform_at(at: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1) for each position."""
    return (bits(at, key) >> 8).to(dtype) * (1.0 / (1 << 24))


def dropout_at(x: Tensor, p: float, at: Tensor, key: int) -> Tensor:
    """Dropout whose mask is a function of position; kept is where a uniform number is below 1 - p, as in torch."""
    if p >= 1.0:
        return x * 0.0
    keep = (bits(at, key) >> 8) < math.ceil((1.0 - p) * (1 << 24))
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - p)))


def normal_at(at: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers for each position (Box and Muller 1958)."""
    u1 = uniform_at(at, key, torch.float64).clamp_min(2.0**-25)
    u2 = uniform_at(at, _mix_int(key ^ 0x5BD1E995), torch.float64)
    return (torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)).to(dtype)


def dropout(x: Tensor, p: float, op: int) -> Tensor:
    """Stands for dropout number `op` in a captured graph; ranks run `dropout_at` in its place."""
    return x * (1.0 - p)


def uniform(size: Sequence[int], op: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for uniform numbers in a captured graph."""
    return torch.empty(tuple(size), dtype=dtype, device=device)


def normal(size: Sequence[int], op: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for normal numbers in a captured graph."""
    return torch.empty(tuple(size), dtype=dtype, device=device)


dropout.operator_name = "shardwise.dropout"  # type: ignore[attr-defined]
uniform.operator_name = "shardwise.uniform"  # type: ignore[attr-defined]
normal.operator_name = "shardwise.normal"  # type: ignore[attr-defined]
DRAWS = (dropout, uniform, normal)
"""What stands for random numbers; the last argument is the operator's number."""
