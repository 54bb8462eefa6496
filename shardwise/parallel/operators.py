"""Operators of a rank's program: each called on this rank's parts, or lowered to what its split letter asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from shardwise.graph.dims import product
from shardwise.graph.graph import Op
from shardwise.graph.rewrite import arguments
from shardwise.graph.rules import Letter, Operand
from shardwise.parallel import lower
from shardwise.parallel.batch_norm import BACKWARD_ROWS, FORWARD_ROWS, batch_norm, statistics_dtype
from shardwise.parallel.layout import Cut, States
from shardwise.parallel.mesh import Axis
from shardwise.parallel.writer import Number, Writer

if TYPE_CHECKING:
    from shardwise.parallel.program import Emitter

aten = torch.ops.aten


@dataclass
class Call:
    """One operator being written for a rank."""

    emitter: Emitter
    op: Op

    @property
    def writer(self) -> Writer:
        return self.emitter.writer

    def emit(self) -> fx.Node:
        e, w, op = self.emitter, self.writer, self.op
        choices = e.layout.choices[op]
        self.states = [self.out_states(o) for o in op.context.outputs]
        self.needed = {o.slot: e.layout.needs(op, o.slot) for o in op.context.inputs}
        self.taken = iter(op.context.inputs)
        self.args = {name: self._argument(a) for name, a in arguments(op.node).items()}
        for name, slot in op.context.size_args.items():
            if name in self.args and isinstance(self.args[name], (list, tuple)):
                out = op.context.operand(slot).value
                self.args[name] = w.shape(out, self.out_states(op.context.operand(slot)))
        self.cut: dict[Letter, list[Axis]] = {}
        for a, choice in enumerate(choices):
            axis = w.axes[a]
            if choice.letter is not None and axis is not None:
                self.cut.setdefault(choice.letter, []).append(axis)
        special = {letter.special: letter for letter in self.cut if letter.special}
        time_special = {
            ch.letter.special for a, ch in enumerate(choices) if w.axes[a] is None and ch.letter is not None
        }
        for name in [*special, *time_special, ""]:
            handler = _SPECIAL.get((name, op.name)) or _SPECIAL.get((name, ""))
            if handler is not None:
                result = handler(self, special.get(name))
                if result is not None:
                    return result
        if op.name in _VIEWS:
            # A part of a tensor may not have the strides that the whole one had.
            return w.call(aten.reshape.default, self.args["self"], self.args["size"])
        always = _ALWAYS.get(op.name)
        if always is not None:
            result = always(self)
            if result is not None:
                return result
        return self.call(op.node.target)

    def out_states(self, operand: Operand) -> States:
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
        e, w = self.emitter, self.writer
        size = e.graph.size(node.meta["val"])
        if size.expression:
            args = [self._number(a) if isinstance(a, fx.Node) else a for a in node.args]
            assert callable(node.target)
            return w.call(node.target, *args)
        return size.coefficient if size.power == 0 else w.times(w.total, size.coefficient)

    def call(self, target: Any, **changes: Any) -> fx.Node:
        """Call an operator with this one's arguments, some changed."""
        given = {**self.args, **changes}
        if not isinstance(target, torch._ops.OpOverload):
            args = [given[str(i)] for i in range(len(self.op.node.args))]
            rest = {k: v for k, v in given.items() if not k.isdigit()}
            return self.writer.call(target, *args, **rest)
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
        return self.writer.call(target, *args, **kwargs)

    def length(self, operand: Operand, pos: int) -> Number:
        """The size of a position of an operand on this rank."""
        states = self.needed.get(operand.slot) or self.out_states(operand)
        return self.writer.shape(operand.value, states)[pos]

    def start_of(self, letter: Letter) -> Number:
        """Where this rank's part of a letter starts in its position, of which the letter is the major part."""
        place = letter.places[0]
        operand = self.op.context.operand(place.slot)
        states = self.needed.get(place.slot) or self.out_states(operand)
        minor = product(leaf.size for leaf in operand.value.dims[place.pos].leaves()[1:])
        return self.writer.times(self.writer.start(operand.value, place.pos, place.leaf, states), minor.coefficient)

    def parts(self, letter: Letter) -> int:
        """Into how many parts a letter is cut."""
        return math.prod(axis.size for axis in self.cut[letter])


