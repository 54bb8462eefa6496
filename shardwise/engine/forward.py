"""Forward: the programs of a rank run without backward, for evaluation and for prediction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.engine.feed import Feeder, Share
from shardwise.parallel.channels import Channels
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.rank import RankModel
from shardwise.parallel.schedule import forward_only


class Forward:
    """Runs a graph that has no gradients on this rank. Tensors are let go of as soon as nothing reads them any more.

    Args:
        model: the programs of this rank's stages.
        channels: between the stages.
        dtype: of floating-point tensors of a batch; None leaves the data's own.
    """

    def __init__(self, model: RankModel, channels: Channels, dtype: torch.dtype | None) -> None:
        split = model.split
        self.model = model
        self.feeder = Feeder(split, model.device, dtype)
        order = forward_only(split.mine, split.plan.micro_batches)
        results = tuple(split.graph.results)
        self._pipeline = Pipeline(model.stages(), split.plan.stages, order, channels, results=results)

    def sums(self, share: Share, key: int) -> Tensor:
        """[results], float64: each result summed over micro-batches, as far as this rank computed it."""
        return self._pipeline.step(self._start(share, key))

    def outputs(self, share: Share, key: int, *, wanted: bool) -> list[Tensor]:
        """Each result of the whole batch, where it is wanted, which it may be on the first rank of the last stage."""
        found: list[Mapping[str, Tensor]] = []
        self._pipeline.play(self._start(share, key), lambda m, outputs: found.append(outputs) if wanted else None)
        if not wanted:
            return []
        return [self.model.joined(name, [part[name] for part in found]) for name in self.model.split.graph.results]

    def _start(self, share: Share, key: int) -> int:
        return self.model.start(self.feeder.tensors(share), share.total, key)
