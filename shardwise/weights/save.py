"""Save: weights written whole or not at all, as safetensors or as torch.load reads them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shardwise.errors import WeightsError
from shardwise.weights.find import SUFFIX
from shardwise.weights.format import write_tensors


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a file, `.safetensors` or another, which has the old contents until the new are on the disk.

    A safetensors file has tied weights once, under the first of their names.

    Raises:
        WeightsError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                if path.suffix == SUFFIX:
                    write_tensors(file, _once(state))
                else:
                    torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
    except OSError as error:
        raise WeightsError(f"the weights cannot be written to {path}: {error.strerror}; give another path") from error


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
