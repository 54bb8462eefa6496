"""Work: what a rank needs to compute chunks: its replica, the data, and the model as it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardwise.engine.launch import Place
from shardwise.engine.train import check_alike
from shardwise.inference.chunks import Chunks
from shardwise.inference.precision import Arithmetic
from shardwise.inference.prediction import Prediction, Replica, build
from shardwise.job import Batch, Job
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Work:
    """The chunks of a job on one rank.

    Attributes:
        replica: the ranks that compute each chunk together.
        chunks: the samples.
        gives: whether this rank hands outputs out.
        prediction: the model as it predicts.
        example: a few samples.
    """

    replica: Replica
    chunks: Chunks
    gives: bool
    prediction: Prediction
    example: Batch

    @classmethod
    def on(cls, job: Job, plan: Plan, arithmetic: Arithmetic, place: Place) -> Work | None:
        """The work of this rank of a process group; None where there is no sample.

        Raises:
            UserError: the plan does not fit the ranks, the model or the chunks; or the ranks read unlike samples.
        """
        mesh, chunks = Mesh.build(plan.axes), Chunks(job)
        example = chunks.example()
        if example is None:
            return None
        check_alike(example, place)
        prediction = build(job, plan, mesh, example, place.device, arithmetic)
        for samples in sorted(chunks.sizes()):
            prediction.check(samples)
        replica = Replica.of(plan, place.rank)
        if len(replica.ranks) > 1:
            place.backend.reset_peak_memory()  # gives what was needed to build the model back
        return cls(replica, chunks, replica.giver == place.rank, prediction, example)

    def compute(self, chunk: int) -> tuple[Any, list[Tensor]] | None:
        """The form and the tensors of a chunk's output; None where there is no such chunk."""
        batch = self.chunks.read(chunk) if chunk >= 0 else None
        return self.prediction.outputs(chunk, batch) if batch is not None else None
