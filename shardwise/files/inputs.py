"""Inputs: a file as a dataset whose samples fit a job's, read a sample at a time; opened again on each rank."""

from __future__ import annotations

import bisect
import itertools
import json
import mmap
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import FileError, UserError
from shardwise.files.fields import ONE, Fields, as_tensor
from shardwise.job import Job


def open_inputs(path: Path, job: Job) -> Dataset[Any]:
    """The samples of a file in the structure, the dtypes and the shapes of the job's own samples.

    A job's sample may be a tensor, a tuple whose first element the model is given, or a dict. The file has an array for
    each field, samples first, or a sample on each line or in each row; see docs/files.md. Numbers become those of the
    job's dtype, whole ones never of fractions. Where the job has a `collate` of its own, samples may have any shape.

    Raises:
        FileError: the file cannot be read, is of an unknown type, or lacks a field; or its first sample has another
            shape. A later sample that does not fit raises it when it is read.
    """
    return _Fitted(path, open_rows(path), Fields.of(job))


def open_rows(path: Path) -> Rows:
    """The samples of a file as it has them.

    Raises:
        FileError: the file cannot be read, or is of an unknown type.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise FileError(f"{path} has the unknown type {path.suffix!r}; give a file of {', '.join(READERS)}")
    with _told(path):
        return reader(path.resolve())


class _Fitted(Dataset[Any]):
    """The samples of a file, each checked and turned into the job's dtypes and structure."""

    def __init__(self, path: Path, rows: Rows, fields: Fields) -> None:
        self._path, self._rows, self._fields = path, rows, fields
        self._names: list[str] | None = None
        if len(rows):
            self._names = list(self._named(0))
            fields.check_names(self._names, where=f"{path} ")
            self[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._fields.sample(self._named(index), where=f"{self._path}, {self._rows.where(index)}: ")

    def _named(self, index: int) -> dict[str, Any]:
        with _told(self._path):
            row = self._rows[index]
        if not isinstance(row, dict):
            row = {self._fields.nameless: row}
        if self._fields.kind == "one" and len(row) != 1:
            raise FileError(
                f"{self._path} has the fields {', '.join(map(repr, row))}, but a sample of the job is one tensor; "
                "give a file with one of them"
            )
        lacking = [name for name in self._names or () if name not in row]
        if lacking:
            raise FileError(
                f"{self._path}, {self._rows.where(index)} lacks {', '.join(map(repr, lacking))}, "
                "which the first sample has"
            )
        return row


# --- files ------------------------------------------------------------------------------------------------------------


class Rows:
    """The samples of an open file: a tensor each, or a dict of tensors or of numbers and lists.

    It travels to another process as its path, and is opened there again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """What a message calls a sample."""
        return f"sample {index}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path = state["_path"]
        with _told(self._path):
            self._open()


class _Npy(Rows):
    """One array, mapped into memory."""

    def _open(self) -> None:
        self._array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        _check_arrays(self._path, {ONE: self._array})

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> Tensor:
        return as_tensor(self._array[index])


class _Npz(Rows):
    """Named arrays, read whole."""

    def _open(self) -> None:
        with np.load(self._path, allow_pickle=False) as file:
            self._arrays = {name: file[name] for name in file.files}
        _check_arrays(self._path, self._arrays)

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: as_tensor(array[index]) for name, array in self._arrays.items()}


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise FileError(f"{path}: field {name!r} holds {array.dtype}; numbers are needed")
    _check_lengths(path, {name: array.shape for name, array in arrays.items()})


def _check_lengths(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not shapes:
        raise FileError(f"{path} has no arrays; give one for each field, samples first")
    if len({shape[:1] for shape in shapes.values()}) > 1 or not all(shapes.values()):
        told = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
        raise FileError(
            f"{path} must have the samples as the first dim of every field, as many in each, but has {told}; "
            "put them there"
        )


class _Safetensors(Rows):
    """Named tensors, of which a slice is read for each sample."""

    def _open(self) -> None:
        file: Any = safe_open(self._path, "pt")
        self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self._shapes: dict[str, tuple[int, ...]] = {n: tuple(part.get_shape()) for n, part in self._slices.items()}
        _check_lengths(self._path, self._shapes)

    def __len__(self) -> int:
        return next(iter(self._shapes.values()))[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: part[index : index + 1][0] for name, part in self._slices.items()}


class _JsonLines(Rows):
    """A number, a list or an object of them on each line; where lines begin is kept, not what they hold."""

    def _open(self) -> None:
        with self._path.open("rb") as file:
            lines = [(at, number) for at, number, line in _lines_of(file) if line.strip()]
            self._lines = np.array(lines, dtype=np.int64).reshape(-1, 2)
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if lines else None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Any:
        assert self._text is not None
        self._text.seek(int(self._lines[index, 0]))
        try:
            return json.loads(self._text.readline())
        except ValueError as error:
            raise FileError(f"{self._path}, {self.where(index)} is not JSON: {error}") from error

    def where(self, index: int) -> str:
        return f"line {self._lines[index, 1]}"


def _lines_of(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Where each line begins, its number, and the line."""
    at = 0
    for number, line in enumerate(file, 1):
        yield at, number, line
        at += len(line)


class _Parquet(Rows):
    """Columns of numbers or lists; one group of rows is kept at a time."""

    def _open(self) -> None:
        self._file = pyarrow_parquet(self._path).ParquetFile(self._path)
        groups = self._file.metadata
        counts = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._ends = list(itertools.accumulate(counts))
        self._kept: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        if self._kept[0] != group:
            self._kept = (group, self._file.read_row_group(group))
        first = self._ends[group - 1] if group else 0
        found: dict[str, Any] = self._kept[1].slice(index - first, 1).to_pylist()[0]
        return found


def pyarrow_parquet(path: Path) -> Any:
    """pyarrow's module for Parquet.

    Raises:
        FileError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(f"{path} is a Parquet file, which needs pyarrow; install it: pip install pyarrow") from error
    return pyarrow.parquet


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".npy": _Npy,
    ".npz": _Npz,
    ".safetensors": _Safetensors,
    ".jsonl": _JsonLines,
    ".parquet": _Parquet,
}


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into one message."""
    try:
        yield
    except (UserError, IndexError):
        raise
    except OSError as error:
        if error.errno is None:
            raise _broken(path, error) from error
        raise FileError(f"{path} cannot be read: {os.strerror(error.errno)}; give another path") from error
    except (ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:  # pyarrow's are ValueErrors too
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> FileError:
    return FileError(f"{path} is not a whole {path.suffix} file: {error}; write it again")
