"""Functional: an exported model as one graph of operators that change nothing, as simple as there are rules for them.

Torch traces an exported model a second time for that, which takes longer than the export. Most models need no more of
it than that parts are written out and a few operators that only name others; these are done here, and the others by
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from shardwise.graph.no_grad import detach_inputs, write_out
from shardwise.graph.normalize import CHANGED, is_check
from shardwise.graph.rewrite import Rewriter, arguments, shape
from shardwise.graph.rules import RULES, operator_name

aten = torch.ops.aten


def functional(exported: ExportedProgram) -> ExportedProgram:
    """A program without parts and without operators in place; the one that is given is changed."""
    inputs = exported.graph_signature.input_specs
    detach_inputs(exported.graph_module, {s.arg.name for s in inputs if s.kind is not InputKind.PARAMETER})
    write_out(exported.graph_module)
    changed = any(s.kind is not OutputKind.USER_OUTPUT for s in exported.graph_signature.output_specs)
    if not changed and all(_is_plain(node) for node in exported.graph.nodes):
        _write_simpler(exported.graph)
        return exported
    simpler: ExportedProgram = exported.run_decompositions(_simpler())
    if any(spec.kind is InputKind.TOKEN for spec in simpler.graph_signature.input_specs):
        # Written simpler, an operator has side effects (linalg.inv looks for errors).
        simpler = exported.run_decompositions({})
    return simpler


def _is_known(op: OpOverload) -> bool:
    name = operator_name(op)
    return name in RULES or name in CHANGED or name.startswith("aten.sym_")


def _simpler() -> dict[Any, Callable[..., Any]]:
    """How torch writes operators that no rule knows with simpler ones, which rules know more often."""
    return {
        op: how
        for op, how in torch.export.default_decompositions().items()
        if not _is_known(op) and torch.Tag.nondeterministic_seeded not in op.tags  # is refused, by its own name
    }


# -- without another trace ---------------------------------------------------------------------------------------------


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is what it would be if torch traced it again, or is written so here."""
    if node.op != "call_function":
        return node.op != "get_attr" or not node.users
    op = node.target
    if not isinstance(op, OpOverload):
        return not isinstance(op, HigherOrderOperator)
    if op in _VIEWS:
        return op is aten.reshape.default or sum(isinstance(s, torch.SymInt) for s in shape(node)) < 2
    if op is aten.chunk.default:
        return all(isinstance(part.shape[arguments(node)["dim"]], int) for part in node.meta["val"])
    if op in _COMPOSITES:
        return not arguments(node).get("copy")
    if op is aten.dropout.default or is_check(node):
        return True
    return _is_known(op) and not op._schema.is_mutable and not _is_never_kept(op)


def _is_never_kept(op: OpOverload) -> bool:
    """Whether torch writes an operator with others whatever it is asked for: one that may give what it is given."""
    aliases = torch.Tag.maybe_aliasing_or_mutating in op.tags or any(a.alias_info for a in op._schema.arguments)
    return aliases and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _write_simpler(graph: fx.Graph) -> None:
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        write = _COMPOSITES.get(node.target)
        if write is not None:
            rewriter.at(node)
            rewriter.replace(write(rewriter, node))


def _view(r: Rewriter, node: fx.Node) -> fx.Node:
    a = arguments(node)
    x = a["self"]
    if node.target is aten.flatten.using_ints and x.meta["val"].ndim == node.meta["val"].ndim:
        return x  # type: ignore[no-any-return]
    sizes = a.get("shape") or [-1 if isinstance(s, torch.SymInt) else s for s in shape(node)]
    if not _is_copy(r, node, x):
        return r.call(aten.view.default, x, sizes)
    copy = r.call(aten.clone.default, x, memory_format=torch.contiguous_format)
    return r.call(aten._unsafe_view.default, copy, sizes)


def _is_copy(r: Rewriter, node: fx.Node, x: fx.Node) -> bool:
    """Whether what a node makes of a tensor is another one, and not a view."""
    made: Tensor = r.evaluate(node)
    return bool(made.untyped_storage()._cdata != x.meta["val"].untyped_storage()._cdata)


def _contiguous(r: Rewriter, node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    memory_format = node.kwargs.get("memory_format", torch.contiguous_format)
    return r.call(aten.clone.default, x, memory_format=memory_format) if _is_copy(r, node, x) else x


def _to(r: Rewriter, node: fx.Node) -> fx.Node:
    x, made = node.args[0], node.meta["val"]
    assert isinstance(x, fx.Node)
    given = x.meta["val"]
    options = {} if made.dtype == given.dtype else {"dtype": made.dtype}
    if made.device != given.device:
        options["device"] = made.device
    return r.call(aten._to_copy.default, x, **options) if options else x


def _chunk(r: Rewriter, node: fx.Node) -> fx.Node:
    a = arguments(node)
    each = node.meta["val"][0].shape[a["dim"]]
    return r.call(aten.split.Tensor, a["self"], each, a["dim"])


_VIEWS = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_COMPOSITES: dict[Any, Callable[[Rewriter, fx.Node], fx.Node]] = {
    **dict.fromkeys(_VIEWS, _view),
    aten.chunk.default: _chunk,
    aten.contiguous.default: _contiguous,
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.device: _to,
}
"""Operators that only name others, and how these are written."""
