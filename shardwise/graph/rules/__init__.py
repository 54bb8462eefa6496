"""Operator rules: how each operator ties the dims of its tensors, and what it costs."""

from shardwise.graph.rules import index, loss, matrix, norm, pointwise, shape
from shardwise.graph.rules.context import Letter, OpContext, Operand, Place, Slot, Value, operator_name
from shardwise.graph.rules.table import RULES, rule

__all__ = ["RULES", "Letter", "OpContext", "Operand", "Place", "Slot", "Value", "operator_name", "rule"]
_FAMILIES = (index, loss, matrix, norm, pointwise, shape)
