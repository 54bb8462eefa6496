"""Graph: a captured model with the dims of every tensor found. Everything that splits, prices or proves reads this."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwise.graph.capture import Purpose, capture, is_getitem
from shardwise.graph.captured import Captured
from shardwise.graph.dims import BATCH, ONE, Dim, Size
from shardwise.graph.garbage import uncollected
from shardwise.graph.rewrite import arguments
from shardwise.graph.rules import RULES, Letter, OpContext, Operand, Slot, Value, operator_name
from shardwise.graph.rules.order import AS_THEY_ARE, Orders, Region
from shardwise.job import Batch, Job


@dataclass(eq=False)
class Op:
    """One operator of the graph.

    Attributes:
        index: place in execution order.
        id: name of this very operator, e.g. `linear.3`; the same however the model was captured.
        name: operator name without overload, e.g. `aten.linear`.
        node: its fx node.
        context: what its rule said.
        letters: the dims it can be split on.
        known: whether there is a rule for it; one without runs whole.
    """

    index: int
    id: str
    name: str
    node: fx.Node
    context: OpContext
    known: bool
    letters: tuple[Letter, ...] = ()

    @cached_property
    def inputs(self) -> Sequence[Value]:
        return [o.value for o in self.context.inputs]

    @cached_property
    def outputs(self) -> Sequence[Value]:
        return [o.value for o in self.context.outputs]

    @cached_property
    def module(self) -> str:
        """Path of the module it was called in, within the user's model."""
        stack = self.node.meta.get("nn_module_stack") or {}
        path = next(reversed(list(stack.values())), ("",))[0] if stack else ""
        return str(path).removeprefix("module").removeprefix(".")


