"""Collectives through shared memory: what gloo returns, the same bits on all ranks, and no wait for who is gone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.engine.launch import Ranks, joined
from shardwise.errors import LostRankError
from shardwise.machine import shared_memory
from shardwise.machine.backend import Backend
from shardwise.machine.shared_memory import shares_memory
from shardwise.machine.slots import Slots
from shardwise.measure.traffic import Collectives
from shardwise.parallel.mesh import open_group
from tests.pool import Pool

SIZES = (0, 1, 7, 5_000, 300_001)
"""Numbers of a tensor: nothing, less than there are ranks, one slot, and several that divide by nothing."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def _pairs(group: dist.ProcessGroup, dtype: torch.dtype, n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a collective brings through shared memory, and what gloo brings."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def numbers(count: int) -> Tensor:
        return torch.randint(-2, 3, (count,)).to(dtype)  # whose sums and products every dtype has exactly

    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        found = numbers(n)
        true = found.clone()
        dist.all_reduce(found, op, group=group)
        dist.all_reduce(true, op)
        yield f"all_reduce {op}", found, true
    x = numbers(n)
    outs = [[torch.empty_like(x) for _ in range(size)] for _ in range(2)]
    dist.all_gather(outs[0], x, group=group)
    dist.all_gather(outs[1], x)
    yield "all_gather", torch.cat(outs[0]), torch.cat(outs[1])
    parts = [numbers(n) for _ in range(size)]
    found, true = torch.empty_like(x), torch.empty_like(x)
    dist.reduce_scatter(found, parts, group=group)
    dist.reduce_scatter(true, parts)
    yield "reduce_scatter", found, true
    found = numbers(n)
    true = found.clone()
    dist.broadcast(found, size - 1, group=group)
    dist.broadcast(true, size - 1)
    yield "broadcast", found, true
    found = numbers(n)
    true = found.clone()
    dist.reduce(found, 1, group=group)
    dist.reduce(true, 1)
    if rank == 1:
        yield "reduce", found, true
    lists = [[torch.empty_like(x) for _ in range(size)] if rank == 1 else None for _ in range(2)]
    dist.gather(x, lists[0], 1, group=group)
    dist.gather(x, lists[1], 1)
    if lists[0] and lists[1]:
        yield "gather", torch.cat(lists[0]), torch.cat(lists[1])
    x = numbers(n * size)
    found, true = torch.empty_like(x), torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    dist.all_to_all_single(true, x)
    yield "all_to_all", found, true
    sent, received = [n + 3 * rank + j for j in range(size)], [n + 3 * j + rank for j in range(size)]
    x = numbers(sum(sent))
    found, true = x.new_empty(sum(received)), x.new_empty(sum(received))
    dist.all_to_all_single(found, x, received, sent, group=group)
    dist.all_to_all_single(true, x, received, sent)
    yield "all_to_all of unequal parts", found, true


