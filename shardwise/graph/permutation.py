"""Permutations: where each row went, from where each row came."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.graph.rewrite import Rewriter, arguments
from shardwise.graph.rules import operator_name
from shardwise.graph.rules.order import COPIES


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of a permutation of 0, 1, 2, ...: [rows] to [rows]."""
    count = torch.arange(permutation.shape[0], device=permutation.device, dtype=permutation.dtype)
    return torch.empty_like(permutation).scatter_(0, permutation, count)


inverse.operator_name = "shardwise.inverse"  # type: ignore[attr-defined]


def written(r: Rewriter, node: fx.Node) -> None:
    """0, 1, 2, ... written to the places of a permutation is its inverse, however many rows there are."""
    a = arguments(node)
    over = operator_name(node.target) == "aten.index_put"
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
    if operator_name(node.target) == "aten.argsort":
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
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        return operator_name(source.target) == "aten.sort" and bool(index == 1)
    return operator_name(node.target) == "aten.argsort" or node.target is inverse


def _counts(node: fx.Node) -> bool:
    """Whether a node has 0, 1, 2, ..."""
    node = _plain(node)
    if operator_name(node.target) != "aten.arange":
        return False
    given = arguments(node)
    return (given.get("start", 0), given.get("step", 1)) == (0, 1)


def _plain(node: Any) -> Any:
    """A node without the copies of it."""
    while isinstance(node, fx.Node) and operator_name(node.target) in COPIES:
        node = node.args[0]
    return node
