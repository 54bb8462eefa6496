"""The program of one rank: the captured graph on local tensors, with the collectives that its layout asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwise.graph.capture import is_getitem
from shardwise.graph.dims import BATCH, Size
from shardwise.graph.graph import Graph, Op
from shardwise.graph.normalize import arguments
from shardwise.graph.rules import Letter, Operand, Value
from shardwise.parallel import collectives as c
from shardwise.parallel import lower
from shardwise.parallel.layout import PARTIAL, VARIES, WHOLE, Cut, Layout, State, States, Whole
from shardwise.parallel.mesh import Axis

aten = torch.ops.aten
Number = int | fx.Node


@dataclass(eq=False)
class Program:
    """A part of a graph as this rank runs it.

    Attributes:
        module: an fx module. Called with `(samples, total, first, key, *tensors)`: the samples of this micro-batch over all
            ranks, the samples of the whole step, where the micro-batch starts among them, the key of this step's random
            numbers, and the tensors named by `inputs`.
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
        axes: the mesh axes of this rank, in the layout's order. An axis of None is micro-batches: its cuts happen in time.
        device: where the program runs; capture may have happened elsewhere.
        given: tensors that another program computed, with the states that they arrive in.
        dtypes: replaces dtypes that the model names, for proofs in float64.
        per_micro_batch: batch statistics are of one micro-batch.
        recompute: patterns of the modules whose activations are computed again in backward.
        exact_dropout: dropout masks are functions of position.
    """

    graph: Graph
    layout: Layout
    axes: Sequence[Axis | None]
    device: torch.device
    given: dict[Value, States] = field(default_factory=dict)
    dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)
    per_micro_batch: bool = False
    recompute: tuple[str, ...] = ()
    exact_dropout: bool = True

    def __post_init__(self) -> None:
        self.out = fx.Graph()
        self.root = nn.Module()
        self.samples, self.total, self.first, self.key = (
            self.out.placeholder(n) for n in ("samples", "total", "first", "key")
        )
        self.env: dict[Value, fx.Node] = {}
        self.converted: dict[tuple[Value, States], fx.Node] = {}
        self.cache: dict[Any, fx.Node] = {}
        self.inputs: list[str] = []
        self.params: list[str] = []
        self.buffers: list[str] = []
        self._sources = {v: n for n, values in graph_items(self.graph) for v in values}
        for i, axis in enumerate(self.axes):
            if axis is not None:
                setattr(self.root, f"axis_{i}", axis)

    # -- whole program -----------------------------------------------------------------------------------------------

    def build(self, ops: Iterable[Op], outputs: Sequence[tuple[Value, States]]) -> Program:
        """The program that runs `ops` and returns `outputs`, each in the given states."""
        for value in self.given:
            self.env[value] = self._placeholder(value.name)
        for node, values in graph_items(self.graph):
            if node.op == "placeholder" and node.name in self.graph.captured.inputs and values[0] not in self.env:
                self.env[values[0]] = self._placeholder(node.name)
        for op in ops:
            self._emit(op)
        results = tuple(self.get(value, states) for value, states in outputs)
        self.out.output(results)
        self.out.eliminate_dead_code()
        self._drop_unused()
        fuse_bias(self.out)
        self.out.lint()
        module = fx.GraphModule(self.root, self.out)
        return Program(module, self.inputs, [v.name for v, _ in outputs], self.params, self.buffers)

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
        is_param = self._sources[value].name in self.graph.captured.params
        if produced == target and not is_param:
            return self.base(value)
        if (value, target) in self.converted:
            return self.converted[value, target]
        node = self.base(value)
        grad = value in self.graph.needs_grad
        node = self._convert(value, node, produced, target, grad, is_param)
        self.converted[value, target] = node
        return node

    def _convert(
        self, value: Value, node: fx.Node, produced: States, target: States, grad: bool, is_param: bool
    ) -> fx.Node:
        now = list(produced)
        # Inner cuts of a dim are undone before outer ones, and made after them.
        for a in reversed(range(len(now))):
            old, new = now[a], target[a]
            axis = self.axes[a]
            if axis is None or old == new:
                continue
            at = f"axis_{a}"
            if isinstance(old, Cut) and (isinstance(new, Whole) or self._same_pos(old, new)):
                whole = new if isinstance(new, Whole) else WHOLE
                varies = whole == VARIES and grad
                before = tuple(now)
                node = self._call(c.gather, node, self._attr(at), *self._geometry(value, now, a, old), varies)
                now[a] = whole
                self._announce(node, value, axis, ("all_gather", before), ("reduce_scatter", tuple(now)) if varies else None)
            elif isinstance(old, Cut) and isinstance(new, Cut):
                source, before = self._geometry(value, now, a, old), tuple(now)
                now[a] = WHOLE
                node = self._call(c.exchange, node, self._attr(at), source, self._geometry(value, now, a, new))
                now[a] = new
                back = ("all_to_all", tuple(now)) if grad else None
                self._announce(node, value, axis, ("all_to_all", before), back)
            elif old == PARTIAL and isinstance(new, Whole):
                node = self._call(c.reduce, node, self._attr(at))
                self._announce(node, value, axis, ("all_reduce", tuple(now)), None)
                if new == VARIES and grad:
                    node = self._call(c.vary, node, self._attr(at))
                    self._announce(node, value, axis, None, ("all_reduce", tuple(now)))
                now[a] = new
        for a in range(len(now)):
            old, new = now[a], target[a]
            axis = self.axes[a]
            if axis is None:
                node = self._in_time(a, node, old, new, value)
            elif old == new and not (is_param and isinstance(new, Whole)):
                continue
            elif old == PARTIAL and isinstance(new, Cut):
                before = tuple(now)
                now[a] = WHOLE
                node = self._call(c.reduce_scatter, node, self._attr(at_axis(a)), *self._geometry(value, now, a, new))
                now[a] = new
                back = ("all_gather", tuple(now)) if grad else None
                self._announce(node, value, axis, ("reduce_scatter", before), back)
            elif isinstance(old, Whole) and isinstance(new, Cut):
                now[a] = WHOLE
                node = self._call(
                    c.scatter, node, self._attr(at_axis(a)), *self._geometry(value, now, a, new), is_param or not grad
                )
                now[a] = new
                if grad and not is_param:
                    self._announce(node, value, axis, None, ("all_gather", tuple(now)))
            elif isinstance(old, Whole) and isinstance(new, Whole):
                if grad and is_param:
                    # A parameter's gradient is summed once, after backward; see Layout.grad_axes.
                    if new == WHOLE and a in self.layout.grad_axes(value):
                        node = self._call(c.scale_grad, node, 1.0 / axis.size)
                elif grad and new == VARIES:
                    node = self._call(c.vary, node, self._attr(at_axis(a)))
                    self._announce(node, value, axis, None, ("all_reduce", tuple(now)))
            else:
                raise AssertionError(f"{value.name}: no way from {old} to {new}")
            now[a] = new
        return node

    @staticmethod
    def _announce(
        node: fx.Node, value: Value, axis: Axis, forward: tuple[str, States] | None, backward: tuple[str, States] | None
    ) -> None:
        """Note what a node will send: (kind, the states in which the tensor is handed in), forward and backward."""
        node.meta["sends"] = [(kind, axis, value, states) for kind, states in filter(None, (forward, backward))]

    def _in_time(self, a: int, node: fx.Node, old: State, new: State, value: Value) -> fx.Node:
        """Micro-batches: what is whole in each of them counts once, so a sum over them takes its share."""
        if new == PARTIAL and isinstance(old, Whole):
            share = self._call(_share, self.samples, self.total)
            return self._call(aten.mul.Tensor, node, share)
        if isinstance(new, Cut) and isinstance(old, Whole):
            states = [WHOLE] * len(self.axes)
            lead: Number = 1
            for k in range(new.leaf):
                lead = self._times(lead, self.leaf_size(value, new.pos, k, states))
            return self._call(_narrow, node, new.pos, lead, self.first, self.samples, self.total)
        return node

    @staticmethod
    def _same_pos(a: Cut, b: State) -> bool:
        return isinstance(b, Cut) and a.pos == b.pos

    def _attr(self, name: str) -> fx.Node:
        if ("attr", name) not in self.cache:
            self.cache["attr", name] = self.out.get_attr(name)
        return self.cache["attr", name]

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.out.call_function(target, args, kwargs)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _chain(self, value: Value, pos: int, leaf: int, states: Sequence[State], but: int | None = None) -> list[Axis]:
        """The mesh axes that cut one leaf, outermost first."""
        return [
            axis
            for a, axis in enumerate(self.axes)
            if axis is not None and a != but and states[a] == Cut(pos, leaf)
        ]

    def number(self, size: Size, batch_axes: Sequence[Axis] = ()) -> Number:
        """A size on this rank: a plain number, or a node where it depends on the number of samples."""
        if size.power == 0:
            return size.coefficient
        chain = tuple((axis.size, axis.rank) for axis in batch_axes)
        key = ("count", chain)
        if key not in self.cache:
            self.cache[key] = self._call(lower.local_count, self.samples, chain) if chain else self.samples
        count: Number = self.cache[key]
        for _ in range(size.power - 1):
            count = self._times(count, self.cache[key])
        return self._times(count, size.coefficient)

    def _times(self, a: Number, b: Number) -> Number:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 1 or b == 1:
            return b if a == 1 else a
        key = ("times", a, b)
        if key not in self.cache:
            self.cache[key] = self._call(lower.times, a, b)
        return self.cache[key]

    def leaf_size(self, value: Value, pos: int, leaf: int, states: Sequence[State], but: int | None = None) -> Number:
        """The size of one leaf on this rank, not counting the cut by axis `but`."""
        dim = value.dims[pos].leaves()[leaf]
        chain = self._chain(value, pos, leaf, states, but)
        if dim.size == BATCH:
            return self.number(BATCH, chain)
        parts = 1
        for axis in chain:
            parts *= axis.size
        return self.number(Size(dim.size.coefficient // parts, dim.size.power))

    def shape(self, value: Value, states: Sequence[State]) -> list[Number]:
        """The shape of a tensor on this rank."""
        found: list[Number] = []
        for pos, dim in enumerate(value.dims):
            total: Number = 1
            if value.sizes[pos].expression:
                total = value.sizes[pos].coefficient
            else:
                for k in range(len(dim.leaves())):
                    total = self._times(total, self.leaf_size(value, pos, k, states))
            found.append(total)
        return found

    def _geometry(self, value: Value, states: Sequence[State], a: int, cut: Cut) -> tuple[int, Number, Any]:
        """(pos, lead, sizes) of a cut by axis `a`, the other axes as in `states`."""
        axis = self.axes[a]
        assert axis is not None
        lead: Number = 1
        for k in range(cut.leaf):
            lead = self._times(lead, self.leaf_size(value, cut.pos, k, states))
        dim = value.dims[cut.pos].leaves()[cut.leaf]
        if dim.size == BATCH:
            chain = tuple((x.size, x.rank) for x in self._chain(value, cut.pos, cut.leaf, states, but=a))
            return cut.pos, lead, self._call(lower.part_sizes, self.samples, chain, axis.size)
        whole = self.leaf_size(value, cut.pos, cut.leaf, states, but=a)
        assert isinstance(whole, int)
        return cut.pos, lead, (whole // axis.size,) * axis.size

    def start(self, value: Value, pos: int, leaf: int, states: Sequence[State]) -> Number:
        """Where this rank's part of a leaf starts; samples are counted over the whole step."""
        dim = value.dims[pos].leaves()[leaf]
        chain = tuple((x.size, x.rank) for x in self._chain(value, pos, leaf, states))
        if dim.size == BATCH:
            own: Number = self._call(lower.local_start, self.samples, chain) if chain else 0
            return self._call(lower_add, self.first, own) if own != 0 else self.first
        start, size = 0, dim.size.coefficient
        for parts, index in chain:
            size //= parts
            start += size * index
        return start

    def span(self, value: Value, states: Sequence[State]) -> Any:
        """For each position its leaves as (start, size here, whole size); see `lower.Span`."""
        return tuple(
            tuple(
                (
                    self.start(value, pos, k, states),
                    self.leaf_size(value, pos, k, states),
                    self.total if leaf.size == BATCH else leaf.size.coefficient,
                )
                for k, leaf in enumerate(dim.leaves())
            )
            for pos, dim in enumerate(value.dims)
        )

    # -- operators ---------------------------------------------------------------------------------------------------

    def _emit(self, op: Op) -> None:
        if all(v in self.env for v in op.outputs) and op.outputs:
            return
        call = _Call(self, op)
        result = call.emit()
        outs = op.outputs
        if len(outs) == 1 and not isinstance(op.node.meta.get("val"), (tuple, list)):
            self.env[outs[0]] = result
        else:
            for i, value in enumerate(outs):
                self.env[value] = self.out.call_function(_getitem, (result, i))


