"""Bugs that have shipped in libraries like this one, each put back by replacing one function while a plan runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engine import base, engine
from shardwise.engine.engine import GraphEngine
from shardwise.graph import random
from shardwise.graph.dims import BATCH
from shardwise.job import Job
from shardwise.parallel import batch_norm, collectives, convert, hybrid, lower, operators, rank, reduction
from shardwise.parallel.data import GradientSync
from shardwise.parallel.hybrid import Split
from shardwise.parallel.layout import PARTIAL, Layout
from shardwise.parallel.pipeline import Pipeline
from shardwise.parallel.rank import RankModel
from shardwise.parallel.reduction import Reduction
from shardwise.parallel.sharded import FlatBucket
from shardwise.parallel.writer import Writer

Patch = pytest.MonkeyPatch
Bug = Callable[[Patch], None]


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(the function, its arguments ...)`."""
    plain = getattr(owner, name)

    def changed(*given: Any, **more: Any) -> Any:
        return change(plain, *given, **more)

    changed.__name__ = name
    patch.setattr(owner, name, changed)


def identity(x: Tensor, *rest: Any) -> Tensor:
    return x


# --- sums that are left out, or made twice ----------------------------------------------------------------------------


def no_sum_after_a_contraction(patch: Patch) -> None:
    patch.setattr(collectives, "reduce", identity)


def no_sum_in_backward(patch: Patch) -> None:
    patch.setattr(collectives, "vary", identity)


def whole_gradient_summed_again(patch: Patch) -> None:
    """A parameter that some operators use whole and others in parts: its whole gradient counts once per rank."""
    patch.setattr(collectives, "scale_grad", identity)


def no_sum_of_gradients(patch: Patch) -> None:
    patch.setattr(Split, "sums", lambda split, value: ())


def gradients_averaged_over_ranks(patch: Patch) -> None:
    def finish(plain: Any, sync: GradientSync) -> None:
        plain(sync)
        for bucket in sync.buckets:
            bucket.flat.div_(bucket.axes[0].size)

    wrapped(patch, GradientSync, "finish", finish)


def bias_added_on_every_rank(patch: Patch) -> None:
    """A bias added to partial sums is summed with them."""

    def passes(plain: Any, layout: Layout, op: Any, axis: int) -> Any:
        found = plain(layout, op, axis)
        states = [(o.slot, layout.states.get(o.value)) for o in op.context.inputs]
        partial = frozenset(slot for slot, state in states if state is not None and state[axis] == PARTIAL)
        return partial if op.name == "aten.add" and partial else found

    wrapped(patch, Layout, "_passes", passes)


def skip_gradient_dropped_at_a_cut(patch: Patch) -> None:
    """Of several tensors that crossed a cut, only the first gets its gradient back."""

    def send(plain: Any, pipe: Pipeline, kind: str, to: int, m: int, tensors: Sequence[Tensor]) -> None:
        kept = list(tensors) if kind == "F" else [*tensors[:1], *(torch.zeros_like(t) for t in tensors[1:])]
        plain(pipe, kind, to, m, kept)

    wrapped(patch, Pipeline, "_send", send)


# --- means ------------------------------------------------------------------------------------------------------------


def each_rank_divides_by_its_own_count(patch: Patch) -> None:
    """The mean over ranks of their means, whatever the number of labels on each."""

    def reduce(plain: Any, x: Tensor, axis: Any) -> Tensor:
        summed: Tensor = plain(x, axis)
        return summed if x.is_floating_point() else x * axis.size

    wrapped(patch, collectives, "reduce", reduce)


def each_micro_batch_divides_by_one_count(patch: Patch) -> None:
    wrapped(patch, rank, "combine", lambda plain, early, parts, *rest: parts[0] * len(parts))


def mean_of_the_rank_s_own_elements(patch: Patch) -> None:
    wrapped(patch, lower, "mean", lambda plain, x, dim, *rest: x.mean() if dim is None else x.mean(list(dim)))


def accumulation_averaged(patch: Patch) -> None:
    def finish(plain: Any, whole: Reduction) -> None:
        for param in whole.plain.values():
            if param.grad is not None:
                param.grad.div_(whole.plan.micro_batches)
        plain(whole)

    wrapped(patch, Reduction, "finish", finish)


