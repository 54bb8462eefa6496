"""Verify: every strategy against one device, from the same weights and batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwise.engine.base import Engine
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import Place, Ranks, joined
from shardwise.engine.sent import Sent
from shardwise.errors import JobError, LaunchError, PlanError, ProofError, RunError
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job, digest, lift
from shardwise.measure.compare import Errors, change_last_bits, compare
from shardwise.measure.reference import Trace, run_reference
from shardwise.measure.traffic import Collectives
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan
from shardwise.search.candidate import Candidate
from shardwise.search.strategies import STRATEGIES, strategies

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The largest error that passes, by the dtype of the run."""
_UNCLEAR = 10.0
"""Errors are told from rounding that are so many times as large as what one device's last bits do to it."""
_LEARNING_RATE = 0.01  # of the plain SGD of proofs in float32


@dataclass(frozen=True)
class Row:
    """What one strategy's run showed. An error is the largest over tensors and steps of ‖a−b‖ / max(‖b‖, 1e-6·‖all‖).

    A parameter whose true gradient is zero moves by rounding noise, which an optimizer such as Adam makes large; its
    error is relative to ‖all‖.

    Attributes:
        strategy: its name.
        plan: what ran; None where the strategy does not apply.
        applicable: whether it applies.
        reason: what the plan splits, why the strategy does not apply, or why the run failed.
        loss_error: of the loss, relative.
        grad_error: of every parameter's gradient and of the gradient norm.
        param_error: of every parameter and floating-point buffer after the steps.
        collectives_announced: of one step on rank 0, as the plan says: kind, axis, count, bytes.
        collectives_recorded: the same as torch dispatched them.
        passed: every error within the tolerance, and on every rank the collectives that were announced.
        worst: the tensor with the largest gradient error.
        unclear: not passed, but no further off than rounding may take it: an error is at most ten times that of one
            device against itself with the last bit of every weight changed, or within the tolerance.
        rounding: the largest of these errors of one device; None where nothing asked for them.
    """

    strategy: str
    plan: Plan | None
    applicable: bool
    reason: str
    loss_error: float | None = None
    grad_error: float | None = None
    param_error: float | None = None
    collectives_announced: list[dict[str, Any]] = field(default_factory=list)
    collectives_recorded: list[dict[str, Any]] = field(default_factory=list)
    passed: bool = False
    worst: str = ""
    unclear: bool = False
    rounding: float | None = None


def verify(
    job: Job,
    ranks: int,
    *,
    strategies: Sequence[str] = STRATEGIES,
    dtype: torch.dtype = torch.float64,
    steps: int = 3,
    plans: Mapping[str, Plan] | None = None,
    spec: str | None = None,
    timeout: float = 600.0,
    pool: Callable[[int], Ranks] | None = None,
) -> list[Row]:
    """Runs a job on one device and by every strategy on local ranks, and compares.

    Steps are taken by the job's optimizer in float64, and by plain SGD in float32, where Adam would turn the rounding
    noise of a gradient that is zero into whole steps. Where an operator has no float64, the runs are in float32.

    Args:
        job: what is split.
        ranks: local ranks of each strategy.
        strategies: which to look at.
        dtype: torch.float64 or torch.float32.
        steps: updates to make.
        plans: more plans to look at, by the name that their row gets.
        spec: where given, each rank loads the job from this SPEC, with the operators and rules that its file registers.
        timeout: seconds that each strategy may take.
        pool: gives so many live ranks to run on, which stay alive; None starts new ones and ends them.

    Raises:
        JobError: the dataset has too few samples.
        ProofError: the job does not run on one device, or its samples are others whenever they are read.
    """
    if dtype not in TOLERANCE:
        raise ProofError(f"a proof runs in float64 or float32, but is asked for in {dtype}")
    candidates = _candidates(job, ranks, strategies) + [Candidate(n, p, "") for n, p in (plans or {}).items()]
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardwise-")))
            alone = _OneDevice.of(job, dtype, steps, folder, spec)
        except OSError as error:
            message = f"the run on one device cannot be kept: {error.strerror}; set TMPDIR to another disk"
            raise LaunchError(message) from error
        rows = [_not_applicable(c) if c.plan is None else None for c in candidates]
        for size in sorted({c.plan.ranks for c in candidates if c.plan is not None}):
            places = [i for i, c in enumerate(candidates) if c.plan is not None and c.plan.ranks == size]
            found = _rows([candidates[i] for i in places], alone, size, timeout, pool)
            for i, row in zip(places, found, strict=True):
                rows[i] = replace(row, reason="; ".join(filter(None, (row.reason, alone.note))))
    return [row for row in rows if row is not None]