def _unlike_gloo(dtype: torch.dtype, shared: bool = True) -> list[str]:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        assert shares_memory(group) is shared
        torch.manual_seed(place.rank)
        return [
            f"{name} of {n}" for n in SIZES for name, found, true in _pairs(group, dtype, n)
            if not torch.equal(found, true)
        ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_collective_returns_what_gloo_returns(pool: Pool, ranks: int, dtype: torch.dtype) -> None:
    assert pool(ranks).run(_unlike_gloo, dtype, timeout=120) == [[]] * ranks


def _sums(n: int) -> list[float]:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        torch.manual_seed(place.rank)
        x = torch.randn(n)
        dist.all_reduce(x, group=group)
        return x.tolist()


@pytest.mark.parametrize("n", [1_000, 200_000])
def test_all_ranks_get_the_same_bits_of_a_sum(pool: Pool, n: int) -> None:
    first, *others = pool(4).run(_sums, n, timeout=60)
    assert all(other == first for other in others)


def _under_way() -> list[bool]:
    """Several at once, waited for in another order; one is begun long before the others begin it."""
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        if place.rank == 1:
            time.sleep(0.3)
        big, small = torch.ones(700_000), torch.full((3,), float(place.rank))
        parts = [torch.empty(3) for _ in range(place.world)]
        works: list[Any] = [
            dist.all_reduce(big, group=group, async_op=True),
            dist.all_gather(parts, small, group=group, async_op=True),
            dist.all_reduce(small.clone(), group=group, async_op=True),
        ]
        for work in reversed(works):
            work.wait()
        gathered = [float(part[0]) for part in parts] == list(range(place.world))
        return [bool((big == place.world).all()), gathered, all(work.is_completed() for work in works)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_under_way_keep_their_order(pool: Pool, ranks: int) -> None:
    assert pool(ranks).run(_under_way, timeout=60) == [[True, True, True]] * ranks


def _parts_with_gaps() -> list[bool]:
    """Parts that arrive where they belong in a larger tensor, and that are summed from where they lie."""
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        found = []
        for shape in ((3, 4, 5), (2, 1, 200_001), (70_001, 2, 3)):  # several rows a slot, several slots a row
            mine = torch.full(shape, float(place.rank)) + torch.arange(shape[2])
            whole = torch.empty(shape[0], place.world, *shape[1:])
            dist.all_gather(list(whole.unbind(1)), mine, group=group)
            found.append(all(torch.equal(whole[:, r], mine - place.rank + r) for r in range(place.world)))
            summed = torch.empty(shape)
            dist.reduce_scatter(summed, list(whole.unbind(1)), group=group)
            found.append(torch.equal(summed, whole[:, place.rank] * place.world))
            # The last rank alone has the room, and no other knows into what rows its part goes.
            last, again = place.world - 1, torch.zeros_like(whole)
            dist.gather(mine, list(again.unbind(1)) if place.rank == last else None, last, group=group)
            found.append(torch.equal(again, whole if place.rank == last else torch.zeros_like(whole)))
        return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_may_have_gaps_between_their_rows(pool: Pool, ranks: int) -> None:
    assert pool(ranks).run(_parts_with_gaps, timeout=60) == [[True] * 9] * ranks


def _tensor_in_another_layout() -> list[float]:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        x = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
        dist.all_reduce(x, group=group)
        with pytest.raises(ValueError, match="has gaps"):
            dist.all_reduce(torch.ones(4, 4)[:, ::2], group=group)
        return x.flatten().tolist()


def test_numbers_are_sent_as_they_lie_in_memory(pool: Pool) -> None:
    assert pool(2).run(_tensor_in_another_layout, timeout=60) == [[2.0 * i for i in range(24)]] * 2


def _different_things() -> str:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        try:
            if place.rank == 0:
                dist.all_reduce(torch.ones(10), group=group)
            else:
                dist.all_reduce(torch.ones(11), group=group)
        except RuntimeError as error:
            return str(error)
        return ""


def test_ranks_that_do_different_things_are_told() -> None:
    with Ranks(2, backend=Backend.cpu()) as ranks:
        said = ranks.run(_different_things, timeout=60)
    assert any("does another collective, or one of another size" in text for text in said), said


def _end_before_others() -> None:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        dist.all_reduce(torch.ones(3), group=group)
        if place.rank == 1:
            os._exit(3)
        dist.all_reduce(torch.ones(3), group=group)


def test_a_killed_rank_is_noticed_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(LostRankError, match="rank 1 of 2 exited with code 3"), Ranks(2, backend=Backend.cpu()) as ranks:
        ranks.run(_end_before_others, timeout=60)
    assert time.monotonic() - start < 30  # and not after the time-out


def _leave_before_others() -> str:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        if place.rank == 1:
            dist.destroy_process_group(group)
            return ""
        begun = time.monotonic()
        try:
            dist.all_reduce(torch.ones(3), group=group)
        except RuntimeError as error:
            assert time.monotonic() - begun < 10
            return str(error)
        return "no error"


def test_a_rank_that_leaves_a_group_is_not_waited_for(pool: Pool) -> None:
    said, _ = pool(2).run(_leave_before_others, timeout=60)
    assert said == "rank 1 of a group is gone, for which rank 0 waits"


def _late() -> str:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        said = ""
        if place.rank == 0:
            try:
                dist.all_reduce(torch.ones(3), group=group)
            except RuntimeError as error:
                said = str(error)
        else:
            time.sleep(3.0)
        return said


def _slow_to_start() -> float:
    """A rank that takes longer to map its memory than others wait before they look whether it lives."""
    with joined() as place:

        class Slow(Slots):
            def __init__(self, *args: Any) -> None:
                time.sleep(1.0 * (place.rank == 0))
                super().__init__(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory, "Slots", Slow)
            group, _ = open_group(range(place.world), "test")
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        return float(x)


def test_a_rank_that_is_slow_to_start_is_not_taken_for_gone(pool: Pool) -> None:
    assert pool(2).run(_slow_to_start, timeout=60) == [2.0, 2.0]


def test_a_rank_that_does_not_come_is_named() -> None:
    with Ranks(2, backend=Backend.cpu(), collective_timeout=2.0) as ranks:
        said, _ = ranks.run(_late, timeout=60)
    assert re.fullmatch("rank 0 of a group timed out after 2 s of waiting for rank 1", said)


def _seen() -> list[tuple[str, str, int, int]]:
    """What is counted of one collective of each kind, and of what one rank sends to the next."""
    with joined() as place, Collectives() as seen:
        group, _ = open_group(range(place.world), "test")
        x, parts = torch.ones(4), list(torch.ones(2, 4))
        dist.all_reduce(x, group=group)
        dist.all_gather(parts, x, group=group)
        dist.reduce_scatter(x, parts, group=group)
        dist.all_to_all_single(torch.empty(4), x, group=group)
        dist.broadcast(x, 0, group=group)
        if place.rank == 0:
            dist.send(x, 1, group=group)
        else:
            dist.recv(x, 0, group=group)
        dist.barrier()
        return [(t.kind, t.axis, t.count, t.bytes) for t in seen.take() if t.axis == "test"]


@pytest.mark.parametrize("shared", ["1", "0"])
def test_every_way_works_and_is_counted_once(monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    monkeypatch.setenv("SHARDWISE_SHARED_MEMORY", shared)
    kinds = {"all_gather": 16, "all_reduce": 16, "all_to_all": 16, "broadcast": 16, "reduce_scatter": 32}
    with Ranks(2, backend=Backend.cpu()) as ranks:
        assert ranks.run(_unlike_gloo, torch.float32, shared == "1", timeout=100) == [[], []]
        first, second = ranks.run(_seen, timeout=60)
    assert second == [(kind, "test", 1, size) for kind, size in kinds.items()]
    assert first == [*second, ("send", "test", 1, 16)]


def _shares() -> tuple[bool, list[float]]:
    with joined() as place:
        group, _ = open_group(range(place.world), "test")
        x = torch.ones(5)
        dist.all_reduce(x, group=group)
        return shares_memory(group), x.tolist()


def test_gloo_does_the_work_where_memory_may_not_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_SHARED_MEMORY", "0")
    with Ranks(2, backend=Backend.cpu()) as ranks:
        assert ranks.run(_shares, timeout=60) == [(False, [2.0] * 5)] * 2


def _shares_unless_one_does_not() -> tuple[bool, list[float]]:
    with joined() as place:
        if place.rank == 1:
            os.environ["SHARDWISE_SHARED_MEMORY"] = "0"
        try:
            return _shares()
        finally:
            os.environ.pop("SHARDWISE_SHARED_MEMORY", None)


def test_ranks_that_cannot_all_share_agree_on_gloo(pool: Pool) -> None:
    assert pool(2).run(_shares_unless_one_does_not, timeout=60) == [(False, [2.0] * 5)] * 2


def _mapped() -> int:
    with open("/proc/self/maps") as lines:
        return sum("memfd:shardwise " in line for line in lines)


def test_memory_goes_with_its_group(pool: Pool) -> None:
    ranks = pool(2)
    assert ranks.run(_shares, timeout=60) == [(True, [2.0] * 5)] * 2
    assert ranks.run(_mapped, timeout=60) == [0, 0]
