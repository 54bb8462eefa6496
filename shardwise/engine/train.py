"""Train: a job over local ranks or a launch's ranks, with one progress line, and a Result that can be kept."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, default_collate

from shardwise.engine.launch import Place, joined, launched, run_ranks
from shardwise.engine.progress import Progress, Run, counted, median
from shardwise.engine.sent import Sent
from shardwise.errors import JobError, PlanError, RunError
from shardwise.job import Batch, Job, digest
from shardwise.machine.backend import Backend, cores
from shardwise.parallel.mesh import Traffic
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.seeding import seeded
from shardwise.weights.save import save_weights

if TYPE_CHECKING:
    from shardwise.engine.base import Engine

_REMEMBERED = 5  # losses that the message about a bad one shows


@dataclass(frozen=True)
class Result:
    """What a training run did.

    Attributes:
        name: of the job.
        plan: the split that ran.
        losses: of each step, over the global batch.
        seconds: of each step, without reading the data.
        elapsed: seconds of all steps together, reading the data included.
        unit: what is counted, "tokens" or "samples".
        per_step: how many of them one step takes.
        peak_memory: bytes at the peak, of each rank: allocated on the device, or resident in the process.
        memory_before: bytes of each rank before the model was built: on a CPU, Python and torch themselves.
        traffic: the collectives of one step on rank 0.
        device: "cpu" or "cuda".
        threads: of each rank.
    """

    name: str
    plan: Plan
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    elapsed: float
    unit: str
    per_step: int
    peak_memory: tuple[int, ...]
    memory_before: tuple[int, ...]
    traffic: tuple[Traffic, ...]
    device: str
    threads: int

    @property
    def ranks(self) -> int:
        return self.plan.ranks

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step, without the first, which allocates and connects."""
        return median(self.seconds[1:] or self.seconds)

    @property
    def rate(self) -> float:
        """Tokens or samples per second, by the median step."""
        return self.per_step / self.step_seconds if self.step_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """The same as numbers, strings, lists and dicts."""
        found = {**asdict(replace(self, traffic=())), "traffic": [t._asdict() for t in self.traffic]}
        found["plan"] = json.loads(self.plan.to_json())
        return {**found, "ranks": self.ranks, "step_seconds": self.step_seconds, "rate": self.rate}

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def train(
    job: Job,
    plan: Plan | None = None,
    *,
    steps: int,
    ranks: int | None = None,
    spec: str | None = None,
    log_dir: Path | None = None,
    save: Path | None = None,
    progress: bool = True,
    threads: int | None = None,
) -> Result:
    """Trains a job: on local ranks that it starts, or, under torchrun, on the ranks of that launch.

    The order of the samples is a permutation per epoch that depends on the job's seed and the epoch alone, so every
    plan sees the same batches. The samples at an epoch's end that do not fill a global batch are left out of it.

    Args:
        plan: how to split; None splits the batch over `ranks`. `shardwise.plan` chooses one.
        steps: updates to make.
        ranks: how many local ranks to start; None means those of the plan, or one for each device or core.
        spec: where given, each rank loads the job from this SPEC instead of receiving it from this process.
        log_dir: gets a log per rank; None means a temporary directory that is kept only on failure.
        save: gets the weights at the end, in the user's names and shapes: a `.safetensors` file, which
            `Job(weights=...)` reads, or another, for `torch.load(..., weights_only=True)`.
        progress: whether rank 0 prints a progress line.
        threads: of each rank; None means the cores divided by the ranks of this machine.

    Raises:
        UserError: the plan does not fit the ranks or the job, or the dataset is too short.
        RunError: the loss became NaN or infinite, or a rank failed.
    """
    if steps < 1:
        raise JobError(f"steps must be at least 1, but is {steps}")
    if launched() or dist.is_initialized():
        with joined(threads=threads) as place:
            plan = plan or data_plan(place.world, job)
            return _train_here(job, plan, steps, Progress(steps, enabled=progress and place.rank == 0), save, place)
    plan = fitting(plan, ranks, job)
    _check_data(job)
    task = _Task(Sent.of(job, spec), plan, steps, save, progress, sys.stdout.isatty())
    return run_ranks(_rank, task, ranks=plan.ranks, threads=threads, log_dir=log_dir)[0]