def first_batches(job: Job, count: int) -> list[Batch]:
    """The first global batches of a job, one after the other; from the start again where the dataset ends."""
    total = job.samples()
    if total is None:
        return [job.batch(range(i * job.global_batch, (i + 1) * job.global_batch)) for i in range(count)]
    if total < job.global_batch:
        raise JobError(
            f"the dataset has {total} samples, but one update takes {job.global_batch} (global_batch); "
            "give more data or a smaller global_batch"
        )
    whole = total // job.global_batch
    return [job.batch(range(i % whole * job.global_batch, (i % whole + 1) * job.global_batch)) for i in range(count)]


# --- one device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What every rank is told: the job, its dtype, and where the run on one device is."""

    job: Sent
    dtype: torch.dtype
    steps: int
    kept: Path

    def loaded(self) -> Job:
        """The job as the proof takes its steps."""
        return _steady(self.job.loaded(), self.dtype)

    def true(self) -> Trace:
        """What one device computed."""
        return Trace(**torch.load(self.kept, weights_only=True, mmap=True))


def _candidates(job: Job, ranks: int, wanted: Sequence[str]) -> list[Candidate]:
    return [c for c in strategies(job, ranks) if c.strategy in wanted]


@dataclass(frozen=True)
class _OneDevice:
    """The run that all others are compared with, and a note where it ran in another dtype."""

    job: Job
    task: _Task
    note: str

    @classmethod
    def of(cls, job: Job, dtype: torch.dtype, steps: int, folder: Path, spec: str | None) -> _OneDevice:
        """Run the job as it is, and keep what it computed in the folder."""
        batches = first_batches(job, steps)
        if digest(first_batches(job, 1)[0]) != digest(batches[0]):
            raise ProofError(
                f"the dataset gave other numbers when its first {job.global_batch} samples were read again, so that no "
                "two runs can be compared; draw random numbers from torch, NumPy or random, which are seeded while a "
                "batch is read, or seed a generator by the sample's index"
            )
        note = ""
        try:
            trace = _run(job, dtype, batches)
        except (NotImplementedError, RuntimeError) as error:
            if dtype == torch.float32:
                raise ProofError(f"{job.title()} does not run on one device: {_line(error)}") from error
            dtype, note = torch.float32, f"in float32, for in float64 it does not run: {_line(error)}"
            try:
                trace = _run(job, dtype, batches)
            except (NotImplementedError, RuntimeError) as again:
                raise ProofError(f"{job.title()} does not run on one device: {_line(again)}") from again
        kept = folder / "one-device.pt"
        torch.save(trace.__dict__, kept)
        return cls(job, _Task(Sent.of(job, spec), dtype, steps, kept), note)

    @cached_property
    def rounding(self) -> Errors:
        """How far it is from itself where every weight is changed in its last bit."""
        module = lift(self.job.build(), self.task.dtype)
        change_last_bits(module)
        changed = _run(self.job, self.task.dtype, first_batches(self.job, self.task.steps), module)
        return compare(changed, self.task.true())[0]


def _run(job: Job, dtype: torch.dtype, batches: Sequence[Batch], module: nn.Module | None = None) -> Trace:
    job = _steady(job, dtype)
    return run_reference(job, batches, dtype, job.optimizer, module)


