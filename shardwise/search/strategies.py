"""The well-known strategies for a job on so many ranks: a plan each, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations

from shardwise.cost.device import Device
from shardwise.cost.price import price
from shardwise.errors import CaptureError, PlanError
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.backend import Backend
from shardwise.parallel.hybrid import Split, check_fixed_batch
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.candidate import Candidate, NotApplicable, check_divides, factors, micro_batches
from shardwise.search.dims import choose_dims, groups
from shardwise.search.stages import balanced_cuts
from shardwise.search.uncaptured import ModuleMaker

STRATEGIES = ("data", "sharded", "tensor", "pipeline", "hybrid")
_KINDS = ("pipeline", "data", "tensor")
"""What a hybrid is made of, outermost axis first: neighbouring ranks talk most."""


def strategies(job: Job, ranks: int, graph: Graph | None = None) -> list[Candidate]:
    """A candidate for each of STRATEGIES, in this order.

    Args:
        job: what to split.
        ranks: over how many ranks.
        graph: the job's, where it is captured already.

    Raises:
        PlanError: fewer than one rank.
    """
    if ranks < 1:
        raise PlanError(f"a plan needs at least 1 rank, but {ranks} are given")
    maker = maker_of(job, graph)
    return [maker.candidate(strategy, ranks) for strategy in STRATEGIES]


def maker_of(job: Job, graph: Graph | None = None) -> Maker | ModuleMaker:
    """What makes plans for a job: from its graph, or from its module where it does not capture."""
    try:
        return Maker(job, graph if graph is not None else Graph.of(job))
    except CaptureError as error:
        return ModuleMaker(job, str(error))


class Maker:
    """Makes plans for one job."""

    def __init__(self, job: Job, graph: Graph) -> None:
        self.job, self.graph = job, graph
        self.device = Device.of(Backend.detect(), job.precision)
        # Where no dim pays on this device's links, those are taken that would pay on links as fast as inside a node.
        self._fast = replace(self.device, link=self.device.link * 10, latency=0.0, call=0.0)
        self._dims: dict[int, tuple[str, ...]] = {}

    def candidate(self, strategy: str, ranks: int) -> Candidate:
        """The plan of a strategy, or why it does not apply."""
        try:
            if ranks == 1:
                raise NotApplicable("one rank is not split")
            plan = self._hybrid(ranks) if strategy == "hybrid" else self.plan({strategy: ranks})
            self.split(plan)
        except (NotApplicable, PlanError) as error:
            return Candidate(strategy, None, str(error))
        return Candidate(strategy, plan, self._reason(plan))

    def plan(self, sizes: dict[str, int], *, zero: int | None = None) -> Plan:
        """A plan with these ways to split and their sizes.

        Args:
            sizes: of "pipeline", "data", "sharded" and "tensor".
            zero: ZeRO stage over the data axis; None means 3 for "sharded", else 0.

        Raises:
            NotApplicable: one of them cannot split this job.
        """
        axes: list[PlanAxis] = []
        data = sizes.get("data", sizes.get("sharded", 1))
        if "pipeline" in sizes:
            axes.append(PlanAxis(PIPELINE, sizes["pipeline"]))
        if data > 1:
            self._check_batch(data)
            axes.append(PlanAxis("data", data, ("batch",)))
        if "tensor" in sizes:
            axes.append(PlanAxis("tensor", sizes["tensor"], self.tensor_dims(sizes["tensor"])))
        stage = zero if zero is not None else 3 if "sharded" in sizes else 0
        plan = Plan(tuple(a for a in axes if a.name != PIPELINE), zero=stage, precision=self.job.precision)
        if "pipeline" in sizes:
            plan = self._pipelined(plan, axes, sizes["pipeline"], data)
        return plan.with_(model=self.graph.fingerprint())

    def split(self, plan: Plan) -> Split:
        """The plan put on the graph, as seen by rank 0.

        Raises:
            PlanError: it does not fit.
        """
        check_fixed_batch(self.graph, plan)
        return Split(self.graph, plan, Mesh.build([(a.name, a.size) for a in plan.axes], rank=0))

    def one(self) -> Plan:
        """The plan for one rank."""
        return Plan(precision=self.job.precision, model=self.graph.fingerprint())

    def price(self, plan: Plan) -> dict[str, float]:
        """Seconds of one step by term."""
        return price(self.split(plan), self.job.global_batch, self.device)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _check_batch(self, ranks: int) -> None:
        total, fixed = self.job.global_batch, self.graph.captured.fixed_batch
        if fixed is not None:
            raise NotApplicable(f"the model fixes its batch at {fixed} samples, so the batch cannot be cut")
        if self.graph.batch_dim is None:
            raise NotApplicable("no input of the model has a dim of samples")
        check_divides(total, ranks)

    def tensor_dims(self, ranks: int) -> tuple[str, ...]:
        """The dims that a tensor axis of so many ranks splits.

        Raises:
            NotApplicable: there are none that would pay.
        """
        if ranks in self._dims:
            return self._dims[ranks]
        found = groups(self.graph, ranks)
        if not found:
            raise NotApplicable(f"{ranks} divides no dim of the model's operators with parameters")

        def cost(device: Device) -> Callable[[tuple[str, ...]], dict[str, float]]:
            return lambda dims: price(
                self.split(Plan((PlanAxis("tensor", ranks, dims),))), self.job.global_batch, device
            )

        chosen = choose_dims(found, cost(self.device)) or choose_dims(found, cost(self._fast))
        if not chosen:
            raise NotApplicable(f"splitting any dim over {ranks} ranks sends more than it saves")
        self._dims[ranks] = chosen
        return chosen

    def _pipelined(self, plan: Plan, axes: list[PlanAxis], ranks: int, data: int) -> Plan:
        cuts = balanced_cuts(self.split(plan), ranks, self.job.global_batch, self.device)
        if not cuts:
            raise NotApplicable(f"the model has fewer operators than {ranks} stages")
        plan = plan.with_(axes=tuple(axes), cuts=cuts)
        for micros in micro_batches(self.job.global_batch // data, ranks):
            try:
                self.split(plan.with_(micro_batches=micros))
            except PlanError:
                continue
            return plan.with_(micro_batches=micros)
        return plan

    def _hybrid(self, ranks: int) -> Plan:
        primes = factors(ranks)
        if len(primes) < 2:
            raise NotApplicable(f"{ranks} ranks are not a product of two axes; take 4, 6 or 8")
        kinds, refused = [], []
        for kind in _KINDS:
            try:
                self.split(self.plan({kind: primes[-1]}))
                kinds.append(kind)
            except (NotApplicable, PlanError) as error:
                refused.append(f"{kind}: {error}")
        if len(kinds) < 2:
            raise NotApplicable("fewer than two ways to split apply (" + "; ".join(refused) + ")")
        options: list[tuple[float, int, Plan]] = []
        for chosen in _choices(kinds, min(len(primes), len(kinds))):
            sizes = dict.fromkeys(chosen, 1)
            for n, prime in enumerate(sorted(primes, reverse=True)):
                sizes[chosen[::-1][n % len(chosen)]] *= prime
            try:
                plan = self.plan(sizes, zero=1 if "data" in sizes else 0)
                options.append((sum(self.price(plan).values()), len(options), plan))
            except (NotApplicable, PlanError) as error:
                refused.append(str(error))
        if not options:
            raise NotApplicable("; ".join(refused))
        return min(options)[2]

    def _reason(self, plan: Plan) -> str:
        parts = []
        for axis in plan.axes:
            if axis.name == PIPELINE:
                micro = f"{plan.micro_batches} micro-batches" if plan.micro_batches > 1 else "one batch at a time"
                parts.append(f"{plan.stages} stages, {micro}")
            elif axis.dims == ("batch",):
                kept = f", state sharded by ZeRO-{plan.zero}" if plan.zero else ""
                parts.append(f"{self.job.global_batch} samples over {axis.size} ranks{kept}")
            else:
                parts.append(f"{self._covered(axis):.0%} of the work by {_kinds(axis)} over {axis.size} ranks")
        return "; ".join(parts)

    def _covered(self, axis: PlanAxis) -> float:
        """The part of the model's work that has one of an axis's dims."""
        total = sum(op.context.work.at(1) for op in self.graph.ops)
        split = sum(
            op.context.work.at(1)
            for op in self.graph.ops
            if any(fnmatchcase(letter.dim.name, p) for letter in op.letters for p in axis.dims)
        )
        return split / total if total else 0.0


def _kinds(axis: PlanAxis) -> str:
    """The kinds of dims that an axis splits: "heads, width"."""
    return ", ".join(dict.fromkeys(dim.partition("@")[0].partition("#")[0] for dim in axis.dims))


def _choices(kinds: list[str], count: int) -> list[tuple[str, ...]]:
    return list(combinations(kinds, count))
