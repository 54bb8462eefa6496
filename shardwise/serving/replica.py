"""A replica: ranks that compute batches, started again when they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, count
from multiprocessing.connection import Connection
from typing import Any, Protocol

from shardwise.engine.launch import Ranks
from shardwise.errors import LostRankError, RunError, ShardwiseError
from shardwise.machine.backend import Backend
from shardwise.serving.outputs import columns
from shardwise.serving.ranks import Computed, Failed, Inbox, Ready, Task, Word, compute_batches
from shardwise.serving.request import Answer, Refused, Request
from shardwise.serving.waiting import Waiting

QUICK = 60.0
"""Seconds that a replica has to live, or one batch that it has to answer, for its end not to count as one in a row."""
IN_A_ROW = 5
"""Quick ends in a row after which a replica is given up."""
_LOST = "the ranks that computed it ended, and are started again; send it again"


class Observer(Protocol):
    """Who is told what a replica does, on a thread of the replica's."""

    def batch(self, samples: int, seconds: float) -> None: ...

    def ended(self, number: int, error: ShardwiseError) -> None: ...

    def started(self, number: int, seconds: float | None) -> None:
        """It answers; after so many seconds in which it did not, where it is not the first time."""

    def given_up(self, error: ShardwiseError) -> None: ...


@dataclass(frozen=True)
class Seating:
    """Where the ranks of a replica run.

    Attributes:
        backend: device and process group.
        threads: of each rank.
        first: number of rank 0's device.
    """

    backend: Backend
    threads: int
    first: int


@dataclass(frozen=True)
class Duty:
    """What a replica is there for.

    Attributes:
        task: what its ranks are told, without their inboxes.
        seating: where they run.
        waiting: where batches come from.
        collate: makes of samples what the ranks are sent.
        observer: is told what happens.
    """

    task: Task
    seating: Seating
    waiting: Waiting
    collate: Callable[[list[Any]], Any]
    observer: Observer


