"""The well-known strategies for a job on so many ranks: a plan each, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations

from shardwise.cost.estimate import Estimate
from shardwise.cost.pricer import Pricer
from shardwise.cost.profile import PROFILES
from shardwise.errors import CaptureError, PlanError
from shardwise.graph.blocks import twins
from shardwise.graph.capture import Purpose
from shardwise.graph.graph import Graph
from shardwise.job import Job
from shardwise.machine.cluster import Cluster
from shardwise.machine.here import here
from shardwise.parallel.hybrid import Split, check_fixed_batch
from shardwise.parallel.mesh import Mesh
from shardwise.plan.plan import PIPELINE, Plan, PlanAxis
from shardwise.search.candidate import Candidate, NotApplicable, check_divides, factors, micro_batches
from shardwise.search.cuts import best_cuts
from shardwise.search.dims import EXPERTS, SEQUENCE, choose_dims, groups
from shardwise.search.state import state_bytes
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


def maker_of(
    job: Job, graph: Graph | None = None, cluster: Cluster | None = None, *, purpose: Purpose = "train"
) -> Maker | ModuleMaker:
    """What makes plans for a job: from its graph, or from its module where it does not capture."""
    try:
        return Maker(job, graph if graph is not None else Graph.of(job, purpose=purpose), cluster)
    except CaptureError as error:
        return ModuleMaker(job, str(error))


class Maker:
    """Makes plans for one job: to predict, where its graph does."""

    def __init__(self, job: Job, graph: Graph, cluster: Cluster | None = None) -> None:
        self.job, self.graph, self._given = job, graph, cluster
        # Weights that are read from files are read in parts.
        state, whole = 0 if graph.predicts else state_bytes(job), job.weights is None
        self.pricer = Pricer(graph, replace(PROFILES["shardwise"], state=state, whole=whole))
        self._dims: dict[int, tuple[str, ...]] = {}
        self._groups: dict[int, list[tuple[str, ...]]] = {}
        self._here: dict[int, Cluster] = {}
        self._twins = twins(graph, self.pricer.blocks)

    def candidate(self, strategy: str, ranks: int) -> Candidate:
        """The plan of a strategy, or why it does not apply."""
        try:
            if ranks == 1:
                raise NotApplicable("one rank is not split")
            plan = self._hybrid(ranks) if strategy == "hybrid" else self.plan({strategy: ranks})
            self.split(plan)
        except (NotApplicable, PlanError) as error:
            return Candidate(strategy, None, str(error))
        return Candidate(strategy, plan, self.reason(plan))

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
        plan = plan.replica() if self.graph.predicts else plan
        check_fixed_batch(self.graph, plan)
        return Split(self.graph, plan, Mesh.build(plan.axes, rank=0))

    def one(self) -> Plan:
        """The plan for one rank."""
        return Plan(precision=self.job.precision, model=self.graph.fingerprint())

    def cluster(self, ranks: int) -> Cluster:
        """Where so many ranks run: what was given, as often as it takes, or this machine."""
        if self._given is not None and ranks <= self._given.ranks:
            return self._given
        if ranks not in self._here:
            self._here[ranks] = (
                here(ranks) if self._given is None else self._given.times(-(-ranks // self._given.ranks))
            )
        return self._here[ranks]

    def price(self, plan: Plan) -> Estimate:
        """What a plan costs."""
        return self.pricer.price(plan, self.cluster(plan.ranks), self.job.global_batch)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _check_batch(self, ranks: int) -> None:
        if self.graph.predicts:
            return  # a replica takes whole chunks
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
        found = self._groups_of(ranks)
        if not found:
            raise NotApplicable(f"{ranks} divides no dim of the model's operators with parameters")

        cluster, half = self.cluster(ranks), ranks // 2
        if cluster.nodes[0].devices <= half and half in self._dims and self._groups_of(half) == found:
            # Both leave the node: the same dims, over links of the same kind.
            self._dims[ranks] = self._dims[half]
            return self._dims[ranks]
        # Where no dim pays on these links, those are taken that would pay on links as fast as inside a node.
        for links in (cluster, cluster.with_links(10, instant=True)):
            chosen = choose_dims(found, self._costs("tensor", ranks, links))
            if chosen:
                self._dims[ranks] = chosen
                return chosen
        raise NotApplicable(f"splitting any dim over {ranks} ranks sends more than it saves")

    def sequence_dims(self, ranks: int) -> tuple[str, ...]:
        """The dims of sequences that a tensor axis of so many ranks can split."""
        found = self._groups_of(ranks)
        return tuple(d for group in found for d in group if all(n.startswith(SEQUENCE) for n in group))

    def expert_dims(self, ranks: int) -> tuple[str, ...]:
        """What an axis of so many ranks splits of the experts of a mixture, their number or their width, as is cheaper.

        What is no expert's is split by samples. None where there are no experts, or `ranks` divides neither.
        """
        dims = list(self.graph.dims())
        owners = {owner for dim in dims if dim.label == EXPERTS for owner in dim.owners}
        counts: list[str] = []
        widths: list[tuple[int, tuple[str, ...]]] = []
        for group in self._groups_of(ranks) if owners and self.graph.batch_dim is not None else ():
            members = [dim for dim in dims if any(fnmatchcase(dim.name, p) for p in group)]
            if any(dim.label == EXPERTS for dim in members):
                counts += group
            elif members and all(dim.owners and owners.issuperset(dim.owners) for dim in members):
                widths.append((members[0].size.coefficient, group))
        choices = [(*names, "batch") for names in (tuple(counts), max(widths, default=(0, ()))[1]) if names]
        cost = self._costs("expert", ranks, self.cluster(ranks))
        return min(choices, key=lambda those: sum(cost(those).values()), default=())

    def _groups_of(self, ranks: int) -> list[tuple[str, ...]]:
        if ranks not in self._groups:
            self._groups[ranks] = groups(self.graph, ranks, self._twins)
        return self._groups[ranks]

    def _costs(self, name: str, ranks: int, cluster: Cluster) -> Callable[[tuple[str, ...]], dict[str, float]]:
        """Seconds of computing and of sending, for dims that so many ranks split."""
        batch = self.job.global_batch
        if not self.graph.predicts:
            batch = max(1, batch * ranks // cluster.ranks)

        def cost(dims: tuple[str, ...]) -> dict[str, float]:
            seconds = self.pricer.seconds(Plan((PlanAxis(name, ranks, dims),)), cluster, batch)
            sent = sum(s for item, s in seconds.items() if item.startswith("communication"))
            return {"compute": sum(seconds.values()) - sent, "communication": sent}

        return cost

    def _pipelined(self, plan: Plan, axes: list[PlanAxis], ranks: int, data: int) -> Plan:
        plan = plan.with_(axes=tuple(axes), cuts=("-",) * (ranks - 1))
        samples = self.job.global_batch // (1 if self.graph.predicts else data)
        for micros in (*micro_batches(samples, ranks), 1):
            cut = self.cut(plan.with_(micro_batches=micros), ranks)
            try:
                self.split(cut)
            except PlanError:
                if micros > 1:
                    continue
                raise
            return cut
        raise AssertionError("one micro-batch is always tried")

    def cut(self, plan: Plan, ranks: int) -> Plan:
        """A plan with stages as equal as can be, in place of those that it has.

        Raises:
            NotApplicable: the model has too few operators.
        """
        cuts = best_cuts(self.pricer.case(plan, self.cluster(plan.ranks), self.job.global_batch), 1, math.inf)
        if cuts is None:
            raise NotApplicable(f"the model has fewer operators than {ranks} stages")
        return plan.with_(cuts=tuple(self.graph.ops[i].id for i in cuts))

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
                options.append((self.price(plan).step, len(options), plan))
            except (NotApplicable, PlanError) as error:
                refused.append(str(error))
        if not options:
            raise NotApplicable("; ".join(refused))
        return min(options)[2]

    def reason(self, plan: Plan) -> str:
        """What a plan splits, in words."""
        parts = []
        for axis in plan.axes:
            if axis.name == PIPELINE:
                micro = f"{plan.micro_batches} micro-batches" if plan.micro_batches > 1 else "one batch at a time"
                parts.append(f"{plan.stages} stages, {micro}")
            elif axis.dims == ("batch",) and self.graph.predicts:
                parts.append(f"chunks of {self.job.global_batch} samples to {axis.size} replicas")
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
