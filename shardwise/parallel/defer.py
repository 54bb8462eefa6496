"""Backward in two halves, for zero-bubble schedules: gradients of a stage's inputs now, of its parameters later.

The stage before waits for the gradients of inputs, and nobody waits for those of parameters (Qi et al., "Zero bubble
pipeline parallelism", 2023). So every operator at which parameters meet what was received runs as a small graph of its
own. In the first half of backward it gives the gradient of what was received, and a tape notes what is left to do; the
second half plays the tape. Products come in halves, each of which is a product of its own. What computes the gradients
of all operands in one go, such as a norm or an LSTM, runs once, in the first half, which keeps those of parameters for
the second: in halves it would be computed twice. What depends on parameters alone is left to the second half
altogether.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.parallel.program import Program, attribute_name

_IN_HALVES = {
    "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "convolution", "dot", "einsum", "linear", "matmul", "mm", "mv",
    "_grouped_mm", "_scaled_mm",
}  # fmt: skip
"""Operators that compute the gradient of each operand by itself."""


def comes_in_halves(name: str) -> bool:
    """Whether an operator, such as "aten.linear", computes the gradient of each operand by itself."""
    return name.split(".")[1] in _IN_HALVES


@dataclass(frozen=True, eq=False)
class _Note:
    """One operator whose second half is to come: what computes the gradients of `learned`."""

    learned: Sequence[Tensor]
    gradients: Callable[[], Sequence[Tensor | None]]


@dataclass(eq=False)
class Tape:
    """What the second half of one backward pass has to do."""

    notes: list[_Note] = field(default_factory=list)

    def play(self, roots: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Accumulate the gradients of parameters.

        Args:
            roots: outputs of the stage that depend on parameters alone.
            grads: their gradients; None for the loss.
        """
        # A parameter with several uses is accumulated into, and its hooks are called, once. Where none is reached
        # through another tensor, no gradient waits for the others.
        alone = not roots and all(learned.is_leaf for note in self.notes for learned in note.learned)
        at: list[Any] = list(roots)  # tensors, and the edges of others
        given = list(grads)
        left = Counter(id(learned) for note in self.notes for learned in note.learned)
        sums: dict[int, Tensor] = {}
        self.notes.reverse()
        while self.notes:
            note = self.notes.pop()  # and what it kept goes
            for learned, grad in zip(note.learned, note.gradients(), strict=True):
                key = id(learned)
                left[key] -= 1
                if grad is not None:
                    sums[key] = sums[key] + grad if key in sums else grad
                if left[key] or key not in sums:
                    continue
                if alone:
                    torch.autograd.backward([learned], [sums.pop(key)])
                else:
                    at.append(get_gradient_edge(learned))
                    given.append(sums.pop(key))
            del note, learned, grad
        if at:
            torch.autograd.backward(at, given)


@dataclass(eq=False)
class Recorder:
    """Where a program's operators find the tape of the forward pass that is running.

    Attributes:
        tape: of that pass.
        targets: the operators that are deferred, and whether their backward is in one piece all the same: where it
            communicates, it must run once, and else it is no slower.
    """

    tape: Tape = field(default_factory=Tape)
    targets: list[tuple[Callable[..., Any], bool]] = field(default_factory=list)

    def start(self) -> Tape:
        """A new tape, for one forward pass."""
        self.tape = Tape()
        return self.tape