def _steady(job: Job, dtype: torch.dtype) -> Job:
    return job if dtype == torch.float64 else job.with_(optimizer=_plain_sgd)


def _plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=_LEARNING_RATE)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- a strategy -------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What one rank saw; errors, and the tensor that is furthest off, are rank 0's."""

    errors: Errors
    worst: str
    announced: list[Traffic]
    recorded: list[Traffic]


def _not_applicable(candidate: Candidate) -> Row:
    return Row(candidate.strategy, candidate.plan, False, candidate.reason)


def _rows(
    candidates: list[Candidate], alone: _OneDevice, ranks: int, timeout: float, pool: Callable[[int], Ranks] | None
) -> list[Row]:
    """The strategies one after the other on the same ranks; where one breaks them, each on ranks of its own."""
    plans = [c.plan for c in candidates if c.plan is not None]
    with nullcontext(pool(ranks)) if pool else Ranks(ranks) as live:
        try:
            answers = live.run(_compare, alone.task, plans, timeout=timeout * len(plans))
            return [_row(c, alone, [each[i] for each in answers]) for i, c in enumerate(candidates)]
        except RunError as error:
            if len(plans) == 1:
                return [Row(candidates[0].strategy, plans[0], True, f"the run failed: {error}")]
    return [row for candidate in candidates for row in _rows([candidate], alone, ranks, timeout, pool)]


def _row(candidate: Candidate, alone: _OneDevice, answers: list[_Found | str]) -> Row:
    refused = next((a for a in answers if isinstance(a, str)), None)
    if refused is not None:
        return _not_applicable(replace(candidate, reason=refused))
    found = [a for a in answers if isinstance(a, _Found)]
    first = found[0]
    limit = TOLERANCE[alone.task.dtype]
    close, sent = max(first.errors) <= limit, all(a.announced == a.recorded for a in found)
    return Row(
        candidate.strategy,
        candidate.plan,
        True,
        candidate.reason,
        *first.errors,
        [t._asdict() for t in first.announced],
        [t._asdict() for t in first.recorded],
        passed=close and sent,
        worst=first.worst,
        unclear=sent and not close and first.errors.within(alone.rounding, _UNCLEAR, limit),
        rounding=None if close else max(alone.rounding),
    )


def _compare(task: _Task, plans: Sequence[Plan]) -> list[_Found | str]:
    """On a rank: each plan's run against that of the one device; a message where the plan does not fit the job."""
    graph: Graph | None = None
    found: list[_Found | str] = []
    job = task.loaded()
    with joined() as place:
        for plan in plans:
            try:
                engine = parallelize(job, plan, dtype=task.dtype, module=job.build(), graph=graph)
            except PlanError as error:
                found.append(str(error))
                continue
            graph = engine.graph
            found.append(_compare_one(task, engine, place))
    return found


def _compare_one(task: _Task, engine: Engine, place: Place) -> _Found:
    found = Trace()
    recorded: list[Traffic] = []
    engine.measures_norm = True
    for batch in first_batches(engine.job, task.steps):
        seen = Collectives()
        with seen:
            found.losses.append(engine.forward_backward(batch))
        recorded = seen.take()
        whole = engine.gradients()
        found.grads.append(whole if place.rank == 0 else {})
        with seen:
            engine.update()
        recorded = _joined(recorded, seen.take())
        found.norms.append(engine.grad_norm or 0.0)
    announced = engine.announced(engine.job.global_batch)
    found.params = engine.state_dict()
    errors, worst = compare(found, task.true()) if place.rank == 0 else (Errors(0.0, 0.0, 0.0), "")
    return _Found(errors, worst, announced, recorded)


def _joined(*parts: Sequence[Traffic]) -> list[Traffic]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for kind, axis, count, size in (t for part in parts for t in part):
        before = found.get((kind, axis), (0, 0))
        found[kind, axis] = (before[0] + count, before[1] + size)
    return [Traffic(kind, axis, *numbers) for (kind, axis), numbers in sorted(found.items())]
