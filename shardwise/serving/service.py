"""Service: a job's model on live ranks, which compute requests as they come."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TextIO

from shardwise.engine.sent import Sent
from shardwise.engine.train import fitting
from shardwise.errors import LaunchError, LostRankError, ShardwiseError
from shardwise.inference.precision import Precision, check_precision
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.plan.plan import Plan
from shardwise.serving.intake import Intake
from shardwise.serving.metrics import Metrics
from shardwise.serving.prompts import Generating, Prompts
from shardwise.serving.ranks import Predicting, Task
from shardwise.serving.replica import Duty, Replica, Seating
from shardwise.serving.request import Refused, Request
from shardwise.serving.waiting import Waiting


class Service:
    """Replicas of a job's model behind one queue.

    Axes of the plan that split the batch alone make replicas, each of ranks of its own that end and start without the
    others. What is served, and how, is that of `predict`.

    Args:
        job: its model, `global_batch` (the samples of a batch at most), `precision`, `seed` and `collate`, and its
            first sample for how those of requests look.
        plan: how to split; None makes a replica of each of `ranks`.
        ranks: how many to start; None means those of the plan, or one for each device or core.
        precision: how weights are held, as for `predict`.
        spec: where given, each rank loads the job from this SPEC instead of receiving it from this process.
        fields: of a sample that requests have; None means those that the model needs.
        wait: seconds that the first request of a batch waits for others.
        queue: samples that may wait.
        positions: of a prompt and its new tokens, where those are served as by `generate`; None serves outputs.
        log: gets a line when a replica ends, and when it is there again.

    Raises:
        UserError: the plan does not fit the ranks; or requests cannot be made into batches of the job's.
    """

    def __init__(
        self,
        job: Job,
        plan: Plan | None = None,
        *,
        ranks: int | None = None,
        precision: Precision | None = None,
        spec: str | None = None,
        fields: Sequence[str] | None = None,
        wait: float = 0.005,
        queue: int = 256,
        positions: int | None = None,
        log: TextIO | None = None,
    ) -> None:
        plan = fitting(plan, ranks, job)
        own = tuple(axis for axis in plan.axes if axis.name not in plan.data)
        inner = plan.with_(axes=own, zero=0, recompute=())
        if plan.ranks % inner.ranks:
            raise LaunchError(f"{plan.title()} does not come apart into replicas")
        if precision is not None:
            check_precision(precision)
        self.job, self.plan, self.precision = job, plan, precision
        self.intake: Intake | Prompts
        task: Task
        sent = Sent.of(job, spec), inner, job.global_batch, ()
        if positions is None:
            self.intake = Intake(job, fields, whole=inner.ranks > 1 or bool(inner.cuts), most=job.global_batch)
            task = Predicting(*sent, precision, self.intake.example(2))
        else:
            self.intake = Prompts(positions, job.seed)
            task = Generating(*sent, positions)
        self.generates = positions is not None
        self.metrics = Metrics()
        self.failed: ShardwiseError | None = None
        """Why it gave up, if it did."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called when it gives up."""
        self._log = sys.stderr if log is None else log
        self._waiting = Waiting(job.global_batch, wait, queue)
        self._changed = threading.Event()
        backend = Backend.detect(plan.ranks)
        threads, firsts = backend.threads(plan.ranks), range(0, plan.ranks, inner.ranks)
        seats = [Seating(backend, threads, first) for first in firsts]
        self.replicas = [
            Replica(number, Duty(task, seating, self._waiting, self.intake.batch, self))
            for number, seating in enumerate(seats)
        ]
        self.metrics.watch(waiting=lambda: self._waiting.samples, ready=lambda: self.ready)

    @property
    def ready(self) -> int:
        """How many replicas answer."""
        return sum(replica.ready for replica in self.replicas)

    @property
    def pids(self) -> list[int]:
        """Process ids of all ranks."""
        return [pid for replica in self.replicas for pid in replica.pids]

    def start(self) -> None:
        """Starts the ranks, and returns when all of them are ready.

        Raises:
            UserError, RunError: a rank cannot build the model, or cannot run it on the job's first sample.
        """
        for replica in self.replicas:
            replica.start()
        while self.ready < len(self.replicas) and self.failed is None:
            self._changed.wait()
            self._changed.clear()
        if self.failed is not None:
            raise self.failed

    def submit(self, request: Request) -> None:
        """Let a request in; its `answer` follows.

        Raises:
            Refused: 503, there is no replica or no room.
        """
        if not self.ready:
            raise Refused(503, "no replica answers now; they are started again, so send it again later")
        self._waiting.put(request)
        if not self.ready:  # the last one ended meanwhile
            self._turn_away()

    def forget(self, request: Request) -> None:
        """Nobody waits for a request any more."""
        request.answer.cancel()
        self._waiting.drop(request)

    def close(self) -> None:
        """Ends the ranks, which first answer what they have."""
        self._waiting.close()
        for replica in self.replicas:
            replica.stop()
        for replica in self.replicas:
            replica.join()
        self._turn_away()

    def _turn_away(self) -> None:
        for request in self._waiting.drain():
            request.refuse(Refused(503, "no replica answers now; send it again later"))

    # --- told by replicas, on threads of theirs -----------------------------------------------------------------------

    def batch(self, samples: int, seconds: float) -> None:
        self.metrics.batch(samples, seconds)

    def started(self, number: int, seconds: float | None) -> None:
        if seconds is not None:
            self.metrics.restart(seconds)
            self._tell(f"replica {number} answers again after {seconds:.1f} s")
        self._changed.set()

    def ended(self, number: int, error: ShardwiseError) -> None:
        if isinstance(error, LostRankError) and not self.ready:
            self._turn_away()
        self._tell(f"replica {number} of {len(self.replicas)} ended: {_headline(error)}")

    def given_up(self, error: ShardwiseError) -> None:
        self.failed = self.failed or error
        if not self.ready:
            self._turn_away()
        self._changed.set()
        self.on_failure()

    def _tell(self, line: str) -> None:
        if self.failed is None:
            print(f"shardwise: {line}", file=self._log, flush=True)


def _headline(error: ShardwiseError) -> str:
    """The first line of a message, which says where the logs are, without the announcement of what follows."""
    line = str(error).partition("\n")[0]
    return line.rpartition("; ")[0] if line.endswith(":") and "; " in line else line
