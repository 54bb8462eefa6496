"""Channels: how tensors travel between stages, so that no two ranks wait for each other.

Gloo tells messages of a group apart by tag, whatever order they are posted in. NCCL does not: it pairs the n-th send of
one rank with the n-th receive of the other, and runs what is posted on one communicator one after the other. Two ranks
that each send first and then receive would wait for ever, and stages that share a pair of ranks would take each other's
tensors. So on a device each cut has two communicators, one for each direction. On one of them a stage sends its
micro-batches in order, and the other stage receives them in order: every schedule goes through a stage's micro-batches
in order (`schedule.check` sees to it). So sends and receives pair up, and nothing waits for what is posted behind it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.mesh import Axis, Mesh, open_group
from shardwise.parallel.schedule import stage_rank

_MOST_TENSORS = 1 << 12


class Channels:
    """Sends and receives between stages of one pipeline.

    Args:
        mesh: this rank's place.
        axis: the pipeline axis; None where there is one stage rank.
        stages: stages in all.
        device: where tensors are.
    """

    def __init__(self, mesh: Mesh, axis: Axis | None, stages: int, device: torch.device) -> None:
        self.axis, self.stages, self.device = axis, stages, device
        self._groups: dict[tuple[str, int], dist.ProcessGroup] = {}
        if axis is not None and axis.group is not None and not has_tags(device):
            self._open(mesh, axis)

    def _open(self, mesh: Mesh, axis: Axis) -> None:
        """A communicator for each cut and direction. All ranks open all, in the same order."""
        for kind in "FB":
            for stage in range(1, self.stages):
                # To stage `stage` forward over the cut before it, and to the stage before it backward.
                source, target = (stage - 1, stage) if kind == "F" else (stage, stage - 1)
                ends = [stage_rank(s, axis.size) for s in (source, target)]
                for column in mesh.columns(axis):
                    pair = [column[end] for end in ends]
                    group, new = open_group(sorted(pair), axis.name, f"{kind}{target}")
                    if mesh.rank in pair:
                        self._groups[kind, target] = group
                    if mesh.rank in pair and new:
                        # NCCL connects at the first message, and waits for the other rank: now, in an order that all
                        # ranks keep, and not in the middle of a schedule.
                        first = torch.zeros(1, device=self.device)
                        if mesh.rank == pair[0]:
                            dist.send(first, pair[1], group=group)
                        else:
                            dist.recv(first, pair[0], group=group)

    def here(self, stage: int) -> bool:
        """Whether a stage is on this rank."""
        return self.axis is None or stage_rank(stage, self.axis.size) == self.axis.rank

    def send(self, kind: str, to: int, m: int, n: int, tensor: Tensor) -> Any:
        """Send the n-th tensor of micro-batch `m` to stage `to`: forward (`F`) or backward (`B`). Does not wait."""
        assert self.axis is not None
        self.axis.record("send", tensor.numel() * tensor.element_size())
        return dist.isend(tensor, self._rank(to), group=self._group(kind, to), tag=self._tag(kind, to, m, n))

    def receive(self, kind: str, at: int, m: int, n: int, buffer: Tensor) -> Any:
        """Receive into `buffer` what was sent to stage `at`, which is on this rank. Does not wait."""
        source = at - 1 if kind == "F" else at + 1
        return dist.irecv(buffer, self._rank(source), group=self._group(kind, at), tag=self._tag(kind, at, m, n))

    def _rank(self, stage: int) -> int:
        assert self.axis is not None
        return self.axis.ranks[stage_rank(stage, self.axis.size)]

    def _group(self, kind: str, to: int) -> dist.ProcessGroup | None:
        assert self.axis is not None
        return self._groups.get((kind, to), self.axis.group)

    def _tag(self, kind: str, to: int, m: int, n: int) -> int:
        return ((m * self.stages + to) * 2 + (kind == "B")) * _MOST_TENSORS + n


def has_tags(device: torch.device) -> bool:
    """Whether messages of a device's tensors are told apart by tags."""
    return device.type == "cpu"
