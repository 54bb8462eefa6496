"""Chunks: the samples of a dataset in their order, so many at a time; the last chunk has what is left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, default_collate

from shardwise.errors import JobError
from shardwise.job import Batch, Job
from shardwise.seeding import seeded


class Chunks:
    """Reads chunks of `job.global_batch` samples on one rank, which asks for some of them in order.

    A map-style dataset is read where a chunk lies. An iterable one is read from its start, and what other ranks take is
    passed over: each rank needs the same stream.

    Args:
        job: with the data to read.

    Raises:
        JobError: the dataset has no length and is not iterable either.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._size = job, job.global_batch
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self.samples: int | None = None
        """Of the whole dataset, where that is known."""
        self.count: int | None = None
        """Chunks of the whole dataset, where that is known; of a stream once it was read to its end."""
        if not isinstance(job.data, IterableDataset):
            self.samples = job.samples()
            if self.samples is None:
                kind = type(job.data).__name__
                raise JobError(f"the dataset, a {kind}, has no length; give it __len__, or make it an IterableDataset")
            self.count = -(-self.samples // self._size)

    def sizes(self) -> set[int]:
        """The numbers of samples that chunks have, as far as they are known."""
        if self.samples is None:
            return {self._size}
        return {min(self.samples, self._size), self.samples % self._size} - {0}

    def example(self) -> Batch | None:
        """One or two samples, for their shapes; None of no samples."""
        job = self._job.with_(global_batch=min(2, self._size))
        return Chunks(job).read(0)

    def read(self, chunk: int) -> Batch | None:
        """A chunk by its number, larger ones later; None beyond the end.

        Random numbers that the dataset draws depend on the job's seed and the chunk, as in `Job.batch`.
        """
        start = chunk * self._size
        if self.samples is not None:
            stop = min(start + self._size, self.samples)
            return self._job.batch(range(start, stop)) if start < stop else None
        if self._rows is None:
            self._rows = iter(self._job.data)
        rows: list[Any] = []
        while self._next <= chunk:
            with seeded(self._job.seed, 0, self._next * self._size):
                rows = list(itertools.islice(self._rows, self._size))
                self._next += 1
                if self._next > chunk and rows:
                    return (self._job.collate or default_collate)(rows)
            if not rows:
                self.count = self._next - 1
                return None
        raise JobError(f"chunk {chunk} was passed over already")
