"""Turn: one function's turn on the ranks of a crew, from the order to the results or the one error to raise."""

from __future__ import annotations

import contextlib
import math
import pickle
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shardwise.engine.crew import Crew, Event
from shardwise.engine.worker import Failure, Order
from shardwise.errors import LostRankError, RunError, ShardwiseError

_GRACE = 2.0  # seconds that the other ranks have to report once one has failed
_LINGER = 1.0  # seconds after which ranks that are done hang up on those that are not
_SETTLE = 5.0  # seconds for ranks that raised to leave their group


@dataclass(frozen=True)
class _Trouble:
    """How a rank failed: by an exception, or by its death."""

    rank: int
    failure: Failure | None = None
    death: str = ""


class _RankTraceback(Exception):
    """Shows a rank's own traceback as the cause of an error raised in the parent."""


class Turn:
    """One function's turn on the ranks: who still works, and what came back."""

    def __init__(self, crew: Crew, name: str, timeout: float | None) -> None:
        self._crew = crew
        self._name = name
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout if timeout is not None else math.inf
        self._pending = set(range(len(crew.ranks)))
        self._bodies: dict[int, bytes] = {}
        self._troubles: list[_Trouble] = []
        self._released: set[int] = set()
        self._idle: set[int] = set()
        self.intact = True

    def send(self, order: Order, payload: bytes) -> None:
        for rank in self._crew.ranks:
            rank.tell(order, payload)

    def collect(self) -> Iterator[Any]:
        """Takes events until every rank has answered, one died, or time is up. Yields parts of answers as they come."""
        limit = self._deadline
        hang_up = math.inf
        while self._pending:
            event = self._crew.next_event(min(limit, hang_up))
            if event is None and time.monotonic() >= limit:
                return
            if event is None:
                self._release()
                hang_up = math.inf
                continue
            if event.verb == "part":
                yield pickle.loads(event.body)
                continue
            self._take(event)
            if event.verb == "died":
                return
            if self._troubles:
                self._release()  # who waits in a collective for a rank that failed gets an error now
                limit = min(limit, time.monotonic() + _GRACE)
            elif event.verb == "result":
                hang_up = time.monotonic() + _LINGER

    def _take(self, event: Event) -> None:
        if event.verb == "part":  # of a rank whose answer is not waited for any more
            return
        self._idle.discard(event.rank)
        if event.verb == "idle":
            self._idle.add(event.rank)
            return
        self._pending.discard(event.rank)
        if event.verb == "result":
            self._bodies[event.rank] = event.body
        elif event.verb == "error":
            self._troubles.append(_Trouble(event.rank, failure=pickle.loads(event.body)))
        else:
            self._troubles.append(_Trouble(event.rank, death=self._crew.ranks[event.rank].bury()))

    def _release(self) -> None:
        """Tells the ranks that have answered to leave the group, so that nobody waits for them."""
        answered = self._bodies.keys() | {trouble.rank for trouble in self._troubles if trouble.failure}
        for number in answered - self._released:
            self._released.add(number)
            self._crew.ranks[number].tell(Order("release"))

    def verdict(self) -> ShardwiseError | None:
        """The error to raise, or None. Sets `intact`: whether the ranks can run something else."""
        if not self._troubles and not self._pending:
            return None
        self.intact = self._all_raised()
        if not self._troubles:
            return self._overdue()
        first = self._first()
        if first.failure is None:
            return self._lost(first)
        return self._raised(first, first.failure)

    def _all_raised(self) -> bool:
        everyone = set(range(len(self._crew.ranks)))
        if {trouble.rank for trouble in self._troubles if trouble.failure} != everyone:
            return False
        limit = time.monotonic() + _SETTLE
        while self._idle != everyone:
            event = self._crew.next_event(limit)
            if event is None or event.verb == "died":
                return False
            self._take(event)
        return True

    def _first(self) -> _Trouble:
        """The first to fail; but an error in a collective is the echo of a death that was noticed a moment later."""
        first = self._troubles[0]
        deaths = [trouble for trouble in self._troubles if not trouble.failure]
        return deaths[0] if deaths and first.failure and first.failure.collective else first

    def _raised(self, trouble: _Trouble, failure: Failure) -> ShardwiseError:
        if failure.error is not None:
            with contextlib.suppress(Exception):
                error = pickle.loads(failure.error)
                if isinstance(error, ShardwiseError):
                    error.__cause__ = _RankTraceback(f"on {self._who(trouble.rank)}:\n\n{failure.traceback}")
                    return error
        return RunError(
            f"{self._who(trouble.rank)} failed in {self._name} with {failure.kind}: {failure.message}"
            f"{self._others()}; {self._crew.logs.kept()}; its traceback:\n\n{failure.traceback}"
        )

    def _lost(self, trouble: _Trouble) -> LostRankError:
        return LostRankError(
            f"{self._who(trouble.rank)} {trouble.death} in {self._name}{self._others()}; "
            f"{self._crew.logs.kept(trouble.rank)}"
        )

    def _overdue(self) -> RunError:
        for number in self._pending:
            self._crew.ranks[number].signal(signal.SIGUSR1)  # writes its stacks into its log
        time.sleep(0.3)
        still = ", ".join(self._who(number) for number in sorted(self._pending))
        return RunError(
            f"{self._name} ran longer than its time-out of {self._timeout:g} s; still running: {still}; "
            f"{self._crew.logs.kept(min(self._pending))}"
        )

    def _others(self) -> str:
        """What the ranks did that did not fail."""
        stopped = [f"stopped while running: {_numbers(self._pending)}"] if self._pending else []
        returned = [f"returned before: {_numbers(self._bodies)}"] if self._bodies else []
        return f" (other ranks {', '.join(stopped + returned)})" if stopped or returned else ""

    def _who(self, number: int) -> str:
        return f"rank {number} of {len(self._crew.ranks)}"

    def results(self) -> list[Any]:
        return [pickle.loads(self._bodies.pop(number)) for number in range(len(self._crew.ranks))]


def _numbers(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