def data_plan(ranks: int, job: Job) -> Plan:
    """The plan that splits the batch and nothing else, which every model has."""
    axes = (PlanAxis("data", ranks, ("batch",)),) if ranks > 1 else ()
    return Plan(axes=axes, precision=job.precision)


def fitting(plan: Plan | None, ranks: int | None, job: Job) -> Plan:
    """The plan for so many local ranks; without one, that of the batch alone over those asked for or at hand.

    Raises:
        PlanError: the plan is for another number of ranks.
    """
    if plan is None:
        backend = Backend.detect(ranks or 1)
        return data_plan(ranks or (torch.cuda.device_count() if backend.device_type == "cuda" else cores()), job)
    if ranks is not None and plan.ranks != ranks:
        raise PlanError(
            f"the plan is for {plan.ranks} ranks ({plan.title()}), but {ranks} are asked for; "
            f"ask for {plan.ranks}, or give a plan for {ranks}"
        )
    return plan


# --- on a rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a local rank is told."""

    job: Sent
    plan: Plan
    steps: int
    save: Path | None
    progress: bool
    terminal: bool


def _rank(task: _Task) -> Result:
    with joined() as place:
        progress = Progress(task.steps, enabled=task.progress and place.rank == 0, terminal=task.terminal)
        return _train_here(task.job.loaded(), task.plan, task.steps, progress, task.save, place)


def _train_here(job: Job, plan: Plan, steps: int, progress: Progress, save: Path | None, place: Place) -> Result:
    engine, result = train_engine(job, plan, steps, progress, place)
    if save is not None:
        state = engine.state_dict()
        if not place.rank:
            save_weights(state, save)
    return result


def train_engine(job: Job, plan: Plan, steps: int, progress: Progress, place: Place) -> tuple[Engine, Result]:
    """Trains on this rank of a process group; the engine, to go on with, and what was measured."""
    from shardwise.engine.engine import parallelize

    place.backend.reset_peak_memory()
    before = place.backend.peak_memory()
    _check_batch(job, plan)
    engine = parallelize(job, plan)
    data = batches(job)
    first = next(data)
    check_alike(first, place)
    run = run_steps(engine, itertools.chain([first], data), steps, place.backend, progress)
    result = Result(
        name=job.title(),
        plan=plan,
        losses=tuple(run.losses),
        seconds=tuple(run.seconds),
        elapsed=run.elapsed,
        unit=run.unit,
        per_step=run.per_step,
        peak_memory=_of_each_rank(place.backend.peak_memory(), place),
        memory_before=_of_each_rank(before, place),
        traffic=tuple(engine.traffic()),
        device=place.backend.device_type,
        threads=torch.get_num_threads(),
    )
    return engine, result


def _check_batch(job: Job, plan: Plan) -> None:
    parts = math.prod(axis.size for axis in plan.axes if "batch" in axis.dims)
    total = job.global_batch
    if total % parts:
        near = f"{total - total % parts} or {total - total % parts + parts}" if total > parts else f"{parts}"
        raise PlanError(
            f"a global batch of {total} samples does not divide by the {parts} ranks that {plan.title()} "
            f"splits it over; take {near} samples, or another plan"
        )


def check_alike(batch: Batch, place: Place) -> None:
    """Check that all ranks have read the same batch.

    Raises:
        JobError: they have not, so that parts of unlike samples would be put together.
    """
    found = _of_each_rank(digest(batch), place)
    odd = [rank for rank, number in enumerate(found) if number != found[0]]
    if odd:
        raise JobError(
            f"rank {odd[0]} of {place.world} read another first batch than rank 0, so the dataset has random numbers "
            "of its own; draw them from torch, NumPy or random, which are seeded while a batch is read, or seed a "
            "generator by the sample's index"
        )


