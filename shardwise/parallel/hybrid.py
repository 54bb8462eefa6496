"""Hybrid: the stages of one rank under any product of axes, with their parameters, ready to run micro-batches."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwise.errors import PlanError
from shardwise.graph.dims import BATCH
from shardwise.graph.graph import Graph
from shardwise.graph.rules import Value
from shardwise.parallel import lower
from shardwise.parallel.collectives import join, take
from shardwise.parallel.layout import PARTIAL, WHOLE, Cut, Layout, SplitAxis, State, States, check_axes
from shardwise.parallel.mesh import Axis, Mesh
from shardwise.parallel.micro import Early, combine, early_values, time_axis
from shardwise.parallel.pipeline import Crossing, Stage
from shardwise.parallel.program import Emitter, Program, attribute_name
from shardwise.parallel.schedule import stage_rank
from shardwise.parallel.sharded import FlatBucket, release, unshard
from shardwise.plan.plan import PIPELINE, Plan


@dataclass(frozen=True)
class Micro:
    """One micro-batch of a step: its samples over all ranks, and where they start among all samples of the step."""

    samples: int
    first: int
    total: int


class Split:
    """A graph, a plan and a mesh put together: what this rank's tensors look like.

    Raises:
        PlanError: the plan does not fit the graph.
    """

    def __init__(self, graph: Graph, plan: Plan, mesh: Mesh) -> None:
        self.graph, self.plan, self.mesh = graph, plan, mesh
        self.timed = plan.micro_batches > 1
        split_axes = [SplitAxis(a.name, a.size, a.dims) for a in plan.axes if a.name != PIPELINE]
        check_axes(graph, split_axes)
        self.axes: list[Axis | None] = [mesh[a.name] for a in split_axes]
        if self.timed:
            self.axes.insert(0, None)
            split_axes.insert(0, time_axis(plan.micro_batches))
        self.layout = Layout(graph, split_axes)
        self.early: list[Early] = (
            early_values(graph, self.layout, exact_batch_norm=plan.batch_norm == "exact") if self.timed else []
        )
        self.pipeline = mesh[PIPELINE] if PIPELINE in mesh else None
        self.bounds = stage_bounds(graph, plan)
        rank = self.pipeline.rank if self.pipeline else 0
        ranks = self.pipeline.size if self.pipeline else 1
        self.mine = [s for s in range(plan.stages) if stage_rank(s, ranks) == rank]
        self.stage_of = {op: s for s, (lo, hi) in enumerate(self.bounds) for op in graph.ops[lo:hi]}

    # -- samples -----------------------------------------------------------------------------------------------------

    def micros(self, total: int) -> list[Micro]:
        """The micro-batches of a step of `total` samples."""
        count = self.plan.micro_batches
        return [Micro(lower.chunk(total, count, m), lower.chunk_start(total, count, m), total) for m in range(count)]

    def chain(self, states: Sequence[State], cut: Cut) -> list[tuple[int, int]]:
        """The mesh cuts of one leaf, outermost first."""
        return [(x.size, x.rank) for x, s in zip(self.axes, states, strict=True) if x is not None and s == cut]

    def rows(self, value: Value, micro: Micro) -> tuple[int, int]:
        """Which samples of the step this rank needs of a batch tensor, for one micro-batch."""
        chain = self.chain(self.layout.states[value], Cut(0, 0))
        start = micro.first + lower.local_start(micro.samples, chain)
        return start, start + lower.local_count(micro.samples, chain)

    def local_shape(self, value: Value, states: States, samples: int) -> tuple[int, ...]:
        """The shape of a tensor on this rank, for a micro-batch of `samples` over all ranks."""
        found = []
        for pos, dim in enumerate(value.dims):
            size = 1
            for k, leaf in enumerate(dim.leaves()):
                chain = self.chain(states, Cut(pos, k))
                if leaf.size == BATCH:
                    size *= lower.local_count(samples, chain)
                    continue
                part = leaf.size.at(samples)
                for parts, _ in chain:
                    part //= parts
                size *= part
            found.append(size)
        return tuple(found)

    def lead(self, value: Value, cut: Cut, states: Sequence[State], samples: int) -> int:
        """The size on this rank of what lies before a leaf in its position."""
        total = 1
        for k, leaf in enumerate(value.dims[cut.pos].leaves()[: cut.leaf]):
            chain = self.chain(states, Cut(cut.pos, k))
            if leaf.size == BATCH:
                total *= lower.local_count(samples, chain)
            else:
                part = leaf.size.at(samples)
                for parts, _ in chain:
                    part //= parts
                total *= part
        return total

    # -- parameters --------------------------------------------------------------------------------------------------

    def shard(self, value: Value, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter."""
        local = whole
        for a, (axis, cut, sizes) in self._cuts(value):
            local = take(local, axis, cut.pos, self._param_lead(value, cut, a), sizes)
        return local.contiguous()

    def unshard(self, value: Value, local: Tensor) -> Tensor:
        """The whole parameter from the parts of all ranks."""
        whole = local
        for a, (axis, cut, sizes) in reversed(self._cuts(value)):
            whole = join(whole, axis, cut.pos, self._param_lead(value, cut, a), sizes)
        return whole

    def _cuts(self, value: Value) -> list[tuple[int, tuple[Axis, Cut, list[int]]]]:
        found = []
        states = self.layout.states[value]
        for a, (axis, state) in enumerate(zip(self.axes, states, strict=True)):
            if axis is None or not isinstance(state, Cut):
                continue
            leaf = value.dims[state.pos].leaves()[state.leaf].size.coefficient
            for b in range(a):
                outer = self.axes[b]
                if outer is not None and states[b] == state:
                    leaf //= outer.size
            found.append((a, (axis, state, [leaf // axis.size] * axis.size)))
        return found

    def _param_lead(self, value: Value, cut: Cut, a: int) -> int:
        """As `lead`, with only the axes before `a` cutting."""
        states = self.layout.states[value]
        return self.lead(value, cut, [s if b < a else WHOLE for b, s in enumerate(states)], 1)

    def sums(self, value: Value) -> tuple[Axis, ...]:
        """The mesh axes over which a parameter's gradient is to be summed."""
        return tuple(x for a in self.layout.grad_axes(value) if (x := self.axes[a]) is not None)

    def copies(self, value: Value) -> int:
        """How many ranks of one stage hold the same entries of a parameter."""
        total = 1
        for axis, state in zip(self.axes, self.layout.states[value], strict=True):
            if axis is not None and not isinstance(state, Cut):
                total *= axis.size
        return total

    # -- stages ------------------------------------------------------------------------------------------------------

    def crossings(self, cut: int) -> list[Value]:
        """What is carried over the cut behind stage `cut`, in order of execution."""
        found: dict[Value, None] = {}
        for op in self.graph.ops:
            if self.stage_of[op] <= cut:
                continue
            for value in op.inputs:
                if value in self._producer and self.stage_of[self._producer[value]] <= cut:
                    found[value] = None
        loss = self.graph.value(self.graph.loss)
        if loss is not None and self.stage_of[self._producer[loss]] <= cut:
            found[loss] = None
        return sorted(found, key=lambda v: self._producer[v].index)

    @property
    def _producer(self) -> Mapping[Value, Any]:
        if not hasattr(self, "_producers"):
            self._producers = {v: op for op in self.graph.ops for v in op.outputs if v in self.graph.learned}
        return self._producers

    def stage_params(self, stage: int) -> list[str]:
        """Names of the parameters that a stage's operators use, in order of use."""
        names = {v: n for n, v in self.graph.params.items()}
        found: dict[str, None] = {}
        for op in self.graph.ops:
            if self.stage_of[op] == stage:
                for value in op.inputs:
                    if value in names:
                        found[names[value]] = None
        return list(found)


def stage_bounds(graph: Graph, plan: Plan) -> list[tuple[int, int]]:
    """The operators of each stage, as a range of indices.

    Raises:
        PlanError: a cut names no operator of the graph, or the cuts are out of order.
    """
    at = {op.id: op.index for op in graph.ops}
    missing = [cut for cut in plan.cuts if cut not in at]
    if missing:
        raise PlanError(
            f"the plan cuts before {missing[0]!r}, but the model has no such operator; the plan is for another model"
        )
    starts = [0, *(at[cut] for cut in plan.cuts)]
    if sorted(set(starts)) != starts:
        raise PlanError(f"cuts must be in order of execution, but are at operators {starts[1:]}")
    return list(zip(starts, [*starts[1:], len(graph.ops)], strict=True))


class RankModel:
    """The programs of this rank's stages, with local parameters and buffers.

    Attributes:
        params: local parameters by the user's names, in order of use.
        buffers: whole buffers by the user's names.
    """

    def __init__(
        self,
        split: Split,
        module: nn.Module,
        device: torch.device,
        *,
        dtypes: dict[torch.dtype, torch.dtype] | None = None,
        autocast: bool = False,
    ) -> None:
        self.split, self.device, self.autocast = split, device, autocast
        self._dtypes = dtypes or {}
        graph, layout = split.graph, split.layout
        self._nodes = {n.name: v[0] for n, v in graph.values.items() if n.op == "placeholder"}
        self.preludes = self._early_programs()
        self.programs = {s: self._stage_program(s) for s in split.mine}
        named = dict(module.named_parameters(remove_duplicate=False))
        self.params: dict[str, nn.Parameter] = {}
        for program in self.programs.values():
            for name in program.params:
                if name not in self.params:
                    source = named[name]
                    local = split.shard(graph.params[name], source.detach()).to(device).clone()
                    self.params[name] = nn.Parameter(local, requires_grad=source.requires_grad)
        everything = dict(module.named_buffers(remove_duplicate=False))
        used = {n for p in [*self.programs.values(), *self.preludes] for n in p.buffers}
        self.buffers = {n: everything[n].detach().to(device).clone() for n in everything if n in used}
        self.key = 0
        self.bind()
        self._micros: list[Micro] = []
        self._tensors: dict[str, Tensor] = {}
        self._rows: dict[str, list[tuple[int, int]]] = {}
        self._given: dict[str, Tensor] = {}
        assert layout is split.layout

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of the captured graph has here."""
        return self._dtypes.get(dtype, dtype)

    def bind(self) -> None:
        """Give the programs this rank's parameters and buffers."""
        for program in [*self.programs.values(), *self.preludes]:
            for name in program.params:
                setattr(program.module, attribute_name(name), self.params[name])
            for name in program.buffers:
                setattr(program.module, attribute_name(name), self.buffers[name])

    def gather_buckets(self, buckets: Sequence[FlatBucket]) -> None:
        """ZeRO-3: programs gather a bucket's parameters before their first use and let go of them after their last."""
        for program in self.programs.values():
            for i, bucket in enumerate(buckets):
                if gather_in(program.module, bucket, f"bucket_{i}"):
                    program.params = [n for n in program.params if n not in bucket.names]
            program.module.recompile()
        for bucket in buckets:
            for name in bucket.names:
                del self.params[name]

    # -- programs ----------------------------------------------------------------------------------------------------

    def _emitter(self, given: dict[Value, States]) -> Emitter:
        split = self.split
        return Emitter(
            split.graph, split.layout, split.axes, self.device, given, self._dtypes,
            per_micro_batch=split.plan.batch_norm != "exact", recompute=split.plan.recompute,
            exact_dropout=split.plan.dropout == "exact",
        )  # fmt: skip

    def _early_programs(self) -> list[Program]:
        given: dict[Value, States] = {}
        found = []
        states = self.split.layout.states
        batch_free = [op for op in self.split.graph.ops if not any(v in self.split.graph.learned for v in op.outputs)]
        for early in self.split.early:
            target = tuple(
                (WHOLE if isinstance(s, Cut) and early.joins is not None else s) if axis is not None else s
                for s, axis in zip(states[early.value], self.split.axes, strict=True)
            )
            found.append(self._emitter(dict(given)).build(batch_free, [(early.value, target)]))
            given[early.value] = (WHOLE, *target[1:])
        self._early_states = given
        return found

    def _stage_program(self, stage: int) -> Program:
        split, graph = self.split, self.split.graph
        states = split.layout.states
        given = dict(self._early_states)
        if stage:
            given.update({v: states[v] for v in split.crossings(stage - 1)})
        ops = [op for op in graph.ops if split.stage_of[op] == stage or not any(v in graph.learned for v in op.outputs)]
        outputs = [(v, states[v]) for v in self._gives(stage) if v not in given]
        loss = graph.value(graph.loss)
        assert loss is not None
        if stage == split.plan.stages - 1:
            outputs.append((loss, tuple(PARTIAL if axis is None else WHOLE for axis in split.axes)))
        for value in self._updated().values():
            if split.stage_of[split._producer.get(value) or self._any_producer(value)] == stage:
                outputs.append((value, (WHOLE,) * len(split.axes)))
        return self._emitter(given).build(ops, outputs)

    def _any_producer(self, value: Value) -> Any:
        return next(op for op in self.split.graph.ops if value in op.outputs)

    def _updated(self) -> dict[str, Value]:
        """Buffer name to the tensor that replaces it."""
        captured = self.split.graph.captured
        outs = captured.graph.output_node().args[0][1:]  # type: ignore[index]
        found = {}
        for name, node in zip(captured.updates, outs, strict=True):  # type: ignore[arg-type]
            value = self.split.graph.value(node)  # type: ignore[arg-type]
            if value is not None and node.op != "placeholder":  # type: ignore[union-attr]
                found[name] = value
        return found

    def _gives(self, stage: int) -> list[Value]:
        return self.split.crossings(stage) if stage < self.split.plan.stages - 1 else []

    # -- running -----------------------------------------------------------------------------------------------------

    def start(self, tensors: Mapping[str, Tensor], total: int, key: int) -> int:
        """Take the tensors of a step: this rank's samples of each, over all micro-batches. Returns the micro-batches."""
        self._micros = self.split.micros(total)
        self._tensors = dict(tensors)
        self.key = key
        self._rows = {}
        for name in tensors:
            at, rows = 0, []
            for micro in self._micros:
                start, stop = self.split.rows(self._nodes[name], micro)
                rows.append((at, at + stop - start))
                at += stop - start
            self._rows[name] = rows
        self._given = {}
        with torch.no_grad():
            for early, prelude in zip(self.split.early, self.preludes, strict=True):
                parts = [self._call(prelude, m, {})[0] for m in range(len(self._micros))]
                leads = [self._early_lead(early, m) for m in range(len(self._micros))]
                self._given[early.value.name] = combine(early, parts, leads, [m.samples for m in self._micros])
        return len(self._micros)

    def _early_lead(self, early: Early, m: int) -> int:
        if early.joins is None:
            return 1
        return self.split.lead(early.value, early.joins, (WHOLE,) * len(self.split.axes), self._micros[m].samples)

    def _call(self, program: Program, m: int, received: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        args = []
        for name in program.inputs:
            if name in received:
                args.append(received[name])
            elif name in self._given:
                args.append(self._given[name])
            else:
                tensor = self._tensors[name]
                value = self._nodes[name]
                if value.ndim and value.sizes[0] == BATCH:
                    start, stop = self._rows[name][m]
                    tensor = tensor[start:stop]
                args.append(tensor)
        micro = self._micros[m]
        context: Any = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            result: tuple[Tensor, ...] = program.module(micro.samples, micro.total, micro.first, self.key, *args)
        return result

    def run(self, stage: int, m: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stage's forward pass on one micro-batch; what goes on by name, and the loss at the end as `loss`."""
        program = self.programs[stage]
        outs = dict(zip(program.outputs, self._call(program, m, received), strict=True))
        for name, value in self._updated().items():
            if value.name in outs and name in self.buffers:
                with torch.no_grad():
                    self.buffers[name].copy_(outs[value.name])
        if stage == self.split.plan.stages - 1:
            loss = self.split.graph.value(self.split.graph.loss)
            assert loss is not None
            return {"loss": outs[loss.name]}
        return {v.name: outs[v.name] if v.name in outs else received[v.name] for v in self._gives(stage)}

    def stages(self) -> list[Stage]:
        """The stages of this rank, for `Pipeline`."""
        return [
            Stage(
                s,
                lambda m, received, s=s: self.run(s, m, received),  # type: ignore[misc]
                [self._crossing(v) for v in self.split.crossings(s - 1)] if s else [],
                [self._crossing(v) for v in self._gives(s)],
                [self.params[n] for n in self.programs[s].params if self.params[n].requires_grad],
            )
            for s in self.split.mine
        ]

    def _crossing(self, value: Value) -> Crossing:
        states = self.split.layout.states[value]
        return Crossing(
            value.name,
            lambda m: self.split.local_shape(value, states, self._micros[m].samples),
            self._dtypes.get(value.dtype, value.dtype),
            value in self.split.graph.needs_grad,
        )


def gather_in(module: fx.GraphModule, bucket: FlatBucket, attribute: str) -> bool:
    """Make a program gather a bucket; whether it uses any of its parameters."""
    graph = module.graph
    names = {attribute_name(n): i for i, n in enumerate(bucket.names)}
    uses = [n for n in graph.nodes if n.op == "get_attr" and n.target in names]
    if not uses:
        return False
    setattr(module, attribute, bucket)
    with graph.inserting_before(uses[0]):
        holder = graph.get_attr(attribute)
        gathered = graph.call_function(unshard, (holder,))
        items = {i: graph.call_function(operator.getitem, (gathered, i)) for i in {names[n.target] for n in uses}}
    users = {user for node in uses for user in node.users}
    for node in uses:
        node.replace_all_uses_with(items[names[node.target]])
        graph.erase_node(node)
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
    last = [n for n in graph.nodes if n in users][-1]
    with graph.inserting_after(last):
        graph.call_function(release, (holder,))
    return True


def check_fixed_batch(graph: Graph, plan: Plan) -> None:
    """Refuse to cut the batch of a model that was written for one batch size.

    Raises:
        PlanError: the plan cuts the batch, but the model fixes it.
    """
    if graph.captured.fixed_batch is not None and (plan.data or plan.micro_batches > 1):
        raise PlanError(
            f"the model fixes its batch at {graph.captured.fixed_batch} samples (a size was turned into a plain number), "
            "so the batch cannot be cut; write the model with tensor.shape[0] in place of len(tensor)"
        )
