"""Reduction: how each gradient of this rank is summed over ranks, and which parameters are kept in parts (ZeRO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.data import FIRST_BYTES, GradientSync, summed_buckets
from shardwise.parallel.mesh import Axis, open_group
from shardwise.parallel.rank import RankModel, let_go
from shardwise.parallel.recompute import block_of
from shardwise.parallel.sharded import FlatBucket, ScatteredBucket, make_buckets


class Reduction:
    """The sums that follow backward, for the parameters of one rank's model.

    Attributes:
        plain: parameters whose gradients are kept as they are, by name.
        sync: sums gradients while backward goes on.
        summed: plain parameters whose gradients are summed, as `sync` does it.
        buckets: the other parameters, in parts over a data axis.
        where: for a name in a bucket that bucket, and its place there.
        ties: plain parameters that other stages have as well, whose gradients are summed over those stages.
    """

    def __init__(self, model: RankModel) -> None:
        self.model, self.split, self.plan = model, model.split, model.split.plan
        self._params = self.split.graph.params
        self._stage_ranks = _shared_over_stages(model)
        self._groups = _tie_groups(model, self._stage_ranks)
        data = [self.split.mesh[name] for name in self.plan.data]
        self.plain: dict[str, nn.Parameter] = {}
        flat: list[tuple[str, nn.Parameter, Axis, tuple[Axis, ...]]] = []
        sums: dict[str, tuple[Axis, ...]] = {}
        for name, param in list(model.params.items()):
            axes = self.split.sums(self._params[name]) if param.requires_grad else ()
            cutting = next((axis for axis in data if axis in axes), None)
            if self.plan.zero and cutting is not None and name not in self._stage_ranks:
                flat.append((name, param, cutting, tuple(a for a in axes if a is not cutting)))
            else:
                self.plain[name] = model.fill(name)
                sums[name] = axes
        limit, first = self.plan.bucket_bytes, FIRST_BYTES if self.plan.zero < 3 else None
        self.buckets: list[FlatBucket] = make_buckets(flat, self._block_of, limit, first, model.entries)
        self.where = {n: (b, i) for b in self.buckets for i, n in enumerate(b.names)}
        trained = [(p, sums[n]) for n, p in self.plain.items() if p.requires_grad]
        self.summed = summed_buckets(trained, limit)
        scattered: list[ScatteredBucket] = []
        if self.plan.zero == 3:
            model.gather_buckets(self.buckets)
        else:
            self._flatten()
            scattered = [
                ScatteredBucket(b, [model.params[n] for n in b.names], frees=self.plan.zero == 2) for b in self.buckets
            ]
        model.bind()
        use = {p: i for i, p in enumerate(model.params.values())}
        # One queue for all, because some share a group. A bucket is full when its first used parameter is reached.
        full = sorted([*self.summed, *scattered], key=lambda bucket: -min(use[p] for p in bucket.params))
        self.sync = GradientSync(full)

    @property
    def ties(self) -> list[nn.Parameter]:
        found = (self.plain.get(name) for name in sorted(self._groups))
        return [p for p in found if p is not None and p.requires_grad]

    def _block_of(self, name: str) -> tuple[str, ...]:
        """What a bucket's parameters have in common: in ZeRO-3 their module, and the block that is recomputed."""
        if self.plan.zero != 3:
            return ()
        module = name.rpartition(".")[0]
        return block_of(module, self.plan.recompute), module.rpartition(".")[0]

    def _flatten(self) -> None:
        """ZeRO 1 and 2: whole parameters are views of a flat tensor of which this rank's part is the shard."""
        for bucket in self.buckets:
            full = bucket.gather()
            part = bucket.part
            low = bucket.axis.rank * part
            bucket.shard.data = full[low : low + part]
            for i, (name, view) in enumerate(zip(bucket.names, bucket.views(full), strict=True)):
                let_go(self.model.params[name])
                self.model.params[name] = nn.Parameter(view)
                a, b = bucket.span(i)
                if b > a:
                    bucket.pieces[name].data = bucket.shard.data[a:b]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What this rank's optimizer updates of each parameter: all it has, a piece, or nothing."""
        found: dict[str, list[nn.Parameter]] = {n: [p] for n, p in self.plain.items()}
        for bucket in self.buckets:
            for name in bucket.names:
                found[name] = [bucket.pieces[name]] if name in bucket.pieces else []
        return found

    # -- a step ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The last backward passes of this step come: what is ready may be sent."""
        self.sync.begin()

    def finish(self) -> None:
        """Send what has not been sent, and wait until every gradient is summed."""
        self.sync.finish()
        if self.plan.zero == 3:
            for bucket in self.buckets:
                bucket.give(bucket.shard.grad)
                bucket.shard.grad = None
        for name, group in sorted(self._groups.items()):
            param = self.plain.get(name)
            if param is None or not param.requires_grad:
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            assert self.split.pipeline is not None
            self.split.pipeline.record("all_reduce", param.grad.numel() * param.grad.element_size())
            dist.all_reduce(param.grad, group=group)

    def after_update(self) -> None:
        """ZeRO 1 and 2: fetch the parts that other ranks updated."""
        if self.plan.zero in (1, 2):
            for bucket in self.buckets:
                assert bucket.full is not None
                own = bucket.shard.data.clone()
                bucket.axis.record("all_gather", own.numel() * own.element_size())
                dist.all_gather(list(bucket.full.chunk(bucket.axis.size)), own, group=bucket.axis.group)

    # -- reading -----------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """What this rank has of each parameter, by name."""
        found = {n: p.detach() for n, p in self.plain.items()}
        for bucket in self.buckets:
            found.update({n: p.detach() for n, p in bucket.pieces.items()})
        return found

    def grads(self) -> Iterator[tuple[str, Tensor, float]]:
        """This rank's gradients: name, tensor, and the share by which it counts in a sum over all ranks."""
        for name, param in self.plain.items():
            if param.grad is not None:
                copies = self.split.copies(self._params[name]) * len(self._stage_ranks.get(name, [0]))
                yield name, param.grad, 1.0 / copies
        for bucket in self.buckets:
            for name, piece in bucket.pieces.items():
                if piece.grad is not None:
                    yield name, piece.grad, bucket.axis.size / self.split.copies(self._params[name])


def _shared_over_stages(model: RankModel) -> dict[str, tuple[int, ...]]:
    """Parameters that stages of several ranks use (tied weights), with those pipeline ranks."""
    split = model.split
    ranks: dict[str, set[int]] = {}
    for s in range(split.plan.stages):
        for name in split.stage_params(s):
            ranks.setdefault(name, set()).add(s % split.plan.pipeline)
    return {name: tuple(sorted(at)) for name, at in ranks.items() if len(at) > 1}


def _tie_groups(model: RankModel, shared: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A process group for each set of stages that share a parameter; every rank makes all groups."""
    axis = model.split.pipeline
    if axis is None or not shared:
        return {}
    made: dict[tuple[int, ...], Any] = {}
    mesh = model.split.mesh
    for ranks in sorted(set(shared.values())):
        for column in mesh.columns(axis):
            members = [column[r] for r in ranks]
            group = open_group(members, axis.name, "tied")[0] if dist.is_initialized() else None
            if mesh.rank in members:
                made[ranks] = group
    return {name: made[ranks] for name, ranks in shared.items() if ranks in made}
