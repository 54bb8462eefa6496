"""Operators on a part of their tensors that are not the same operator: what their letters' `special` names.

These run inside a rank's program. `axes` are the mesh axes that cut the letter, outermost first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.graph import random
from shardwise.parallel.collectives import all_reduce_, merge_view, split_view
from shardwise.parallel.mesh import Axis

aten = torch.ops.aten
Parts = int | tuple[int, ...]
"""Into how many equal parts, or the shares of unequal ones."""
Chain = Sequence[tuple[Parts, int]]
"""Cuts of one dim, outermost first: (parts, this rank's part)."""


def chunk(n: int, parts: Parts, index: int) -> int:
    """Size of part `index` of `n`; the first parts are larger where it does not divide."""
    return n // parts + (index < n % parts) if isinstance(parts, int) else _by_shares(n, parts)[index]


def chunk_start(n: int, parts: Parts, index: int) -> int:
    """Where part `index` of `n` starts."""
    return (n // parts) * index + min(index, n % parts) if isinstance(parts, int) else sum(_by_shares(n, parts)[:index])


@lru_cache
def _by_shares(n: int, shares: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of parts in proportion to shares; what is left over goes to the largest remainders, the first first."""
    whole = sum(shares)
    sizes = [n * share // whole for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: -(n * shares[i] % whole))
    for i in remainders[: n - sum(sizes)]:
        sizes[i] += 1
    return tuple(sizes)


def local_count(n: int, chain: Chain) -> int:
    """How many of `n` samples this rank has."""
    for parts, index in chain:
        n = chunk(n, parts, index)
    return n


def local_start(n: int, chain: Chain) -> int:
    """Where this rank's samples start."""
    start = 0
    for parts, index in chain:
        start += chunk_start(n, parts, index)
        n = chunk(n, parts, index)
    return start


def part_sizes(n: int, chain: Chain, parts: Parts) -> list[int]:
    """The sizes of the parts that this rank's samples would be cut into."""
    n = local_count(n, chain)
    return [chunk(n, parts, i) for i in range(parts if isinstance(parts, int) else len(parts))]


def embedding(table: Tensor, index: Tensor, start: int, padding: int) -> Tensor:
    """Rows of a table of which this rank has `start` to `start + len(table)`; zero for the others'.

    `padding` is the row, of all, that gets no gradient; -1 for none.
    """
    local = index - start
    mine = (local >= 0) & (local < table.shape[0])
    unlearned = padding - start if start <= padding < start + table.shape[0] else -1
    found = aten.embedding.default(table, torch.where(mine, local, 0), unlearned)
    return torch.where(mine.unsqueeze(-1), found, found.new_zeros(()))


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore: int, start: int, axes: Sequence[Axis]) -> Tensor:
        largest = logits.amax(dim=1).float() if logits.dtype is torch.bfloat16 else logits.amax(dim=1)
        for axis in axes:
            all_reduce_(largest, axis, op=dist.ReduceOp.MAX)
        shifted = logits - largest.unsqueeze(1)
        exps = shifted.exp()
        local = target - start
        mine = (local >= 0) & (local < logits.shape[1])
        safe = torch.where(mine, local, 0)
        own = shifted.gather(1, safe.unsqueeze(1)).squeeze(1) * mine
        both = torch.stack([exps.sum(1), own])
        for axis in axes:
            all_reduce_(both, axis)
        valid = target != ignore
        loss = torch.where(valid, both[0].log() - both[1], both.new_zeros(()))
        ctx.save_for_backward(exps.div_(both[0].unsqueeze(1)), safe, mine, valid)
        ctx.dtype = logits.dtype
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probabilities, safe, mine, valid = ctx.saved_tensors
        back = probabilities.clone()
        back.scatter_add_(1, safe.unsqueeze(1), -(mine.to(back.dtype)).unsqueeze(1))
        back.mul_((valid.to(back.dtype) * grad).unsqueeze(1))
        return back.to(ctx.dtype), None, None, None, None


def cross_entropy(logits: Tensor, target: Tensor, ignore: int, start: int, axes: Sequence[Axis]) -> Tensor:
    """Sum of cross-entropies over samples, the classes cut over `axes` (Shoeybi et al. 2019, section 3).

    Args:
        logits: [samples, this rank's classes].
        target: [samples].
        ignore: target value that does not count.
        start: this rank's first class.
        axes: mesh axes that cut the classes.
    """
    return _SplitCrossEntropy.apply(logits, target, ignore, start, axes)  # type: ignore[no-any-return,no-untyped-call]


def attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None, gqa: bool) -> Tensor:
    """Causal attention of the queries from `start` on, over all keys."""
    rows = torch.arange(start, start + q.shape[-2], device=q.device).unsqueeze(1)
    mask = rows >= torch.arange(k.shape[-2], device=q.device)
    return aten.scaled_dot_product_attention.default(q, k, v, mask, 0.0, False, scale=scale, enable_gqa=gqa)  # type: ignore[no-any-return]


def mean(x: Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: Any, count: int) -> Tensor:
    """This rank's share of a mean over `count` elements."""
    total = x.sum(dtype=dtype) if dim is None else x.sum(list(dim), keepdim=keepdim, dtype=dtype)
    return total / count


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, start: int) -> Tensor:
    """Rows grouped by expert times their expert's matrix, for this rank's experts from `start`; zero elsewhere.

    Args:
        x: [rows, in], sorted by expert.
        w: [this rank's experts, in, out].
        offsets: [all experts], where each expert's rows end.
    """
    ends = offsets.tolist()
    first = ends[start - 1] if start else 0
    out = x.new_zeros((x.shape[0], w.shape[2]))
    parts = []
    for e in range(w.shape[0]):
        last = ends[start + e]
        parts.append(x[first:last] @ w[e])
        first = last
    begin = ends[start - 1] if start else 0
    return torch.cat([out[:begin], *parts, out[first:]])