@dataclass
class _Call:
    """One operator being written for a rank."""

    emitter: Emitter
    op: Op

    def emit(self) -> fx.Node:
        e, op = self.emitter, self.op
        choices = e.layout.choices[op]
        self.states = [self._out_states(o) for o in op.context.outputs]
        self.needed = {o.slot: e.layout.needs(op, o.slot) for o in op.context.inputs}
        self.taken = iter(op.context.inputs)
        self.args = {name: self._argument(a) for name, a in arguments(op.node).items()}
        for name, slot in op.context.size_args.items():
            if name in self.args and isinstance(self.args[name], (list, tuple)):
                out = op.context.operand(slot).value
                self.args[name] = e.shape(out, self._out_states(op.context.operand(slot)))
        self.cut: dict[Letter, list[Axis]] = {}
        for a, choice in enumerate(choices):
            axis = e.axes[a]
            if choice.letter is not None and axis is not None:
                self.cut.setdefault(choice.letter, []).append(axis)
        special = {letter.special: letter for letter in self.cut if letter.special}
        time_special = {
            ch.letter.special for a, ch in enumerate(choices) if e.axes[a] is None and ch.letter is not None
        }
        for name in [*special, *time_special, ""]:
            handler = _SPECIAL.get((name, op.name)) or _SPECIAL.get((name, ""))
            if handler is not None:
                result = handler(self, special.get(name))
                if result is not None:
                    return result
        if op.name in _VIEWS:
            # A part of a tensor may not have the strides that the whole one had.
            return e._call(aten.reshape.default, self.args["self"], self.args["size"])
        always = _ALWAYS.get(op.name)
        if always is not None:
            result = always(self)
            if result is not None:
                return result
        return self.call(op.node.target)

    def _out_states(self, operand: Operand) -> States:
        return self.emitter.layout.states[operand.value]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            value = self.emitter.graph.value(argument)
            if value is None:
                return self._number(argument)
            operand = next(self.taken)
            assert operand.value is value
            return self.emitter.get(value, self.needed[operand.slot])
        if isinstance(argument, (list, tuple)):
            return [self._argument(a) for a in argument]
        if isinstance(argument, torch.device):
            return self.emitter.device
        if isinstance(argument, torch.dtype):
            return self.emitter.dtypes.get(argument, argument)
        return argument

    def _number(self, node: fx.Node) -> Number:
        """A number that the model computed from the number of samples: always of the whole step."""
        e = self.emitter
        size = e.graph.size(node.meta["val"])
        if size.expression:
            args = [self._number(a) if isinstance(a, fx.Node) else a for a in node.args]
            return e._call(node.target, *args)  # type: ignore[arg-type]
        return size.coefficient if size.power == 0 else e._times(e.total, size.coefficient)

    def call(self, target: Any, **changes: Any) -> fx.Node:
        """Call an operator with this one's arguments, some changed."""
        given = {**self.args, **changes}
        if not isinstance(target, torch._ops.OpOverload):
            args = [given[str(i)] for i in range(len(self.op.node.args))]
            rest = {k: v for k, v in given.items() if not k.isdigit()}
            return self.emitter._call(target, *args, **rest)
        args, kwargs = [], {}
        for argument in target._schema.arguments:
            if argument.name not in given:
                continue
            if argument.kwarg_only:
                default = argument.default_value if argument.has_default_value() else None
                if given[argument.name] is not None and given[argument.name] != default:
                    kwargs[argument.name] = given[argument.name]
            else:
                args.append(given[argument.name])
        return self.emitter._call(target, *args, **kwargs)

    def length(self, operand: Operand, pos: int) -> Number:
        """The size of a position of an operand on this rank."""
        states = self.needed.get(operand.slot) or self._out_states(operand)
        return self.emitter.shape(operand.value, states)[pos]

    def start_of(self, letter: Letter) -> Number:
        """Where this rank's part of a letter starts."""
        place = letter.places[0]
        operand = self.op.context.operand(place.slot)
        states = self.needed.get(place.slot) or self._out_states(operand)
        return self.emitter.start(operand.value, place.pos, place.leaf, states)