class Replica:
    """Keeps a replica going until it is told to stop; it is the one with this number."""

    def __init__(self, number: int, duty: Duty) -> None:
        self._number, self._duty = number, duty
        self._life: _Life | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"shardwise-replica{number}", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self._life is not None and self._life.ready

    @property
    def pids(self) -> list[int]:
        """Process ids of its ranks."""
        return self._life.pids if self._life is not None else []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the ranks once they have answered what they have."""
        self._stopping.set()
        if self._life is not None:
            self._life.stop()

    def join(self) -> None:
        self._thread.join()

    def _keep(self) -> None:
        row, down = 0, 0.0
        while not self._stopping.wait(max(0.0, row - 1.0)):
            life = self._life = _Life(self._duty)
            if self._stopping.is_set():
                return

            def ready(since: float = down) -> None:
                self._duty.observer.started(self._number, time.monotonic() - since if since else None)

            error = life.run(ready)
            if error is None or self._stopping.is_set():
                return
            raised = life.began is not None and not isinstance(error, LostRankError)
            row = 0 if life.proved or raised else row + 1
            if row >= IN_A_ROW or (life.began is None and not down):
                self._duty.observer.given_up(error)
                return
            self._duty.observer.ended(self._number, error)
            down = down if down and life.began is None else time.monotonic()


@dataclass(frozen=True)
class _Batch:
    """Requests that a replica computes together, and since when."""

    requests: list[Request]
    samples: int
    since: float


class _Life:
    """The ranks of a replica from their start to their end.

    One thread, that of `run`, hears what they say; another, from when they are ready, gathers batches and sends them.
    """

    def __init__(self, duty: Duty) -> None:
        self._duty = duty
        self._live: Ranks | None = None
        self._stopped = self._over = self._answered = False
        self._told: set[int] = set()
        """Ranks that are ready."""
        self._dims: tuple[int, ...] = ()
        self._flying: dict[int, _Batch] = {}
        self._failed: dict[int, Failed] = {}
        self.began: float | None = None
        """When it was ready, by the monotonic clock."""

    @property
    def ready(self) -> bool:
        return self.began is not None and not self._over

    @property
    def proved(self) -> bool:
        """Whether it answered a batch, or lived for long."""
        return self._answered or (self.began is not None and time.monotonic() - self.began > QUICK)

    @property
    def pids(self) -> list[int]:
        return self._live.pids if self._live is not None else []

    def stop(self) -> None:
        """Lets the ranks answer what they have, and end; ends at once those that are not ready."""
        with self._duty.waiting.changed:
            self._stopped = True
            self._duty.waiting.changed.notify_all()
        if not self.ready:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(self, ready: Callable[[], None]) -> ShardwiseError | None:
        """Runs until the ranks end; why they did, where nobody told them to."""
        error: ShardwiseError | None = None
        seating, world = self._duty.seating, self._duty.task.plan.ranks
        pipes: list[tuple[Connection[Any, Any], Connection[Any, Any]]] = []
        sender = threading.Thread(target=self._send, args=(pipes,), daemon=True)
        try:
            pipes += (multiprocessing.Pipe(duplex=False) for _ in range(world))
            inboxes = tuple(Inbox(os.getpid(), reader.fileno()) for reader, _ in pipes)
            with (
                Ranks(world, backend=seating.backend, threads=seating.threads, first=seating.first) as live,
                closing(live.stream(compute_batches, replace(self._duty.task, inboxes=inboxes))) as words,
            ):
                self._live = live
                if self._stopped:
                    return None
                for word in words:
                    if self._take(word):
                        for reader, _ in pipes:
                            reader.close()
                        self.began = time.monotonic()
                        sender.start()
                        ready()
        except ShardwiseError as failed:
            error = failed
        except Exception as failed:
            error = RunError(f"{type(failed).__name__}: {failed}")
        finally:
            self._end(error)
            if sender.is_alive():
                sender.join()
            for pipe in pipes:
                for end in pipe:
                    end.close()
        return error

    # --- what the ranks say -------------------------------------------------------------------------------------------

    def _take(self, word: Word) -> bool:
        """Hears a word; whether it was the last that says a rank is ready."""
        if isinstance(word, Ready):
            self._told.add(word.rank)
            self._dims = word.dims if word.dims is not None else self._dims
            return len(self._told) == self._duty.task.plan.ranks
        if isinstance(word, Failed) and not word.goes_on:
            # Later ones are echoes of the first; and that may be the echo of another rank's end, which is heard next.
            self._failed.setdefault(word.number, word)
            return False
        with self._duty.waiting.changed:
            batch = self._flying.pop(word.number)
            self._duty.waiting.changed.notify_all()
        if isinstance(word, Failed):
            self._raised(batch, word)
        else:
            self._answer(batch, word)
        return False

    def _answer(self, batch: _Batch, word: Computed) -> None:
        self._answered = True
        self._duty.observer.batch(batch.samples, time.monotonic() - batch.since)
        found = columns(word.tensors, self._dims)
        stops = accumulate(len(request.rows) for request in batch.requests)
        for request, stop in zip(batch.requests, stops, strict=True):
            request.give(Answer(word.form, found, stop - len(request.rows), stop))

    def _raised(self, batch: _Batch, word: Failed) -> None:
        """The requests of a batch that fails are computed again each by itself; who then fails is told."""
        if len(batch.requests) > 1:
            self._duty.waiting.put_back(batch.requests, alone=True)
            return
        for request in batch.requests:
            if word.unfit is not None:
                request.refuse(Refused.by(word.unfit))
            else:
                request.refuse(Refused(500, f"the model failed on it: {word.message}"))

    def _end(self, error: ShardwiseError | None) -> None:
        with self._duty.waiting.changed:
            self._over = True
            left, self._flying = self._flying, {}
            self._duty.waiting.changed.notify_all()
        for number, batch in left.items():
            if number in self._failed and not isinstance(error, LostRankError):
                self._raised(batch, self._failed[number])
                continue
            for request in batch.requests:
                request.refuse(Refused(503, _LOST))

    # --- what they are sent -------------------------------------------------------------------------------------------

    def _send(self, pipes: list[tuple[Connection[Any, Any], Connection[Any, Any]]]) -> None:
        writers = [writer for _, writer in pipes]
        changed, together = self._duty.waiting.changed, self._duty.task.together
        for number in count(2):  # 0 and 1 were computed to try the model
            requests = self._duty.waiting.take(lambda: len(self._flying), together, lambda: self._stopped or self._over)
            if requests is None:
                break
            here = [request for request in requests if not request.answer.cancelled()]
            batch = _Batch(here, sum(len(request.rows) for request in here), time.monotonic())
            if not here:
                continue
            try:
                collated = self._duty.collate([row for request in here for row in request.rows])
            except Exception as error:
                self._raised(batch, Failed(number, f"collate: {type(error).__name__}: {error}", True))
                continue
            message = pickle.dumps((number, collated), pickle.HIGHEST_PROTOCOL)
            with changed:
                if self._over:
                    self._duty.waiting.put_back(here, alone=False)
                    return
                self._flying[number] = batch
            try:
                for writer in writers:
                    writer.send_bytes(message)
            except OSError:  # the rank is dead, which the other thread hears as well
                return
        with changed:
            while self._flying:
                changed.wait()
        for writer in writers:
            writer.close()
