"""Slots: how processes of one machine hand each other parts of tensors through memory that they share.

Every rank of a group has a few slots in a file that exists in memory alone, and two counters. In each round of a
collective it puts a part of what it sends into a slot of its own and raises one counter; it takes what the others have
put, and raises the other. Nothing runs behind the program: what does not fit into the slots moves while a rank waits.

A rank reads what another wrote before it raised a counter, without a lock. That is right where a processor's stores
are seen in their order: on x86-64.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.machine.descriptors import opened

SLOT_BYTES = 1 << 19
"""Bytes of a slot: what is put is still in a processor's cache when it is taken."""
_SLOTS = 2
"""Slots of each rank: it fills one while the others read the other."""
_LINE = 8
"""Numbers of 64 bits in a cache line; no two ranks write to one line."""
_PAGE = 4096
_BOOT, _NETWORK = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
_SPIN_SECONDS, _SLEEP_SECONDS, _LOOK_SECONDS = 3e-4, 1e-3, 0.25
"""How long a waiting rank keeps its core, how long it sleeps at most, and how often it looks whether others live."""

Put = Callable[[int, Tensor], None]
"""Puts the part of a round, counted from the collective's first, into a slot."""
Take = Callable[[int, Sequence[Tensor]], None]
"""Takes the parts of a round from one slot of every rank, in their order."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """One collective, as one rank does it.

    Attributes:
        sign: what it is; the same number on all ranks, or they do different things.
        dtype: of what goes into slots.
        rounds: how many it has, the same on all ranks.
        put: None where this rank sends nothing.
        take: None where this rank receives nothing.
        after: whether all rounds before have to be taken first, because it sends what they bring.
    """

    sign: int
    dtype: torch.dtype
    rounds: int
    put: Put | None
    take: Take | None
    after: bool = False


class Slots:
    """The slots and counters of a group, as one rank sees them.

    Args:
        file: descriptor of the shared file, as `meet` gives it, which belongs to this object from now on.
        rank, size: this rank's place in the group.
        timeout: seconds to wait for another rank.
    """

    def __init__(self, file: int, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.taken = 0
        self._file = file
        memory = mmap.mmap(file, _length(size))
        block = size * _LINE
        lines = memoryview(memory)[: 2 * block * 8].cast("q")
        # A rank's first line says how much it has put and what is in its slots, its second how much it has taken.
        self._puts, self._takes = lines[:block:_LINE], lines[block::_LINE]
        self._signs = [lines[1 + at : block : _LINE] for at in range(_SLOTS)]
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)[_head(size) :]
        self._typed: dict[torch.dtype, list[list[Tensor]]] = {}
        self._last = self._given = 0
        self._to_put: deque[tuple[int, Exchange]] = deque()
        self._to_take: deque[tuple[int, Exchange]] = deque()

    def close(self) -> None:
        """Let the others know that this rank takes no further part."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def begin(self, exchange: Exchange) -> int:
        """Start a collective, and do of it what needs no other rank. All ranks begin the same, in the same order.

        Returns:
            the number of rounds after which it is done.
        """
        start = self._last
        self._last += exchange.rounds
        self._to_put.append((start, exchange))
        self._to_take.append((start, exchange))
        self.advance()
        return self._last

    def advance(self) -> bool:
        """Put and take what can be put and taken now; whether anything was."""
        before = self._given + self.taken
        self._put_all()
        self._take_all()
        return self._given + self.taken > before

    def wait(self, rounds: int, timeout: float | None = None) -> None:
        """Go on until so many rounds are taken.

        Raises:
            RuntimeError: another rank is gone, does something else, or did nothing for `timeout` seconds.
        """
        limit = self.timeout if timeout is None else timeout
        begun = looked = time.monotonic()
        while self.taken < rounds:
            now = time.monotonic()
            if self.advance():
                begun = looked = now
            elif now - begun < _SPIN_SECONDS:
                os.sched_yield()
            else:
                time.sleep(min((now - begun) / 10, _SLEEP_SECONDS))
                if now - looked > _LOOK_SECONDS:
                    looked = now
                    self._look(now - begun, limit)

    def _put_all(self) -> None:
        while self._to_put:
            start, now = self._to_put[0]
            if self._given == start + now.rounds:
                self._to_put.popleft()
                continue
            if (now.after and self.taken < start) or self._given >= min(self._takes) + _SLOTS:
                return
            at = self._given % _SLOTS
            if now.put is not None:
                now.put(self._given - start, self._as(now.dtype)[at][self.rank])
            self._signs[at][self.rank] = now.sign
            self._given += 1
            self._puts[self.rank] = self._given

    def _take_all(self) -> None:
        while self._to_take:
            start, now = self._to_take[0]
            if self.taken == start + now.rounds:
                self._to_take.popleft()
                continue
            if min(self._puts) <= self.taken:
                return
            at = self.taken % _SLOTS
            for rank, sign in enumerate(self._signs[at]):
                if sign != now.sign:
                    raise RuntimeError(
                        f"rank {rank} of a group does another collective, or one of another size, than rank "
                        f"{self.rank}; all ranks have to do the same in the same order"
                    )
            if now.take is not None:
                now.take(self.taken - start, self._as(now.dtype)[at])
            self.taken += 1
            self._takes[self.rank] = self.taken

    def _look(self, waited: float, limit: float) -> None:
        """Whether it makes sense to go on waiting."""
        gone = [rank for rank in range(self.size) if rank != self.rank and self._is_gone(rank)]
        if gone and not self.advance():  # what it put before it went is still there
            raise RuntimeError(f"rank {gone[0]} of a group is gone, for which rank {self.rank} waits")
        if waited > limit:
            late = [rank for rank in range(self.size) if min(self._puts[rank], self._takes[rank] + 1) <= self.taken]
            raise RuntimeError(
                f"rank {self.rank} of a group timed out after {limit:g} s of waiting for rank "
                + ", ".join(map(str, late))
            )

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process, or its part in the group, has ended."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _as(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """The slots as tensors of a dtype, by slot and rank."""
        if dtype not in self._typed:
            slots = self._bytes.view(dtype).split(SLOT_BYTES // dtype.itemsize)
            self._typed[dtype] = [list(slots[at * self.size : (at + 1) * self.size]) for at in range(_SLOTS)]
        return self._typed[dtype]


def _length(size: int) -> int:
    """Bytes of the file that a group of so many ranks shares; pages that are never written take no memory."""
    return _head(size) + _SLOTS * size * SLOT_BYTES


def _head(size: int) -> int:
    return -(-2 * size * _LINE * 8 // _PAGE) * _PAGE


def place() -> str:
    """What ranks have in common that can share memory; empty where this process cannot, or is told not to.

    The environment variable SHARDWISE_SHARED_MEMORY=0 tells it.
    """
    wanted = os.environ.get("SHARDWISE_SHARED_MEMORY", "1") != "0"
    if not wanted or sys.platform != "linux" or platform.machine() != "x86_64":
        return ""
    try:
        return f"{_BOOT.read_text().strip()} {_NETWORK.stat().st_ino}"
    except OSError:
        return ""


def meet(store: dist.Store, rank: int, size: int) -> int | None:
    """The file that a group's ranks share; None on all of them where one cannot share it.

    It has no name. The first rank opens it, and the others through that process, which works within one machine only.
    They have to be in one network too: where it was divided, its parts stand for machines.
    """
    here = place()
    file = os.memfd_create("shardwise") if here and rank == 0 else -1
    if rank == 0:
        token = secrets.token_hex(16)
        if file >= 0:
            os.truncate(file, _length(size))
            os.pwrite(file, token.encode(), _length(size) - len(token))  # in the last slot, where it is overwritten
        store.set("file", f"{here} {os.getpid()} {file} {token}")
    else:
        there, process, number, token = store.get("file").decode().rsplit(" ", 3)
        if here and there == here:
            file = _open_of(int(process), int(number), token, _length(size))
    if file >= 0:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # until this process ends, in whatever way; others may look soon
    store.set(f"open{rank}", str(int(file >= 0)))
    if all(store.get(f"open{other}") == b"1" for other in range(size)):
        return file
    if file >= 0:
        os.close(file)
    return None


def _open_of(process: int, number: int, token: str, size: int) -> int:
    """Another process's file of so many bytes, -1 where it cannot be opened or does not end with the token."""
    try:
        file = opened(process, number)
    except OSError:
        return -1
    if os.pread(file, len(token), size - len(token)) == token.encode():
        return file
    os.close(file)
    return -1
