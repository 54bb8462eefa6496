"""Parts of a model that run under `torch.no_grad()`: what they take is detached, for a graph of operators has no modes.

torch exports such a part as a graph of its own, called by `wrap_with_set_grad_enabled`. Written out among the other
operators, nothing would be left of it, and gradients would flow through what is computed there.
"""

from __future__ import annotations

from collections.abc import Collection

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
