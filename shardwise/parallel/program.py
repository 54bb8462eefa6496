"""The program of one rank: the captured graph on local tensors, with the collectives that its layout asks for."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.parallel.convert import Converter
from shardwise.parallel.fuse import fuse_bias
from shardwise.parallel.layout import PARTIAL, WHOLE, Layout, States
from shardwise.parallel.mesh import Axis
from shardwise.parallel.operators import Call
from shardwise.parallel.recompute import blocks_by
from shardwise.parallel.reuse import reuse
from shardwise.parallel.writer import Writer

aten = torch.ops.aten


@dataclass(eq=False)
class Program:
    """A part of a graph as this rank runs it.

    Attributes:
        module: an fx module. Called with `(samples, total, first, key, *tensors)`: the samples of this micro-batch over
            all ranks, the samples of the whole step, where the micro-batch starts among them, the key of this step's
            random numbers, and the tensors named by `inputs`.
        inputs: names of the tensors taken, in order: batch tensors and values of other programs.
        outputs: names of the tensors returned, in order.
        params: names of the parameters used; the module has them as attributes (`attribute_name`).
        buffers: names of the buffers used.
    """

    module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]
    params: list[str]
    buffers: list[str]


def attribute_name(name: str) -> str:
    """The attribute under which a program's module has a parameter or buffer."""
    return "t_" + name.replace(".", "__")


