"""What prediction is made of, without ranks: forms of outputs, chunks, parcels, replicas, claims."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from shardwise.errors import JobError
from shardwise.graph.output import checked, put_together, taken_apart
from shardwise.inference.chunks import Chunks
from shardwise.inference.claims import Claims, stop
from shardwise.inference.parcel import discard, pack, unpack
from shardwise.inference.prediction import Replica
from shardwise.job import Job
from shardwise.plan.plan import Plan, PlanAxis
from tests.conftest import data, pipeline, tensor


class Two(NamedTuple):
    """Two things."""

    left: Any
    right: Any


class More(dict[str, Any]):
    """A kind of dict that may need arguments of its own."""


def test_an_output_is_taken_apart_and_put_together() -> None:
    a, b, c = torch.ones(2), torch.zeros(3), torch.arange(4)
    output = OrderedDict(x=a, y=[b, (c, None, 3, "text", 2.5, True)], z=Two(a, {"k": b}), other=object(), m=More(q=c))
    form, tensors = taken_apart(output)
    assert len(tensors) == 6 and tensors[0] is a
    again = put_together(form, [t + 1 for t in tensors])
    assert type(again) is OrderedDict and type(again["z"]) is Two and type(again["m"]) is dict
    assert again["y"][1][1:] == (None, 3, "text", 2.5, True)
    assert again["other"] is None
    assert again["z"].left.tolist() == [2.0, 2.0] and again["m"]["q"].tolist() == [1, 2, 3, 4]


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(JobError, match="dict, has no tensor in it"):
        checked({"a": 1, "b": None})


class Stream(IterableDataset[Any]):
    """Numbers, with one drawn from torch's generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.stack([torch.tensor(float(i)), torch.rand(())]) for i in range(self.count))


def job(rows: Any, size: int = 3) -> Job:
    return Job(model=lambda: torch.nn.Linear(1, 1), data=rows, global_batch=size)


def test_chunks_of_a_dataset_are_its_samples_in_order() -> None:
    chunks = Chunks(job(TensorDataset(torch.arange(8))))
    assert chunks.count == 3 and chunks.sizes() == {3, 2}
    assert [chunks.read(i)[0].tolist() for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]  # type: ignore[index]
    assert chunks.read(3) is None
    assert chunks.example()[0].tolist() == [0, 1]  # type: ignore[index]
    assert Chunks(job(TensorDataset(torch.arange(6)))).sizes() == {3}
    assert Chunks(job(TensorDataset(torch.arange(2)))).sizes() == {2}


def test_a_rank_that_takes_some_chunks_of_a_stream_reads_what_another_would() -> None:
    whole, some = Chunks(job(Stream(8))), Chunks(job(Stream(8)))
    every = [whole.read(i) for i in range(3)]
    assert [batch[:, 0].tolist() for batch in every] == [[0, 1, 2], [3, 4, 5], [6, 7]]  # type: ignore[index]
    assert whole.count is None
    assert whole.read(3) is None
    assert vars(whole)["count"] == 3
    assert torch.equal(some.read(2), every[2])  # type: ignore[arg-type]
    assert some.read(5) is None
    assert vars(some)["count"] == 3


def test_a_parcel_is_what_was_packed_and_its_memory_goes_with_its_tensors() -> None:
    given = [
        torch.randn(3, 5), torch.zeros(0, 4), torch.tensor(True), torch.arange(7, dtype=torch.int16)[::2],
        torch.randn(2, dtype=torch.complex128), torch.randn(4, dtype=torch.bfloat16), torch.eye(3).t(),
    ]  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    parcel = pack(given)
    found = unpack(parcel)
    discard(parcel)
    for a, b in zip(found, given, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    found[0].zero_()
    assert float(found[0].sum()) == 0.0
    del found, a
    assert len(os.listdir("/proc/self/fd")) == before


def test_replicas_are_the_ranks_that_differ_in_no_data_axis() -> None:
    plan = Plan((pipeline(), data(), tensor()), ("a",))
    assert [Replica.of(plan, rank) for rank in (0, 3)] == [
        Replica(0, 2, (0, 1, 4, 5), giver=4),
        Replica(1, 2, (2, 3, 6, 7), giver=6),
    ]
    assert Replica.of(Plan((data(3),)), 2) == Replica(2, 3, (2,), giver=2)
    both = Plan((PlanAxis("both", 2, ("heads*", "batch")),))
    assert Replica.of(both, 1) == Replica(0, 1, (0, 1), giver=0)


def test_who_is_free_claims_the_next_chunk_within_the_window() -> None:
    store, counted = dist.HashStore(), [0]
    plan = Plan((data(), tensor()))
    ranks = [Claims(store, Replica.of(plan, rank), rank, 3, lambda: counted[0]) for rank in range(4)]
    assert [ranks[0].next(), ranks[2].next(), ranks[2].next()] == [0, 1, 2]
    assert [ranks[3].next(), ranks[1].next(), ranks[3].next()] == [1, 0, 2]
    counted[0] = 1
    assert ranks[0].next() == ranks[1].next() == 3
    assert stop(store) == 4
    assert ranks[2].next() == ranks[3].next() == -1, "no room, and nobody makes any"
