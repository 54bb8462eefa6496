"""The stages of one rank as programs, with their parameters and buffers, ready to run micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.graph.dims import BATCH
from shardwise.graph.rules import Value
from shardwise.parallel.collectives import all_reduce_
from shardwise.parallel.defer import defer_weights
from shardwise.parallel.hand_out import hand_out
from shardwise.parallel.hybrid import Micro, Split
from shardwise.parallel.layout import PARTIAL, WHOLE, Cut, States
from shardwise.parallel.mesh import Axis
from shardwise.parallel.micro import Early, combine
from shardwise.parallel.pipeline import Crossing, Stage
from shardwise.parallel.program import Emitter, Program, attribute_name
from shardwise.parallel.recompute import in_segments
from shardwise.parallel.reuse import overwrite
from shardwise.parallel.sharded import FlatBucket, gather_in
from shardwise.parallel.state import travelling, unlike
from shardwise.weights.files import Ranges, count, within
from shardwise.weights.fill import Weights
from shardwise.weights.int8 import quantize


class RankModel:
    """The programs of this rank's stages, with local parameters and buffers.

    With `int8`, the parameters that it names are held in int8, with a scale for each entry of the dims that it gives.

    Attributes:
        params: local parameters by the user's names, in order of use.
        buffers: whole buffers by the user's names.
        updated: for each buffer that the model changes, the tensor that replaces it.
        travels: buffers that one rank of a pipeline makes anew and another reads, with the place of the one.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device,
        *,
        dtypes: dict[torch.dtype, torch.dtype] | None = None,
        autocast: bool = False,
        int8: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.split, self.device, self.autocast = split, device, autocast
        self._int8 = int8 or {}
        self._dtypes = dtypes or {}
        self._weights: Weights | None = None
        self._ranges: dict[str, list[Ranges]] = {}
        self.params: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self._renewed: dict[str, Tensor] = {}
        self._renews: dict[int, list[str]] = {}
        self.updated = self._updated()
        self.travels = travelling(split, self.updated)
        self._nodes = {n.name: v[0] for n, v in split.graph.values.items() if n.op == "placeholder"}
        self.preludes = self._early_programs()
        self.programs = {s: self._stage_program(s) for s in split.mine}
        self.key = 0
        self._micros: list[Micro] = []
        self._tensors: dict[str, Tensor] = {}
        self._rows: dict[str, list[tuple[int, int]]] = {}
        self._given: dict[str, Tensor] = {}

    @classmethod
    def like(cls, other: RankModel, split: Split) -> RankModel:
        """A model on the same device and in the same precision, for another graph; without parameters as yet."""
        return cls(split, other.device, dtypes=other._dtypes, autocast=other.autocast, int8=other._int8)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of the captured graph has here."""
        return self._dtypes.get(dtype, dtype)

    @property
    def used(self) -> list[str]:
        """Names of the parameters that this rank's programs have as their own, in order of use."""
        return list(dict.fromkeys(name for program in self.programs.values() for name in program.params))

    @property
    def used_buffers(self) -> list[str]:
        """Names of the buffers that this rank's programs read or make anew."""
        read = [n for p in [*self.programs.values(), *self.preludes] for n in p.buffers]
        made = [
            n for n, v in self.updated.items() if self.split.stage_of[self.split.graph.producer[v]] in self.programs
        ]
        return list(dict.fromkeys([*read, *made, *self.travels]))

    def load(
        self, module: nn.Module, *, frees: bool = False, weights: Weights | None = None, later: bool = False
    ) -> None:
        """Take this rank's part of the parameters, and the buffers, of a whole module; or of files.

        Args:
            module: whole, but for parameters on `meta` where there are weights.
            frees: lets go of the module's own parameters one by one, but for their shapes.
            weights: reads this rank's part of the parameters, and nothing else of them.
            later: leaves the parameters on `meta`; `fill` and `entries` read them.
        """
        named = dict(module.named_parameters(remove_duplicate=False))
        if weights is not None:
            self._load_parts(named, weights)
        else:
            self._cut_parts(named, frees)
        used = self.used_buffers
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in used and name not in self.split.graph.state:
                self.buffers[name] = buffer.detach().to(self.device).clone()
        self.buffers.update((name, torch.empty(0)) for name in self.split.graph.state if name in used)
        if weights is not None and not later:
            for name in self.used:
                self.fill(name)
        self.bind()

    def _cut_parts(self, named: Mapping[str, nn.Parameter], frees: bool) -> None:
        left = Counter(named[name] for name in self.used)
        for param in {named[name] for name in self.split.graph.params} if frees else ():
            if not left[param]:
                let_go(param)
        # The smallest first, so that a part is made when little else is there besides the whole model.
        for name in sorted(self.used, key=lambda name: named[name].numel()):
            param = named[name]
            local = self.split.shard(self.split.graph.params[name], param.detach()).to(self.device).clone()
            self.params[name] = self._held(name, local, param.requires_grad)
            left[param] -= 1
            if frees and not left[param]:
                let_go(param)
        self.params = {name: self.params[name] for name in self.used}

    def _load_parts(self, named: Mapping[str, nn.Parameter], weights: Weights) -> None:
        self._weights = weights
        for name in self.used:
            param = named[name]
            self._ranges[name] = self.split.ranges(self.split.graph.params[name], param.shape)
            local = torch.empty([count(dim) for dim in self._ranges[name]], dtype=param.dtype, device="meta")
            self.params[name] = nn.Parameter(local, requires_grad=param.requires_grad)

    def fill(self, name: str) -> nn.Parameter:
        """This rank's part of a parameter, read now if it has not been; `bind` gives it to the programs."""
        param = self.params[name]
        if param.is_meta:
            local = self._read(name, self._ranges[name])
            self.params[name] = self._held(name, local, param.requires_grad)
        return self.params[name]

    def _held(self, name: str, local: Tensor, learns: bool) -> nn.Parameter:
        """This rank's part of a parameter as it is held; its memory may be written over."""
        channels = self._int8.get(name)
        if channels is None:
            return nn.Parameter(local, requires_grad=learns)
        axes = self.split.cutting(self.split.graph.params[name], channels)

        def over_ranks(largest: Tensor) -> Tensor:
            for axis in axes:
                all_reduce_(largest, axis, op=dist.ReduceOp.MAX)
            return largest

        return nn.Parameter(quantize(local, channels, over_ranks), requires_grad=False)

    def entries(self, name: str, low: int, high: int) -> Tensor:
        """Entries `low` to `high` of this rank's part of a parameter laid out flat; no more than their rows is read."""
        param = self.params[name]
        if not param.is_meta:
            return param.detach().reshape(-1)[low:high]
        if not param.ndim:
            return self._read(name, []).reshape(-1)[low:high]
        row = max(param[:1].numel(), 1)
        first, last = low // row, -(-high // row)
        rows, *rest = self._ranges[name]
        return self._read(name, [within(rows, first, last), *rest]).reshape(-1)[low - first * row : high - first * row]

    def _read(self, name: str, ranges: Sequence[Ranges]) -> Tensor:
        assert self._weights is not None
        return self._weights.read(name, ranges).to(self.device, self.params[name].dtype)

    def share(self, other: RankModel) -> None:
        """Take the parameters and buffers of a model that is split alike."""
        self.params = {name: other.params[name] for name in self.used}
        self.buffers = {name: other.buffers[name] for name in self.used_buffers}
        self.bind()

    def bind(self) -> None:
        """Give the programs this rank's parameters and buffers."""
        for program in [*self.programs.values(), *self.preludes]:
            for name in program.params:
                setattr(program.module, attribute_name(name), self.params[name])
            for name in program.buffers:
                setattr(program.module, attribute_name(name), self.buffers[name])

    def gather_buckets(self, buckets: Sequence[FlatBucket], but: Container[str] = ()) -> None:
        """ZeRO-3: programs gather a bucket's parameters before their first use and let go of them after their last.

        Args:
            buckets: the parameters, in parts.
            but: names of parameters that stay the programs' own.
        """
        for program in self.programs.values():
            for i, bucket in enumerate(buckets):
                names = [n for n in bucket.names if n not in but]
                if gather_in(program.module, bucket, names, f"bucket_{i}"):
                    program.params = [n for n in program.params if n not in names]
                for name in names:
                    self.params.pop(name, None)
            program.module.recompile()

    # -- programs ----------------------------------------------------------------------------------------------------

    def _emitter(self, given: dict[Value, States]) -> Emitter:
        split = self.split
        return Emitter(
            split.graph, split.layout, split.axes, self.device, given, self._dtypes,
            recompute=split.plan.recompute, exact_dropout=split.plan.dropout == "exact",
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
        if stage == split.plan.stages - 1:
            outputs += [(value, self._result_states(value)) for value in graph.results.values()]
        for name, value in self.updated.items():
            everywhere = name in graph.state and value not in graph.learned
            if split.stage_of[graph.producer[value]] == stage or everywhere:
                kept = states[graph.state[name][0]] if name in graph.state else (WHOLE,) * len(split.axes)
                outputs.append((value, kept))
                self._renews.setdefault(stage, []).append(name)
        program = self._emitter(given).build(ops, outputs)
        overwrite(program.module, [attribute_name(name) for name in graph.state])
        if graph.captured.form is not None and stage == split.plan.stages - 1:
            hand_out(program.module)
        return program

    def _result_states(self, value: Value) -> States:
        """How the last stage leaves a result.

        Of a loss the sums are made by `total`, for nothing waits for them before. An output is whole on the first rank,
        but for what each micro-batch has of it.
        """
        states = zip(self.split.layout.states[value], self.split.axes, strict=True)
        if self.split.graph.captured.form is not None:
            return tuple(state if axis is None else WHOLE for state, axis in states)
        return tuple(PARTIAL if axis is None or state == PARTIAL else WHOLE for state, axis in states)

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """An output of the whole step from what the last stage gave of each micro-batch; on the first rank."""
        value = self.split.graph.results[name]
        states = self._result_states(value)
        if len(parts) == 1 or not self.split.timed or states[0] == WHOLE:
            return parts[0]
        early = Early(value, states[0] if isinstance(states[0], Cut) else None)
        leads = [self._early_lead(early, m) for m in range(len(parts))]
        return combine(early, parts, leads, [micro.samples for micro in self._micros])

    @cached_property
    def result_sums(self) -> list[tuple[Axis, list[int]]]:
        """The axes over which results are still to be summed, each with the places of those results."""
        states = [self._result_states(value) for value in self.split.graph.results.values()]
        found = [
            (axis, [i for i, each in enumerate(states) if each[a] == PARTIAL])
            for a, axis in enumerate(self.split.axes)
            if axis is not None and axis.group is not None
        ]
        pipeline = self.split.pipeline
        if pipeline is not None and pipeline.group is not None:
            found.append((pipeline, list(range(len(states)))))
        return [(axis, places) for axis, places in found if places]

    def total(self, results: Tensor) -> Tensor:
        """The results of a step on every rank, [results], from what this rank computed of them."""
        for axis, places in self.result_sums:
            results[places] = all_reduce_(results[places], axis)
        return results

    def _updated(self) -> dict[str, Value]:
        captured = self.split.graph.captured
        outs: Any = captured.graph.output_node().args[0]
        found = {}
        for name, node in zip(captured.updates, outs[len(self.split.graph.results) :], strict=True):
            value = self.split.graph.value(node)
            if value is not None and node.op != "placeholder":
                found[name] = value
        return found

    def _gives(self, stage: int) -> list[Value]:
        return self.split.crossings(stage) if stage < self.split.plan.stages - 1 else []

    # -- running -----------------------------------------------------------------------------------------------------

    def start(self, tensors: Mapping[str, Tensor], total: int, key: int) -> int:
        """Take the tensors of a step: this rank's samples of each. Returns the number of micro-batches."""
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

    def replace_buffer(self, name: str, tensor: Tensor) -> None:
        """Give the programs that read a buffer another tensor."""
        self.buffers[name] = tensor
        for program in [*self.programs.values(), *self.preludes]:
            if name in program.buffers:
                setattr(program.module, attribute_name(name), tensor)

    def run(self, stage: int, m: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stage's forward pass on one micro-batch; what goes on by name, and at the end the graph's results."""
        program = self.programs[stage]
        found = self._call(program, m, received)
        renews = self._renews.get(stage, ())
        # What is renewed may go to another stage as well, cut otherwise.
        outs = dict(zip(program.outputs[: len(found) - len(renews)], found, strict=False))
        for name, tensor in zip(renews, found[len(found) - len(renews) :], strict=True):
            if name in self.buffers:
                # A new tensor: backward may still need the old one.
                self._renewed[name] = tensor.detach()
                if self.updated[name] not in self.split.same:
                    self._renew()
        if stage == self.split.plan.stages - 1:
            return {result: outs[value.name] for result, value in self.split.graph.results.items()}
        kept = [self.buffers[name] for name in self.split.graph.state if name in self.buffers]
        return {v.name: unlike(outs[v.name], kept) if v.name in outs else received[v.name] for v in self._gives(stage)}

    def renew(self) -> None:
        """Put new buffers in place of old ones, after a step.

        Those that differ between micro-batches are renewed with each; the others are the same for all of them.
        """
        self._renew()
        axis = self.split.pipeline
        for name, owner in self.travels.items():
            assert axis is not None and axis.group is not None
            tensor = self.buffers[name].clone()
            axis.record("broadcast", tensor.numel() * tensor.element_size())
            dist.broadcast(tensor, src=axis.ranks[owner], group=axis.group)
            self.replace_buffer(name, tensor)

    def _renew(self) -> None:
        for name, tensor in self._renewed.items():
            self.replace_buffer(name, tensor)
        self._renewed.clear()

    def stages(self) -> list[Stage]:
        """The stages of this rank, for `Pipeline`."""
        return [self._stage(s) for s in self.split.mine]

    def _stage(self, s: int) -> Stage:
        takes = [self._crossing(v) for v in self.split.crossings(s - 1)] if s else []
        gives = [self._crossing(v) for v in self._gives(s)]
        stage = Stage(s, partial(self.run, s), takes, gives)
        received = [c.name for c in takes if c.grad]
        if self.split.plan.recompute and self.split.graph.needs_grad:
            in_segments(self.programs[s].module)
        if received and self.split.plan.schedule == "zero-bubble":
            names = {v.name: result for result, v in self.split.graph.results.items()}
            stage.tapes, apart = defer_weights(self.programs[s], received)
            last = s == self.split.plan.stages - 1
            stage.apart = frozenset(names.get(name, name) if last else name for name in apart)
        return stage

    def _crossing(self, value: Value) -> Crossing:
        states = self.split.layout.states[value]
        return Crossing(
            value.name,
            lambda m: self.split.local_shape(value, states, self._micros[m]),
            self._dtypes.get(value.dtype, value.dtype),
            value in self.split.graph.needs_grad,
        )


def let_go(param: nn.Parameter) -> None:
    """Free a parameter's entries and keep its shape."""
    param.data = param.new_empty(()).expand(param.shape)