Span = Sequence[Sequence[tuple[int, int, int]]]
"""For each position its leaves, major first: (start, size on this rank, whole size)."""


def _indices(span: Span, device: torch.device) -> tuple[list[Tensor], list[int]]:
    found, whole = [], []
    for leaves in span:
        index = torch.zeros(1, dtype=torch.int64, device=device)
        total = 1
        for start, size, full in leaves:
            own = torch.arange(start, start + size, device=device)
            index = (index.unsqueeze(1) * full + own).reshape(-1)
            total *= full
        found.append(index)
        whole.append(total)
    return found, whole


def _at(shape: Sequence[int], span: Span, device: torch.device) -> Tensor:
    axes, whole = _indices(span, device)
    return random.positions(shape, axes, whole, device)


def dropout(x: Tensor, p: float, op: int, key: int, span: Span) -> Tensor:
    """Dropout of a part, its mask a function of the whole tensor's positions."""
    return random.dropout_at(x, p, _at(x.shape, span, x.device), random.stream(key, 0, op))


def dropout_per_rank(x: Tensor, p: float, op: int, key: int, part: int, first: int) -> Tensor:
    """Dropout by torch's own generator, seeded for each part of a tensor and each micro-batch (by its first sample)."""
    if p >= 1.0:
        return x * 0.0
    seed = random.stream(random.stream(key, part, op), first, 0)
    generator = torch.Generator(x.device).manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def draw(normal: bool, size: Sequence[int], op: int, key: int, span: Span, dtype: Any, device: Any) -> Tensor:
    """A part of a tensor of random numbers."""
    at = _at(size, span, torch.device(device))
    make = random.normal_at if normal else random.uniform_at
    return make(at, random.stream(key, 0, op), dtype)


def times(a: int, b: int) -> int:
    """A product of numbers that are known at run time."""
    return a * b


def plus(a: int, b: int) -> int:
    """A sum of numbers that are known at run time."""
    return a + b


def share(x: Tensor, samples: int, total: int) -> Tensor:
    """A micro-batch's share of what is there once in a step."""
    # A whole number times a float would be float32, and large counts would be rounded.
    return (x if x.is_floating_point() else x.double()) * (samples / total)


def narrow(x: Tensor, pos: int, lead: int, first: int, samples: int, total: int) -> Tensor:
    """The samples of one micro-batch, of a tensor that has those of the whole step."""
    return merge_view(split_view(x, pos, lead, total).narrow(pos + 1, first, samples), pos)


def arange(span: Span, first: float, step: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A part of first, first + step, first + 2·step, ..."""
    (index,), _ = _indices(span, device)
    return (first + step * index).to(dtype)
