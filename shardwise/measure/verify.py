"""Verify: every strategy against one device, from the same weights and batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.engine.base import Engine
from shardwise.engine.engine import parallelize
from shardwise.engine.launch import Place, Ranks, joined
from shardwise.engine.sent import Sent
from shardwise.errors import JobError, LaunchError, PlanError, ProofError, RunError
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job, digest
from shardwise.measure.reference import Trace, real, run_reference
from shardwise.measure.traffic import Collectives
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan
from shardwise.search.candidate import Candidate
from shardwise.search.strategies import STRATEGIES, strategies

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The largest error that passes, by the dtype of the run."""
_NOISE = 1e-6
"""A tensor counts as at least this part of all tensors together; one whose true gradient is zero as all of them."""
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
            task, note = _on_one_device(job, dtype, steps, folder, spec)
        except OSError as error:
            message = f"the run on one device cannot be kept: {error.strerror}; set TMPDIR to another disk"
            raise LaunchError(message) from error
        rows = [_not_applicable(c) if c.plan is None else None for c in candidates]
        for size in sorted({c.plan.ranks for c in candidates if c.plan is not None}):
            places = [i for i, c in enumerate(candidates) if c.plan is not None and c.plan.ranks == size]
            found = _rows([candidates[i] for i in places], task, size, timeout, pool)
            for i, row in zip(places, found, strict=True):
                rows[i] = replace(row, reason="; ".join(filter(None, (row.reason, note))))
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


def relative(found: Tensor, true: Tensor, scale: float) -> float:
    """‖found − true‖ / max(‖true‖, 1e-6·scale), in float64; 0 for equal ones."""
    found, true = real(found).double().cpu(), real(true).double().cpu()
    if found.shape != true.shape:
        return float("inf")
    off = float(torch.linalg.vector_norm(found - true))
    return off / max(float(torch.linalg.vector_norm(true)), _NOISE * scale) if off else 0.0


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


def _candidates(job: Job, ranks: int, wanted: Sequence[str]) -> list[Candidate]:
    return [c for c in strategies(job, ranks) if c.strategy in wanted]


def _on_one_device(job: Job, dtype: torch.dtype, steps: int, folder: Path, spec: str | None) -> tuple[_Task, str]:
    """Runs the job as it is, and keeps what it computed; with a note where it ran in another dtype."""
    batches = first_batches(job, steps)
    if digest(first_batches(job, 1)[0]) != digest(batches[0]):
        raise ProofError(
            f"the dataset gave other numbers when its first {job.global_batch} samples were read again, so that no two "
            "runs can be compared; draw random numbers from torch, NumPy or random, which are seeded while a batch is "
            "read, or seed a generator by the sample's index"
        )
    note = ""
    try:
        trace = run_reference(_steady(job, dtype), batches, dtype, _steady(job, dtype).optimizer)
    except (NotImplementedError, RuntimeError) as error:
        if dtype == torch.float32:
            raise ProofError(f"{job.title()} does not run on one device: {_line(error)}") from error
        dtype, note = torch.float32, f"in float32, for in float64 it does not run: {_line(error)}"
        try:
            trace = run_reference(_steady(job, dtype), batches, dtype, _steady(job, dtype).optimizer)
        except (NotImplementedError, RuntimeError) as again:
            raise ProofError(f"{job.title()} does not run on one device: {_line(again)}") from again
    kept = folder / "one-device.pt"
    torch.save(trace.__dict__, kept)
    return _Task(Sent.of(job, spec), dtype, steps, kept), note


def _steady(job: Job, dtype: torch.dtype) -> Job:
    return job if dtype == torch.float64 else job.with_(optimizer=_plain_sgd)


def _plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=_LEARNING_RATE)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- a strategy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What one rank saw; errors are rank 0's."""

    loss: float
    grad: float
    param: float
    worst: str
    announced: list[Traffic]
    recorded: list[Traffic]


def _not_applicable(candidate: Candidate) -> Row:
    return Row(candidate.strategy, candidate.plan, False, candidate.reason)


