"""The one table of operator rules, and the way a user adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

from shardwise.graph.rules.context import Rule, operator_name

_RULES: dict[str, Rule] = {}
RULES = MappingProxyType(_RULES)
"""Rules by operator name without overload, e.g. `aten.linear`."""


def rule(op: Any) -> Callable[[Rule], Rule]:
    """Register how an operator ties its dims; `op` is an operator or its name, such as `"mylib::op"`.

    The decorated function takes an `OpContext`. Where a rule of that name exists, it is replaced.

    Example:
        @shardwise.rule("mylib::scaled_gelu")
        def _(c):
            c.elementwise(c.inputs)
    """

    def register(function: Rule) -> Rule:
        _RULES[operator_name(op)] = function
        return function

    return register


def rules(names: Iterable[str], prefix: str = "aten.") -> Callable[[Rule], Rule]:
    """Register one rule for several operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[prefix + name] = function
        return function

    return register
