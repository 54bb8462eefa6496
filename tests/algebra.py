"""The proof of one operator's letters without any process: its parts, computed apart and joined, are the whole.

An operator is run as a rank's program runs it, once for each of several ranks, on parts of its inputs that were cut by
hand. What the layout says of its outputs (cut, partial, whole) says how they join. Gradients are joined the same way,
mirrored: a cut input has a cut gradient, an input that is whole but used by parts has a partial one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.graph.dims import BATCH
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Letter, Value
from shardwise.job import Job, batch_tensors, map_batch
from shardwise.parallel.collectives import merge_view, split_view, take
from shardwise.parallel.layout import PARTIAL, VARIES, Cut, Layout, SplitAxis, State
from shardwise.parallel.lower import chunk
from shardwise.parallel.mesh import Axis, Recorder
from shardwise.parallel.program import Emitter, attribute_name

CPU = torch.device("cpu")
KEY = 77
TALKS = ("classes", "batch_norm")
"""Lowerings that send inside; they need real ranks."""


class Whole:
    """A job's graph, and the value of each of its tensors on one device in float64.

    Args:
        samples: the batch taken.
    """

    def __init__(self, job: Job, samples: int) -> None:
        module = job.build().double()
        batch = map_batch(job.batch(range(samples)), lambda t: t.double() if t.is_floating_point() else t)
        self.samples = samples
        self.graph = Graph.of(job, module, batch)
        self.layout = Layout(self.graph, [])
        captured = self.graph.captured
        tensors = dict(zip(captured.inputs, batch_tensors(batch), strict=True))
        with torch.no_grad():
            self.values = self._run(module, tensors)

    def _run(self, module: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[Value, Tensor]:
        graph = self.graph
        emitter = Emitter(graph, self.layout, [], CPU, dtypes={torch.float32: torch.float64})
        made = [(v, ()) for op in graph.ops for v in op.outputs if v.numel().at(2)]
        program = emitter.build(graph.ops, made)
        named: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name in [*program.params, *program.buffers]:
            setattr(program.module, attribute_name(name), named[name])
        found = program.module(self.samples, self.samples, 0, KEY, *(tensors[n] for n in program.inputs))
        values = {v: t for (v, _), t in zip(made, found, strict=True)}
        for node, (value, *_) in graph.values.items():
            if node.op == "placeholder":
                captured = graph.captured
                name = captured.params.get(node.name) or captured.buffers.get(node.name)
                if name is not None:
                    values[value] = named[name].detach()
                elif node.name in captured.constants:
                    values[value] = captured.constants[node.name].detach()
                else:
                    values[value] = tensors[node.name]
        return values


def letters(graph: Graph, parts: int, module: str = "") -> Iterator[tuple[Op, Letter]]:
    """Every letter of a module's operators that can be cut into `parts`, once for operators that are alike."""
    seen = set()
    for op in graph.ops:
        if module and op.module != module:
            continue
        shapes = tuple(tuple(v.sizes) for v in [*op.inputs, *op.outputs])
        plain = str([a for a in op.node.args if not hasattr(a, "op")])
        for letter in op.letters:
            key = (op.name, shapes, plain, tuple(letter.places))
            # Ranks that sort their own rows have other rows in between; `test_orders` has what they get back.
            apart = letter.special in TALKS or letter.region is not None
            if key not in seen and not apart and _divides(letter, parts):
                seen.add(key)
                yield op, letter


def _divides(letter: Letter, parts: int) -> bool:
    return letter.dim.size == BATCH or letter.dim.size.coefficient % parts == 0


