"""The safetensors format: eight bytes that say how long the header is, the header in JSON, the tensors one by one.

The header has for each name a dtype, a shape, and where the bytes of the tensor start and end behind the header. The
tensors lie without gaps, little-endian and row by row (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from shardwise.errors import WeightsError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        file: where it is.
        state: of the file when its header was read.
        start: its first byte in the file.
    """

    file: Path
    state: tuple[int, ...]
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
        WeightsError: it is no safetensors file, or not all of one.
    """
    with _descriptor(file) as descriptor:
        return _header(file, descriptor, _state(descriptor))


@contextmanager
def opened(entry: Entry) -> Iterator[int]:
    """The descriptor of the file of a tensor.

    Raises:
        WeightsError: the file was changed since its header was read.
    """
    with _descriptor(entry.file) as descriptor:
        if _state(descriptor) != entry.state:
            raise changed(entry.file)
        yield descriptor


def changed(file: Path) -> WeightsError:
    """What is raised where a file is no longer what its header said."""
    return WeightsError(f"{file} was changed while it was read; let nothing write to it meanwhile, and start again")


@contextmanager
def _descriptor(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}; give another path") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _state(descriptor: int) -> tuple[int, ...]:
    """What tells one state of a file from another: device, number, bytes and time of the last change."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header(file: Path, descriptor: int, state: tuple[int, ...]) -> dict[str, Entry]:
    size = state[2]
    if size < 8:
        raise WeightsError(f"{file} has {size} bytes, too few for a safetensors file; get it again")
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > _LONGEST_HEADER:
        raise WeightsError(f"{file} is no safetensors file: its header would have {length:,} bytes; give another path")
    if 8 + length > size:
        raise WeightsError(f"{file} is cut off: its header has {length:,} bytes, the file {size:,}; get it again")
    try:
        header: Any = json.loads(os.pread(descriptor, length, 8))
        entries = {n: _entry(n, e, file, state, 8 + length) for n, e in header.items() if n != "__metadata__"}
    except WeightsError:
        raise
    except (ValueError, RecursionError, AttributeError) as error:
        raise WeightsError(f"{file} is no safetensors file: its header is not as it must be ({error})") from error
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))):
        if entry.start != at:
            raise WeightsError(
                f"{file} is not well-formed: {name} starts at byte {entry.start:,} in place of {at:,}; get it again"
            )
        at += math.prod(entry.shape) * entry.dtype.itemsize
    if at != size:
        what = "is cut off" if size < at else "has something behind its tensors"
        raise WeightsError(f"{file} {what}: it has {size:,} bytes, but its header says {at:,}; get it again")
    return entries


def _entry(name: str, described: Any, file: Path, state: tuple[int, ...], base: int) -> Entry:
    found: dict[str, Any] = described if isinstance(described, dict) else {}
    dtype: Any = found.get("dtype")
    shape: Any = found.get("shape")
    span: Any = found.get("data_offsets")
    if not (_sizes(shape) and _sizes(span) and len(span) == 2 and isinstance(dtype, str)):
        raise ValueError(f"{name[:80]!r} has no dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise WeightsError(
            f"{name} in {file} has dtype {dtype[:20]}, which is not supported; supported are {', '.join(DTYPES)}"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise ValueError(f"{name[:80]!r} is said to have {span[1] - span[0]:,} bytes, but is {dtype} of shape {shape}")
    return Entry(file, state, base + span[0], DTYPES[dtype], tuple(shape))


def _sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in found)


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the format, one after the other.

    Raises:
        WeightsError: the format has no name for a dtype.
    """
    odd = next((n for n, t in tensors.items() if t.dtype not in NAMES), None)
    if odd is not None:
        raise WeightsError(f"{odd} is {tensors[odd].dtype}, which safetensors cannot hold; save to a .pt file")
    for name in write_header(file, {name: (t.dtype, t.shape) for name, t in tensors.items()}):
        file.write(data_of(tensors[name].detach().cpu().contiguous()))


def write_header(file: IO[bytes], heads: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """Write what comes before tensors of these dtypes and shapes.

    Returns:
        their names in the order in which they are to follow: those of large items first, so that all are aligned.
    """
    ordered = sorted(heads, key=lambda name: (-heads[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        dtype, shape = heads[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    return ordered


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read or to write."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
