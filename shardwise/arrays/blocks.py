"""Blocks: runs of an array's rows, and a function's results for them, each put in its place. Does not import torch.

A row is what one index along the mapped axis selects. Arrays are NumPy's or tensors on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from shardwise.errors import ArrayError

Array = Any
"""A numpy.ndarray or a torch.Tensor."""


@dataclass(frozen=True)
class Form:
    """Of which kind, dtype and shape an array is; Fortran order is kept for NumPy arrays alone."""

    tensor: bool
    dtype: Any
    shape: tuple[int, ...]
    order: Literal["C", "F"] = "C"

    @classmethod
    def of(cls, array: Array) -> Form:
        if is_tensor(array):
            return cls(True, array.dtype, tuple(array.shape))
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        return cls(False, array.dtype, array.shape, "F" if fortran else "C")

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * int(self.dtype.itemsize)

    def empty(self) -> Array:
        """A new array of this form."""
        if not self.tensor:
            return np.empty(self.shape, self.dtype, self.order)
        import torch

        return torch.empty(self.shape, dtype=self.dtype)

    def over(self, buffer: Any) -> Array:
        """An array of this form whose elements are those of a buffer."""
        if not self.tensor:
            return np.ndarray(self.shape, self.dtype, buffer, order=self.order)
        import torch

        count = int(np.prod(self.shape, dtype=np.int64))
        if count == 0:
            return self.empty()
        return torch.frombuffer(buffer, dtype=self.dtype, count=count).view(self.shape)

    def text(self) -> str:
        return f"{'tensor' if self.tensor else 'array'} of {self.dtype} {self.shape}"


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, without an import of torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


@dataclass
class Work:
    """A function, the array whose blocks it is given, and the array that its results go to.

    `out` is made for the first result where there is none yet; so it has to be done alone.
    """

    fn: Callable[[Array], Array]
    array: Array
    axis: int
    out: Array | None = None
    shareable: bool = False
    """Whether the elements have to mean the same in another process."""

    @property
    def rows(self) -> int:
        return int(self.array.shape[self.axis])

    def at(self, start: int, stop: int) -> tuple[slice, ...]:
        """The index of rows in the array and in `out`."""
        return (*[slice(None)] * self.axis, slice(start, stop))

    def do(self, start: int, stop: int) -> None:
        """Computes the results of one block and puts them in place.

        Raises:
            ArrayError: the result is not a block like the others.
        """
        at = self.at(start, stop)
        block = self.array[at]
        try:
            if start and _writes_in_place(self.fn, block, self.out):
                self.fn(block, out=self.out[at])  # type: ignore[index, call-arg]
                return
            found = self.fn(block)
        except BaseException as error:
            error.add_note(f"in {self.where(start, stop)}")
            raise
        self._check(found, start, stop)
        if self.out is None:
            self.out = replace(Form.of(found), shape=self._whole(found)).empty()
        self.out[at] = found.detach() if is_tensor(found) else found

    def _check(self, found: Array, start: int, stop: int) -> None:
        tensor = is_tensor(found)
        if not (tensor or isinstance(found, np.ndarray)):
            raise ArrayError(
                f"fn must return one array or tensor with the rows of its block, but returned a "
                f"{type(found).__name__} for {self.where(start, stop)}; put several results into one array, "
                "or map once for each"
            )
        if found.ndim <= self.axis or found.shape[self.axis] != stop - start:
            raise ArrayError(
                f"fn must return as many rows as its block has, {stop - start} along axis {self.axis}, but returned "
                f"the shape {tuple(found.shape)} for {self.where(start, stop)}; "
                "keep that axis, with keepdims=True for example"
            )
        if self.shareable and not tensor and found.dtype.hasobject:
            raise ArrayError(
                f"fn returned Python objects for {self.where(start, stop)}, which processes cannot share; "
                'return numbers, or take backend="threads"'
            )
        out = self.out
        if out is None:
            return
        if self._whole(found) != tuple(out.shape) or tensor != is_tensor(out) or not _castable(found, out):
            given = replace(Form.of(found), shape=self._whole(found)).text()
            raise ArrayError(
                f"fn returned what makes an {given} for {self.where(start, stop)}, "
                f"but the results go to {Form.of(out).text()}"
            )

    def _whole(self, found: Array) -> tuple[int, ...]:
        """The shape of all results."""
        return (*found.shape[: self.axis], self.rows, *found.shape[self.axis + 1 :])

    def where(self, start: int, stop: int) -> str:
        return f"rows {start} to {stop} of {self.rows} along axis {self.axis}"


def _castable(found: Array, out: Array) -> bool:
    if found.dtype == out.dtype:
        return True
    if not is_tensor(found):
        return bool(np.can_cast(found.dtype, out.dtype, "same_kind"))
    import torch

    return torch.can_cast(found.dtype, out.dtype)


def _writes_in_place(fn: Any, block: Array, out: Array | None) -> bool:
    """Whether a function takes `out`, as NumPy's functions of one argument do."""
    return (
        isinstance(fn, np.ufunc)
        and fn.nin == fn.nout == 1
        and isinstance(block, np.ndarray)
        and isinstance(out, np.ndarray)
    )
