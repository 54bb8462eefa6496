"""Evaluate: a job's model without dropout, with running statistics and without gradients, split as it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

from shardwise.engine.feed import Share
from shardwise.engine.forward import Forward
from shardwise.engine.whole import Whole
from shardwise.graph.graph import Graph
from shardwise.parallel.channels import Channels
from shardwise.parallel.hybrid import Split, check_fixed_batch
from shardwise.parallel.rank import RankModel
from shardwise.parallel.reduction import Reduction


class Evaluation:
    """The program of evaluation on this rank, over the parameters and buffers that it trains.

    A model in evaluation is another graph: dropout is gone, statistics are given, attention may be another operator.
    Its stages follow the training graph's, and it keeps a parameter as training does wherever both split it alike. The
    few that they do not are gathered once for each call.

    Args:
        graph: the job captured as it is evaluated.
        reduction: the parameters that are trained.
        whole: gathers them.
        channels: between the stages; training is done with them meanwhile.
        dtype: as the engine's.
    """

    def __init__(
        self, graph: Graph, reduction: Reduction, whole: Whole, channels: Channels, dtype: torch.dtype | None
    ) -> None:
        training = reduction.model
        split = training.split
        check_fixed_batch(graph, split.plan)
        self.split = Split(graph, split.plan, split.mesh, corresponding(split.graph, graph, split.bounds))
        self.model = RankModel.like(training, self.split)
        self._training, self._reduction, self._whole = training, reduction, whole
        self._apart = sorted(n for n in graph.params if not _kept_alike(split, self.split, n))
        self._own = self.model.used
        if split.plan.zero == 3:
            self.model.gather_buckets(reduction.buckets, but=self._apart)
        self._forward = Forward(self.model, channels, dtype)

    def load(self, module: nn.Module) -> None:
        """Take the parameters and buffers as they are now; called on every rank."""
        graph = self._training.split.graph
        values = self._reduction.values()
        model = self.model
        for name in self._own:
            if name in self._training.params and name not in self._apart:
                model.params[name] = self._training.params[name]
        for name in self._apart:
            if name in graph.params:
                whole = self._whole.one(name, values.get(name))
            else:
                whole = self._whole.untouched[name]
            if name in self._own:
                local = self.split.shard(self.split.graph.params[name], whole)
                model.params[name] = nn.Parameter(local, requires_grad=False)
        buffers: Mapping[str, Tensor] = {**dict(module.named_buffers(remove_duplicate=False)), **self._whole.buffers()}
        for name in model.used_buffers:
            model.buffers[name] = buffers[name].detach().to(model.device)
        model.bind()

    def run(self, share: Share, key: int) -> tuple[float, float]:
        """The mean loss of a batch, and its weight: the count that the job's loss gives, or else the samples."""
        with torch.no_grad():
            results = self.model.total(self._forward.sums(share, key))
        loss, *count = results.tolist()
        return loss, count[0] if count else float(share.total)


def _kept_alike(training: Split, evaluation: Split, name: str) -> bool:
    """Whether every rank that evaluates with a parameter has just that part of it from training."""
    if name not in training.graph.params:
        return False
    ranks = training.plan.pipeline
    have = {s % ranks for s in range(training.plan.stages) if name in training.stage_params(s)}
    need = {s % ranks for s in range(training.plan.stages) if name in evaluation.stage_params(s)}
    stored = [split.stored(split.graph.params[name]) for split in (training, evaluation)]
    return need <= have and stored[0] == stored[1]


def corresponding(training: Graph, evaluation: Graph, bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stages of one graph as ranges of operators of another of the same model, found by aligning the two."""
    before, after = ([(op.name, op.module) for op in graph.ops] for graph in (training, evaluation))
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    at = {a + k: b + k for a, b, size in matcher.get_matching_blocks() for k in range(size)}
    last = len(evaluation.ops)
    starts = [0]
    for start, _ in bounds[1:]:
        starts.append(next((at[i] for i in range(start, len(training.ops)) if i in at), last))
    return list(zip(starts, [*starts[1:], last], strict=True))
