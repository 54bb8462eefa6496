"""Micro-batches: a cut of the batch in time. The same algebra says when it changes nothing.

The batch is cut along one more axis, over which nothing can be sent. What every micro-batch needs of all the others is
allowed where it depends on the batch alone (counts of valid labels): it is computed before the first forward pass. What
depends on parameters may only be summed on its way to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.errors import PlanError
from shardwise.graph.graph import Graph, Op
from shardwise.graph.rules import Value
from shardwise.parallel.collectives import merge_view, split_view
from shardwise.parallel.layout import PARTIAL, TIME, WHOLE, Cut, Layout, SplitAxis, Whole


def time_axis(count: int) -> SplitAxis:
    """Micro-batches as an axis."""
    return SplitAxis(TIME, count, ("batch",))


@dataclass(frozen=True, eq=False)
class Early:
    """A tensor that all micro-batches share, to be computed before them: a sum over them, or their parts joined."""

    value: Value
    joins: Cut | None


def early_values(graph: Graph, layout: Layout, *, exact_batch_norm: bool = True) -> list[Early]:
    """What has to be computed before the first micro-batch; `layout`'s axis 0 is time.

    Raises:
        PlanError: the model couples the samples of a batch, so that micro-batches would compute something else.
    """
    found: dict[Value, Early] = {}
    for op in graph.ops:
        letter = layout.choices[op][0].letter
        if letter is not None and letter.special == "batch_norm" and exact_batch_norm:
            raise PlanError(
                f"{where(op)} takes statistics over the whole batch, which micro-batches would change; use one "
                "micro-batch, or batch-norm per-micro-batch in the plan"
            )
        for operand in op.context.inputs:
            produced, needed = layout.states[operand.value][0], layout.needs(op, operand.slot)[0]
            if produced == needed or isinstance(produced, Whole):
                continue
            if operand.value in graph.learned:
                raise PlanError(
                    f"{where(op)} needs {operand.value.name} of the whole batch, so the samples are coupled and "
                    "micro-batches would change the result; use one micro-batch"
                )
            found[operand.value] = Early(operand.value, produced if isinstance(produced, Cut) else None)
    order = {v: i for i, op in enumerate(graph.ops) for v in op.outputs}
    return sorted(found.values(), key=lambda e: order.get(e.value, -1))


def same_for_all(graph: Graph, layout: Layout) -> frozenset[Value]:
    """Results of operators that are the same for all micro-batches; `layout`'s axis 0 is time.

    They have no part of the batch, and are not made of the statistics that a batch norm may take of each micro-batch
    alone, which the layout has as those of the whole batch.
    """
    found: set[Value] = set()
    made_of_statistics: set[Value] = set()
    for op in graph.ops:
        letter = layout.choices[op][0].letter
        if (letter is not None and letter.special == "batch_norm") or not made_of_statistics.isdisjoint(op.inputs):
            made_of_statistics.update(op.outputs)
        else:
            found.update(value for value in op.outputs if layout.states[value][0] == WHOLE)
    return frozenset(found)


def combine(early: Early, parts: Sequence[Tensor], leads: Sequence[int], samples: Sequence[int]) -> Tensor:
    """The tensor of the whole batch from those of the micro-batches."""
    if early.joins is None:
        return torch.stack(list(parts)).sum(0)
    pos = early.joins.pos
    seen = [split_view(p, pos, lead, n) for p, lead, n in zip(parts, leads, samples, strict=True)]
    return merge_view(torch.cat(seen, dim=pos + 1), pos)


def where(op: Op) -> str:
    """An operator as a message names it."""
    return f"{op.name} in {op.module}" if op.module else f"{op.name} ({op.node.name})"


__all__ = ["PARTIAL", "TIME", "WHOLE", "Early", "combine", "early_values", "same_for_all", "time_axis", "where"]