def loss_scaled_twice(patch: Patch) -> None:
    def run(plain: Any, model: RankModel, *rest: Any) -> dict[str, Tensor]:
        found = plain(model, *rest)
        return {n: t / model.split.plan.micro_batches if n == "loss" else t for n, t in found.items()}

    wrapped(patch, RankModel, "run", run)


def accumulation_wiped(patch: Patch) -> None:
    def run(plain: Any, model: RankModel, stage: int, m: int, received: Any) -> Any:
        if m:
            for param in model.params.values():
                param.grad = None
        return plain(model, stage, m, received)

    wrapped(patch, RankModel, "run", run)


def gradients_sent_before_the_last_micro_batch(patch: Patch) -> None:
    def forward_backward(plain: Any, self: GraphEngine, batch: Any) -> float:
        self._reduction.begin()
        loss: float = plain(self, batch)
        return loss

    wrapped(patch, GraphEngine, "forward_backward", forward_backward)


# --- clipping ---------------------------------------------------------------------------------------------------------


def norm_of_a_shard_taken_for_the_whole(patch: Patch) -> None:
    patch.setattr(base, "dist", SimpleNamespace(is_initialized=lambda: False))


def replicated_parameters_counted_once_per_rank(patch: Patch) -> None:
    wrapped(patch, Reduction, "grads", lambda plain, whole: ((name, grad, 1.0) for name, grad, _ in plain(whole)))


def largest_entry_taken_for_the_norm(patch: Patch) -> None:
    def largest(plain: Any, grads: Iterable[tuple[Tensor, float]], device: Any) -> Tensor:
        return torch.stack([grad.abs().max() ** 2 * share for grad, share in grads]).max()

    wrapped(patch, base, "squared_norm", largest)


# --- tied weights, state, shards --------------------------------------------------------------------------------------


def tied_weights_not_summed_over_stages(patch: Patch) -> None:
    patch.setattr(reduction, "_tie_groups", lambda model, shared: {})


def updated_parts_not_fetched(patch: Patch) -> None:
    patch.setattr(Reduction, "after_update", lambda whole: None)


def stale_gather(patch: Patch) -> None:
    """ZeRO-3 goes on with the parameters that it gathered in the first step."""
    kept: dict[int, Tensor] = {}

    def gather(plain: Any, bucket: FlatBucket) -> Tensor:
        if id(bucket) not in kept:
            kept[id(bucket)] = plain(bucket)
        bucket.full = kept[id(bucket)]
        return bucket.full

    wrapped(patch, FlatBucket, "gather", gather)


def own_part_of_gradients_not_summed(patch: Patch) -> None:
    def own(plain: Any, bucket: FlatBucket, flat: Tensor) -> Any:
        part = flat.chunk(bucket.axis.size)[bucket.axis.rank].clone()
        return SimpleNamespace(wait=lambda: part)

    wrapped(patch, FlatBucket, "reducing", own)


