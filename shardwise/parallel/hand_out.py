"""Outputs made whole on one rank: where the last thing done to an output is to join it, only the first rank has to.

What the other ranks of the axis return in its place is their own part, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from shardwise.parallel import collectives as c
from shardwise.parallel.mesh import Axis


def hand_out(module: fx.GraphModule) -> None:
    """Let a program join what it returns on the first rank of an axis alone."""
    output = module.graph.output_node()
    for node in output.all_input_nodes:
        if node.target in _ON_FIRST and list(node.users) == [output]:
            node.target = _ON_FIRST[node.target]
    module.recompile()


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial → whole on the first rank."""
    x = x.clone(memory_format=torch.contiguous_format)
    if axis.group is not None:
        axis.record("reduce", x.numel() * x.element_size())
        dist.reduce(x, axis.ranks[0], group=axis.group)
    return x


def gather(x: Tensor, axis: Axis, pos: int, lead: int, sizes: c.Sizes, varies: bool) -> Tensor:
    """Cut → whole on the first rank."""
    return c.join(x, axis, pos, lead, sizes, on_first=True)


_ON_FIRST: dict[Any, Callable[..., Tensor]] = {c.reduce: reduce, c.gather: gather}
