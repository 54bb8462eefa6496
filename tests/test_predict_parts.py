"""What prediction is made of, without ranks: forms of outputs, chunks, parcels, replicas, claims."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from shardwise.errors import JobError, RunError
from shardwise.graph.output import checked, put_together, taken_apart
from shardwise.inference.chunks import Chunks
from shardwise.inference.claims import Claims, Queue, StoreQueue
from shardwise.inference.local_queue import LocalQueue
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


@pytest.mark.parametrize("entries", [5, 5000], ids=["in the parcel", "beside it"])
def test_a_parcel_is_what_was_packed_and_its_memory_goes_with_its_tensors(entries: int) -> None:
    given = [
        torch.randn(3, entries), torch.zeros(0, 4), torch.tensor(True), torch.arange(7, dtype=torch.int16)[::2],
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


@pytest.fixture(params=["in a store", "in memory"])
def queues(request: pytest.FixtureRequest) -> Iterator[Callable[[], Queue]]:
    """What opens one queue, as often as it is asked."""
    store = dist.HashStore()
    if request.param == "in a store":
        yield lambda: StoreQueue(store)
        return
    with closing(LocalQueue.new(notes=4)) as memory, ExitStack() as stack:
        yield lambda: stack.enter_context(closing(memory.opened(store)))


def test_who_is_free_claims_the_next_chunk_within_the_window(queues: Callable[[], Queue]) -> None:
    store, caller, plan = dist.HashStore(), queues(), Plan((data(), tensor()))
    ranks = [Claims(queues(), store, Replica.of(plan, rank), rank, 3) for rank in range(4)]
    assert [ranks[0].next(), ranks[2].next(), ranks[2].next()] == [0, 1, 2]
    assert [ranks[3].next(), ranks[1].next(), ranks[3].next()] == [1, 0, 2]
    caller.take()
    assert ranks[0].next() == ranks[1].next() == 3
    assert caller.stop() == 4
    assert ranks[2].next() == ranks[3].next() == -1, "no room, and nobody makes any"


def test_what_is_said_of_chunks_is_read_once_it_is_there(queues: Callable[[], Queue]) -> None:
    caller, other = queues(), queues()
    said = [b"short", b"", os.urandom(1 << 17), b"another", b"the first one's place", os.urandom(1 << 16)]
    for chunk, note in enumerate(said[:4]):
        assert not caller.noted(chunk)
        other.note(chunk, note)
        assert caller.noted(chunk)
    assert [caller.read(chunk) for chunk in (0, 1, 2)] == said[:3]
    later = threading.Timer(0.2, lambda: [other.note(chunk, said[chunk]) for chunk in (4, 5)])
    later.start()
    assert [caller.read(chunk) for chunk in (3, 4, 5)] == said[3:], "waits for it"
    later.join()
    assert not caller.noted(6)


CLAIMING = """
import sys
from shardwise.inference.local_queue import LocalQueue

queue = LocalQueue(int(sys.argv[1]), int(sys.argv[2])).opened()
print(*(queue.claim() for _ in range(2000)))
"""


def test_no_two_processes_claim_one_chunk() -> None:
    with closing(LocalQueue.new()) as queue:
        command = [sys.executable, "-c", CLAIMING, str(queue.process), str(queue.descriptor)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        claimed = [[int(n) for n in process.communicate(timeout=60)[0].split()] for process in both]
    assert all(mine == sorted(mine) for mine in claimed)
    assert sorted(claimed[0] + claimed[1]) == list(range(4000))


def test_memory_of_a_process_that_is_gone_is_not_opened() -> None:
    queue = LocalQueue.new()
    queue.close()
    with pytest.raises(RunError, match=r"cannot open memory of process .* SHARDWISE_SHARED_MEMORY=0"):
        queue.opened()
