"""Waiting: the requests that no replica has yet, in the order they came, gathered into batches for whoever is free."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from shardwise.serving.request import Refused, Request


class Waiting:
    """A bounded queue that is taken from by the batch.

    Args:
        most: samples of a batch.
        seconds: that the first request of a batch waits for others.
        limit: samples that may wait.
    """

    def __init__(self, most: int, seconds: float, limit: int) -> None:
        self._most, self._seconds, self._limit = most, seconds, limit
        self._requests: deque[Request] = deque()
        self._samples = 0
        self._idle = 0
        """Who waits for a batch with nothing else to do."""
        self._closed = False
        self.changed = threading.Condition()

    @property
    def samples(self) -> int:
        """How many wait."""
        return self._samples

    def put(self, request: Request) -> None:
        """Add a request behind the others.

        Raises:
            Refused: 503, there is no room for it.
        """
        count = len(request.rows)
        with self.changed:
            if self._requests and self._samples + count > self._limit:
                raise Refused(
                    503,
                    f"{self._samples} samples are waiting, and no more than {self._limit} may; send it again later",
                )
            self._requests.append(request)
            self._samples += count
            # Who gathers sleeps until a first request comes, and then until its time is up or a batch is full.
            if len(self._requests) == 1 or self._samples >= self._most:
                self.changed.notify_all()

    def put_back(self, requests: Sequence[Request], *, alone: bool) -> None:
        """Put requests before all others, which were not answered; they were let in already."""
        with self.changed:
            for request in reversed(requests):
                request.alone = request.alone or alone
                self._requests.appendleft(request)
                self._samples += len(request.rows)
            self.changed.notify_all()

    def drop(self, request: Request) -> None:
        """Forget a request, if it still waits."""
        with self.changed:
            if request in self._requests:
                self._requests.remove(request)
                self._samples -= len(request.rows)

    def drain(self) -> list[Request]:
        """Takes all that wait."""
        with self.changed:
            found, self._samples = list(self._requests), 0
            self._requests.clear()
        return found

    def close(self) -> None:
        """Nothing more comes: what waits is taken without waiting for others."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def take(self, busy: Callable[[], int], together: int, ended: Callable[[], bool]) -> list[Request] | None:
        """The next batch, when there is one; None when `ended` says so.

        A batch is due when it is full or its first request has waited its time. Who is busy with as many batches as
        run `together` is given one more, to begin with at once, if it is full and nobody waits for it idly.
        """
        with self.changed:
            while not ended():
                now = busy()
                wait = None
                if self._requests and now <= together:
                    count, samples = self._head()
                    full = samples >= self._most or count < len(self._requests) or self._requests[0].alone
                    wait = self._requests[0].since + self._seconds - time.monotonic()
                    due = full or wait <= 0 or self._closed
                    if due if now < together else full and not self._idle:
                        return self._cut(count, samples)
                idle = now < together
                self._idle += idle
                self.changed.wait(wait if idle else None)
                self._idle -= idle
            return None

    def _head(self) -> tuple[int, int]:
        """How many of the first requests go into one batch, and their samples."""
        first, samples = self._requests[0], 0
        for count, request in enumerate(self._requests):
            samples += len(request.rows)
            unlike = request.kind != first.kind or (count and (request.alone or first.alone))
            if unlike or (count and samples > self._most):
                return count, samples - len(request.rows)
            if samples >= self._most:
                return count + 1, samples
        return len(self._requests), samples

    def _cut(self, count: int, samples: int) -> list[Request]:
        self._samples -= samples
        found = [self._requests.popleft() for _ in range(count)]
        if self._requests:
            self.changed.notify_all()  # another may take what is left
        return found
