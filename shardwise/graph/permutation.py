"""Permutations: where each row went, from where each row came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardwise.graph.rewrite import Rewriter, arguments

aten = torch.ops.aten


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of a permutation of 0, 1, 2, ...: [rows] to [rows]."""
    count = torch.arange(permutation.shape[0], device=permutation.device, dtype=permutation.dtype)
    return torch.empty_like(permutation).scatter_(0, permutation, count)


inverse.operator_name = "shardwise.inverse"  # type: ignore[attr-defined]


def written(r: Rewriter, node: fx.Node) -> None:
    """0, 1, 2, ... written to the places of a permutation is its inverse, however many rows there are."""
    a = arguments(node)
    over = str(node.target.overloadpacket) == "aten.index_put"  # type: ignore[union-attr]
    index, values = (a["indices"], a["values"]) if over else ([a["index"]], a.get("src"))
    if a.get("accumulate") or len(index) != 1 or not isinstance(values, fx.Node) or not _is_permutation(index[0]):
        return
    where = index[0].meta["val"]
    same = all(str(n.meta["val"].shape) == str(where.shape) for n in (a["self"], values))
    if same and _counts(values) and node.meta["val"].dtype == where.dtype:
        r.replace(r.call(inverse, index[0]))


def sorted_again(r: Rewriter, node: fx.Node) -> None:
    """What sorts a permutation is its inverse."""
    given = arguments(node)
    if not _is_permutation(given["self"]) or given.get("descending"):
        return
    if "argsort" in str(node.target):
        r.replace(r.call(inverse, given["self"]))
    elif all(user.args[1] == 1 for user in node.users):
        found = r.call(inverse, given["self"])
        for user in list(node.users):
            user.replace_all_uses_with(found)
            r.graph.erase_node(user)
        r.graph.erase_node(node)


def _is_permutation(node: Any) -> bool:
    """Whether a node has the places that a sort of one dim found, or the inverse of these."""
    node = _plain(node)
    if not isinstance(node, fx.Node) or node.meta["val"].ndim != 1:
        return False
    source = node.args[0] if node.op == "call_function" and "getitem" in str(node.target) else node
    name = str(getattr(source.target, "overloadpacket", "")) if isinstance(source, fx.Node) else ""
    return name == "aten.argsort" or node.target is inverse or (name == "aten.sort" and bool(node.args[1] == 1))


def _counts(node: fx.Node) -> bool:
    """Whether a node has 0, 1, 2, ..."""
    node = _plain(node)
    if str(getattr(node.target, "overloadpacket", "")) != "aten.arange":
        return False
    given = arguments(node)
    return (given.get("start", 0), given.get("step", 1)) == (0, 1)


def _plain(node: Any) -> Any:
    """A node without the copies of it."""
    while isinstance(node, fx.Node) and str(getattr(node.target, "overloadpacket", "")) in _COPIES:
        node = node.args[0]
    return node


_COPIES = {"aten._to_copy", "aten.to", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias"}