def run_steps(
    engine: Engine,
    data: Iterator[Batch],
    steps: int,
    backend: Backend,
    progress: Callable[[Run, int], None] | None = None,
) -> Run:
    """Makes `steps` updates with the next global batches of `data`.

    Raises:
        RunError: the loss is NaN or infinite.
    """
    run = Run([], [])
    recent: deque[float] = deque(maxlen=_REMEMBERED)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        batch = next(data)
        if step == 1:
            run.unit, run.per_step = counted(batch)
        backend.synchronize()
        start = time.perf_counter()
        loss = engine.step(batch)
        backend.synchronize()
        now = time.perf_counter()
        run.seconds.append(now - start)
        run.losses.append(loss)
        run.elapsed = now - began
        if not math.isfinite(loss):
            raise RunError(_not_finite(loss, step, recent, engine.plan))
        recent.append(loss)
        if progress is not None:
            progress(run, backend.peak_memory())
    return run


def _not_finite(loss: float, step: int, recent: deque[float], plan: Plan) -> str:
    last = ", ".join(f"{value:.6g}" for value in recent)
    before = f"after {last}" if recent else "at once"
    other = "train in fp32" if plan.precision != "fp32" else "look for bad numbers in the data"
    return (
        f"the loss became {loss} at step {step} ({before}); "
        f"give a smaller learning rate, set clip_norm (1.0 is usual), or {other}"
    )


def _of_each_rank(number: int, place: Place) -> tuple[int, ...]:
    mine = torch.tensor([number], dtype=torch.int64, device=place.device)
    all_ = [torch.empty_like(mine) for _ in range(place.world)]
    dist.all_gather(all_, mine)
    return tuple(int(n) for n in all_)


# --- data -------------------------------------------------------------------------------------------------------------


def batches(job: Job) -> Iterator[Batch]:
    """The global batches of a job without end, the same on every rank.

    A map-style dataset is read in an order that the seed and the epoch decide; an iterable one is read as it comes and
    started again at its end. What is left at the end of an epoch and does not fill a batch is not used in that epoch.

    Raises:
        JobError: the dataset has fewer samples than the global batch.
    """
    if isinstance(job.data, IterableDataset):
        yield from _stream(job)
    _check_data(job)
    count = job.samples()
    assert count is not None
    for epoch in itertools.count():
        order = permutation(count, job.seed, epoch)
        for start in range(0, count - job.global_batch + 1, job.global_batch):
            yield job.batch(order[start : start + job.global_batch], epoch=epoch)


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` samples in one epoch."""
    mixed = (seed * 1_000_003 + epoch) % (1 << 63)
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist()
    return found


def _stream(job: Job) -> Iterator[Batch]:
    collate = job.collate or default_collate
    for epoch in itertools.count():
        found = 0
        rows = iter(job.data)
        while True:
            with seeded(job.seed, epoch, found):
                samples = list(itertools.islice(rows, job.global_batch))
                if len(samples) < job.global_batch:
                    break
                batch = collate(samples)
            found += 1
            yield batch
        if not found:
            raise _too_short(job, len(samples))


def _check_data(job: Job) -> None:
    if isinstance(job.data, IterableDataset):
        return
    count = job.samples()
    if count is None:
        kind = type(job.data).__name__
        raise JobError(f"the dataset, a {kind}, has no length; give it __len__, or make it an IterableDataset")
    if count < job.global_batch:
        raise _too_short(job, count)


def _too_short(job: Job, count: int) -> JobError:
    return JobError(
        f"the dataset has {count} samples, but one update takes {job.global_batch} (global_batch); "
        "give more data or a smaller global_batch"
    )
