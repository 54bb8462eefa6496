"""The ranks of one replica: they build the model once, and then compute the batches that come through a pipe."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from shardwise.engine.launch import joined
from shardwise.engine.sent import Sent
from shardwise.errors import JobError, PlanError, ShardwiseError
from shardwise.inference.precision import Arithmetic, Precision
from shardwise.inference.prediction import Prediction, Replica, build
from shardwise.job import Batch, slice_batch
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.serving.outputs import outline


@dataclass(frozen=True)
class Inbox:
    """The reading end of a pipe of another process of this user."""

    process: int
    descriptor: int

    def open(self) -> Connection[Any, Any]:
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        return Connection(os.open(path, os.O_RDONLY | os.O_CLOEXEC), writable=False)


@dataclass(frozen=True)
class Task:
    """What the ranks of a replica are told.

    Attributes:
        job: whose model it is.
        plan: of one replica.
        precision: how weights are held; None leaves them as the model has them.
        example: two samples.
        most: samples of a batch.
        inboxes: of each rank.
    """

    job: Sent
    plan: Plan
    precision: Precision | None
    example: Batch
    most: int
    inboxes: tuple[Inbox, ...]


@dataclass(frozen=True)
class Ready:
    """A rank has built its part. The one that hands out says along which dim of each output the samples lie."""

    rank: int
    dims: tuple[int, ...] | None


@dataclass(frozen=True)
class Computed:
    """The output of a batch; for its form see `outline`."""

    number: int
    form: Any
    tensors: list[Tensor]


@dataclass(frozen=True)
class Failed:
    """A batch that the model raised an exception on, and whether the rank goes on."""

    number: int
    message: str
    goes_on: bool


Word = Ready | Computed | Failed


def compute_batches(task: Task) -> Iterator[Word]:
    """Runs on every rank, until the pipe ends."""
    with joined() as place:
        plan, arithmetic = task.plan, Arithmetic.of(task.plan, task.precision, None)
        prediction = build(task.job.loaded(), plan, Mesh.build(plan.axes), task.example, place.device, arithmetic)
        _check_sizes(prediction, task)
        gives = Replica.of(task.plan, place.rank).giver == place.rank
        dims = _dims_of_samples(prediction, task, gives)
        place.backend.reset_peak_memory()  # gives what was needed to build the model back
        inbox = task.inboxes[place.rank].open()
        yield Ready(place.rank, dims if gives else None)
        while (message := _received(inbox)) is not None:
            number, batch = pickle.loads(message)
            try:
                form, tensors = prediction.outputs(number, batch)
            except Exception as error:
                # Others of the replica may be in the middle of this batch, and CUDA may be of no more use.
                goes_on = place.world == 1 and place.device.type == "cpu"
                yield Failed(number, f"{type(error).__name__}: {_line(error)}", goes_on)
                if not goes_on:
                    raise
                traceback.print_exc()
                continue
            if gives:
                yield Computed(number, outline(form), tensors)


def _received(inbox: Connection[Any, Any]) -> bytes | None:
    try:
        return inbox.recv_bytes()
    except EOFError:
        return None


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]


def _check_sizes(prediction: Prediction, task: Task) -> None:
    try:
        for samples in sorted({*range(1, min(task.plan.micro_batches, task.most) + 1), task.most}):
            prediction.check(samples)
    except PlanError as error:
        raise PlanError(
            f"{error}; a server's batches are of 1 to {task.most} samples, so serve it by a plan that splits the batch "
            "alone"
        ) from error


def _dims_of_samples(prediction: Prediction, task: Task, gives: bool) -> tuple[int, ...]:
    """Along which dim the samples lie, of each tensor of the output: the one that is as long as there are samples.

    Raises:
        JobError: an output has no such dim, so that it does not belong to samples; or the model does not run.
    """
    two, one = (_tried(prediction, task, samples) for samples in (2, 1))
    if not gives:
        return ()
    found = []
    for a, b in zip(two, one, strict=True):
        dims = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if (m, n) == (2, 1)]
        if len(dims) != 1 or a.ndim != b.ndim:
            raise JobError(
                "every output must have a dim for the samples, but of two samples the model gives the shapes "
                f"{[list(t.shape) for t in two]}, and of one {[list(t.shape) for t in one]}; "
                "let it return what belongs to samples alone"
            )
        found.append(dims[0])
    return tuple(found)


def _tried(prediction: Prediction, task: Task, samples: int) -> list[Tensor]:
    """The outputs of the first of the example's samples."""
    try:
        return prediction.outputs(samples - 1, slice_batch(task.example, 0, samples))[1]
    except ShardwiseError:
        raise
    except Exception as error:
        raise JobError(
            f"the model does not run on {samples} of the job's samples: {type(error).__name__}: {_line(error)}; "
            f"a server's batches are of 1 to {task.most} samples"
        ) from error
