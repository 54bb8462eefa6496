"""Formats: files of outputs, written from parts one after another, so that never more than a part is in memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import FileError
from shardwise.files.inputs import pyarrow_parquet
from shardwise.weights.format import data_of, write_header

Head = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor the dtype, and the shape of one sample."""


@dataclass(frozen=True)
class Part:
    """The outputs of samples `start` to `stop`, which `read` gives."""

    start: int
    stop: int
    head: Head
    read: Callable[[], dict[str, Tensor]]


class Format(Protocol):
    """A type of file."""

    def check(self, heads: Sequence[Head], one: str) -> None:
        """That such outputs can be in one file; `one` is the name of a tensor that comes alone."""

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        """Writes all parts."""


class _Arrays:
    """What the files of whole arrays have in common: samples are alike."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, heads: Sequence[Head], one: str) -> None:
        for head in heads[1:]:
            if head != heads[0]:
                raise FileError(
                    f"outputs are {_text(heads[0])} for some samples and {_text(head)} for others, but "
                    f"{self._path.suffix} holds arrays; name a .jsonl file, or let the model give one shape"
                )

    def _whole(self, parts: Sequence[Part]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and the shape of each array."""
        total = parts[-1].stop if parts else 0
        return {name: (dtype, (total, *shape)) for name, (dtype, shape) in (parts[0].head if parts else {}).items()}


class Npy(_Arrays):
    """One array."""

    def check(self, heads: Sequence[Head], one: str) -> None:
        super().check(heads, one)
        if len(heads[0]) != 1:
            names = ", ".join(map(repr, heads[0]))
            raise FileError(
                f"the model gives {len(heads[0])} tensors ({names}), but .npy holds one; "
                "name a .npz or .safetensors file"
            )

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        for name, (dtype, shape) in self._whole(parts).items() or {"": ("float32", (0,))}.items():
            _array(file, name, dtype, shape, parts)


class Npz(_Arrays):
    """Named arrays in a zip file, not compressed."""

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (dtype, shape) in self._whole(parts).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    _array(member, name, dtype, shape, parts)


def _array(file: IO[bytes], name: str, dtype: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
    kind = _numpy(torch.empty(0, dtype=getattr(torch, dtype))).dtype
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(_numpy(part.read()[name]).tobytes())


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as NumPy has it; bfloat16 and 8-bit floats, which it has not, become float32 without loss."""
    try:
        found: np.ndarray[Any, Any] = tensor.numpy()
    except TypeError:
        found = tensor.float().numpy()
    return found


class Safetensors(_Arrays):
    """Named tensors of any dtype that a part can have."""

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        whole = self._whole(parts).items()
        for name in write_header(file, {name: (getattr(torch, dtype), shape) for name, (dtype, shape) in whole}):
            for part in parts:
                file.write(data_of(part.read()[name].contiguous()))


class JsonLines:
    """A line for each sample: a number or list where the model gives one tensor, else an object of them."""

    def __init__(self, path: Path) -> None:
        self._one = ""

    def check(self, heads: Sequence[Head], one: str) -> None:
        self._one = one
        for head in heads:
            _no_complex(head, ".jsonl")

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        for part in parts:
            tensors = part.read()
            columns = {name: tensors[name].tolist() for name in part.head}
            for values in zip(*columns.values(), strict=True):
                alone = list(columns) == [self._one]
                sample = values[0] if alone else dict(zip(columns, values, strict=True))
                file.write(json.dumps(sample).encode() + b"\n")


class Parquet:
    """A column for each tensor, of numbers or of lists."""

    def __init__(self, path: Path) -> None:
        self._path = path
        pyarrow_parquet(path)

    def check(self, heads: Sequence[Head], one: str) -> None:
        for head in heads:
            _no_complex(head, ".parquet")
        first = {name: (dtype, len(shape)) for name, (dtype, shape) in heads[0].items()}
        for head in heads[1:]:
            if {name: (dtype, len(shape)) for name, (dtype, shape) in head.items()} != first:
                raise FileError(
                    f"outputs are {_text(heads[0])} for some samples and {_text(head)} for others, which one column "
                    "cannot hold; name a .jsonl file"
                )

    def write(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        import pyarrow  # type: ignore[import-not-found, unused-ignore]

        writer = None
        for part in parts:
            tensors = part.read()
            table = pyarrow.table({name: _column(pyarrow, tensors[name]) for name in part.head})
            writer = writer or pyarrow_parquet(self._path).ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is None:
            writer = pyarrow_parquet(self._path).ParquetWriter(file, pyarrow.schema([]))
        writer.close()


def _column(pyarrow: Any, tensor: Tensor) -> Any:
    """Lists of lists, as deep as the tensor has dims behind the samples."""
    found = pyarrow.array(_numpy(tensor).reshape(-1))
    for dim in range(tensor.ndim - 1, 0, -1):
        count = int(np.prod(tensor.shape[:dim]))
        offsets = pyarrow.array(np.arange(count + 1, dtype=np.int64) * tensor.shape[dim])
        found = pyarrow.LargeListArray.from_arrays(offsets, found)
    return found


def _no_complex(head: Head, suffix: str) -> None:
    for name, (dtype, _) in head.items():
        if dtype.startswith("complex"):
            raise FileError(f"output {name!r} holds {dtype}, which {suffix} has not; name a .npz or .safetensors file")


def _text(head: Head) -> str:
    return ", ".join(f"{name!r} {dtype} {shape}" for name, (dtype, shape) in head.items())


FORMATS: Mapping[str, Callable[[Path], Format]] = {
    ".npy": Npy,
    ".npz": Npz,
    ".safetensors": Safetensors,
    ".jsonl": JsonLines,
    ".parquet": Parquet,
}
