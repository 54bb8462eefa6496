"""One device's run of a job, by the user's own module and torch's own autograd: what every split is compared with.

Two things differ from a plain loop, and only where the job asks for them: random numbers are drawn as the captured
graph draws them, and in a float64 proof no operator may fall back to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.graph import random
from shardwise.graph.capture import LossModule
from shardwise.job import Batch, Job, batch_tensors, map_batch


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


class Lifted(TorchDispatchMode):
    """Operators that name a floating-point dtype, or read a tensor of one, get `dtype` in its place."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._from = {d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if d != dtype}
        self._to = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Constants that the model makes in a dtype of its own are lifted where they are read.
        reads = not func._schema.is_mutable

        def lift(x: Any) -> Any:
            if isinstance(x, torch.dtype) and x in self._from:
                return self._to
            if reads and isinstance(x, Tensor) and x.dtype in self._from:
                return x.to(self._to)
            return x

        return func(*[lift(a) for a in args], **{k: lift(v) for k, v in (kwargs or {}).items()})


class Numbers:
    """Random numbers of one step that are functions of seed, step, operator and position, as in the captured graph."""

    def __init__(self, seed: int, step: int) -> None:
        self._key = random.stream(seed, step, 0)
        self._count = 0

    def next(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
        """The positions of a tensor, and the key of the operator that comes."""
        self._count += 1
        return random.positions(shape, None, shape, device), random.stream(self._key, 0, self._count - 1)


class PlacedDraws(TorchDispatchMode):
    """Operators that draw random numbers fill their result with placed ones, of `dtype` where they name none."""

    def __init__(self, numbers: Numbers, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers, self._dtype = numbers, dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_like")
        if kind not in ("rand", "uniform", "randn", "normal", "bernoulli", "exponential", "randint"):
            return func(*args, **(kwargs or {}))
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        if "self" not in given and given.get("dtype", self._dtype) is None:
            kwargs = {**(kwargs or {}), "dtype": self._dtype}
        chance = given["self"].clone() if kind == "bernoulli" and "p" not in given else given.get("p")
        out = func(*args, **(kwargs or {}))
        at, key = self._numbers.next(out.shape, out.device)
        wide = torch.float64 if kind == "randint" else out.dtype
        if kind in ("randn", "normal"):
            drawn = random.normal_at(at, key, wide) * given.get("std", 1.0) + given.get("mean", 0.0)
        else:
            drawn = random.uniform_at(at, key, wide)
        if kind == "uniform":
            drawn = drawn * (given["to"] - given["from"]) + given["from"]
        elif kind == "bernoulli":
            drawn = drawn < chance
        elif kind == "exponential":
            drawn = -torch.log(1 - drawn) / given["lambd"]
        elif kind == "randint":
            drawn = torch.floor(drawn * (given["high"] - given.get("low", 0))) + given.get("low", 0)
        return out.copy_(drawn)


class PlacedDropout(TorchFunctionMode):
    """Dropout whose masks are placed."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self._numbers = numbers

    def _drop(self, x: Tensor, p: float) -> Tensor:
        return random.dropout_at(x, p, *self._numbers.next(x.shape, x.device))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p, training = _dropout_arguments(*args, **kwargs)
            return self._drop(x, p) if training and p > 0 else x
        if func is torch.dropout:
            return self._drop(args[0], args[1]) if args[2] and args[1] > 0 else args[0]
        if func is F.scaled_dot_product_attention and _sdpa_dropout(*args, **kwargs) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        scores = (query * (scale if scale is not None else query.shape[-1] ** -0.5)) @ key.transpose(-2, -1)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        elif attn_mask is not None:
            masked = attn_mask.dtype is torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
        return self._drop(scores.softmax(-1), dropout_p) @ value


def _dropout_arguments(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return x, p, training


def _sdpa_dropout(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **more: Any
) -> float:
    return dropout_p


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
    module = (module if module is not None else job.build()).to(dtype)
    cast = [map_batch(b, lambda t: t.to(dtype) if t.is_floating_point() else t) for b in batches]
    wrapper = LossModule(module, job, cast[0]).train()
    made = optimizer(list(module.parameters()))
    update, scheduler = made if isinstance(made, tuple) else (made, None)
    trace = Trace()
    named = list(module.named_parameters())
    for step, batch in enumerate(cast):
        numbers = Numbers(job.seed, step)
        with Lifted(dtype), PlacedDraws(numbers, dtype), PlacedDropout(numbers):
            loss = wrapper(*batch_tensors(batch))
        loss.backward()
        grads = {n: p.grad.detach().clone() for n, p in named if p.grad is not None}
        norm = torch.sqrt(sum((g.double().pow(2).sum() for g in grads.values()), torch.zeros((), dtype=torch.float64)))
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
