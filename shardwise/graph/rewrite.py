"""What changes a captured graph: new nodes with their fake values, in place of old ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the operator's schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def gives_views(target: Any) -> bool:
    """Whether all that an operator gives are views of what it takes."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.returns) and all(r.alias_info is not None for r in schema.returns)


class Rewriter:
    """Adds nodes with their fake values, at one place of a graph.

    Attributes:
        randoms: random operators rewritten so far; the next one's number.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
        self.randoms = 0
        self._origin: fx.Node | None = None

    def at(self, node: fx.Node) -> None:
        """New nodes come before this one, and belong to its module."""
        self._origin = node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `target`; an argument may be a node."""
        assert self._origin is not None
        with self.graph.inserting_before(self._origin):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self._origin.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = self.evaluate(node)
        return node

    def again(self, node: fx.Node, **changes: Any) -> fx.Node:
        """The same call with some arguments changed."""
        given = {**arguments(node), **changes}
        args, kwargs = [], {}
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.kwarg_only:
                kwargs[argument.name] = given[argument.name]
            else:
                args.append(given[argument.name])
        return self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def replace(self, new: fx.Node) -> None:
        """Put `new` where the node at this place was."""
        assert self._origin is not None
        self._origin.replace_all_uses_with(new)
        self.graph.erase_node(self._origin)

    def next_random(self) -> int:
        """The number of a random operator, in order of execution."""
        self.randoms += 1
        return self.randoms - 1

    def evaluate(self, node: fx.Node) -> Any:
        """The fake value of a node, from the fake values of its arguments."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        with self._mode or nullcontext():
            return node.target(*args, **kwargs)


def shape(node: fx.Node) -> Sequence[Any]:
    """The shape of a node's value, number of samples included as a symbol."""
    found: Sequence[Any] = node.meta["val"].shape
    return found
