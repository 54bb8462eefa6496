"""Work: what every operator of a graph does on one rank, when tensor axes split it: operations, bytes, messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from shardwise.cost.place import DATA
from shardwise.cost.traits import ATTENTION, MEMORY, NOTHING, PRODUCT, Traits
from shardwise.graph.dims import Size
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.graph.saved import Saved
from shardwise.parallel.layout import PARTIAL, VARIES, WHOLE, Cut, Layout, SplitAxis, State, States

_CHANNELS_FIRST = ("aten.conv", "aten._conv")


class Product(NamedTuple):
    """Matrix products of one shape: `copies` times (rows × depth) by (depth × columns)."""

    copies: float
    rows: float
    columns: float
    depth: float


class Message(NamedTuple):
    """A collective of one operator's edge: on which axis, of which kind, the bytes of the whole tensor."""

    axis: str
    kind: str
    size: float


@dataclass(frozen=True)
class Task:
    """What one operator does on one rank for one micro-batch.

    Attributes:
        op: the operator.
        kind: PRODUCT, ATTENTION, MEMORY (bound by memory) or NOTHING (a view).
        dtype: what it computes in.
        flops: forward operations.
        product: its matrix product, for a PRODUCT.
        gradients: how many of its tensor inputs get a gradient.
        moved: bytes that forward reads and writes; tensors that never reach memory, because operators are fused, are
            left out.
        moved_back: the same of backward.
        causal: whether it is attention that leaves out the keys behind each query; of some queries it takes all keys.
        calls: 1 where it is an operator of its own, 0 where it is a part of another or a view.
        last: whether it comes behind the last product, as a loss does.
        forward, backward: collectives of its edges.
    """

    op: Op
    kind: str
    dtype: torch.dtype
    flops: float
    product: Product | None
    gradients: int
    moved: float
    moved_back: float
    causal: bool
    calls: int
    last: bool
    forward: tuple[Message, ...]
    backward: tuple[Message, ...]


