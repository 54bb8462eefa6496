"""Pieces: how tensors are cut to go through slots, whatever room there is between their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """How tensors of so many rows and columns are cut into pieces: whole rows, or parts of one.

    Attributes:
        each: numbers of a piece at most.
    """

    rows: int
    columns: int
    each: int

    @classmethod
    def of(cls, x: Tensor, room: int) -> Pieces:
        """For tensors like this one, in pieces of at most so many bytes."""
        return cls(x.shape[0], x.shape[1], room // x.itemsize)

    @property
    def count(self) -> int:
        """How many pieces there are."""
        if self.columns > self.each:
            return self.rows * -(-self.columns // self.each)
        return -(-self.rows // (self.each // self.columns)) if self.rows and self.columns else 0

    def __getitem__(self, at: tuple[Tensor, int]) -> Tensor:
        """Piece k of a tensor, which may be shorter than the others are."""
        x, k = at
        if self.columns > self.each:
            row, k = divmod(k, -(-self.columns // self.each))
            return x[row, k * self.each : (k + 1) * self.each]
        rows = self.each // self.columns
        return x[k * rows : (k + 1) * rows]


def give(piece: Tensor, slot: Tensor) -> None:
    """Put a piece into a slot."""
    slot[: piece.numel()].view(piece.shape).copy_(piece)


def get(piece: Tensor, slot: Tensor) -> None:
    """Fill a piece from a slot."""
    piece.copy_(slot[: piece.numel()].view(piece.shape))


def fill(rows: Tensor, start: int, numbers: Tensor) -> None:
    """Write numbers into rows, which may have gaps between them, from a place on that counts those before it."""
    row, column = divmod(start, rows.shape[1])
    if column:
        first = numbers[: rows.shape[1] - column]
        rows[row, column : column + len(first)].copy_(first)
        row, numbers = row + 1, numbers[len(first) :]
    count, rest = divmod(len(numbers), rows.shape[1])
    whole, last = numbers[: len(numbers) - rest], numbers[len(numbers) - rest :]
    rows[row : row + count].copy_(whole.view(count, rows.shape[1]))
    if rest:
        rows[row + count, :rest].copy_(last)


def join(piece: Tensor, slots: Sequence[Tensor], fold: Callable[..., Tensor]) -> None:
    """Fill a piece with what several slots have, folded in their order."""
    parts = [slot[: piece.numel()].view(piece.shape) for slot in slots]
    if len(parts) == 1:
        piece.copy_(parts[0])
        return
    fold(parts[0], parts[1], out=piece)
    for part in parts[2:]:
        fold(piece, part, out=piece)


def flat(x: Tensor) -> Tensor:
    """The numbers of a tensor in the order in which they lie in memory, in which ranks send what they all have alike.

    Raises:
        ValueError: there are gaps between them.
    """
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected and x.numel():
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} and strides {x.stride()} has gaps; make it contiguous"
            )
        expected *= size
    return x.as_strided((x.numel(),), (1,))


def rows(x: Tensor) -> Tensor:
    """A tensor as rows of numbers that lie one after the other, in the order of its positions; a view of it.

    Raises:
        ValueError: its rows are not equally far apart.
    """
    columns, at = 1, x.dim()
    while at and (x.shape[at - 1] == 1 or x.stride(at - 1) == columns):
        at -= 1
        columns *= x.shape[at]
    try:
        return x.view(math.prod(x.shape[:at]), columns)
    except RuntimeError as error:
        where = f"shape {tuple(x.shape)} and strides {x.stride()}"
        raise ValueError(f"a tensor of {where} has no rows that are equally far apart; make it contiguous") from error


def alike(one: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A tensor and others of as many numbers, all as rows of one length.

    Raises:
        ValueError: the tensor is not contiguous, or the others have no rows that are equally far apart.
    """
    found = [rows(part) for part in parts]
    if not one.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(one.shape)} and strides {one.stride()} is not contiguous; make it so"
        )
    return one.view(found[0].shape), found
