"""Limits: whether positions and tokens fit the tensors that a step reads and writes at their places."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.errors import JobError
from shardwise.graph.captured import Captured
from shardwise.graph.rewrite import arguments
from shardwise.graph.rules import operator_name

_ANY = 1 << 62
"""More tokens than any vocabulary has."""


@dataclass(frozen=True)
class Demand:
    """What prompts ask of a model.

    Attributes:
        longest: positions of the longest prompt and its new tokens.
        piece: positions of a prompt that go in at once.
        largest: the largest token of a prompt.
    """

    longest: int
    piece: int
    largest: int


def check_fits(captured: Captured, model: str, demand: Demand) -> None:
    """Check that what is to be generated fits a model.

    Args:
        captured: a step of one position.
        model: what it is called.
        demand: of the prompts.

    Raises:
        JobError: there are fewer positions, or fewer tokens in its vocabulary.
    """
    size = _outgrown(captured, 0, demand.longest - 1)
    if size is not None:
        raise _too_long(demand, model, size)
    size = _outgrown(captured, demand.largest, 0)
    if size is not None:
        raise _unknown(demand, model, size)


def check_takes(takes: Callable[[int, int], bool], model: str, demand: Demand) -> None:
    """Check the same of a model that is not captured, by trying it.

    Args:
        takes: whether the model takes a token at a position; where it does not, it takes none that is larger.

    Raises:
        JobError: as `check_fits`.
    """
    if takes(demand.largest, demand.longest - 1) or not takes(0, 0):
        return  # all is well, or something else is wrong, which the first step says
    if not takes(0, demand.longest - 1):
        size = bisect_left(range(demand.longest), True, key=lambda position: not takes(0, position))
        raise _too_long(demand, model, size)
    if not takes(demand.largest, 0):
        size = bisect_left(range(demand.largest), True, key=lambda token: not takes(token, 0))
        raise _unknown(demand, model, size)


def vocabulary_of(captured: Captured) -> int:
    """What the tokens of a captured step have to be below."""
    size = _outgrown(captured, _ANY - 1, 0)
    return _ANY if size is None else size


def vocabulary_tried(takes: Callable[[int, int], bool], logits: int) -> int:
    """The same of a model that is not captured, by trying it; no more than it has logits."""
    if takes(logits - 1, 0) or not takes(0, 0):
        return logits
    return bisect_left(range(logits), True, key=lambda token: not takes(token, 0))


def _too_long(demand: Demand, model: str, size: int) -> JobError:
    return JobError(
        f"the longest prompt and its new tokens are {demand.longest} positions, but {model} has {size}; "
        "give shorter prompts or fewer tokens"
    )


def _unknown(demand: Demand, model: str, size: int) -> JobError:
    return JobError(
        f"token {demand.largest} is in a prompt, but {model} has a vocabulary of {size}; "
        f"give tokens from 0 to {size - 1}"
    )


def _outgrown(captured: Captured, token: int, position: int) -> int | None:
    """The least size of a dim that is read or written behind its end, for one token at a position; None of none."""
    tokens, positions = captured.inputs
    known: dict[fx.Node, Any] = {}
    sizes = []
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.name in (tokens, positions):
            known[node] = torch.full((1, 1), token) if node.name == tokens else torch.full((1,), position)
        elif node.op == "call_function":
            sizes += [size for size, index in _places(node) if index in known and int(known[index].max()) >= size]
            if all(n in known for n in node.all_input_nodes):
                found = _computed(node, known)
                if isinstance(found, (Tensor, int)):
                    known[node] = found
    return min(sizes, default=None)


def _computed(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, IndexError):  # made for another number of samples
        return None


def _places(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The dims that an operator reads or writes at computed places: their sizes, and the places."""
    name = operator_name(node.target)
    if name not in _INDEXED:
        return []
    a = arguments(node)
    if name == "aten.embedding":
        return [(_size(a["weight"], 0), a["indices"])]
    if "indices" in a:
        x = a["self"]
        return [(_size(x, i), t) for i, t in enumerate(a["indices"]) if t is not None and not _is_mask(t)]
    return [(_size(a["self"], a["dim"]), a["index"])]


_INDEXED = {
    "aten.embedding", "aten.index", "aten.index_put", "aten._unsafe_index_put", "aten.index_select", "aten.index_copy",
}  # fmt: skip


def _size(node: fx.Node, dim: int) -> int:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else 1 << 62


def _is_mask(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.itemsize == 1)
