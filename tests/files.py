"""Files of arrays for tests: written and read by the libraries whose formats they have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardwise as sw

ARRAYS = [".npy", ".npz", ".safetensors"]
WITHOUT_PYARROW = [*ARRAYS, ".jsonl"]


class Named(nn.Module):
    """Takes two tensors by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        found: Tensor = self.layer(x)
        return found if shift is None else found + shift[:, None]


def job(sample: Any, **settings: Any) -> sw.Job:
    return sw.Job(model=Named, data=[sample] * 4, loss=lambda output, batch: output.sum(), **settings)  # type: ignore[arg-type]


ONE = torch.zeros(3)
PAIR = (torch.zeros(3), torch.tensor(1))
DICT = {"x": torch.zeros(3), "shift": torch.tensor(0.0), "label": torch.tensor(2)}


def write(path: Path, arrays: dict[str, Any]) -> Path:
    """A file of these arrays."""
    first = next(iter(arrays.values()), None)
    if path.suffix == ".npy":
        np.save(path, np.asarray(first))
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    elif path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(array) for name, array in arrays.items()}, path)
    elif path.suffix == ".jsonl":
        lists = {name: np.asarray(array).tolist() for name, array in arrays.items()}
        rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        table = sys.modules["pyarrow"].table({name: np.asarray(array).tolist() for name, array in arrays.items()})
        parquet.write_table(table, path, row_group_size=3)
    return path


def read(path: Path) -> dict[str, Any]:
    """What a file of outputs has, as NumPy arrays."""
    if path.suffix == ".npy":
        return {"output": np.load(path)}
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".safetensors":
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row if isinstance(row, dict) else {"output": row} for row in rows]
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    return {name: np.asarray(column) for name, column in parquet.read_table(path).to_pydict().items()}