def _mean(call: _Call, letter: Letter | None) -> fx.Node:
    x = call.op.context.inputs[0]
    e = call.emitter
    count: Number = 1
    for pos in call.op.context.reduced(x):
        size = x.value.sizes[pos]
        count = e._times(count, size.coefficient)
        for _ in range(size.power):
            count = e._times(count, e.total)
    return e._call(
        lower.mean, call.args["self"], call.args.get("dim"), bool(call.args.get("keepdim", False)),
        call.args.get("dtype"), count,
    )  # fmt: skip


def _vocabulary(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    return call.emitter._call(lower.embedding, call.args["weight"], call.args["indices"], call.start_of(letter))


def _classes(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    e = call.emitter
    axes = [e._attr(at_axis(list(e.axes).index(axis))) for axis in call.cut[letter]]
    node = e._call(
        lower.cross_entropy, call.args["self"], call.args["target"], call.args.get("ignore_index", -100),
        call.start_of(letter), axes,
    )  # fmt: skip
    target = call.op.context.inputs[1]
    logits = call.op.context.inputs[0].value
    # The largest logit of each sample, then the sum of exponentials and the target's logit together.
    node.meta["sends"] = [
        ("all_reduce", axis, target.value, call.needed[target.slot], logits.dtype, times)
        for axis in call.cut[letter]
        for times in (1, 2)
    ]
    return node


def _queries(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None or not call.args.get("is_causal"):
        return None
    a = call.args
    return call.emitter._call(
        lower.attention, a["query"], a["key"], a["value"], call.start_of(letter), a.get("scale"),
        bool(a.get("enable_gqa")),
    )  # fmt: skip


def _arange(call: _Call) -> fx.Node | None:
    out = call.op.context.out
    states = call._out_states(out)
    e = call.emitter
    if not any(isinstance(s, Cut) for s in states) and out.value.sizes[0].power == 0:
        return None
    if out.value.sizes[0] != BATCH:
        return None
    span = e.span(out.value, states)
    return e._call(_arange_span, span, call.args.get("dtype"), e.device)


def _iota(call: _Call, letter: Letter | None) -> fx.Node | None:
    """The position is cut, and the index counts over the whole step."""
    e = call.emitter
    indices = list(call.args["indices"])
    context = call.op.context
    listed = [t for t in context.arguments["indices"] if t is not None]
    for n, t in enumerate(context.arguments["indices"]):
        if t is None or t.slot not in context.iota:
            continue
        assert t in listed
        letters = [x for x in context.letters() if x.special == "iota" and x.place(t.slot)]
        for found in letters:
            place = found.place(t.slot)
            assert place is not None
            start = e.start(t.value, place.pos, place.leaf, call.needed[t.slot])
            indices[n] = e._call(aten.sub.Tensor, indices[n], start)
    return call.call(call.op.node.target, indices=indices)


def _slice(call: _Call) -> fx.Node | None:
    x, out = call.op.context.inputs[0], call.op.context.out
    dim = int(call.args.get("dim", 0)) % x.ndim
    if x.value.sizes == out.value.sizes:
        return call.args["self"]  # type: ignore[no-any-return]
    part = call.length(out, dim)
    full = out.value.sizes[dim]
    if isinstance(part, int) and full.power == 0 and part != full.coefficient:
        start = call.args.get("start") or 0
        whole = x.value.sizes[dim].coefficient
        start = (start + whole if start < 0 else start) * part // full.coefficient
        return call.call(call.op.node.target, start=start, end=start + part)
    return None


def _split(call: _Call, letter: Letter | None) -> fx.Node | None:
    dim = int(call.args.get("dim", 0))
    size = call.length(call.op.context.outputs[0], dim)
    count = len(call.op.context.outputs)
    return call.emitter._call(aten.split_with_sizes.default, call.args["self"], [size] * count, dim)


def _group_norm(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    parts = 1
    for axis in call.cut[letter]:
        parts *= axis.size
    return call.call(call.op.node.target, num_groups=int(call.args["num_groups"]) // parts)


def _groups(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    parts = 1
    for axis in call.cut[letter]:
        parts *= axis.size
    return call.call(call.op.node.target, groups=int(call.args["groups"]) // parts)


def _experts(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    operands = [call.emitter.get(o.value, call.needed[o.slot]) for o in call.op.context.inputs]
    return call.emitter._call(lower.grouped_mm, *operands[:3], call.start_of(letter))


def _random(call: _Call) -> fx.Node:
    e = call.emitter
    out = call.op.context.out
    span = e.span(out.value, call._out_states(out))
    if call.op.name == "shardwise.dropout":
        return e._call(lower.dropout, call.args["0"], call.args["1"], call.args["2"], e.key, span)
    size = e.shape(out.value, call._out_states(out))
    dtype = call.args["dtype"]
    return e._call(lower.draw, call.op.name == "shardwise.normal", size, call.args["1"], e.key, span, dtype, e.device)


def _batch_norm(call: _Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    e = call.emitter
    x = call.op.context.inputs[0].value
    count: Number = e.samples if e.per_micro_batch else e.total
    for size in x.sizes[2:]:
        count = e._times(count, size.coefficient)
    axes = [e._attr(at_axis(list(e.axes).index(axis))) for axis in call.cut[letter]]
    a = call.args
    node = e._call(
        lower.batch_norm, a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["momentum"],
        a["eps"], count, axes,
    )  # fmt: skip
    mean = call.op.context.outputs[3]
    both_ways = 2 if x in e.graph.needs_grad else 1
    node.meta["sends"] = [
        ("all_reduce", axis, mean.value, call._out_states(mean), x.dtype, 1)
        for axis in call.cut[letter]
        for _ in range(2 * both_ways)
    ]
    return node


_Handler = Callable[[_Call, Letter | None], fx.Node | None]
_SPECIAL: dict[tuple[str, str], _Handler] = {
    ("mean", ""): _mean,
    ("vocabulary", ""): _vocabulary,
    ("classes", ""): _classes,
    ("queries", ""): _queries,
    ("iota", ""): _iota,
    ("split", ""): _split,
    ("group_norm", ""): _group_norm,
    ("groups", ""): _groups,
    ("experts", ""): _experts,
    ("batch_norm", ""): _batch_norm,
}
_VIEWS = {"aten.view", "aten._unsafe_view", "aten.view_copy", "aten._reshape_alias"}
_ALWAYS: dict[str, Callable[[_Call], fx.Node | None]] = {
    "aten.slice": _slice,
    "aten.arange": _arange,
    "shardwise.dropout": _random,
    "shardwise.uniform": _random,
    "shardwise.normal": _random,
}


def at_axis(index: int) -> str:
    """The attribute under which a program has a mesh axis."""
    return f"axis_{index}"


def graph_items(graph: Graph) -> list[tuple[fx.Node, tuple[Value, ...]]]:
    """Every fx node with the tensors it produces."""
    return list(graph.values.items())


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def lower_add(a: int, b: int) -> int:
    """A sum of numbers that are known at run time."""
    return a + b


def _share(samples: int, total: int) -> float:
    return samples / total


def _narrow(x: Tensor, pos: int, lead: int, first: int, samples: int, total: int) -> Tensor:
    """The samples of one micro-batch."""
    return c.merge_view(c.split_view(x, pos, lead, total).narrow(pos + 1, first, samples), pos)


def _arange_span(span: Any, dtype: Any, device: Any) -> Tensor:
    ((leaves,),) = (span,)
    start, size, _ = leaves[0]
    return torch.arange(start, start + size, dtype=dtype, device=device)


def fuse_bias(graph: fx.Graph) -> None:
    """Put a bias back into the product it follows, where nothing comes between them."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        product, bias = node.args
        if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node) or len(product.users) != 1:
            continue
        linear = product.target is aten.linear.default and bias.op == "get_attr"
        if bias.target is aten.view.default and product.target in _CONVOLUTIONS:
            bias, linear = bias.args[0], True  # type: ignore[assignment]
        if product.target is aten.mm.default and bias.op == "get_attr":
            with graph.inserting_before(node):
                fused = graph.call_function(aten.addmm.default, (bias, *product.args))
        elif linear:
            args = list(product.args)
            args[2:3] = [bias]
            with graph.inserting_before(node):
                fused = graph.call_function(product.target, tuple(args), dict(product.kwargs))
        else:
            continue
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(product)
    graph.eliminate_dead_code()


_CONVOLUTIONS: Collection[Any] = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip

__all__ = ["Emitter", "Program", "attribute_name", "is_getitem"]
