"""Predict: a job's model over a dataset, on local ranks or a launch's; its outputs in the order of the samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.engine.launch import Ranks, joined, launched
from shardwise.engine.sent import Sent
from shardwise.engine.train import data_plan, fitting
from shardwise.graph.output import put_together
from shardwise.inference import collect
from shardwise.inference.chunks import Chunks
from shardwise.inference.claims import Claims, in_order, shared_store
from shardwise.inference.local_queue import LocalQueue
from shardwise.inference.parcel import Parcel, discard, ends, pack, unpack
from shardwise.inference.precision import Arithmetic, Precision
from shardwise.inference.work import Work
from shardwise.job import Job
from shardwise.plan.plan import Plan

_AHEAD = 2
"""Chunks that each rank may have computed before the caller takes the first of them."""
_AHEAD_OF_ROOT = 4
"""The same where rank 0 hands them on: it computes too, and takes them late."""
_DYING = 5.0
"""Seconds between the end of a rank's memory and its own, at most."""


def predict(
    job: Job,
    data: Dataset[Any] | None = None,
    plan: Plan | None = None,
    *,
    ranks: int | None = None,
    precision: Precision | None = None,
    dtype: torch.dtype | None = None,
    spec: str | None = None,
    log_dir: Path | None = None,
    threads: int | None = None,
) -> Generator[Any, None, None]:
    """The outputs of a job's model over a dataset, chunk by chunk, in the order of the samples, each sample once.

    A chunk is the next `job.global_batch` samples, the last one what is left. Its output is what the model returns for
    it in evaluation mode without gradients, in the model's own structure: tensors are on the CPU, and what is neither
    tensor, number nor string in a container of these, such as a cache of keys and values, is None.

    Axes of the plan that split the batch make replicas. One that is free takes the next whole chunk, so a slow rank
    takes less, and a chunk meets the model as on one device whatever couples its samples. The other axes split the
    model within a replica. What a plan says for training alone (ZeRO, recompute, shares of a batch) is not looked at.

    Runs on local ranks that it starts, which end with the iterator: read it to its end, close it, or let go of it.
    Under torchrun it runs on the ranks of that launch: every rank has to iterate, rank 0 gets the outputs and the
    others get none.

    Args:
        job: its model, `global_batch`, `precision`, `seed` and `collate`; loss and optimizer are not looked at.
        data: the samples; None means the job's own.
        plan: how to split; None makes a replica of each of `ranks`.
        ranks: how many local ranks to start; None means those of the plan, or one for each device or core.
        precision: how weights are held: "fp32", "bf16", or "int8" for those of matrix products. None leaves the model's
            own, and runs a job that trains in bf16 as it trains.
        dtype: runs everything in this dtype (float64 for proofs); None leaves the model's own.
        spec: where given, each rank loads the job from this SPEC instead of receiving it from this process.
        log_dir: gets a log per rank; None means a temporary directory that is kept only on failure.
        threads: of each rank; None means the cores divided by the ranks of this machine.

    Raises:
        UserError: the plan does not fit the ranks, the model or the chunks.
        RunError: a rank failed.
    """
    whole = job if data is None else job.with_(data=data)
    chunks = Chunks(whole)
    if launched() or dist.is_initialized():
        return _predict_joined(whole, plan, precision, dtype, threads)
    plan = fitting(plan, ranks, job)
    arithmetic = Arithmetic.of(plan, precision, dtype)
    if chunks.count == 0:
        return _nothing()
    return _predict_locally(Sent.of(job, spec), data, plan, arithmetic, threads, log_dir)


def _nothing() -> Generator[Any, None, None]:
    yield from ()


def _predict_locally(
    job: Sent,
    data: Dataset[Any] | None,
    plan: Plan,
    arithmetic: Arithmetic,
    threads: int | None,
    log_dir: Path | None,
) -> Generator[Any, None, None]:
    with (
        closing(LocalQueue.new()) as queue,
        Ranks(plan.ranks, threads=threads, log_dir=log_dir) as live,
        closing(live.stream(_rank, _Task(job, data, plan, arithmetic, queue))) as parts,
        closing(queue.opened()) as counts,
    ):
        for form, tensors in in_order(_opened(parts)):
            counts.take()
            yield put_together(form, tensors)
            del tensors


def _opened(parts: Iterator[_Part]) -> Iterator[tuple[int, tuple[Any, list[Tensor]]]]:
    """The form and the tensors of each chunk that comes, with its number."""
    for part in parts:
        try:
            found = part.form, unpack(part.parcel)
        except OSError:
            if not ends(part.parcel, within=_DYING):
                raise
            continue  # the rank that had it died, which is what `parts` says next
        yield part.chunk, found
        del found


# --- on a rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a local rank is told."""

    job: Sent
    data: Dataset[Any] | None
    plan: Plan
    arithmetic: Arithmetic
    queue: LocalQueue


@dataclass(frozen=True)
class _Part:
    """The output of a chunk on its way to the process that started the ranks."""

    chunk: int
    form: Any
    parcel: Parcel


def _rank(task: _Task) -> Iterator[_Part]:
    with joined() as place:
        job = task.job.loaded()
        work = Work.on(job if task.data is None else job.with_(data=task.data), task.plan, task.arithmetic, place)
        if work is None:
            return
        window = _AHEAD * place.world
        kept: deque[tuple[int, Parcel]] = deque()
        with closing(task.queue.opened()) as queue:
            claims = Claims(queue, shared_store("predict"), work.replica, place.rank, window)
            while (found := work.compute(chunk := claims.next())) is not None:
                while kept and kept[0][0] <= chunk - window:  # which was taken, or this one could not have been claimed
                    discard(kept.popleft()[1])
                if work.gives:
                    form, tensors = found
                    kept.append((chunk, pack(tensors)))
                    yield _Part(chunk, form, kept[-1][1])


def _predict_joined(
    job: Job, plan: Plan | None, precision: Precision | None, dtype: torch.dtype | None, threads: int | None
) -> Generator[Any, None, None]:
    with joined(threads=threads) as place:
        plan = plan or data_plan(place.world, job)
        work = Work.on(job, plan, Arithmetic.of(plan, precision, dtype), place)
        if work is None:
            return
        window = _AHEAD_OF_ROOT * place.world
        with collect.agreed_queue(place, window) as (queue, store):
            claims = Claims(queue, store, work.replica, place.rank, window)
            if place.rank == 0:
                yield from collect.outputs(work, claims, queue, store, place)
            else:
                collect.send_all(work, claims, queue, store, place)
