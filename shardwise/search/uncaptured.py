"""Plans for a job that does not capture: by samples, and by layers where the model is an nn.Sequential."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from shardwise.job import Job
from shardwise.parallel.sequential import balanced_cuts, layers
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.candidate import Candidate, NotApplicable, check_divides, factors, micro_batches


class ModuleMaker:
    """Makes plans for a job whose module runs as it is.

    Args:
        job: what to split.
        why: why it does not capture.
    """

    def __init__(self, job: Job, why: str) -> None:
        self.job, self.why = job, why
        self.module = job.build("meta")
        self._norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())

    def candidate(self, strategy: str, ranks: int) -> Candidate:
        """The plan of a strategy, or why it does not apply."""
        try:
            if ranks == 1:
                raise NotApplicable("one rank is not split")
            plan = self._plan(strategy, ranks)
        except NotApplicable as error:
            return Candidate(strategy, None, str(error))
        return Candidate(strategy, plan, self._reason(plan))

    def price(self, plan: Plan) -> None:
        """None: without a graph there is no telling."""
        return None

    def one(self) -> Plan:
        """The plan for one rank."""
        return Plan(precision=self.job.precision)

    def _plan(self, strategy: str, ranks: int) -> Plan:
        if strategy == "tensor":
            raise NotApplicable(f"dims are found in a captured graph, but {self.why}")
        if strategy == "pipeline":
            return self._made(pipeline=ranks)
        if strategy == "hybrid":
            primes = factors(ranks)
            if len(primes) < 2:
                raise NotApplicable(f"{ranks} ranks are not a product of two axes; take 4, 6 or 8")
            return self._made(pipeline=primes[0], data=ranks // primes[0], zero=1)
        return self._made(data=ranks, zero=3 if strategy == "sharded" else 0)

    def _made(self, *, pipeline: int = 1, data: int = 1, zero: int = 0) -> Plan:
        cuts: Sequence[str] = ()
        axes = []
        if pipeline > 1:
            cuts = self._cuts(pipeline)
            axes.append(PlanAxis(PIPELINE, pipeline))
        if data > 1:
            check_divides(self.job.global_batch, data)
            axes.append(PlanAxis("data", data, ("batch",)))
        # Micro-batches would change statistics that are of the whole batch.
        micros = micro_batches(self.job.global_batch // data, pipeline) if pipeline > 1 and not self._norms else []
        norm = "per-micro-batch" if self._norms and data > 1 else "exact"
        return Plan(
            tuple(axes), tuple(cuts), next(iter(micros), 1), zero=zero, precision=self.job.precision, batch_norm=norm
        )

    def _cuts(self, stages: int) -> tuple[str, ...]:
        if not layers(self.module):
            raise NotApplicable(
                f"{type(self.module).__name__} does not capture, and is no nn.Sequential that says where to cut it"
            )
        cuts = balanced_cuts(self.module, stages)
        if not cuts:
            raise NotApplicable(f"the model has fewer layers than {stages} stages")
        return cuts

    def _reason(self, plan: Plan) -> str:
        parts = []
        if plan.stages > 1:
            parts.append(f"{plan.stages} stages of layers, {plan.micro_batches} micro-batches")
        ranks = math.prod(axis.size for axis in plan.axes if axis.name != PIPELINE)
        if ranks > 1:
            kept = f", state sharded by ZeRO-{plan.zero}" if plan.zero else ""
            parts.append(f"{self.job.global_batch} samples over {ranks} ranks{kept}")
        if plan.batch_norm != "exact":
            parts.append("batch norm of each rank's samples")
        return "; ".join([*parts, "the module as it is, for it does not capture"])