def parts_joined_in_another_order(patch: Patch) -> None:
    """Experts overwritten: state is read back rank by rank from the wrong end."""

    def join(plain: Any, x: Tensor, axis: Any, pos: int, lead: int, sizes: Sequence[int]) -> Tensor:
        whole: Tensor = plain(x, axis, pos, lead, sizes)
        return whole.roll(whole.shape[pos] // axis.size, pos)

    wrapped(patch, hybrid, "join", join)


def fused_weight_cut_in_one_piece(patch: Patch) -> None:
    """A third of the heads' queries, keys and values each; not the first third of all rows."""
    wrapped(patch, hybrid, "take", lambda plain, x, axis, pos, lead, sizes: plain(x, axis, pos, 1, sizes))


def groups_made_by_the_shapes_of_parts(patch: Patch) -> None:
    """An optimizer that leaves out vectors from weight decay sees flat pieces, and leaves out all."""

    def build(factory: Any, module: Any, local: Mapping[str, Sequence[nn.Parameter]]) -> tuple[Any, Any]:
        made = factory([p for parts in local.values() for p in parts])
        return made if isinstance(made, tuple) else (made, None)

    patch.setattr(engine, "build_optimizer", build)


# --- random numbers ---------------------------------------------------------------------------------------------------


def _start(patch: Patch, found: Callable[[Writer, Any], Any]) -> None:
    def start(plain: Any, writer: Writer, value: Any, pos: int, leaf: int, states: Any) -> Any:
        number = plain(writer, value, pos, leaf, states)
        return found(writer, number) if value.dims[pos].leaves()[leaf].size == BATCH else number

    wrapped(patch, Writer, "start", start)


def same_mask_on_every_rank(patch: Patch) -> None:
    _start(patch, lambda writer, number: writer.first)


def same_mask_for_every_micro_batch(patch: Patch) -> None:
    _start(patch, lambda writer, number: 0)


def other_mask_on_every_rank(patch: Patch) -> None:
    """Ranks that hold the same activations must drop the same."""
    me = dist.get_rank()
    wrapped(patch, random, "stream", lambda plain, seed, step, op: plain(seed + me, step, op))


def same_mask_in_every_step(patch: Patch) -> None:
    wrapped(patch, random, "stream", lambda plain, seed, step, op: plain(seed, 0, op))


def same_mask_in_every_operator(patch: Patch) -> None:
    wrapped(patch, random, "stream", lambda plain, seed, step, op: plain(seed, step, 0))


def each_rank_draws_its_own_weights(patch: Patch) -> None:
    me = dist.get_rank()

    wrapped(patch, Job, "bare", lambda plain, job, *rest: plain(job.with_(seed=job.seed + me), *rest))


# --- batch norm, samples, schedulers ----------------------------------------------------------------------------------


def statistics_of_the_rank_s_own_samples(patch: Patch) -> None:
    wrapped(patch, operators, "batch_norm", lambda plain, *given: plain(*given[:-1], []))


def statistics_of_unequal_parts_averaged(patch: Patch) -> None:
    def join(plain: Any, *given: Any) -> Tensor:
        rows: Tensor = plain(*given)
        rows[:, 2] = rows[:, 2].mean(0)
        return rows

    wrapped(patch, batch_norm, "join", join)


def every_rank_reads_the_same_samples(patch: Patch) -> None:
    def rows(plain: Any, split: Split, *rest: Any) -> tuple[int, int]:
        start, stop = plain(split, *rest)
        return 0, stop - start

    wrapped(patch, Split, "rows", rows)


def scheduler_stepped_once_per_rank(patch: Patch) -> None:
    def update(plain: Any, self: GraphEngine) -> None:
        plain(self)
        self.scheduler.step()

    wrapped(patch, GraphEngine, "update", update)


# --- lowerings --------------------------------------------------------------------------------------------------------


def causal_mask_from_the_rank_s_own_start(patch: Patch) -> None:
    wrapped(patch, lower, "attention", lambda plain, q, k, v, start, *rest: plain(q, k, v, 0, *rest))


def each_rank_subtracts_its_own_largest_logit(patch: Patch) -> None:
    def all_reduce(plain: Any, x: Tensor, axis: Any, **op: Any) -> Tensor:
        return x if op else plain(x, axis)  # type: ignore[no-any-return]

    wrapped(patch, lower, "all_reduce_", all_reduce)


def rows_of_other_ranks_not_masked(patch: Patch) -> None:
    def embedding(plain: Any, table: Tensor, index: Tensor, start: int, padding: int) -> Tensor:
        return torch.nn.functional.embedding(index % table.shape[0], table)

    wrapped(patch, lower, "embedding", embedding)


def padding_row_learned(patch: Patch) -> None:
    wrapped(patch, lower, "embedding", lambda plain, table, index, start, padding: plain(table, index, start, -1))


# --- what is announced ------------------------------------------------------------------------------------------------


def edges_not_announced(patch: Patch) -> None:
    patch.setattr(convert, "_announce", lambda *given: None)


def gathered_twice(patch: Patch) -> None:
    def gather(plain: Any, *given: Any) -> Tensor:
        with torch.no_grad(), suppress(StopIteration):
            plain(*given)
        return plain(*given)  # type: ignore[no-any-return]

    wrapped(patch, collectives, "gather", gather)


def gradients_sent_in_other_buckets(patch: Patch) -> None:
    """Half of what was announced, twice."""

    def send(plain: Any, sync: GradientSync, bucket: Any) -> None:
        whole = bucket.flat
        for part in whole.chunk(2):
            bucket.flat = part
            plain(sync, bucket)
            bucket.work.wait()
        bucket.flat = whole

    wrapped(patch, GradientSync, "_send", send)
