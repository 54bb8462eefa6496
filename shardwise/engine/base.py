"""Engine: a job under a plan on this rank. `step` takes a batch and returns the loss of the global batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.feed import Share
from shardwise.engine.optimize import squared_norm
from shardwise.graph.graph import Graph
from shardwise.job import Batch, Job
from shardwise.parallel.mesh import Mesh, Traffic, open_group
from shardwise.plan.plan import Plan


class Gradients(Protocol):
    """What an update needs of this rank's gradients."""

    def grads(self) -> Iterator[tuple[str, Tensor, float]]:
        """Name, gradient, and the share by which it counts in a sum over all ranks."""

    def after_update(self) -> None:
        """Fetch what other ranks updated."""


class Shares(Protocol):
    """Cuts global batches as a plan wants them."""

    def share(self, batch: Batch) -> Share:
        """This rank's samples of a global batch, in the order of the micro-batches."""


class Engine(ABC):
    """A job under a plan, on this rank of an initialised process group (or alone).

    Attributes:
        job, plan: what it was made of.
        graph: the captured model; None where it does not capture.
        mesh: the device mesh.
        optimizer, scheduler: the user's, over this rank's parameters.
        steps: updates made so far.
        grad_norm: 2-norm of the last step's whole gradient, before clipping; None where it was not measured.
        measures_norm: whether steps measure it for a job that does not clip by it; at first they do not.
    """

    job: Job
    plan: Plan
    graph: Graph | None
    mesh: Mesh
    device: torch.device
    optimizer: torch.optim.Optimizer
    scheduler: Any
    _reduction: Gradients
    _feeder: Shares

    def __init__(self) -> None:
        self.steps = 0
        self.grad_norm: float | None = None
        self.measures_norm = False
        self._fed: Share | None = None
        self._traffic: list[Traffic] = []

    # -- training ----------------------------------------------------------------------------------------------------

    def feed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """This rank's share of each global batch of a loader that is the same on every rank."""
        for batch in loader:
            self._fed = self._feeder.share(batch)
            yield self._fed.batch

    def _taken(self, batch: Batch) -> Share:
        """This rank's share of a batch; it may be one already."""
        if self._fed is not None and batch is self._fed.batch:
            return self._fed
        return self._feeder.share(batch)

    def step(self, batch: Batch) -> float:
        """One update: forward, backward, gradient reduction, clipping, optimizer, scheduler.

        Args:
            batch: a global batch, the same on every rank; or this rank's share of one, as `feed` yields it.

        Returns:
            The loss of the global batch, the same number on every rank.

        Raises:
            PlanError: the batch is too small to be cut as the plan says.
        """
        self.mesh.recorder.take()
        loss = self.forward_backward(batch)
        self.update()
        self._traffic = self.mesh.recorder.take()
        return loss

    def update(self) -> None:
        """Clip, and step the optimizer and the scheduler, once."""
        self.grad_norm = self._clip()
        self.optimizer.step()
        self._reduction.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1

    @abstractmethod
    def forward_backward(self, batch: Batch) -> float:
        """The loss of a global batch, and the gradients of this rank's parameters, summed over all ranks."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over batches, computed as the model is evaluated: no dropout, running statistics, no gradients.

        Batches are weighted by the count where the job's loss returns `(sum, count)`, and by their samples otherwise.

        Args:
            batches: global batches, the same on every rank; or this rank's shares of them, as `feed` yields them.

        Returns:
            The same number on every rank.

        Raises:
            JobError: there is no batch.
            PlanError: a batch is too small to be cut as the plan says.
            CaptureError: the model captures in training, but not in evaluation.
        """

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def _needs_norm(self) -> bool:
        return self.measures_norm or self.job.clip_norm is not None

    def _clip(self) -> float | None:
        """Scale gradients to the job's norm. The norm is of the whole gradient, each entry counted once."""
        if not self._needs_norm:
            return None
        grads = list(self._reduction.grads())
        total = squared_norm([(grad, share) for _, grad, share in grads], self.device)
        if dist.is_initialized() and self.plan.ranks > 1:
            self.mesh.recorder.add("all_reduce", "all", total.element_size())
            dist.all_reduce(total, group=open_group(range(self.plan.ranks), "all")[0])
        norm = math.sqrt(float(total))
        limit = self.job.clip_norm
        # A stage may have no parameters.
        if grads and limit is not None and norm > limit:
            torch._foreach_mul_([grad for _, grad, _ in grads], limit / (norm + 1e-6))
        return norm

    # -- reading -----------------------------------------------------------------------------------------------------

    def traffic(self) -> list[Traffic]:
        """The collectives of the last step."""
        return self._traffic

    @abstractmethod
    def announced(self, total: int | None = None) -> list[Traffic]:
        """The collectives that a step of `total` samples (the job's global batch) will make, known beforehand."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole, under the user's names; the same on every rank."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient of every parameter that the model uses, after `forward_backward`; on every rank."""