def _rows(
    candidates: list[Candidate], task: _Task, ranks: int, timeout: float, pool: Callable[[int], Ranks] | None
) -> list[Row]:
    """The strategies one after the other on the same ranks; where one breaks them, each on ranks of its own."""
    plans = [c.plan for c in candidates if c.plan is not None]
    with nullcontext(pool(ranks)) if pool else Ranks(ranks) as live:
        try:
            answers = live.run(_compare, task, plans, timeout=timeout * len(plans))
            return [_row(c, task, [each[i] for each in answers]) for i, c in enumerate(candidates)]
        except RunError as error:
            if len(plans) == 1:
                return [Row(candidates[0].strategy, plans[0], True, f"the run failed: {error}")]
    return [row for candidate in candidates for row in _rows([candidate], task, ranks, timeout, pool)]


def _row(candidate: Candidate, task: _Task, answers: list[_Found | str]) -> Row:
    refused = next((a for a in answers if isinstance(a, str)), None)
    if refused is not None:
        return _not_applicable(replace(candidate, reason=refused))
    found = [a for a in answers if isinstance(a, _Found)]
    first = found[0]
    limit = TOLERANCE[task.dtype]
    close = all(error <= limit for error in (first.loss, first.grad, first.param))
    return Row(
        candidate.strategy,
        candidate.plan,
        True,
        candidate.reason,
        first.loss,
        first.grad,
        first.param,
        [t._asdict() for t in first.announced],
        [t._asdict() for t in first.recorded],
        passed=close and all(a.announced == a.recorded for a in found),
        worst=first.worst,
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
    losses: list[float] = []
    norms: list[float] = []
    grads: list[dict[str, Tensor]] = []
    recorded: list[Traffic] = []
    engine.measures_norm = True
    for batch in first_batches(engine.job, task.steps):
        seen = Collectives()
        with seen:
            losses.append(engine.forward_backward(batch))
        recorded = seen.take()
        whole = engine.gradients()
        grads.append(whole if place.rank == 0 else {})
        with seen:
            engine.update()
        recorded = _joined(recorded, seen.take())
        norms.append(engine.grad_norm or 0.0)
    announced = engine.announced(engine.job.global_batch)
    state = engine.state_dict()
    if place.rank:
        return _Found(0.0, 0.0, 0.0, "", announced, recorded)
    true = Trace(**torch.load(task.kept, weights_only=True, mmap=True))
    loss = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(losses, true.losses, strict=True))
    errors = {
        (step, name): relative(found.get(name, torch.zeros_like(grad)), grad, norm)
        for step, (found, norm) in enumerate(zip(grads, true.norms, strict=True))
        for name, grad in true.grads[step].items()
    }
    errors |= {
        (step, "the gradient norm"): abs(a - b) / max(b, 1e-30)
        for step, (a, b) in enumerate(zip(norms, true.norms, strict=True))
    }
    worst = max(errors, key=lambda key: errors[key], default=(0, ""))
    scale = float(torch.stack([real(p).double().norm() for p in true.params.values()]).norm()) if true.params else 0.0
    params = [
        relative(state[name], value, scale / _NOISE if _is_noise(true, name) else scale)
        for name, value in true.params.items()
    ]
    return _Found(loss, errors.get(worst, 0.0), max(params, default=0.0), worst[1], announced, recorded)


def _is_noise(true: Trace, name: str) -> bool:
    """Whether a parameter's true gradient is zero (a key's bias), so that its steps are rounding noise made large."""
    norms = [(float(g[name].norm()) if name in g else 0.0, n) for g, n in zip(true.grads, true.norms, strict=True)]
    return any(norm for norm, _ in norms) and all(norm <= 1e-12 * whole for norm, whole in norms)


def _joined(*parts: Sequence[Traffic]) -> list[Traffic]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for kind, axis, count, size in (t for part in parts for t in part):
        before = found.get((kind, axis), (0, 0))
        found[kind, axis] = (before[0] + count, before[1] + size)
    return [Traffic(kind, axis, *numbers) for (kind, axis), numbers in sorted(found.items())]
