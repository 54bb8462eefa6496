"""A module run as it is by the rules of its captured graph: placed random numbers, counted means, one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.graph import random
from shardwise.job import lifts
from shardwise.seeding import seed_torch

_OPERATORS = 1 << 20
"""More operators than a pass draws random numbers with."""


class Lifted(TorchDispatchMode):
    """Operators that name a floating-point dtype, or read a tensor of one, get `dtype` in its place."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lifts = lifts(dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Constants that the model makes in a dtype of its own are lifted where they are read.
        reads = not func._schema.is_mutable

        def lift(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return self._lifts.get(x, x)
            if reads and isinstance(x, Tensor) and x.dtype in self._lifts:
                return x.to(self._lifts[x.dtype])
            return x

        return func(*[lift(a) for a in args], **{k: lift(v) for k, v in (kwargs or {}).items()})


class OneDtype(TorchFunctionMode):
    """Functions that take tensors of one floating-point dtype only get `dtype` where they are given several.

    So a model whose weights are held in another dtype than it was written for runs, and what it computes in a wider one
    on purpose stays as it is.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _ONE_DTYPE:
            return func(*args, **kwargs)
        found = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()}
        if len(found) < 2:
            return func(*args, **kwargs)

        def alike(x: Any) -> Any:
            return x.to(self._dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        args, kwargs = tree_map(alike, (args, kwargs))
        return func(*args, **kwargs)


_ONE_DTYPE = frozenset(
    {
        "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "einsum",
        "addmm", "addmv", "baddbmm", "addbmm", "tensordot", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "multi_head_attention_forward",
        "layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm", "prelu", "grid_sample", "lstm", "gru",
        "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Which samples of a step a module runs on: `count` of `total`, from `first` on."""

    first: int
    count: int
    total: int


class Numbers:
    """Random numbers of one step that are functions of seed, step, operator and position, as in the captured graph.

    A tensor's samples are found by their number: along the first dim of that size, or else merged into dim 0. Where
    there are none, and the tensor is not one number or row for all, each rank draws its own.

    Micro-batch and operator are counted in torch's own generator, which activation checkpointing winds back before it
    runs a part again; so the caller forks it (`torch.random.fork_rng`). Draws that are not placed come from there too,
    other ones on each rank.

    Args:
        seed: the job's.
        step: updates made so far.
        rows: the samples of each micro-batch; None for one that has all.
        evaluating: whether no update is made, so that training is not seen again.
    """

    def __init__(self, seed: int, step: int, rows: Sequence[Rows] | None = None, *, evaluating: bool = False) -> None:
        self._key = random.stream(seed, step, int(evaluating))
        self._rows = rows
        self._start = random.stream(self._key, 1, rows[0].first if rows else 0) << 31
        self.begin(0)

    def begin(self, micro: int) -> None:
        """The first operator of a micro-batch comes."""
        seed_torch(self._start + micro * _OPERATORS)

    def next(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
        """The positions of a tensor, and the key of the operator that comes."""
        seed = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(seed + 1)
        micro, operator = divmod(seed - self._start, _OPERATORS)
        key = random.stream(self._key, 0, operator)
        rows = self._rows[micro] if self._rows else None
        if rows is None or rows.count == rows.total or not shape:
            return random.positions(shape, None, shape, device), key
        at = next((d for d, size in enumerate(shape) if size == rows.count), 0)
        if shape[at] % rows.count:
            own = key if shape[0] == 1 else random.stream(key, 1, rows.first)
            return random.positions(shape, None, shape, device), own
        each = shape[at] // rows.count
        axes = [torch.arange(size, device=device) for size in shape]
        axes[at] += rows.first * each
        whole = [*shape[:at], rows.total * each, *shape[at + 1 :]]
        return random.positions(shape, axes, whole, device), key


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


class CountedMean(TorchFunctionMode):
    """Notes over how many targets a cross-entropy is a mean, of which some may be ignored.

    Where none is left the mean is zero, so that it adds nothing to a sum over ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def count_of(self, loss: Tensor) -> Tensor | None:
        """The number of items, where the loss is one such mean and nothing else; a sum of weights where it has them."""
        if len(self._seen) != 1:
            return None
        mean, count = self._seen[0]
        return count if loss.shape == mean.shape and torch.equal(loss.detach(), mean.detach()) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy and func is not F.nll_loss:
            return func(*args, **kwargs)
        given = dict(zip(_CROSS_ENTROPY, args, strict=False)) | kwargs
        target, weight = given["target"], given.get("weight")
        plain = given.get("size_average") is None and given.get("reduce") is None
        if given.get("reduction", "mean") != "mean" or not plain or target.is_floating_point():
            return func(**given)
        valid = target != given.get("ignore_index", -100)
        count = valid.sum() if weight is None else weight[target[valid]].sum()
        # A mean of none would be NaN.
        mean = func(**given) if bool(valid.any()) else func(**{**given, "reduction": "sum"})
        self._seen.append((mean, count))
        return mean


_CROSS_ENTROPY = (
    "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
)  # fmt: skip


def _dropout_arguments(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return x, p, training


def _sdpa_dropout(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **more: Any
) -> float:
    return dropout_p
