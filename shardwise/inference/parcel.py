"""Parcels: tensors on their way from a rank to the process that started it, in memory that both see.

The memory has no name in any file system: it is gone with the last process that has it, however these end. Small
tensors are in the parcel itself, which takes less time than to make memory for them.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.errors import RunError
from shardwise.machine.descriptors import opened

_ALIGNED = 64  # bytes; a tensor starts at a multiple of it
_SMALL = 1 << 13  # bytes that are sent as they are


@dataclass(frozen=True)
class Parcel:
    """Where tensors lie.

    Attributes:
        process, descriptor: whose memory it is, and its number there; -1 where they are in `data`.
        size: bytes.
        places: of each tensor where it starts, its shape and its dtype.
        data: of small tensors what is in them.
    """

    process: int
    descriptor: int
    size: int
    places: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]
    data: bytes = b""


def pack(tensors: Sequence[Tensor]) -> Parcel:
    """Copy tensors to memory that another process of the same user can open, until `discard`.

    Raises:
        RunError: there is not enough memory.
    """
    places, size = [], 0
    for tensor in tensors:
        places.append((size, tuple(tensor.shape), tensor.dtype))
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    size = max(size, 1)
    if size <= _SMALL:
        small = bytearray(size)
        parcel = Parcel(os.getpid(), -1, size, tuple(places))
        _fill(parcel, small, tensors)
        return replace(parcel, data=bytes(small))
    try:
        descriptor = os.memfd_create("shardwise-outputs")
        os.ftruncate(descriptor, size)
        parcel = Parcel(os.getpid(), descriptor, size, tuple(places))
        with mmap.mmap(descriptor, size) as memory:
            _fill(parcel, memory, tensors)
    except OSError as error:
        raise RunError(
            f"{size / 1e9:.2f} GB of outputs cannot be kept: {error.strerror}; give a smaller global_batch"
        ) from error
    return parcel


def discard(parcel: Parcel) -> None:
    """Let go of memory that this process packed."""
    if parcel.descriptor >= 0:
        os.close(parcel.descriptor)


def unpack(parcel: Parcel) -> list[Tensor]:
    """The tensors of a parcel; its memory is kept for as long as one of them is."""
    if parcel.descriptor < 0:
        return _views(parcel, bytearray(parcel.data))
    descriptor = opened(parcel.process, parcel.descriptor)
    try:
        memory = mmap.mmap(descriptor, parcel.size)
    finally:
        os.close(descriptor)
    return _views(parcel, memory)


def ends(parcel: Parcel, *, within: float) -> bool:
    """Whether the process that packed it has ended, or does within so many seconds."""
    try:
        process = os.pidfd_open(parcel.process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], within)[0])
    finally:
        os.close(process)


def _fill(parcel: Parcel, memory: mmap.mmap | bytearray, tensors: Sequence[Tensor]) -> None:
    for view, tensor in zip(_views(parcel, memory), tensors, strict=True):
        view.copy_(tensor)


def _views(parcel: Parcel, memory: mmap.mmap | bytearray) -> list[Tensor]:
    found = []
    for start, shape, dtype in parcel.places:
        count = torch.Size(shape).numel()
        # torch takes no part of a buffer that is empty.
        flat = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        )
        found.append(flat.view(shape))
    return found