class _Deferred(torch.autograd.Function):
    """An operator as a graph of its own. Parameters are no inputs of it, so the outer graph does not reach them."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], whole: bool, tape: Tape, learned: Sequence[Tensor], *received: Tensor
    ) -> tuple[Any, ...]:
        with torch.enable_grad():
            ctx.received = [x.detach().requires_grad_() for x in received]
            ctx.own = [w.detach().requires_grad_() for w in learned]
            outs = run(ctx.received, ctx.own)
        # Not the outputs themselves, which whoever reads them may free before the second half.
        ctx.edges = [get_gradient_edge(out) if _differentiable(out) else None for out in outs]
        ctx.whole, ctx.tape, ctx.learned = whole, tape, learned
        ctx.set_materialize_grads(False)
        found = tuple(out.detach() if isinstance(out, Tensor) else out for out in outs)
        constant = (out for out, edge in zip(found, ctx.edges, strict=True) if edge is None)
        ctx.mark_non_differentiable(*(out for out in constant if isinstance(out, Tensor)))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        pairs = [(e, g) for e, g in zip(ctx.edges, grads, strict=True) if g is not None and e is not None]
        outs, given = [e for e, _ in pairs], [g for _, g in pairs]
        received, own = ctx.received, ctx.own
        # This node outlives its turn; what the second half does not need is to go.
        del ctx.received, ctx.own, ctx.edges
        if not outs:
            return None, None, None, None, *(None for _ in received)
        if ctx.whole:
            found = torch.autograd.grad(outs, [*received, *own], given, allow_unused=True)
            ready = found[len(received) :]
            ctx.tape.notes.append(_Note(ctx.learned, lambda: ready))
        else:
            found = torch.autograd.grad(outs, received, given, retain_graph=True, allow_unused=True)
            later = partial(torch.autograd.grad, outs, own, given, allow_unused=True)
            ctx.tape.notes.append(_Note(ctx.learned, later))
        return None, None, None, None, *found[: len(received)]


def _differentiable(out: Any) -> bool:
    return isinstance(out, Tensor) and out.requires_grad


def deferred(recorder: Recorder, which: int, weights: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Call an operator; its gradients of weights are taken in the second half of backward.

    Args:
        recorder: has the tape, and the operator.
        which: the operator's place among those deferred.
        weights: which of the arguments' leaves depend on parameters alone.
    """
    target, whole = recorder.targets[which]
    leaves, tree = tree_flatten((args, kwargs))
    learned = [i for i in weights if _differentiable(leaves[i])]
    received = [i for i, leaf in enumerate(leaves) if _differentiable(leaf) and i not in learned]
    if not learned or not received or not torch.is_grad_enabled():
        return target(*args, **kwargs)
    several = True

    def run(new_received: Sequence[Tensor], new_learned: Sequence[Tensor]) -> tuple[Any, ...]:
        nonlocal several
        replaced = list(leaves)
        for i, leaf in zip([*received, *learned], [*new_received, *new_learned], strict=True):
            replaced[i] = leaf
        new_args, new_kwargs = tree_unflatten(replaced, tree)
        found = target(*new_args, **new_kwargs)
        several = isinstance(found, (tuple, list))
        return tuple(found) if several else (found,)

    apply: Any = _Deferred.apply
    outs = apply(run, whole, recorder.tape, [leaves[i] for i in learned], *(leaves[i] for i in received))
    return outs if several else outs[0]


def defer_weights(program: Program, received: Collection[str]) -> tuple[Recorder, frozenset[str]]:
    """Rewrite a program so that its backward comes in two halves.

    Args:
        program: of one stage; changed in place.
        received: names of the inputs that gradients are sent back for.

    Returns:
        Where to find tapes, and the names of the outputs that depend on parameters alone.
    """
    graph = program.module.graph
    recorder = Recorder()
    program.module.tapes = recorder  # type: ignore[assignment]
    inputs = [n for n in graph.nodes if n.op == "placeholder"][4:]
    flows = {node for node, name in zip(inputs, program.inputs, strict=True) if name in received}
    params = {attribute_name(name) for name in program.params}
    learned: set[fx.Node] = set()
    holder = None
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in params:
            learned.add(node)
        if node.op != "call_function" or node.meta.get("constant"):
            continue
        sources = set(node.all_input_nodes)
        if not sources & flows:
            if sources & learned:
                learned.add(node)
            continue
        flows.add(node)
        if sources & learned:
            if holder is None:
                with graph.inserting_before(node):
                    holder = graph.get_attr("tapes")
            leaves, _ = tree_flatten((node.args, node.kwargs))
            weights = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and leaf in learned)
            node.args = (holder, len(recorder.targets), weights, *node.args)
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            recorder.targets.append((node.target, bool(node.meta.get("answers")) or name not in _IN_HALVES))
            node.target = deferred
    program.module.recompile()
    results: Any = graph.output_node().args[0]
    return recorder, frozenset(n for n, node in zip(program.outputs, results, strict=True) if node in learned)
