"""Int8: a weight held as whole numbers of one byte and a scale for each output channel, multiplied as it is.

Symmetric: of a channel whose largest entry is m, the entry w is round(w · 127 / m), and its scale m / 127. Products are
those of one device whatever part of a weight a rank has, as long as the scales are those of the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
_LEVELS = 127
_BLOCK = 1 << 19
"""Entries that a product turns back into floating-point numbers at a time on a CPU: 2 MiB, which its caches hold."""


class Int8Weight(Tensor):
    """A weight held in int8, which operators take for the tensor of floating-point numbers that it stands for.

    A product multiplies by the whole numbers, a few rows of them at a time on a CPU, and scales what comes out. Rows of
    a table are scaled when they have been looked up. For any other operator the weight is turned back as a whole, for
    as long as the operator takes.

    Attributes:
        numbers: int8.
        scales: of as many dims, of size 1 where all entries have the same scale.
    """

    numbers: Tensor
    scales: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Weight:
        with torch.inference_mode(False):  # as above
            made: Any = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=dtype, device=numbers.device)
        made.numbers, made.scales = numbers, scales
        return made  # type: ignore[no-any-return]

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """Of int8 numbers and their scales; `dtype` is what operators see."""

    def whole(self) -> Tensor:
        """The tensor that it stands for."""
        return (self.numbers.to(self.scales.dtype) * self.scales).to(self.dtype)

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return sum(t.numel() * t.element_size() for t in (self.numbers, self.scales))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES:
            return _moved(func, args, kwargs)
        how = _PRODUCTS.get(func)
        if how is not None and not kwargs:
            found = how(*args)
            if found is not None:
                return found
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would change a weight that is held in int8")
        with torch.inference_mode(False), torch.no_grad():  # or a part of it could not be taken in that mode
            args, kwargs = tree_map(lambda a: a.whole() if isinstance(a, Int8Weight) else a, (args, kwargs))
            return func(*args, **kwargs)


def quantize(values: Tensor, channels: Collection[int], whole: Callable[[Tensor], Tensor] | None = None) -> Int8Weight:
    """A weight in int8; its own memory is written over.

    Args:
        values: the weight, or this rank's part of it.
        channels: the dims of which each entry has a scale of its own.
        whole: makes of the largest entries of this rank's channels those of the whole weight's, where it has a part.
    """
    others = [d for d in range(values.ndim) if d not in channels]
    with torch.no_grad():
        if values.numel():
            largest = torch.maximum(values.amax(others, keepdim=True), -values.amin(others, keepdim=True))
        else:
            largest = values.new_zeros([1 if d in others else n for d, n in enumerate(values.shape)])
        scales = largest.to(torch.promote_types(values.dtype, torch.float32))
        scales = (whole(scales) if whole is not None else scales) / _LEVELS
        scales[scales == 0] = 1  # of channels that are all zeros
        if values.dtype == scales.dtype:
            numbers = values.div_(scales).round_().to(torch.int8)
        else:
            numbers = (values / scales).round_().to(torch.int8)
    return Int8Weight(numbers, scales, values.dtype)


# -- operators ---------------------------------------------------------------------------------------------------------

_MOVES = (
    aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default,
    aten.detach.default, aten.alias.default,
)  # fmt: skip
"""What only changes the order of dims."""


def _moved(func: Any, args: Any, kwargs: Any) -> Int8Weight:
    weight, *rest = args
    return Int8Weight(func(weight.numbers, *rest, **kwargs), func(weight.scales, *rest, **kwargs), weight.dtype)


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not isinstance(weight, Int8Weight) or isinstance(x, Int8Weight) or weight.ndim != 2:
        return None
    found = _product(x, weight)
    return found if found is None or bias is None else found.add_(bias)


def _matmul(x: Any, weight: Any) -> Tensor | None:
    if not isinstance(weight, Int8Weight) or isinstance(x, Int8Weight) or weight.ndim != 2 or not x.ndim:
        return None
    return _product(x, _moved(aten.t.default, (weight,), {}))


def _addmm(bias: Any, x: Any, weight: Any) -> Tensor | None:
    found = _matmul(x, weight)
    return found if found is None else found.add_(bias)


def _product(x: Tensor, weight: Int8Weight) -> Tensor | None:
    """[..., in] by [out, in], where scales are those of rows: the product with whole numbers, then scaled."""
    numbers, scales = weight.numbers, weight.scales
    outs, ins = weight.shape
    if scales.shape[1] != 1:
        return None
    rows = x.reshape(-1, ins)
    step = max(1, _BLOCK // max(ins, 1))
    if x.device.type != "cpu" or step >= outs:
        found = rows @ numbers.to(x.dtype).t()
    else:
        found = rows.new_empty((rows.shape[0], outs))
        room = x.new_empty((step, ins))
        for first in range(0, outs, step):
            block = numbers[first : first + step]
            torch.mm(rows, room[: len(block)].copy_(block).t(), out=found[:, first : first + step])
    return found.mul_(scales.reshape(1, -1)).view(*x.shape[:-1], outs)


def _embedding(table: Any, index: Any, *settings: Any) -> Tensor | None:
    numbers, scales = table.numbers, table.scales
    rows = aten.embedding.default(numbers, index).to(scales.dtype)
    each = aten.embedding.default(scales, index) if scales.shape[0] != 1 else scales[0]
    found: Tensor = (rows * each).to(table.dtype)
    return found


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
}


def held_bytes(tensor: Tensor) -> int:
    """Bytes of memory of a tensor, or of what a weight in int8 is held in."""
    return tensor.held if isinstance(tensor, Int8Weight) else math.prod(tensor.shape) * tensor.element_size()
