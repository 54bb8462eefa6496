"""Edges: where an operator needs a tensor otherwise than it is produced, the collectives in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from shardwise.graph.graph import Graph
from shardwise.graph.rules import Value
from shardwise.parallel import collectives as c
from shardwise.parallel import lower
from shardwise.parallel.layout import PARTIAL, VARIES, WHOLE, Cut, Layout, State, States, Whole
from shardwise.parallel.mesh import Axis
from shardwise.parallel.writer import Number, Writer


@dataclass(frozen=True, eq=False)
class Converter:
    """Writes conversions between states."""

    graph: Graph
    layout: Layout
    writer: Writer

    def convert(self, value: Value, node: fx.Node, produced: States, target: States) -> fx.Node:
        """A tensor in other states than it is in.

        Args:
            value: the tensor.
            node: the tensor as it is produced.
            produced: its states there.
            target: the states wanted.
        """
        # Inner cuts of a dim are undone before outer ones, and made after them.
        now = list(produced)
        node = self._undo(value, node, now, target)
        return self._make(value, node, now, target)

    def _undo(self, value: Value, node: fx.Node, now: list[State], target: States) -> fx.Node:
        """Leave the cuts and sums that `target` does not have; `now` becomes what is left."""
        w, grad = self.writer, value in self.graph.needs_grad
        for a in reversed(range(len(now))):
            # A cut inside of one that comes or goes holds other parts afterwards, so that it is made anew.
            anew = isinstance(target[a], Cut) and _moves(target[a], now[:a], target[:a])
            old, new = now[a], WHOLE if anew else target[a]
            axis = w.axes[a]
            if axis is None or old == new:
                continue
            if isinstance(old, Cut) and (isinstance(new, Whole) or _same_pos(old, new)):
                whole = new if isinstance(new, Whole) else WHOLE
                varies = whole == VARIES and grad
                before = tuple(now)
                node = w.call(c.gather, node, w.axis(a), *w.geometry(value, now, a, old), varies)
                now[a] = whole
                back = ("reduce_scatter", before) if varies else None
                _announce(node, value, axis, ("all_gather", before), back)
            elif isinstance(old, Cut) and isinstance(new, Cut):
                source, before = w.geometry(value, now, a, old), tuple(now)
                now[a] = WHOLE
                node = w.call(c.exchange, node, w.axis(a), source, w.geometry(value, now, a, new))
                now[a] = new
                back = ("all_to_all", tuple(now)) if grad else None
                _announce(node, value, axis, ("all_to_all", before), back)
            elif old == PARTIAL and isinstance(new, Whole):
                node = w.call(c.reduce, node, w.axis(a))
                _announce(node, value, axis, ("all_reduce", tuple(now)), None)
                if new == VARIES and grad:
                    node = w.call(c.vary, node, w.axis(a))
                    _announce(node, value, axis, None, ("all_reduce", tuple(now)))
                now[a] = new
        return node

    def _make(self, value: Value, node: fx.Node, now: list[State], target: States) -> fx.Node:
        """Make the cuts that `now` does not have."""
        w, grad = self.writer, value in self.graph.needs_grad
        # What differs by rank in these gradients is summed once for all uses, after backward.
        late = self.layout.grad_axes(value)
        for a in range(len(now)):
            old, new = now[a], target[a]
            axis = w.axes[a]
            if axis is None:
                node = self._in_time(a, node, old, new, value)
            elif old == new and not (a in late and new == WHOLE):
                continue
            elif old == PARTIAL and isinstance(new, Cut):
                now[a] = WHOLE
                node = w.call(c.reduce_scatter, node, w.axis(a), *w.geometry(value, now, a, new))
                now[a] = new
                back = ("all_gather", tuple(now)) if grad else None
                _announce(node, value, axis, ("reduce_scatter", tuple(now)), back)
            elif isinstance(old, Whole) and isinstance(new, Cut):
                now[a] = WHOLE
                pads = a in late or not grad
                node = w.call(c.scatter, node, w.axis(a), *w.geometry(value, now, a, new), pads)
                now[a] = new
                if not pads:
                    _announce(node, value, axis, None, ("all_gather", tuple(now)))
            elif isinstance(old, Whole) and isinstance(new, Whole):
                if a in late:
                    # Every rank has all of this use's gradient.
                    if new == WHOLE:
                        node = w.call(c.scale_grad, node, 1.0 / axis.size)
                elif grad and new == VARIES:
                    node = w.call(c.vary, node, w.axis(a))
                    _announce(node, value, axis, None, ("all_reduce", tuple(now)))
            else:
                raise AssertionError(f"{value.name}: no way from {old} to {new}")
            now[a] = new
        return node

    def _in_time(self, a: int, node: fx.Node, old: State, new: State, value: Value) -> fx.Node:
        """Micro-batches: what is whole in each of them counts once, so a sum over them takes its share."""
        w = self.writer
        if new == PARTIAL and isinstance(old, Whole):
            return w.call(lower.share, node, w.samples, w.total)
        if isinstance(new, Cut) and isinstance(old, Whole):
            states = [WHOLE] * len(w.axes)
            lead: Number = 1
            for k in range(new.leaf):
                lead = w.times(lead, w.leaf_size(value, new.pos, k, states))
            return w.call(lower.narrow, node, new.pos, lead, w.first, w.samples, w.total)
        return node


def _announce(
    node: fx.Node, value: Value, axis: Axis, forward: tuple[str, States] | None, backward: tuple[str, States] | None
) -> None:
    """Note what a node sends in forward and answers in backward: (kind, the states that the tensor is handed in).

    Of a reduce-scatter they are the states that it comes out in.
    """
    for when, what in (("sends", forward), ("answers", backward)):
        if what is not None:
            node.meta[when] = [(what[0], axis, value, what[1])]


def _moves(cut: State, now: Sequence[State], target: Sequence[State]) -> bool:
    """Whether an axis begins or ends to cut what `cut` cuts."""
    return any((old == cut) != (new == cut) for old, new in zip(now, target, strict=True))


def _same_pos(a: Cut, b: State) -> bool:
    return isinstance(b, Cut) and a.pos == b.pos