class Work:
    """What the operators of a graph do on one rank.

    Args:
        graph: the captured model.
        axes: the mesh axes that split other dims than the batch; all of them where operators need all samples.
        saved: what each operator keeps for backward.
        traits: what is known of the operators before they are split; None where nothing is fused.
        balanced: whether the queries of each rank are early ones and late ones, so that causal attention takes half of
            the keys however they are split.
        regather: whether of a tensor gathered for an operator the own part is kept, and gathered again in backward.
        scores: bytes that a loss in one operator keeps of each score; 0 where the graph's operators keep what they do.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Sequence[SplitAxis],
        saved: Mapping[Op, Saved],
        traits: Traits | None = None,
        *,
        balanced: bool = False,
        regather: bool = False,
        scores: float = 0.0,
    ) -> None:
        self.graph, self.axes, self.saved = graph, tuple(axes), saved
        self.traits = traits or Traits(graph)
        self.balanced, self.regather, self.scores = balanced, regather, scores
        self.layout = Layout(graph, axes)
        self._tasks: dict[int, list[Task]] = {}
        self._entries: dict[Value, tuple[Size, int]] = {}

    # -- sizes -------------------------------------------------------------------------------------------------------

    def parts(self, states: Sequence[State]) -> int:
        """Into how many parts a tensor in these states is cut."""
        total = 1
        for axis, state in zip(self.axes, states, strict=True):
            if isinstance(state, Cut):
                total *= axis.size
        return total

    def local(self, value: Value, samples: int, states: States | None = None) -> float:
        """Entries of a tensor on one rank."""
        if states is not None:
            return value.numel().at(samples) / self.parts(states)
        if value not in self._entries:
            self._entries[value] = value.numel(), self.parts(self.layout.states[value])
        size, parts = self._entries[value]
        return size.at(samples) / parts

    def local_bytes(self, value: Value, samples: int, states: States | None = None) -> float:
        """Bytes of a tensor on one rank."""
        return self.local(value, samples, states) * value.dtype.itemsize

    def made(self, op: Op, samples: int) -> float:
        """Bytes of what an operator makes that gradients flow through, on one rank."""
        return sum(self.local_bytes(v, samples) for v in self.traits.of[op].made)

    def largest(self, op: Op, samples: int) -> float:
        """Bytes of what an operator makes and of its gradient, on one rank; a loss in one operator has but this."""
        if self.scores and self.traits.of[op].last:
            return 0.0
        return self.made(op, samples) * (1 if self.scores and op in self.traits.heads else 2)

    # -- tasks -------------------------------------------------------------------------------------------------------

    def tasks(self, samples: int) -> list[Task]:
        """What each operator does for a micro-batch of `samples` samples on this rank's data axes."""
        if samples not in self._tasks:
            self._tasks[samples] = [self._task(op, samples) for op in self.graph.ops]
        return self._tasks[samples]

    def _task(self, op: Op, samples: int) -> Task:
        trait, share = self.traits.of[op], self.layout.share(op)
        kind, gradients = trait.kind, trait.gradients
        flops = op.context.work.at(samples) * share
        out = sum(self.local_bytes(v, samples) for v in trait.writes)
        read = [self.local_bytes(r.value, samples, self.layout.needs(op, r.slot)) for r in trait.reads]
        # What an operator keeps and no other has, it writes in forward and reads in backward.
        inside = sum(size.at(samples) for size in self.saved[op].others) * share if kind == MEMORY else 0.0
        moved = sum(read) + out + inside
        grads = sum(size for r, size in zip(trait.reads, read, strict=True) if r.grad)
        calls = int(kind != NOTHING and (kind != MEMORY or self.traits.fused == "none" or out > 0))
        if trait.bias:
            moved, calls = 0.0, 0
        if trait.free:
            moved = grads = flops = 0.0
            calls = 0
        back = moved + grads if gradients and op.name not in _FREE_BACK else 0.0
        forward, backward = self._messages(op, samples)
        product = self._product(op, samples, flops) if kind == PRODUCT else None
        queries = any(c.letter is not None and c.letter.special == "queries" for c in self.layout.choices[op])
        causal = bool(op.context.arguments.get("is_causal", False)) and (self.balanced or not queries)
        return Task(
            op, kind, trait.dtype, flops, product, gradients, moved, back, causal, calls, trait.last, forward, backward
        )

    def _product(self, op: Op, samples: int, flops: float) -> Product:
        out = op.context.out.value
        position = 1 if op.name.startswith(_CHANNELS_FIRST) else -1
        states = self.layout.states[out]
        entries = self.local(out, samples)
        columns = float(out.sizes[position].at(samples)) if out.sizes else 1.0
        for axis, state in zip(self.axes, states, strict=True):
            if isinstance(state, Cut) and out.ndim and state.pos == position % out.ndim:
                columns /= axis.size
        columns = max(columns, 1.0)
        weight = any(v in self.traits.params for v in op.inputs)
        rows = float(out.sizes[-2].at(samples)) if not weight and out.ndim > 2 else max(entries / columns, 1.0)
        count = max(entries / (rows * columns), 1.0)
        return Product(count, rows, columns, flops / max(2 * entries, 1))

    # -- messages ----------------------------------------------------------------------------------------------------

    def _messages(self, op: Op, samples: int) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        forward, backward = [], []
        for value, need in self._first_uses[op]:
            made = self.layout.states[value]
            late = self.layout.grad_axes(value)
            for a, axis in enumerate(self.axes):
                if axis.size == 1 or made[a] == need[a] or a in late:
                    continue
                size = self.local_bytes(value, samples, (*made[:a], WHOLE, *made[a + 1 :]))
                # Each rank sends its part to all others, or takes a part in what makes the whole.
                part = {"all_to_all": size / axis.size}
                there, back = exchanged(made[a], need[a])
                forward += [Message(axis.name, kind, part.get(kind, size)) for kind in there]
                if value in self.graph.needs_grad:
                    backward += [Message(axis.name, kind, part.get(kind, size)) for kind in back]
        for axis, choice in zip(self.axes, self.layout.choices[op], strict=True):
            if axis.size > 1 and choice.letter is not None and choice.letter.special == "classes":
                # The largest score of each sample's classes; then their sum, and the score of its label.
                scores = op.context.inputs[0].value
                size = scores.bytes().at(samples) / choice.letter.dim.size.coefficient
                forward += [Message(axis.name, "all_reduce", size), Message(axis.name, "all_reduce", 2 * size)]
        for value in self.traits.shared[op] if not any(axis.dims == ("batch",) for axis in self.axes) else ():
            # Not made of parameters alone, so that its gradient is summed at once, not with theirs after backward.
            backward.append(Message(DATA, "all_reduce", self.local_bytes(value, samples)))
        if op.name in _BATCH_NORMS:
            # Over the ranks that split the batch: mean, squares and count of each channel; then two gradients.
            channels = op.outputs[0].sizes[1].at(1) * 4
            forward.append(Message(DATA, "all_gather", 3 * channels))
            backward.append(Message(DATA, "all_reduce", 2 * channels))
        for value in self._handed_out.intersection(op.outputs):
            made = self.layout.states[value]
            for a, axis in enumerate(self.axes):
                size = self.local_bytes(value, samples, (*made[:a], WHOLE, *made[a + 1 :]))
                forward += [Message(axis.name, kind, size) for kind in exchanged(made[a], WHOLE)[0] if axis.size > 1]
        return tuple(forward), tuple(backward)

    @cached_property
    def _handed_out(self) -> frozenset[Value]:
        """Outputs of the model, which are joined on one rank."""
        return frozenset(self.graph.results.values() if self.graph.predicts else ())

    @cached_property
    def _first_uses(self) -> Mapping[Op, list[tuple[Value, States]]]:
        """For each operator the tensors that it is the first to need in a state: an edge is converted once."""
        seen: set[tuple[Value, States]] = set()
        found: dict[Op, list[tuple[Value, States]]] = {}
        for op in self.graph.ops:
            mine = found.setdefault(op, [])
            for operand in op.context.inputs:
                key = (operand.value, self.layout.needs(op, operand.slot))
                if key not in seen:
                    seen.add(key)
                    mine.append(key)
        return found

    # -- activations -------------------------------------------------------------------------------------------------

    def kept(self, samples: int, *, attention: str = "fused") -> list[float]:
        """For each operator the bytes that it is the first to keep for backward, for one micro-batch on one rank.

        Args:
            samples: of the micro-batch.
            attention: whether attention is "fused", writes its "scores", or keeps what it was "observed" to keep.
        """
        seen: set[tuple[Value, float]] = set()
        found = []
        for op in self.graph.ops:
            total = 0.0
            keeps = self.saved[op]
            values, others = keeps.values, [float(size.at(samples)) for size in keeps.others]
            if self.scores and self.traits.of[op].last:
                values, others = (), []
            if self.scores and op in self.traits.heads:
                total += self.scores * sum(self.local(value, samples) for value in op.outputs)
            share = self.layout.share(op)
            if self.traits.kinds[op] == ATTENTION and attention != "observed":
                query = op.context.inputs[0].value
                depth = max(query.sizes[-1].coefficient, 1)
                values = tuple(dict.fromkeys([*op.inputs[:3], *op.outputs]))
                others = [query.numel().at(samples) / depth * 4]
                if attention == "scores":
                    # What softmax makes, the mask of dropout and what it leaves: 5as²b (Korthikanti et al., 2022).
                    values = tuple(op.inputs[:3])
                    others = [op.context.work.at(samples) / (4 * depth) * (2 * query.dtype.itemsize + 1)]
            if self.traits.fused != "none" and self.traits.kinds[op] in (MEMORY, NOTHING) and not others:
                values, others = self._fused_keeps(op, values), []
            new = self._kept_by(op, values, samples) - seen
            seen |= new
            total += sum(size for _, size in new)
            found.append(total + sum(others) * share if values or others else total)
        return found

    def halved(self, samples: int) -> list[tuple[float, float]]:
        """For each operator the bytes that it is the first to keep from the first half of backward to the second.

        And those of the largest gradient that it makes then. Products keep what they kept of forward, whoever else kept
        it, and the gradients of what they make. Of other operators the gradients of parameters wait for the second
        half.
        """
        seen: set[tuple[Value, float]] = set()
        found = []
        for op in self.graph.ops:
            total = late = 0.0
            if self.traits.of[op].halves:
                # Autograd holds what it takes a gradient of as long as what it computes that gradient with.
                values = self._kept_by(op, (*self.saved[op].values, *op.inputs), samples) - seen
                seen |= values
                others = sum(float(size.at(samples)) for size in self.saved[op].others) * self.layout.share(op)
                total = sum(size for _, size in values) + others + self.made(op, samples)
                late = max(self.local_bytes(value, samples) for value in self.traits.learned(op))
            elif self.traits.of[op].weighted:
                total = sum(self.local_bytes(value, samples) for value in self.traits.learned(op))
            found.append((total, late))
        return found

    def _kept_by(self, op: Op, values: Sequence[Value], samples: int) -> set[tuple[Value, float]]:
        """Of tensors that an operator keeps those that they are views of, and the bytes of what it keeps of these.

        Parameters and the batch itself are not counted, for they are kept anyway.
        """
        needs = {o.value: self.layout.needs(op, o.slot) for o in op.context.inputs}
        found = set()
        for value in values:
            root = self.traits.root(value)
            if root in self.traits.params or root not in self.graph.learned:
                continue
            size = self.local_bytes(root, samples)
            if value in needs and not self.regather:
                # What was gathered for this operator is another tensor than the part it was gathered from.
                size = max(size, self.local_bytes(value, samples, needs[value]))
            found.add((root, size))
        return found

    def back(self, samples: int) -> list[tuple[float, float, float]]:
        """For each operator the bytes that its backward makes: of parameters' gradients, and of all else.

        First of gradients that this rank has alone, then of those that are summed over an axis.
        """
        found = []
        for op in self.graph.ops:
            keeps, sizes = self.saved[op], [0.0, 0.0, 0.0]
            needs = {o.value: self.layout.needs(op, o.slot) for o in op.context.inputs}
            for value in keeps.fresh:
                size = self.local_bytes(value, samples)
                kind = 2 if value not in self.traits.params else int(self._is_summed(value))
                sizes[kind] += max(size, self.local_bytes(value, samples, needs.get(value)))
            room = sum(size.at(samples) for size in keeps.room) * self.layout.share(op)
            found.append((sizes[0], sizes[1], sizes[2] + room))
        return found

    def _is_summed(self, param: Value) -> bool:
        """Whether a parameter's gradient is summed over an axis."""
        return any(self.axes[a].size > 1 for a in self.layout.grad_axes(param))

    def _fused_keeps(self, op: Op, values: tuple[Value, ...]) -> tuple[Value, ...]:
        """What a fused operator keeps: of what never reaches memory that from which it is computed again."""
        found: dict[Value, None] = {}
        todo, done = list(values), set[Value]()
        while todo:
            value = todo.pop()
            producer = self.graph.producer.get(value)
            if value in done:
                continue
            done.add(value)
            if producer is not None and self._is_inside(value, producer, op):
                todo += [v for v in producer.inputs if v in self.graph.learned]
            else:
                found[value] = None
        return tuple(found)

    def _is_inside(self, value: Value, producer: Op, op: Op) -> bool:
        """Whether a tensor that an operator keeps is only there inside of what it is fused to."""
        if self.traits.kinds[producer] == MEMORY:
            return not self.traits.reaches_memory(value, producer)
        return self.traits.kinds[producer] == NOTHING and self.traits.fuses(producer, op)


def exchanged(made: State, need: State) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The collectives that turn a tensor from one state into another, and those of its gradient."""
    if made == need:
        return (), ()
    if made == PARTIAL:
        if isinstance(need, Cut):
            return ("reduce_scatter",), ("all_gather",)
        return ("all_reduce",), ("all_reduce",) if need == VARIES else ()
    if isinstance(made, Cut):
        if isinstance(need, Cut):
            return ("all_to_all",), ("all_to_all",)
        return ("all_gather",), ("reduce_scatter",) if need == VARIES else ()
    if isinstance(need, Cut):
        return (), ("all_gather",)
    return (), ("all_reduce",) if need == VARIES else ()


_BATCH_NORMS = {"aten._native_batch_norm_legit", "aten._native_batch_norm_legit_functional", "aten.batch_norm"}
_FREE_BACK = {"aten.add", "aten.sub"}
