"""Estimate: what a plan costs on a cluster, by item: seconds of a step, and bytes of every stage's fullest rank.

Pure: it runs nothing. Sizes, operations and messages come from the captured graph of the very model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardwise.cost.kernels import Kernels
from shardwise.cost.profile import PROFILES, Profile
from shardwise.cost.timeline import pipeline_seconds
from shardwise.cost.work import ATTENTION, Message, Task, Work
from shardwise.errors import PlanError
from shardwise.graph.blocks import blocks
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.graph.saved import Saved, saved
from shardwise.machine.cluster import Cluster, Route
from shardwise.machine.device import Device
from shardwise.parallel.hybrid import stage_bounds
from shardwise.parallel.layout import SplitAxis
from shardwise.parallel.recompute import block_of
from shardwise.parallel.schedule import stage_rank
from shardwise.plan.plan import PIPELINE, Plan


@dataclass(frozen=True)
class Estimate:
    """What a plan costs.

    Attributes:
        seconds: of a step, by item: "compute", "overhead" (the host keeps the device waiting), "communication AXIS" of
            each axis (what nothing hides), "bubble", "update".
        hidden: seconds of communication behind computing, by axis.
        ranks: bytes of each pipeline rank, by item: "parameters", "gradients", "optimizer", "activations", "buffers",
            "reserve".
        limit: bytes that the smallest device of the cluster has.
    """

    seconds: Mapping[str, float]
    hidden: Mapping[str, float]
    ranks: tuple[Mapping[str, float], ...]
    limit: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def memory(self) -> Mapping[str, float]:
        """Bytes of the fullest rank, by item."""
        return max(self.ranks, key=lambda items: sum(items.values()))

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.peak <= self.limit


@dataclass
class _Stage:
    """What one stage takes for one micro-batch."""

    forward: float = 0.0
    backward: float = 0.0
    host_forward: float = 0.0
    host_backward: float = 0.0
    sent_forward: dict[str, float] = field(default_factory=dict)
    sent_backward: dict[str, float] = field(default_factory=dict)
    again: float = 0.0
    kept: float = 0.0
    largest: float = 0.0
    inside: dict[str, float] = field(default_factory=dict)
    weights: float = 0.0
    weight_bytes: float = 0.0


_Timed = tuple[Task, tuple[float, float]]


class Pricer:
    """Prices plans of one graph.

    Args:
        graph: the captured model.
        profile: the framework that runs the plans.
    """

    def __init__(self, graph: Graph, profile: Profile | None = None) -> None:
        self.graph = graph
        self.profile = profile or PROFILES["shardwise"]
        self._works: dict[tuple[SplitAxis, ...], Work] = {}
        self._timed: dict[object, list[_Timed]] = {}
        self._kept: dict[object, list[float]] = {}

    def price(self, plan: Plan, cluster: Cluster, batch: int, *, selective: bool = False) -> Estimate:
        """What a plan costs on a cluster.

        Args:
            plan: how the model is split.
            cluster: the machines; ranks are placed in the order of its nodes.
            batch: samples of a step.
            selective: whether attention is computed again in backward.

        Raises:
            PlanError: the plan is for another graph, or needs more ranks than the cluster has.
        """
        if plan.ranks > cluster.ranks:
            raise PlanError(
                f"the plan needs {plan.ranks} ranks, but cluster {cluster.name} has {cluster.ranks}; "
                "give a larger cluster, or a plan for fewer ranks"
            )
        return _Price(self, plan, cluster, batch, selective).estimate()

    @cached_property
    def copies(self) -> int:
        """How many alike layers the model has."""
        return max((block.count for block in blocks(self.graph)), default=1)

    @cached_property
    def saved(self) -> Mapping[Op, Saved]:
        """What operators keep for backward."""
        return saved(self.graph)

    def work(self, axes: Sequence[SplitAxis]) -> Work:
        """What operators do under these axes."""
        key = tuple(axes)
        if key not in self._works:
            p = self.profile
            self._works[key] = Work(self.graph, key, self.saved, fused=p.fused, prepared=p.prepared)
        return self._works[key]

    def timed(self, work: Work, samples: int, device: Device) -> list[_Timed]:
        """Each operator with its seconds forward and backward."""
        key = (work.axes, samples, device.name)
        if key not in self._timed:
            kernels = Kernels(device, flash=self.profile.flash, passes=self.profile.passes)
            self._timed[key] = [(t, (kernels.forward(t), kernels.backward(t))) for t in work.tasks(samples)]
        return self._timed[key]

    def kept(self, work: Work, samples: int) -> list[float]:
        """Bytes that each operator is the first to keep for backward."""
        key = (work.axes, samples)
        if key not in self._kept:
            self._kept[key] = work.kept(samples, flash=self.profile.flash)
        return self._kept[key]


class _Price:
    def __init__(self, pricer: Pricer, plan: Plan, cluster: Cluster, batch: int, selective: bool) -> None:
        self.pricer, self.plan, self.cluster, self.selective = pricer, plan, cluster, selective
        self.graph, self.profile = pricer.graph, pricer.profile
        inner = [SplitAxis(a.name, a.size, a.dims) for a in plan.axes if a.name != PIPELINE and a.dims != ("batch",)]
        self.work = pricer.work(inner)
        self.data = math.prod(a.size for a in plan.axes if a.dims == ("batch",))
        self.samples = max(1, math.ceil(batch / (plan.micro_batches * self.data)))
        self.device = min((n.device for n in self.cluster.nodes), key=lambda d: d.peak("bf16"))

    @property
    def _memory_rate(self) -> float:
        return self.device.bandwidth.value * self.device.reached.value

    def _accumulates(self) -> float:
        """In which share of micro-batches a gradient is added to one that is there."""
        return 1 - 1 / self.plan.micro_batches

    # -- routes ------------------------------------------------------------------------------------------------------

    @cached_property
    def routes(self) -> Mapping[str, Route]:
        """What each axis sends over; the batch axes together are "data"."""
        sizes = [a.size for a in self.plan.axes]
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        found = {}
        for axis, stride in zip(self.plan.axes, strides, strict=True):
            found[axis.name] = self.cluster.path([stride * i for i in range(axis.size)])
        batch = [(a.size, s) for a, s in zip(self.plan.axes, strides, strict=True) if a.dims == ("batch",)]
        members = [0]
        for size, stride in batch:
            members = [m + stride * i for m in members for i in range(size)]
        found["data"] = self.cluster.path(members)
        return found

    # -- stages ------------------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[_Stage]:
        tasks = self.pricer.timed(self.work, self.samples, self.device)
        kept = self.pricer.kept(self.work, self.samples)
        found = []
        names = {v: n for n, v in self.graph.params.items()}
        for low, high in stage_bounds(self.graph, self.plan):
            stage = _Stage()
            used: dict[str, float] = {}
            entered: set[tuple[str, Value]] = set()
            for i in range(low, high):
                task, times = tasks[i]
                block = self._block(task.op)
                again = bool(block) or (task.kind == ATTENTION and self.selective)
                self._add(stage, task, times, again)
                if block:
                    stage.inside[block] = stage.inside.get(block, 0.0) + kept[i]
                    stage.kept += self._enters(block, task.op, entered)
                elif not again:
                    stage.kept += kept[i]
                for value in task.op.inputs:
                    if value in names:
                        used[names[value]] = self.work.weights[names[value]]
            stage.weights = sum(used.values())
            stage.backward += (
                stage.weights * self.profile.accumulate * self._accumulates() * self.profile.passes / self._memory_rate
            )
            stage.weight_bytes = sum(
                n * (self.profile.weight or self.graph.params[name].dtype.itemsize) for name, n in used.items()
            )
            found.append(stage)
        return found

    def _add(self, stage: _Stage, task: Task, times: tuple[float, float], again: bool) -> None:
        forward, backward = times
        call = self.profile.call
        stage.forward += forward
        stage.backward += backward
        stage.host_forward += call * task.calls
        stage.host_backward += call * task.calls * (min(task.gradients, 2) + again)
        stage.again += forward * again
        sent = [(stage.sent_forward, task.forward), (stage.sent_backward, task.backward)]
        if again:
            sent.append((stage.sent_backward, task.forward))
        for total, messages in sent:
            for message in messages:
                total[message.axis] = total.get(message.axis, 0.0) + self._seconds(message)
        out = sum(self.work.local_bytes(v, self.samples) for v in task.op.outputs if v in self.graph.needs_grad)
        stage.largest = max(stage.largest, 2 * out)

    def _block(self, op: Op) -> str:
        """The block that an operator is computed again with; empty for none."""
        return block_of(op.module, self.plan.recompute) if self.plan.recompute else ""

    def _enters(self, block: str, op: Op, entered: set[tuple[str, Value]]) -> float:
        """Bytes of what a block is given and keeps, as far as this operator is the first to need it."""
        total = 0.0
        for value in op.inputs:
            producer = self.graph.producer.get(value)
            inside = producer is not None and self._block(producer) == block
            if inside or value not in self.graph.learned or producer is None or (block, value) in entered:
                continue
            entered.add((block, value))
            total += self.work.local_bytes(value, self.samples)
        return total

    def _seconds(self, message: Message) -> float:
        return self.routes[message.axis].seconds(message.kind, message.size)

    # -- time --------------------------------------------------------------------------------------------------------

    def estimate(self) -> Estimate:
        p, plan = self.profile, self.plan
        micros, size = plan.micro_batches, plan.pipeline
        shown = 1.0 - p.overlap_tensor
        forward, backward, pure = [], [], []
        sent: dict[str, float] = {}
        hidden: dict[str, float] = {}
        waits = 0.0
        gathers = self._gathers()
        for i, stage in enumerate(self.stages):
            tf, tb = sum(stage.sent_forward.values()) * shown, sum(stage.sent_backward.values()) * shown
            f, b = stage.forward, stage.backward + stage.again
            host_f, host_b = max(0.0, stage.host_forward - f - tf), max(0.0, stage.host_backward - b - tb)
            gather = gathers[i]
            gf = max(0.0, gather - p.overlap_gather * f)
            gb = max(0.0, 2 * gather - p.overlap_gather * b)
            forward.append(f + tf + host_f + gf)
            backward.append(b + tb + host_b + gb)
            pure.append(f + b)
            waits += (host_f + host_b) * micros / size
            for axis in stage.sent_forward.keys() | stage.sent_backward.keys():
                both = stage.sent_forward.get(axis, 0.0) + stage.sent_backward.get(axis, 0.0)
                sent[axis] = sent.get(axis, 0.0) + both * shown * micros / size
                hidden[axis] = hidden.get(axis, 0.0) + both * (1 - shown) * micros / size
            if gather:
                sent["data"] = sent.get("data", 0.0) + (gf + gb) * micros / size
        total = pipeline_seconds(plan.schedule, size, micros, forward, backward, self._send())
        compute = sum(pure) * micros / size
        reduction, behind = self._reduction(backward)
        sent["data"] = sent.get("data", 0.0) + reduction
        hidden["data"] = hidden.get("data", 0.0) + behind
        bubble = total - compute - waits - sum(v for k, v in sent.items()) + reduction
        seconds = {"compute": compute, "overhead": waits}
        seconds |= {f"communication {axis}": s for axis, s in sent.items() if s}
        seconds |= {"bubble": max(bubble, 0.0) if size > 1 else 0.0, "update": self._update()}
        ranks = tuple(self._rank_memory(rank) for rank in range(plan.pipeline))
        limit = min(node.device.memory.value for node in self.cluster.nodes)
        return Estimate(seconds, {k: v for k, v in hidden.items() if v}, ranks, limit)

    def _send(self) -> float:
        """Seconds to carry one micro-batch over a cut between neighbours."""
        if self.plan.pipeline == 1:
            return 0.0
        sizes = [a.size for a in self.plan.axes]
        at = next(i for i, a in enumerate(self.plan.axes) if a.name == PIPELINE)
        stride = math.prod(sizes[at + 1 :])
        route = self.cluster.path([0, stride])
        return max((route.seconds("send", size) for size in self._crossing), default=0.0)

    @cached_property
    def _crossing(self) -> list[float]:
        """Bytes that each cut carries for one micro-batch."""
        found = []
        last = {v: op.index for op in self.graph.ops for v in op.inputs}
        for low, _ in stage_bounds(self.graph, self.plan)[1:]:
            live = (
                v for v, op in self.graph.producer.items()
                if op.index < low <= last.get(v, -1) and v in self.graph.learned
            )  # fmt: skip
            found.append(sum(self.work.local_bytes(v, self.samples) for v in live))
        return found

    def _rank_stages(self, rank: int) -> list[_Stage]:
        return [s for i, s in enumerate(self.stages) if stage_rank(i, self.plan.pipeline) == rank]

    def _gathers(self) -> list[float]:
        """Seconds to gather each stage's weights once, where they are sharded."""
        if self.plan.zero < 3 or self.data == 1:
            return [0.0] * len(self.stages)
        each = [s.weights * self.profile.send_gradient for s in self.stages]  # they travel in the dtype of gradients
        return [self.routes["data"].seconds("all_gather", size) for size in each]

    def _reduction(self, backward: Sequence[float]) -> tuple[float, float]:
        """Seconds of summing gradients that nothing hides, and those that backward hides, on the slowest rank."""
        if self.data == 1:
            return 0.0, 0.0
        route, p = self.routes["data"], self.profile
        worst = (0.0, 0.0)
        for rank in range(self.plan.pipeline):
            weights = sum(s.weights for s in self._rank_stages(rank))
            grads = weights * p.send_gradient
            if self.plan.zero == 0:
                time = route.seconds("all_reduce", grads)
            else:
                time = route.seconds("reduce_scatter", grads)
                if self.plan.zero < 3:
                    time += route.seconds("all_gather", sum(s.weight_bytes for s in self._rank_stages(rank)))
            last = sum(b for i, b in enumerate(backward) if stage_rank(i, self.plan.pipeline) == rank)
            behind = min(time, p.overlap_data * last)
            worst = max(worst, (time - behind, behind))
        return worst

    def _shards(self, from_stage: int) -> int:
        return self.data if self.plan.zero >= from_stage else 1

    def _update(self) -> float:
        """Seconds of the optimizer on the rank with most weights."""
        weights = max(sum(s.weights for s in self._rank_stages(r)) for r in range(self.plan.pipeline))
        p = self.profile
        moved = weights / self._shards(1) * (2 * p.state + p.gradient + 4)
        return moved / self._memory_rate

    # -- memory ------------------------------------------------------------------------------------------------------

    def _rank_memory(self, rank: int) -> dict[str, float]:
        p, plan = self.profile, self.plan
        stages = self._rank_stages(rank)
        weights = sum(s.weights for s in stages)
        flight = self._in_flight(rank)
        kept = sum(s.kept for s in stages) * flight / max(len(stages), 1)
        largest = max((s.largest for s in stages), default=0.0)
        # While a block is computed again, what it keeps is there; gathered weights are those of two blocks.
        inside = max((size for s in stages for size in s.inside.values()), default=0.0)
        gathered = 2 * weights * 4 / self.pricer.copies if plan.zero == 3 and self.data > 1 else 0.0
        found = {
            "parameters": sum(s.weight_bytes for s in stages) / self._shards(3),
            "gradients": weights * p.gradient / self._shards(2),
            "optimizer": weights * p.state / self._shards(1),
            "activations": kept + inside + largest,
            "buffers": p.fixed + gathered,
        }
        return {**found, "reserve": p.reserve * sum(found.values())}

    def _in_flight(self, rank: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at most, over all its stages."""
        plan = self.plan
        per_rank = plan.stages // plan.pipeline
        if plan.schedule == "gpipe":
            return plan.micro_batches * per_rank
        if per_rank == 1:
            return min(plan.micro_batches, plan.pipeline - rank)
        ahead = (per_rank - 1) * plan.pipeline + 2 * (plan.pipeline - rank - 1) + 1
        return min(plan.micro_batches * per_rank, ahead)