class Graph:
    """A captured model with the dims of every tensor found.

    Attributes:
        captured: the fx graph and what its placeholders are.
        ops: operators in execution order.
        values: the tensors that each fx node produces.
        regions: operators on rows in the order of a sort; see `rules.order`.
    """

    def __init__(self, captured: Captured, trainable: frozenset[str]) -> None:
        self.captured = captured
        self.trainable = trainable
        self.values: dict[fx.Node, tuple[Value, ...]] = {}
        self.ops: list[Op] = []
        self._iota: dict[Value, int] = {}
        self._counts: dict[str, int] = {}
        self._orders = Orders()
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = (self._value(node.name, node.meta["val"]),)
                self._label_placeholder(node)
            elif node.op == "get_attr":
                raise NotImplementedError(f"captured attribute {node.target}")
            elif node.op == "call_function" and not is_getitem(node):
                self._add(node)
        for op in self.ops:
            op.letters = tuple(op.context.letters())
        self.regions, kept = self._orders.settle([op.letters for op in self.ops])
        for index, letters in kept.items():
            self.ops[index].letters = letters
        self._name_dims()

    @classmethod
    @uncollected()
    def of(
        cls, job: Job, module: nn.Module | None = None, batch: Batch | None = None, *, purpose: Purpose = "train"
    ) -> Graph:
        """Capture a job and find its dims; where it is not to be trained, nothing has a gradient.

        Raises:
            CaptureError: the model does not capture.
        """
        module = module if module is not None else job.build("meta")
        named = module.named_parameters(remove_duplicate=False)
        trainable = frozenset(n for n, p in named if p.requires_grad and purpose == "train")
        return cls(capture(job, module, batch, purpose=purpose), trainable)

    # -- reading -----------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Value | None:
        """The tensor that a node stands for; None for numbers and for tuples."""
        if is_getitem(node):
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            found = self.values.get(source)
            return found[index] if found is not None else None
        found = self.values.get(node)
        return found[0] if found is not None and len(found) == 1 else None

    @cached_property
    def params(self) -> Mapping[str, Value]:
        """Parameter name to its tensor, for those that the loss depends on."""
        names = self.captured.params
        return {names[n.name]: v[0] for n, v in self.values.items() if n.name in names and n.users}

    @cached_property
    def region(self) -> Mapping[Op, Region]:
        """The region of each operator that is in one."""
        return {self.ops[index]: region for region in self.regions for index in region.ops}

    @cached_property
    def tallies(self) -> frozenset[Value]:
        """Tensors that were counted over the rows of a region, which each rank needs of its own rows."""
        return self._orders.tallies

    @cached_property
    def producer(self) -> Mapping[Value, Op]:
        """The operator that computes a tensor; none for what a graph is given."""
        return {v: op for op in self.ops for v in op.outputs}

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Operator's id to its place in execution order."""
        return {op.id: op.index for op in self.ops}

    @property
    def loss(self) -> fx.Node:
        node: fx.Node = self.captured.graph.output_node().args[0][0]  # type: ignore[index,assignment]
        return node

    @cached_property
    def results(self) -> Mapping[str, Value]:
        """What a run is for, by name; see `Captured.results`."""
        outs: Any = self.captured.graph.output_node().args[0]
        found = {}
        for name, node in zip(self.captured.results, outs, strict=False):
            value = self.value(node)
            assert value is not None
            found[name] = value
        return found

    @property
    def predicts(self) -> bool:
        """Whether it is run for the model's own output: without a loss, and without gradients."""
        return self.captured.form is not None

    @cached_property
    def batch_dim(self) -> Dim | None:
        """The dim of samples; None where the model fixes their number."""
        for node in self.values:
            if node.op == "placeholder" and node.name in self.captured.inputs:
                value = self.values[node][0]
                if value.ndim and value.sizes[0] == BATCH:
                    return value.dims[0].leaves()[0]
        return None

    @cached_property
    def needs_grad(self) -> frozenset[Value]:
        """Tensors that gradients flow through, from the loss to a parameter that is trained."""
        found: set[Value] = set()
        constant = {op.context.operand(slot).value for op in self.ops for slot in op.context.constant}
        for node, values in self.values.items():
            if node.op == "placeholder":
                if self.captured.params.get(node.name) in self.trainable:
                    found.update(values)
                continue
            sources = [self.value(n) for n in node.all_input_nodes]
            if any(s in found for s in sources if s is not None) and operator_name(node.target) not in _NO_GRADIENT:
                floating = (v for v in values if v.dtype.is_floating_point or v.dtype.is_complex)
                found.update(v for v in floating if v not in constant)
        reached = {v for v in self.results.values() if v in found}
        for node, values in reversed(self.values.items()):
            if not reached.isdisjoint(values):
                reached.update(v for n in node.all_input_nodes if (v := self.value(n)) is not None and v in found)
        return frozenset(reached)

    @cached_property
    def state(self) -> Mapping[str, tuple[Value, Value]]:
        """What a step of generation reads and renews, by name: each tensor before and after."""
        outs: Any = self.captured.graph.output_node().args[0]
        new = dict(zip(self.captured.updates, outs[len(self.captured.results) :], strict=True))
        nodes = {self.captured.buffers[n.name]: n for n in self.values if n.name in self.captured.buffers}
        pairs = {name: (self.value(nodes[name]), self.value(new[name])) for name in self.captured.state}
        return {name: (old, after) for name, (old, after) in pairs.items() if old is not None and after is not None}

    @cached_property
    def learned(self) -> frozenset[Value]:
        """Tensors that depend on a parameter, maybe in an earlier step; the others are functions of the batch alone."""
        kept: set[Value] = set()
        while True:
            found = self._learned(kept)
            more = {old for old, new in self.state.values() if new in found}
            if more <= kept:
                return frozenset(found)
            kept |= more

    def _learned(self, kept: set[Value]) -> set[Value]:
        found = set(kept)
        for node, values in self.values.items():
            if node.op == "placeholder":
                if node.name in self.captured.params:
                    found.update(values)
            elif any(self.value(n) in found for n in node.all_input_nodes if self.value(n) is not None):
                found.update(values)
        return found

    @cached_property
    def steady(self) -> frozenset[Value]:
        """Tensors that are computed from parameters and constants alone, and so are the same for every batch."""
        found: set[Value] = set()
        kept = (node for node, name in self.captured.buffers.items() if name in self.captured.state)
        given = {*self.captured.inputs, *kept}
        for node, values in self.values.items():
            sources = [self.value(n) for n in node.all_input_nodes]
            if node.name not in given and all(s is not None and s in found for s in sources):
                found.update(values)
        return frozenset(found)

    def dims(self) -> Iterator[Dim]:
        """Every named dim that some operator can be split on, in order of appearance."""
        seen: set[int] = set()
        for op in self.ops:
            for letter in op.letters:
                if id(letter.dim) not in seen:
                    seen.add(id(letter.dim))
                    yield letter.dim

    def work(self, batch: int) -> int:
        """Forward floating-point operations of `batch` samples, a multiply-add as two."""
        return sum(op.context.work.at(batch) for op in self.ops)

    def fingerprint(self) -> str:
        """A short name for this graph: equal for equal operators, parameters, and shapes of what is read."""
        computed = [(op.name, [v.sizes for v in self._read(op)]) for op in self.ops if op.name not in CASTS]
        text = repr([*computed, *sorted(self.params)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _read(self, op: Op) -> list[Value]:
        """The outputs of an operator that something reads; the others depend on the device (of embedding bags)."""
        picked = {user.args[1] for user in op.node.users if is_getitem(user)}
        return [v for i, v in enumerate(op.outputs) if len(op.outputs) == 1 or i in picked]

    def unknown(self) -> list[str]:
        """Operators without a rule, which run whole on every rank."""
        return sorted({op.name for op in self.ops if not op.known})

    # -- building ----------------------------------------------------------------------------------------------------

    def _value(self, name: str, fake: Any) -> Value:
        sizes = tuple(self.size(s) for s in fake.shape)
        return Value(name, sizes, tuple(Dim(s) for s in sizes), fake.dtype)

    def size(self, size: Any) -> Size:
        """A size of the capture as a Size."""
        if isinstance(size, int):
            return Size(size)
        expression = size.node.expr
        if not expression.free_symbols:
            return Size(int(expression))
        samples = [s for s in expression.free_symbols if str(s) in self.captured.batch_symbols]
        # Each tensor of the batch has a symbol of its own for the same number.
        expression = expression.xreplace(dict.fromkeys(samples[1:], samples[0])) if samples[1:] else expression
        coefficient, rest = expression.as_coeff_Mul()
        power = 0
        for base, exponent in rest.as_powers_dict().items():
            if str(base) not in self.captured.batch_symbols or not exponent.is_Integer or exponent < 0:
                return Size(int(size.node.hint or 0), 0, str(expression))
            power += int(exponent)
        return Size(int(coefficient), power)

    def _label_placeholder(self, node: fx.Node) -> None:
        value = self.values[node][0]
        if node.name in self.captured.inputs:
            if value.ndim and value.sizes[0] == BATCH:
                value.dims[0].hint("batch")
            if value.ndim > 1 and not value.sizes[1].one and (not value.dtype.is_floating_point or value.ndim == 3):
                value.dims[1].hint("sequence")
        elif self.captured.buffers.get(node.name) in self.captured.state:
            if value.ndim and value.sizes[0] == BATCH:
                value.dims[0].hint("batch")
        elif node.name in self.captured.params:
            for dim in value.dims:
                dim.owners.append(self.captured.params[node.name])

    def _add(self, node: fx.Node) -> None:
        fake = node.meta.get("val")
        if isinstance(fake, Tensor):
            fakes = [fake]
        elif isinstance(fake, (tuple, list)) and all(isinstance(f, Tensor) for f in fake):
            fakes = list(fake)
        elif node.target in _NUMBER_FUNCTIONS or not isinstance(fake, (tuple, list)):
            return
        else:
            fakes = [f if isinstance(f, Tensor) else torch.empty(0) for f in fake]
        outs = tuple(self._value(f"{node.name}.{i}" if len(fakes) > 1 else node.name, f) for i, f in enumerate(fakes))
        self.values[node] = outs
        inputs: list[Operand] = []

        def operand(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                value = self.value(argument)
                if value is None:
                    return self.size(argument.meta["val"]) if "val" in argument.meta else argument
                inputs.append(Operand(Slot("in", len(inputs)), value))
                return inputs[-1]
            if isinstance(argument, (list, tuple)):
                return [operand(a) for a in argument]
            return argument

        named = {name: operand(argument) for name, argument in arguments(node).items()}
        outputs = [Operand(Slot("out", i), v) for i, v in enumerate(outs)]
        context = OpContext(node, named, inputs, outputs)
        context.iota = {o.slot: self._iota[o.value] for o in inputs if o.value in self._iota}
        name = operator_name(node.target)
        known = name in RULES
        self._orders.enter(context)
        if known:
            RULES[name](context)
        self._orders.leave(len(self.ops), context)
        self._trace_iota(name, context)
        short = name.rpartition(".")[2]  # of several namespaces
        count = self._counts[short] = self._counts.get(short, -1) + 1
        self.ops.append(Op(len(self.ops), f"{short}.{count}", name, node, context, known))

    def _trace_iota(self, name: str, c: OpContext) -> None:
        """Note tensors that hold 0, 1, 2, ... along one position."""
        if name == "aten.arange":
            if c.arguments.get("start", 0) == 0 and c.arguments.get("step", 1) == 1:
                self._iota[c.out.value] = 0
            return
        if not c.inputs or c.inputs[0].value not in self._iota:
            return
        source = c.inputs[0]
        at = self._iota[source.value]
        moves = name in _IOTA_MOVES or (name == "aten.add" and c.arguments.get("other") == 0)
        dim = source.value.dims[at].leaves()
        same = [j for j, d in enumerate(c.out.value.dims) if dim and d.leaves() == dim]
        if moves and len(same) == 1:
            self._iota[c.out.value] = same[0]

    def _name_dims(self) -> None:
        """Give each dim a name that is the same on every rank: its kind, and the module of its parameters."""
        taken: dict[str, int] = {}
        leaves: dict[int, Dim] = {}
        owners: dict[int, list[str]] = {}
        for name, value in self.params.items():
            for position in value.leaves():
                for leaf in position:
                    leaves[id(leaf)] = leaf
                    owners.setdefault(id(leaf), []).append(name)
        for dim in self.dims():
            leaves.setdefault(id(dim), dim)
        for key, leaf in leaves.items():
            if leaf.size == BATCH:
                leaf.label = leaf.name = "batch"
                continue
            leaf.label = leaf.label or ("width" if key in owners else "dim")
            home = common_module(owners.get(key, []))
            base = f"{leaf.label}@{home}" if home else leaf.label
            taken[base] = taken.get(base, 0) + 1
            leaf.name = base if taken[base] == 1 else f"{base}#{taken[base]}"
            leaf.owners = sorted(owners.get(key, []))

    def __repr__(self) -> str:
        return f"Graph({len(self.ops)} operators, {len(self.params)} parameters, {len(list(self.dims()))} dims)"


CASTS = {"aten._to_copy", "aten.to"}
"""Operators of which a model has others, or none, in another dtype."""
_NO_GRADIENT = {"aten.detach", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like"}
_NUMBER_FUNCTIONS = {operator.mul, operator.add, operator.sub, operator.floordiv, torch.ops.aten.sym_size.int}
_IOTA_MOVES = AS_THEY_ARE | {"aten.slice"}


def common_module(names: list[str]) -> str:
    """The longest module path that all parameter names share."""
    if not names:
        return ""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


__all__ = ["ONE", "Graph", "Op", "common_module"]
