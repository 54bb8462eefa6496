"""The ranks of one replica: they build the model once, and then compute the batches that come through a pipe.

What is computed of a batch is a task's: here a model's outputs, in `prompts` the tokens behind prompts.
"""

from __future__ import annotations

import os
import pickle
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from torch import Tensor

from shardwise.engine.launch import Place, joined
from shardwise.engine.sent import Sent
from shardwise.errors import FieldError, JobError, PlanError, ShardwiseError
from shardwise.inference.precision import Arithmetic, Precision
from shardwise.inference.prediction import Prediction, Replica, build
from shardwise.job import Batch, slice_batch
from shardwise.machine.descriptors import opened
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan
from shardwise.serving.outputs import outline


@dataclass(frozen=True)
class Inbox:
    """The reading end of a pipe of another process of this user."""

    process: int
    descriptor: int

    def open(self) -> Connection[Any, Any]:
        return Connection(opened(self.process, self.descriptor, os.O_RDONLY), writable=False)


class Model(Protocol):
    """What a rank computes with."""

    @property
    def gives(self) -> bool:
        """Whether this rank hands outputs out."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Along which dim of each tensor of the output the samples lie; where this rank hands out."""

    def compute(self, number: int, batch: Any) -> tuple[Any, Sequence[Tensor | list[Any]]]:
        """The form of a batch's output, and its tensors; see `outline` and `columns`.

        Raises:
            FieldError: a request does not fit, which all ranks found alike before they began with it.
        """


@dataclass(frozen=True)
class Task(ABC):
    """What the ranks of a replica are told.

    Attributes:
        job: whose model it is.
        plan: of one replica.
        most: samples of a batch.
        inboxes: of each rank.
    """

    job: Sent
    plan: Plan
    most: int
    inboxes: tuple[Inbox, ...]

    @property
    @abstractmethod
    def together(self) -> int:
        """How many batches run at a time."""

    @abstractmethod
    def on(self, place: Place) -> Model:
        """The model on a rank, tried.

        Raises:
            UserError: it cannot be served.
        """


@dataclass(frozen=True)
class Ready:
    """A rank has built its part. The one that hands out says along which dim of each output the samples lie."""

    rank: int
    dims: tuple[int, ...] | None


@dataclass(frozen=True)
class Computed:
    """The output of a batch."""

    number: int
    form: Any
    tensors: Sequence[Tensor | list[Any]]


@dataclass(frozen=True)
class Failed:
    """A batch without an output: the model raised an exception on it, or a request does not fit; see `FieldError`."""

    number: int
    message: str
    goes_on: bool
    unfit: FieldError | None = None


Word = Ready | Computed | Failed


def compute_batches(task: Task) -> Iterator[Word]:
    """Runs on every rank, until the pipe ends."""
    with joined() as place:
        model = task.on(place)
        place.backend.reset_peak_memory()  # gives what was needed to build the model back
        inbox = task.inboxes[place.rank].open()
        yield Ready(place.rank, model.dims if model.gives else None)
        while (message := _received(inbox)) is not None:
            number, batch = pickle.loads(message)
            try:
                form, tensors = model.compute(number, batch)
            except FieldError as error:
                if model.gives:
                    yield Failed(number, str(error), True, error)
                continue
            except Exception as error:
                # Others of the replica may be in the middle of this batch, and CUDA may be of no more use.
                goes_on = place.world == 1 and place.device.type == "cpu"
                yield Failed(number, f"{type(error).__name__}: {_line(error)}", goes_on)
                if not goes_on:
                    raise
                traceback.print_exc()
                continue
            if model.gives:
                yield Computed(number, form, tensors)


def _received(inbox: Connection[Any, Any]) -> bytes | None:
    try:
        return inbox.recv_bytes()
    except EOFError:
        return None


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:300]


# --- a model's outputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicting(Task):
    """To compute a model's outputs.

    Attributes:
        precision: how weights are held; None leaves them as the model has them.
        example: two samples.
    """

    precision: Precision | None
    example: Batch

    @property
    def together(self) -> int:
        return self.plan.pipeline

    def on(self, place: Place) -> Model:
        mesh, arithmetic = Mesh.build(self.plan.axes), Arithmetic.of(self.plan, self.precision, None)
        prediction = build(self.job.loaded(), self.plan, mesh, self.example, place.device, arithmetic)
        _check_sizes(prediction, self)
        gives = Replica.of(self.plan, place.rank).giver == place.rank
        return _Predicts(prediction, gives, _dims_of_samples(prediction, self, gives))


@dataclass(frozen=True, eq=False)
class _Predicts:
    prediction: Prediction
    gives: bool
    dims: tuple[int, ...]

    def compute(self, number: int, batch: Batch) -> tuple[Any, list[Tensor]]:
        form, tensors = self.prediction.outputs(number, batch)
        return (outline(form) if self.gives else None), tensors


def _check_sizes(prediction: Prediction, task: Predicting) -> None:
    try:
        for samples in sorted({*range(1, min(task.plan.micro_batches, task.most) + 1), task.most}):
            prediction.check(samples)
    except PlanError as error:
        raise PlanError(
            f"{error}; a server's batches are of 1 to {task.most} samples, so serve it by a plan that splits the batch "
            "alone"
        ) from error


def _dims_of_samples(prediction: Prediction, task: Predicting, gives: bool) -> tuple[int, ...]:
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


def _tried(prediction: Prediction, task: Predicting, samples: int) -> list[Tensor]:
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
