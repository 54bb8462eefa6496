"""Parts of a model that run under `torch.no_grad()`: what they take is detached, for a graph of operators has no modes.

torch exports such a part as a graph of its own, called by `wrap_with_set_grad_enabled`. Written out among the other
operators, nothing is left of it, and without that gradients would flow through what is computed there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def detach_inputs(module: fx.GraphModule, plain: Collection[str] = ()) -> None:
    """Detaches what parts without gradients take, in place and in the parts of parts.

    Args:
        module: an exported graph.
        plain: placeholders that no gradient flows to, which are left alone.
    """
    for node in list(module.graph.nodes):
        part = _part(module, node)
        if part is None:
            continue
        enabled, inner = part
        given = list(node.args[2:])
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        known = {p.name for p, arg in zip(places, given, strict=True) if getattr(arg, "name", "") in plain}
        if not enabled:
            _detach(inner, [p for p in places if p.name not in known])
        detach_inputs(inner, known)


def write_out(module: fx.GraphModule) -> None:
    """Puts the operators of parts, and of the parts of parts, where these are called."""
    for node in list(module.graph.nodes):
        part = _part(module, node)
        if part is None:
            continue
        inner = part[1]
        write_out(inner)
        if any(each.op == "get_attr" and each.users for each in inner.graph.nodes):
            continue  # it has parts of another kind
        known: dict[fx.Node, fx.Node] = {}
        with module.graph.inserting_before(node):
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            known.update(zip(places, node.args[2:], strict=True))
            for each in inner.graph.nodes:
                if each.op == "call_function":
                    known[each] = module.graph.node_copy(each, known.__getitem__)
        made: Any = inner.graph.output_node().args[0]
        for user in list(node.users):  # each takes one of the results
            found = made[user.args[1]]
            user.replace_all_uses_with(known.get(found, found))
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _part(module: fx.GraphModule, node: fx.Node) -> tuple[bool, fx.GraphModule] | None:
    """Whether a node calls a part of the graph with gradients or without them, and the part."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
        return None
    enabled, inner = node.args[:2]
    assert isinstance(inner, fx.Node)
    found = module.get_submodule(str(inner.target))
    assert isinstance(found, fx.GraphModule)
    return bool(enabled), found


def _detach(part: fx.GraphModule, places: Collection[fx.Node]) -> None:
    """What a part takes is detached where it computes with it, not where it hands it on, even to one with gradients."""
    places = [p for p in places if _has_gradients(p.meta.get("val"))]
    last = [n for n in part.graph.nodes if n.op == "placeholder"]
    for place in places:
        computing = [user for user in place.users if user.op != "output" and not (_part(part, user) or (False,))[0]]
        if computing:
            with part.graph.inserting_after(last[-1]):
                plain = part.graph.call_function(aten.detach.default, (place,))
            plain.meta["val"] = place.meta["val"].detach()
            for user in computing:
                user.replace_input_with(place, plain)
    part.recompile()


def _has_gradients(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
