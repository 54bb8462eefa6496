"""Recompute: the activations of a block are not kept for backward but computed again there (Chen et al. 2016).

A rank's program is cut into segments, each the operators of one block. A segment keeps what it is given; its inside is
run again when backward reaches it, collectives included. What begins or ends a block and keeps nothing for backward
anyway, such as the all-reduce and the residual addition of a split layer, is left outside, and so is not done twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph
from shardwise.parallel import collectives as c

aten = torch.ops.aten
_NO_LARGER: set[Any] = {c.reduce, c.reduce_scatter, c.exchange, c.vary}
_KEEPS_NOTHING: set[Any] = _NO_LARGER | {c.gather, aten.add.Tensor, aten.view.default, aten.reshape.default}
_LISTED = 8


def blocks_by(patterns: Sequence[str]) -> Callable[[str], str]:
    """What gives the block that a module belongs to: the outermost on its path that a pattern names; empty for none."""
    names = frozenset(patterns)
    wild = [p for p in patterns if any(c in p for c in "*?[")]

    def block(module: str) -> str:
        parts = module.split(".")
        paths = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return next((p for p in paths if p and (p in names or any(fnmatchcase(p, w) for w in wild))), "")

    return block


def block_of(module: str, patterns: Sequence[str]) -> str:
    """The block that a module belongs to, as `blocks_by` says."""
    return blocks_by(patterns)(module)


def check_blocks(graph: Graph, patterns: Sequence[str]) -> None:
    """Check that every pattern names a block.

    Raises:
        PlanError: one does not.
    """
    modules = {op.module for op in graph.ops} if patterns else set()
    for pattern in patterns:
        if not any(map(blocks_by([pattern]), modules)):
            paths = {".".join(m.split(".")[: n + 1]) for m in modules if m for n in range(m.count(".") + 1)}
            # A block that is there several times is what one would name.
            listed = sorted(paths, key=lambda p: (not p.rpartition(".")[2].isdigit(), p.count("."), p))[:_LISTED]
            raise PlanError(
                f"recompute names {pattern!r}, but the model has no such block; it has: {', '.join(listed) or 'none'}"
            )


def in_segments(module: fx.GraphModule) -> None:
    """Cut a program into segments that are computed again in backward, in place.

    Nodes say in `meta["block"]` which block they are of.
    """
    runs = _runs(module.graph.nodes)
    out = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for block, nodes in runs:
        before, inside, after = _ends(nodes) if block else (nodes, [], [])
        for node in before:
            copied[node] = out.node_copy(node, copied.__getitem__)
        if inside:
            _extract(module, f"segment_{len(segments(module))}", inside, out, copied)
        for node in after:
            copied[node] = out.node_copy(node, copied.__getitem__)
    module.graph = out
    out.lint()
    module.recompile()


def _runs(nodes: Iterable[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Nodes in runs of one block each, in an order that is still one of execution.

    What comes between the nodes of a block and needs none of them is put before the block, so that it does not part it.
    """
    found: list[tuple[str, list[fx.Node]]] = [("", [])]
    for node in nodes:
        block = node.meta.get("block", "") if node.op == "call_function" else ""
        last, members = found[-1]
        if block == last:
            members.append(node)
        elif block == "" and node.op != "output" and not _needs(node, members):
            # Before the block: the run there is of no block, or is made to be.
            found[-2][1].append(node)
        elif block:
            if last:
                found.append(("", []))
            found.append((block, [node]))
        else:
            found.append(("", [node]))
    return found


def _needs(node: fx.Node, members: Sequence[fx.Node]) -> bool:
    return not set(members).isdisjoint(node.all_input_nodes)


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """A segment between what can come before and after it, because it keeps nothing for backward.

    Of what comes first only what makes no tensor larger: the segment keeps what it is given.
    """
    inside = dict.fromkeys(nodes)
    for node in reversed(nodes):
        if node.target in _KEEPS_NOTHING and inside.keys().isdisjoint(node.users):
            del inside[node]
    after = [node for node in nodes if node not in inside]
    for node in list(inside):
        if node.target in _NO_LARGER and inside.keys().isdisjoint(node.all_input_nodes):
            del inside[node]
    if all(node.meta.get("serves", False) for node in inside):
        return list(nodes), [], []  # what it was gathered for keeps nothing
    return [node for node in nodes if node not in inside and node not in after], list(inside), after


def _extract(
    module: fx.GraphModule, name: str, nodes: Sequence[fx.Node], out: fx.Graph, copied: dict[fx.Node, fx.Node]
) -> None:
    """Put nodes into a module of their own, and a call of it into the program."""
    members = set(nodes)
    given = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in members))
    results = [node for node in nodes if not members.issuperset(node.users)]
    graph = fx.Graph()
    own = {node: graph.placeholder(node.name) for node in given}
    for node in nodes:
        own[node] = graph.node_copy(node, own.__getitem__)
    graph.output(tuple(own[node] for node in results))
    module.add_module(name, fx.GraphModule(nn.Module(), graph))
    call = out.call_function(run_segment, (out.get_attr(name), *(copied[node] for node in given)))
    for i, node in enumerate(results):
        copied[node] = out.call_function(operator.getitem, (call, i))


def run_segment(segment: Callable[..., Any], *given: Any) -> Any:
    """Run a segment without keeping what is inside. Backward: run it again."""
    if not torch.is_grad_enabled():
        return segment(*given)
    # Stopped early, how far it runs would depend on what autograd happens to keep, and so would what is sent. Random
    # numbers are functions of position: there is no generator whose state to bring back.
    with set_checkpoint_early_stop(False):
        return checkpoint(segment, *given, use_reentrant=False, preserve_rng_state=False)


def segments(module: fx.GraphModule) -> Mapping[str, fx.GraphModule]:
    """The segments of a program, by name."""
    return {name: child for name, child in module.named_children() if isinstance(child, fx.GraphModule)}