@dataclass
class Emitter:
    """Writes the program for some operators of a graph.

    Args:
        graph: the captured model.
        layout: where its tensors are cut.
        axes: the mesh axes of this rank, in the layout's order. An axis of None is micro-batches: cuts in time.
        device: where the program runs; capture may have happened elsewhere.
        given: tensors that another program computed, with the states that they arrive in.
        dtypes: replaces dtypes that the model names, for proofs in float64.
        recompute: patterns of the modules whose activations are computed again in backward.
        exact_dropout: dropout masks are functions of position.
    """

    graph: Graph
    layout: Layout
    axes: Sequence[Axis | None]
    device: torch.device
    given: dict[Value, States] = field(default_factory=dict)
    dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)
    recompute: tuple[str, ...] = ()
    exact_dropout: bool = True

    def __post_init__(self) -> None:
        self.writer = Writer(self.axes)
        self.out, self.root = self.writer.out, self.writer.root
        self.converter = Converter(self.graph, self.layout, self.writer)
        self.env: dict[Value, fx.Node] = {}
        self.converted: dict[tuple[Value, States], fx.Node] = {}
        self.inputs: list[str] = []
        self.params: list[str] = []
        self.buffers: list[str] = []
        self._sources = {v: n for n, values in self.graph.values.items() for v in values}
        block_of = blocks_by(self.recompute)
        self._blocks: dict[Op, str] = {op: block_of(op.module) for op in self.graph.ops}
        self._readers: dict[Value, set[str]] = {}

    # -- whole program -----------------------------------------------------------------------------------------------

    def build(self, ops: Iterable[Op], outputs: Sequence[tuple[Value, States]]) -> Program:
        """The program that runs `ops` and returns `outputs`, each in the given states."""
        for value in self.given:
            self.env[value] = self._placeholder(value.name)
        for node, values in self.graph.values.items():
            if node.op == "placeholder" and node.name in self.graph.captured.inputs and values[0] not in self.env:
                self.env[values[0]] = self._placeholder(node.name)
        ops = list(ops)
        counts = self._counts(ops)
        first = self._needed(value for value, _ in counts)
        self._blocks.update(dict.fromkeys(first, ""))
        for op in self.graph.ops:
            for value in op.inputs:
                self._readers.setdefault(value, set()).add(self._blocks[op])
        for op in ops:
            if op in first:
                self._emit(op)
        for value, states in counts:
            self.get(value, states)
        for op in ops:
            if op not in first:
                self._emit(op)
        self.writer.block = ""
        results = tuple(self.get(value, states) for value, states in outputs)
        self.out.output(results)
        self.out.eliminate_dead_code()
        self._drop_unused()
        fuse_bias(self.out)
        reuse(self.out)
        self.out.lint()
        module = fx.GraphModule(self.root, self.out)
        return Program(module, self.inputs, [v.name for v, _ in outputs], self.params, self.buffers)

    def _counts(self, ops: Sequence[Op]) -> list[tuple[Value, States]]:
        """Sums over ranks of what the batch alone decides, such as counts of labels, and the states they are needed in.

        They are made before anything else. Later a rank would wait in them for all that others take longer.
        """
        found = {
            (operand.value, self.layout.needs(op, operand.slot)): None
            for op in ops
            for operand in op.context.inputs
            if operand.value not in self.graph.learned and PARTIAL in self.produced(operand.value)
        }
        return [(value, states) for value, states in found if states != self.produced(value)]

    def _needed(self, values: Iterable[Value]) -> set[Op]:
        """The operators that compute these tensors, and what they are computed from."""
        found: set[Op] = set()
        left = list(values)
        while left:
            op = self.graph.producer.get(left.pop())
            if op is not None and op not in found:
                found.add(op)
                left += op.inputs
        return found

    def _placeholder(self, name: str) -> fx.Node:
        node = self.out.placeholder("in_" + name.replace(".", "_"))
        self.inputs.append(name)
        return node

    def _drop_unused(self) -> None:
        used = {str(n.target) for n in self.out.nodes if n.op == "get_attr"}
        self.params = [n for n in self.params if attribute_name(n) in used]
        self.buffers = [n for n in self.buffers if attribute_name(n) in used]
        for name in [n for n, _ in self.root.named_parameters(recurse=False)]:
            if name not in used:
                delattr(self.root, name)
        placeholders = [n for n in self.out.nodes if n.op == "placeholder"][4:]
        for node, name in zip(placeholders, list(self.inputs), strict=True):
            if not node.users:
                self.out.erase_node(node)
                self.inputs.remove(name)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def produced(self, value: Value) -> States:
        """How a tensor is before conversion."""
        return self.given.get(value) or self.layout.states.get(value, (WHOLE,) * len(self.axes))

    def base(self, value: Value) -> fx.Node:
        """The node of a tensor as it is produced; parameters and constants are fetched at first use."""
        if value in self.env:
            return self.env[value]
        source = self._sources[value]
        captured = self.graph.captured
        if source.name in captured.params:
            node = self._attribute(captured.params[source.name], self.params)
        elif source.name in captured.buffers:
            node = self._attribute(captured.buffers[source.name], self.buffers)
        elif source.name in captured.constants:
            tensor = captured.constants[source.name].detach().to(self.device)
            name = attribute_name(source.name)
            self.root.register_buffer(name, self._lift(tensor), persistent=False)
            node = self.out.get_attr(name)
        else:
            raise KeyError(f"{value.name} is not available in this program")
        self.env[value] = node
        return node

    def _lift(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtypes.get(tensor.dtype, tensor.dtype))

    def _attribute(self, name: str, names: list[str]) -> fx.Node:
        key = attribute_name(name)
        if name not in names:
            names.append(name)
            if not hasattr(self.root, key):
                if names is self.params:
                    setattr(self.root, key, nn.Parameter(torch.empty(0)))
                else:
                    self.root.register_buffer(key, torch.empty(0), persistent=False)
        return self.out.get_attr(key)

    def get(self, value: Value, target: States) -> fx.Node:
        """A tensor in the states that a use needs."""
        produced = self.produced(value)
        if produced == target and not self.layout.grad_axes(value):
            return self.base(value)
        if (value, target) in self.converted:
            return self.converted[value, target]
        block = self.writer.block
        if self._readers.get(value) != {block}:
            # Made once for all blocks that read it, and so part of none.
            self.writer.block = ""
        node = self.converter.convert(value, self.base(value), produced, target)
        self.writer.block = block
        self.converted[value, target] = node
        return node

    # -- operators ---------------------------------------------------------------------------------------------------

    def _emit(self, op: Op) -> None:
        if all(v in self.env for v in op.outputs) and op.outputs:
            return
        self.writer.block = self._blocks[op]
        result = self._lifted(op, Call(self, op).emit())
        outs = op.outputs
        if not any(value in self.graph.needs_grad for value in outs):
            result.meta["constant"] = True
        if len(outs) == 1 and not isinstance(op.node.meta.get("val"), (tuple, list)):
            self.env[outs[0]] = result
            result.meta["ndim"] = outs[0].ndim
        else:
            for i, value in enumerate(outs):
                self.env[value] = self.writer.call(operator.getitem, result, i)

    def _lifted(self, op: Op, result: fx.Node) -> fx.Node:
        """A result, in the dtype that takes the place of its own where torch's default decides: what is made of none.

        Torch makes floats of integers, or of nothing, in its default dtype whatever the model runs in.
        """
        if len(op.outputs) != 1 or any(_is_inexact(value.dtype) for value in op.inputs):
            return result
        dtype = self.dtypes.get(op.outputs[0].dtype)
        return result if dtype is None else self.writer.call(aten._to_copy.default, result, dtype=dtype)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
