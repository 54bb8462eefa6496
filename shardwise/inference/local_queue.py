"""LocalQueue: a queue of chunks in memory that processes of one machine share.

Who asks a store waits until the process that has it runs, which takes long where ranks compute on all cores.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from shardwise.errors import RunError
from shardwise.machine.descriptors import opened

_CLAIMED, _TAKEN, _STOPPED, _COUNTS = range(4)  # places of the counts, and how many there are
_NUMBER, _LENGTH, _HEAD = range(3)  # places in what is before a note, and how many there are
_INT = 8  # bytes of a number
_NOTE = 1 << 15
"""Bytes of a note; a longer one goes through the store."""
_PAUSE, _LONGEST = 1e-4, 2e-3  # seconds between looks whether there is a note: at first, and at most


@dataclass(frozen=True)
class LocalQueue:
    """Where a queue lies; sent to other processes, which open it. Closed by the process that made it.

    Attributes:
        process, descriptor: whose memory it is, and its number there.
        notes: of how many chunks there is room for what is said of them.
    """

    process: int
    descriptor: int
    notes: int = 0

    @classmethod
    def new(cls, notes: int = 0) -> LocalQueue:
        """A queue of which nothing is claimed. Room that is never written to takes no memory."""
        descriptor = os.memfd_create("shardwise-queue")
        os.ftruncate(descriptor, (_COUNTS + notes * _HEAD) * _INT + notes * _NOTE)
        return cls(os.getpid(), descriptor, notes)

    def opened(self, store: dist.Store | None = None) -> SharedQueue:
        """The queue as a process uses it; a store is for notes.

        Raises:
            RunError: this process may not open it.
        """
        try:
            return SharedQueue(opened(self.process, self.descriptor), store)
        except OSError as error:
            raise RunError(
                f"process {os.getpid()} cannot open memory of process {self.process} of the same machine: "
                f"{error.strerror}; run both as one user, or set SHARDWISE_SHARED_MEMORY=0"
            ) from error

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


class SharedQueue:
    """A `claims.Queue` in shared memory, opened by one process.

    Args:
        file: descriptor of the memory, which belongs to this object from now on.
        store: for notes that are too long.
    """

    def __init__(self, file: int, store: dist.Store | None = None) -> None:
        self._file, self._store = file, store
        self._memory = mmap.mmap(file, 0)
        whole = memoryview(self._memory)
        self._notes = (len(whole) - _COUNTS * _INT) // (_HEAD * _INT + _NOTE)
        numbers = (_COUNTS + self._notes * _HEAD) * _INT
        self._views = whole, whole[:numbers], whole[numbers:]
        self._counts, self._room = self._views[1].cast("q"), self._views[2]

    def close(self) -> None:
        """Let go of it."""
        for view in (self._counts, *reversed(self._views)):
            view.release()
        self._memory.close()  # which has a descriptor of its own
        os.close(self._file)

    def claim(self) -> int:
        with self._alone():
            if self.stopped():
                return -1
            self._counts[_CLAIMED] += 1
            return self._counts[_CLAIMED] - 1

    def taken(self) -> int:
        return self._counts[_TAKEN]

    def take(self) -> None:
        self._counts[_TAKEN] += 1

    def stopped(self) -> bool:
        return bool(self._counts[_STOPPED])

    def stop(self) -> int:
        with self._alone():
            self._counts[_STOPPED] = 1
            return self._counts[_CLAIMED]

    def note(self, chunk: int, said: bytes) -> None:
        head, place = self._place(chunk)
        if len(said) > _NOTE:
            assert self._store is not None
            self._store.set(f"note/{chunk}", said)  # type: ignore[arg-type]  # bytes too
        else:
            self._room[place : place + len(said)] = said
        self._counts[head + _LENGTH] = len(said)
        self._counts[head + _NUMBER] = chunk + 1  # last, for who sees it reads the rest

    def noted(self, chunk: int) -> bool:
        return self._counts[self._place(chunk)[0] + _NUMBER] == chunk + 1

    def read(self, chunk: int) -> bytes:
        pause = _PAUSE
        while not self.noted(chunk):
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST)
        head, place = self._place(chunk)
        length = self._counts[head + _LENGTH]
        if length <= _NOTE:
            return bytes(self._room[place : place + length])
        assert self._store is not None
        said = self._store.get(f"note/{chunk}")
        self._store.delete_key(f"note/{chunk}")
        return said

    def _place(self, chunk: int) -> tuple[int, int]:
        """Where the head of a chunk's note is among the numbers, and where the note is in its room."""
        slot = chunk % self._notes
        return _COUNTS + slot * _HEAD, slot * _NOTE

    @contextmanager
    def _alone(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)  # each process has opened a file of its own
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
