"""Claims: which chunk a replica computes next. One that is free takes the next that nobody has: a slow one takes less.

A counter is the queue, in the launch's store or in memory of one machine. The first rank of a replica claims and tells
the others through the store: nobody waits in a collective for a chunk, and the stages of a pipeline work on different
chunks at once.

At most `window` chunks are computed ahead of the last one that the caller has taken; who claims another waits. So what
is kept for the caller is bounded, however slow it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist

from shardwise.engine.launch import Place
from shardwise.inference.prediction import Replica

_PAUSE, _LONGEST = 0.001, 0.02  # seconds between looks whether there is room: at first, and at most
FOREVER = timedelta(days=365)  # nothing but the end of a rank, which others notice, keeps a claim from being told
_T = TypeVar("_T")
_CLAIMED, _TAKEN, _STOPPED = "claimed", "taken", "stopped"
_MANY = 1 << 40  # more chunks than there are: the counter is beyond it where nothing more is to be claimed


class Queue(Protocol):
    """Counts the chunks that somebody has claimed and those that the caller has taken, and has notes of the others."""

    def claim(self) -> int:
        """The next chunk that nobody has; -1 where all is stopped."""

    def taken(self) -> int:
        """How many chunks the caller has taken."""

    def take(self) -> None:
        """Count a chunk more as taken; done by one process alone."""

    def stopped(self) -> bool:
        """Whether nothing more is to be computed."""

    def stop(self) -> int:
        """Let nobody compute what is not claimed yet. Returns how many chunks are."""

    def note(self, chunk: int, said: bytes) -> None:
        """Say something of a claimed chunk, once; nothing where nobody computes it."""

    def noted(self, chunk: int) -> bool:
        """Whether something was said of a chunk."""

    def read(self, chunk: int) -> bytes:
        """What was said of a chunk, when it is; read once, by one process."""


class StoreQueue:
    """A queue in a store that all ranks see and nobody else does.

    Args:
        store: which answers slowly where those who have it compute.
        told: so many chunks are taken before the store is told.
    """

    def __init__(self, store: dist.Store, told: int = 1) -> None:
        self._store, self._told = store, told
        self._untold = 0

    def claim(self) -> int:
        chunk = int(self._store.add(_CLAIMED, 1)) - 1
        return chunk if chunk < _MANY else -1

    def taken(self) -> int:
        return int(self._store.add(_TAKEN, 0))

    def take(self) -> None:
        self._untold += 1
        if self._untold == self._told:
            self._store.add(_TAKEN, self._untold)
            self._untold = 0

    def stopped(self) -> bool:
        return bool(self._store.check([_STOPPED]))

    def stop(self) -> int:
        self._store.set(_STOPPED, "")
        return int(self._store.add(_CLAIMED, _MANY)) - _MANY

    def note(self, chunk: int, said: bytes) -> None:
        self._store.set(f"note/{chunk}", said)  # type: ignore[arg-type]  # bytes too

    def noted(self, chunk: int) -> bool:
        return bool(self._store.check([f"note/{chunk}"]))

    def read(self, chunk: int) -> bytes:
        key = f"note/{chunk}"
        self._store.wait([key], FOREVER)
        said = self._store.get(key)
        self._store.delete_key(key)
        return said


class Claims:
    """This rank's view of who computes what.

    Args:
        queue: counts chunks for all ranks.
        store: where ranks tell each other, seen by all of them and by nobody else.
        replica: this rank's.
        rank: this rank.
        window: chunks that may be computed before the first of them is taken.
    """

    def __init__(self, queue: Queue, store: dist.Store, replica: Replica, rank: int, window: int) -> None:
        self.window = window
        self._queue, self._store, self._replica, self._rank = queue, store, replica, rank
        self._number = self._room = 0

    @property
    def leads(self) -> bool:
        """Whether this rank claims for its replica."""
        return self._rank == self._replica.ranks[0]

    def next(self) -> int:
        """The chunk that this rank is to compute next; called on every rank of a replica. -1 where all is stopped."""
        if not self.leads:
            key = f"told/{self._rank}/{self._number}"
            self._number += 1
            self._store.wait([key], FOREVER)
            chunk = int(self._store.get(key))
            self._store.delete_key(key)
            return chunk
        chunk = self._queue.claim()
        if chunk >= 0 and not self._await_room(chunk):
            self.void(chunk)
            chunk = -1
        self.tell(chunk)
        return chunk

    def tell(self, chunk: int) -> None:
        """Tell the others of this replica what to compute; -1 for nothing more."""
        for rank in self._replica.ranks[1:]:
            self._store.set(f"told/{rank}/{self._number}", str(chunk))
        self._number += 1

    def void(self, chunk: int) -> None:
        """Say that nobody computes a chunk that this replica claimed."""
        self._queue.note(chunk, b"")

    def _await_room(self, chunk: int) -> bool:
        """Wait until a chunk is no more than the window ahead; False where all is stopped."""
        pause = _PAUSE
        while chunk >= self._room:
            if self._queue.stopped():
                return False
            self._room = self._queue.taken() + self.window
            if chunk < self._room:
                break
            # Looking takes processor time that others may need while the caller takes its time.
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST)
        return True


def in_order(numbered: Iterable[tuple[int, _T]]) -> Iterator[_T]:
    """Things in the order of their numbers from 0 on, as soon as all before them have come."""
    waiting: dict[int, _T] = {}
    following = 0
    for number, thing in numbered:
        waiting[number] = thing
        del thing  # nothing that was taken is kept until the next comes
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def leave(store: dist.Store, place: Place) -> None:
    """Say, on another rank than 0, that nothing more comes from it."""
    store.set(f"done/{place.rank}", "")


def await_others(store: dist.Store, place: Place) -> None:
    """On rank 0, which may have the store, and leaves last."""
    if place.world > 1:
        store.wait([f"done/{rank}" for rank in range(1, place.world)], FOREVER)


def shared_store(name: str) -> dist.Store:
    """The store of this process group's launch, for keys of its own under a name that all ranks agree on."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore(f"shardwise/{name}", store)
