"""Weight files: the tensors of safetensors files by name. Parts of them are read, and nothing else of the files."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shardwise.errors import WeightsError
from shardwise.weights.find import find_files
from shardwise.weights.format import Entry, changed, data_of, opened, read_header

Ranges = Sequence[tuple[int, int]]
"""Entries of one dim: from the first number of each pair to the second, without it, in order."""

CHUNK = 8 << 20
"""Bytes of a part that are read at a time, where they cannot go to their place at once."""
PAGE = 4096
"""Bytes. What lies between two parts and is shorter is read with them: a file system reads no less."""


class WeightFiles:
    """The tensors of a safetensors file, or of the files of a folder that its index names.

    Nothing is mapped into memory, and no file stays open: what is read goes to its place, by `pread`.

    Args:
        path: a file, or a folder with one file or with an index (`model.safetensors.index.json`).

    Raises:
        WeightsError: there is no such file, or it is not a whole safetensors file.

    Attributes:
        entries: the tensors by name.
        asked: bytes of the parts that were read, in the file's dtype.
        fetched: bytes that the files were read for, with those between the parts.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.asked = self.fetched = 0
        files, index = find_files(self.path)
        for file in files:
            found = read_header(file)
            twice = next((name for name in found if name in self.entries), None)
            if twice is not None:
                raise WeightsError(f"{twice} is in both {self.entries[twice].file} and {file}; get the files again")
            self.entries |= found
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Mapping[str, Path]) -> None:
        lost = [n for n, file in index.items() if n not in self.entries or self.entries[n].file != file]
        if lost:
            raise WeightsError(
                f"the index of {self.path} says that {index[lost[0]].name} has {lost[0]}, but it has not, and so for "
                f"{len(lost)} of {len(index)} names; get the files again, all of one version"
            )
        self.entries = {name: self.entries[name] for name in index}

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, name: str, out: Tensor, ranges: Sequence[Ranges] | None = None) -> Tensor:
        """Read a part of a tensor into `out`, in its dtype and on its device.

        Args:
            out: of the part's shape.
            ranges: the entries of each dim that are the part; None means all.

        Raises:
            WeightsError: the file was changed since its header was read, or cannot be read.
        """
        entry = self.entries[name]
        kept = [tuple(r) for r in ranges] if ranges is not None else [((0, n),) for n in entry.shape]
        shape = tuple(map(count, kept))
        assert tuple(out.shape) == shape, (name, tuple(out.shape), shape)
        self.asked += out.numel() * entry.dtype.itemsize
        if not out.numel():
            return out
        if not shape:  # one number
            entry, kept, shape = replace(entry, shape=(1,)), [((0, 1),)], (1,)
        with torch.no_grad(), opened(entry) as descriptor:
            target = out.detach().reshape(shape) if out.is_contiguous() else out.detach()
            at_once = target.dtype == entry.dtype and target.device.type == "cpu" and target.is_contiguous()
            step = max(1, CHUNK // (math.prod(shape[1:]) * entry.dtype.itemsize))
            for first in range(0, shape[0], step):
                last = min(first + step, shape[0])
                part = target[first:last]
                block = part if at_once else torch.empty(part.shape, dtype=entry.dtype, device="cpu")
                self._read_block(entry, descriptor, [within(kept[0], first, last), *kept[1:]], block)
                if not at_once:
                    part.copy_(block)
        return out

    def _read_block(self, entry: Entry, descriptor: int, kept: Sequence[Ranges], out: Tensor) -> None:
        """Read a part into `out`, which is contiguous and of the file's dtype."""
        shape, size = entry.shape, entry.dtype.itemsize
        cuts = [d for d, dim in enumerate(kept) if d and list(dim) != [(0, shape[d])]]
        # Parts that lie close to each other are read as the block that encloses them, and cut in memory.
        while cuts and _gap(kept[cuts[-1]], shape, cuts[-1]) * size < PAGE:
            cuts.pop()
        dim = cuts[-1] if cuts else 0
        cut_later = [d for d in range(dim + 1, len(shape)) if list(kept[d]) != [(0, shape[d])]]
        run = math.prod(shape[dim + 1 :])
        strides = [math.prod(shape[d + 1 :]) for d in range(dim)]
        flat, at = out.view(-1), 0
        room = data_of(flat)
        inner = out.shape[dim + 1 :]
        for index in itertools.product(*(_indices(kept[d]) for d in range(dim))):
            base = sum(i * stride for i, stride in zip(index, strides, strict=True))
            for a, b in kept[dim]:
                offset = entry.start + (base + a * run) * size
                taken = (b - a) * math.prod(inner)
                if not cut_later:
                    self._fetch(entry, descriptor, offset, room[at * size : (at + taken) * size])
                else:
                    block = torch.empty((b - a, *shape[dim + 1 :]), dtype=entry.dtype, device="cpu")
                    self._fetch(entry, descriptor, offset, data_of(block))
                    for d in cut_later:
                        block = torch.cat([block.narrow(d - dim, lo, hi - lo) for lo, hi in kept[d]], d - dim)
                    flat[at : at + taken].view(b - a, *inner).copy_(block)
                at += taken

    def _fetch(self, entry: Entry, descriptor: int, offset: int, room: memoryview) -> None:
        """Fill `room` with the bytes of a file from `offset` on."""
        while len(room):
            try:
                got = os.preadv(descriptor, [room], offset)
            except OSError as error:
                raise WeightsError(f"{entry.file} cannot be read: {error.strerror}; see to its disk") from error
            if not got:
                raise changed(entry.file)
            self.fetched += got
            room, offset = room[got:], offset + got


def runs(indices: Tensor) -> list[tuple[int, int]]:
    """Rising whole numbers as ranges."""
    if not indices.numel():
        return []
    breaks = (indices.diff() != 1).nonzero().flatten()
    starts = torch.cat([indices[:1], indices[breaks + 1]]).tolist()
    stops = torch.cat([indices[breaks], indices[-1:]]).tolist()
    return [(a, b + 1) for a, b in zip(starts, stops, strict=True)]


def count(ranges: Ranges) -> int:
    """How many entries ranges have."""
    return sum(b - a for a, b in ranges)


def within(ranges: Ranges, first: int, last: int) -> Ranges:
    """The ranges of those entries that come `first` to `last` among all of them."""
    found, at = [], 0
    for a, b in ranges:
        low, high = max(first - at, 0), min(last - at, b - a)
        if low < high:
            found.append((a + low, a + high))
        at += b - a
    return found


def _indices(ranges: Ranges) -> Iterator[int]:
    return itertools.chain.from_iterable(range(a, b) for a, b in ranges)


def _gap(ranges: Ranges, shape: Sequence[int], dim: int) -> float:
    """Elements between two parts along a dim, on average."""
    return (shape[dim] - count(ranges)) / len(ranges) * math.prod(shape[dim + 1 :])