class _Only(Layout):
    """The layout in which one operator splits one letter, and nothing else splits anything."""

    def __init__(self, whole: Layout, op: Op, letter: Letter, parts: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.letter = letter
        self.axes = (SplitAxis("axis", parts, (letter.dim.name,)),)
        self.choices, self.states, self._needs = {}, {}, {}
        self._place(op)

    def _pick(self, op: Op, axis: SplitAxis, cut_by: Any) -> Letter | None:
        return self.letter

    def grad_axes(self, value: Value) -> tuple[int, ...]:
        """None: gradients are taken of what this one operator is given, and summed by the check."""
        return ()


def check(whole: Whole, op: Op, letter: Letter, parts: int) -> None:
    """Run an operator by parts, join what the parts computed, and compare values and gradients.

    Raises:
        AssertionError: something differs.
    """
    graph, samples = whole.graph, whole.samples
    layout = _Only(whole.layout, op, letter, parts)
    needs: dict[Value, State] = {}
    for operand in op.context.inputs:
        state = layout.needs(op, operand.slot)[0]
        if needs.setdefault(operand.value, state) != state:
            return  # the same tensor is needed in two ways; the edge that converts it is not the operator's matter
    axes = [Axis("axis", parts, rank, None, tuple(range(parts)), Recorder()) for rank in range(parts)]
    outs = [v for v in op.outputs if v in whole.values]
    cotangents = {v: torch.randn(whole.values[v].shape, dtype=torch.float64) for v in outs if v in graph.needs_grad}

    def run(layout: Layout, axis: Axis | None) -> tuple[list[Tensor], dict[Value, Tensor]]:
        given: dict[Value, tuple[State, ...]] = {v: (s,) if axis else () for v, s in needs.items()}
        emitter = Emitter(graph, layout, [axis] if axis else [], CPU, given, {torch.float32: torch.float64})
        states = {v: layout.states[v] for v in outs}
        program = emitter.build([op], [(v, states[v]) for v in outs])
        tensors = {}
        for value in needs:
            local = cut(whole.values[value], value, needs[value], axis, samples) if axis else whole.values[value]
            floating = value in graph.needs_grad
            tensors[value.name] = local.detach().clone().requires_grad_(floating)
        found = program.module(samples, samples, 0, KEY, *(tensors[n] for n in program.inputs))
        pairs = [
            (t, cut(cotangents[v], v, states[v][0] if axis else PARTIAL, axis, samples))
            for v, t in zip(outs, found, strict=True)
            if v in cotangents and t.requires_grad
        ]
        wanted = [v for v in needs if v in graph.needs_grad and v.name in program.inputs]
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            total = sum(((t * g).sum().real for t, g in pairs), torch.zeros((), dtype=torch.float64))
            grads = torch.autograd.grad(total, [tensors[v.name] for v in wanted], allow_unused=True)
        zero = {v: torch.zeros_like(tensors[v.name]) for v in wanted}
        return list(found), {v: zero[v] if g is None else g for v, g in zip(wanted, grads, strict=True)}

    true, true_grads = run(whole.layout, None)
    ranks = [run(layout, axis) for axis in axes]
    what = f"{op.name} ({op.id}) split on {letter.dim.name} at {letter.places}"
    for i, value in enumerate(outs):
        state = layout.states[value][0]
        joined = join([found[i] for found, _ in ranks], value, state, samples)
        for one in joined:
            _same(one, true[i], f"{what}: output {i} is {state}")
    for value in ranks[0][1]:
        state = needs[value]
        mirrored = PARTIAL if state == VARIES else state
        for one in join([grads[value] for _, grads in ranks], value, mirrored, samples):
            _same(one, true_grads[value], f"{what}: gradient of {value.name}, needed {state}")


def cut(whole: Tensor, value: Value, state: State, axis: Axis | None, samples: int) -> Tensor:
    """This rank's part of a tensor."""
    if axis is None or not isinstance(state, Cut):
        return whole
    lead, size = _geometry(value, state, samples)
    return take(whole, axis, state.pos, lead, [chunk(size, axis.size, r) for r in range(axis.size)])


def join(found: Sequence[Tensor], value: Value, state: State, samples: int) -> list[Tensor]:
    """The whole tensor from every rank's; more than one candidate where each rank should have all of it."""
    if state == PARTIAL:
        return [torch.stack(list(found)).sum(0)]
    if not isinstance(state, Cut):
        return list(found)
    lead, size = _geometry(value, state, samples)
    seen = [split_view(t, state.pos, lead, chunk(size, len(found), r)) for r, t in enumerate(found)]
    return [merge_view(torch.cat(seen, state.pos + 1), state.pos)]


def _geometry(value: Value, state: Cut, samples: int) -> tuple[int, int]:
    sizes = [leaf.size.at(samples) for leaf in value.dims[state.pos].leaves()]
    lead = 1
    for size in sizes[: state.leaf]:
        lead *= size
    return lead, sizes[state.leaf]


def _same(found: Tensor, true: Tensor, what: str) -> None:
    assert found.shape == true.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(true.shape)}"
    if not true.is_floating_point() and not true.is_complex():
        assert torch.equal(found, true), f"{what}: values differ"
        return
    infinite = torch.isinf(true)
    assert torch.equal(found[infinite], true[infinite]), f"{what}: infinities differ"
    off = (found - true)[~infinite].abs().max().item() if (~infinite).any() else 0.0
    assert off <= 1e-10 * max(1.0, true[~infinite].abs().max().item() if off else 1.0), f"{what}: off by {off:.1e}"
