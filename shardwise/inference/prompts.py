"""Prompts: sequences of tokens to generate behind, checked, and read from a file."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import FileError, JobError
from shardwise.files.inputs import open_rows

Prompts = Iterable[Tensor | Sequence[int]]
"""Each of at least one token, which are whole numbers; they may be of unlike lengths."""


def checked(prompts: Iterable[Any], called: Callable[[int], str] = lambda number: f"prompt {number}") -> list[Tensor]:
    """The prompts as tensors, [length] each, int64, on the CPU.

    Args:
        called: what a message calls the prompt of a number.

    Raises:
        JobError: one is not a sequence of tokens.
    """
    found = []
    for number, prompt in enumerate(prompts):
        try:
            tensor = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise JobError(f"{called(number)} has {_odd(prompt)}; tokens are whole numbers below 2**63") from error
        if tensor.ndim != 1 or not len(tensor):
            shape = "is empty" if not tensor.numel() else f"has the shape {list(tensor.shape)}"
            raise JobError(f"{called(number)} {shape}; give tokens in one dim, at least one")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise JobError(f"{called(number)} is of {tensor.dtype}; tokens are whole numbers")
        tensor = tensor.to("cpu", torch.int64)
        if int(tensor.min()) < 0:
            raise JobError(f"{called(number)} has token {int(tensor.min())}; tokens are 0 or more")
        found.append(tensor)
    return found


def _odd(prompt: Any) -> str:
    """What cannot be in a tensor of tokens."""
    each = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    odd = next((token for token in each if not isinstance(token, int) or token >= 1 << 63), prompt)
    return reprlib.repr(odd)


def read_prompts(path: Path, field: str | None = None) -> list[Tensor]:
    """The prompts of a file: its lines, its rows, or one field of these.

    Args:
        path: of a type that `open_rows` knows.
        field: the name of the field that has the tokens; None means the only one, or lines and rows without names.

    Raises:
        FileError: the file cannot be read, or has no such field.
        JobError: a line or row is not a sequence of tokens.
    """
    rows = open_rows(path)
    name, found = field, []
    for number in range(len(rows)):
        row, where = rows[number], f"{path}, {rows.where(number)}"
        if isinstance(row, dict):
            names = ", ".join(map(repr, row)) or "none"
            if name is None and len(row) != 1:
                raise FileError(f"{where} has {len(row)} fields ({names}); say with --field which one has the tokens")
            name = name or next(iter(row))
            if name not in row:
                raise FileError(f"{where} has no field {name!r}; it has {names}")
            row = row[name]
        elif field is not None:
            raise FileError(f"{where} has no fields, so that {field!r} is not one of them; leave --field out")
        found.append(row)
    return checked(found, lambda number: f"prompt {number} ({path}, {rows.where(number)})")