def _mean(call: Call, letter: Letter | None) -> fx.Node:
    x = call.op.context.inputs[0]
    w = call.writer
    count: Number = 1
    for pos in call.op.context.reduced(x):
        size = x.value.sizes[pos]
        count = w.times(count, size.coefficient)
        for _ in range(size.power):
            count = w.times(count, w.total)
    return w.call(
        lower.mean, call.args["self"], call.args.get("dim"), bool(call.args.get("keepdim", False)),
        call.args.get("dtype"), count,
    )  # fmt: skip


def _vocabulary(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    a = call.args
    return call.writer.call(lower.embedding, a["weight"], a["indices"], call.start_of(letter), a.get("padding_idx", -1))


def _classes(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    w = call.writer
    axes = [w.axis(w.axes.index(axis)) for axis in call.cut[letter]]
    node = w.call(
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


def _queries(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None or not call.args.get("is_causal"):
        return None
    a = call.args
    return call.writer.call(
        lower.attention, a["query"], a["key"], a["value"], call.start_of(letter), a.get("scale"),
        bool(a.get("enable_gqa")),
    )  # fmt: skip


def _arange(call: Call) -> fx.Node | None:
    out = call.op.context.out
    states = call.out_states(out)
    e, w = call.emitter, call.writer
    if not out.value.sizes[0].power and not any(isinstance(state, Cut) for state in states):
        return None
    dtype = e.dtypes.get(out.value.dtype, out.value.dtype)
    first, step = call.args.get("start", 0), call.args.get("step", 1)
    return w.call(lower.arange, w.span(out.value, states), first, step, dtype, e.device)


def _iota(call: Call, letter: Letter | None) -> fx.Node | None:
    """The position is cut, and the index counts over the whole step."""
    w = call.writer
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
            start = w.start(t.value, place.pos, place.leaf, call.needed[t.slot])
            indices[n] = w.call(aten.sub.Tensor, indices[n], start)
    return call.call(call.op.node.target, indices=indices)


def _slice(call: Call) -> fx.Node | None:
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


def _split(call: Call, letter: Letter | None) -> fx.Node | None:
    dim = int(call.args.get("dim", 0))
    size = call.length(call.op.context.outputs[0], dim)
    count = len(call.op.context.outputs)
    return call.writer.call(aten.split_with_sizes.default, call.args["self"], [size] * count, dim)


def _group_norm(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    return call.call(call.op.node.target, num_groups=int(call.args["num_groups"]) // call.parts(letter))


def _groups(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    return call.call(call.op.node.target, groups=int(call.args["groups"]) // call.parts(letter))


def _experts(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    operands = [call.emitter.get(o.value, call.needed[o.slot]) for o in call.op.context.inputs]
    return call.writer.call(lower.grouped_mm, *operands[:3], call.start_of(letter))


def _random(call: Call) -> fx.Node:
    e, w = call.emitter, call.writer
    out = call.op.context.out
    states = call.out_states(out)
    if call.op.name == "shardwise.dropout" and not e.exact_dropout:
        part = w.part(states)
        return w.call(lower.dropout_per_rank, call.args["0"], call.args["1"], call.args["2"], w.key, *part)
    span = w.span(out.value, states)
    if call.op.name == "shardwise.dropout":
        return w.call(lower.dropout, call.args["0"], call.args["1"], call.args["2"], w.key, span)
    size = w.shape(out.value, states)
    dtype = call.args["dtype"]
    return w.call(lower.draw, call.op.name == "shardwise.normal", size, call.args["1"], w.key, span, dtype, e.device)


def _batch_norm(call: Call, letter: Letter | None) -> fx.Node | None:
    if letter is None:
        return None
    e, w = call.emitter, call.writer
    x = call.op.context.inputs[0].value
    axes = call.cut[letter]
    a = call.args
    node = w.call(
        batch_norm, a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["momentum"], a["eps"],
        [w.axis(w.axes.index(axis)) for axis in axes],
    )  # fmt: skip
    mean = call.op.context.outputs[3]
    dtype, states = statistics_dtype(x.dtype), call.out_states(mean)
    node.meta["sends"] = [("all_gather", axis, mean.value, states, dtype, FORWARD_ROWS) for axis in axes]
    if x in e.graph.needs_grad:
        node.meta["answers"] = [("all_reduce", axis, mean.value, states, dtype, BACKWARD_ROWS) for axis in axes]
    return node


_Handler = Callable[[Call, Letter | None], fx.Node | None]
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
_ALWAYS: dict[str, Callable[[Call], fx.Node | None]] = {
    "aten.slice": _slice,
    "aten.arange": _arange,
    "shardwise.dropout": _random,
    "shardwise.uniform": _random,
    "shardwise.normal": _random,
}
