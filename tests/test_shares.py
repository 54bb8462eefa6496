"""Shares of the batch for devices that are not alike: as good as any, and priced by the rank that takes longest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.cost.pricer import Pricer
from shardwise.machine.cluster import Cluster
from shardwise.plan.plan import Plan, PlanAxis
from shardwise.search.choose import search
from shardwise.search.shares import fair_shares
from shardwise.search.space import Options
from shardwise.search.strategies import Maker, maker_of
from tests.test_planner import graph_of, perceptron


def every(ranks: int, samples: int) -> Iterator[tuple[int, ...]]:
    if ranks == 1:
        yield (samples,)
        return
    for first in range(1, samples - ranks + 2):
        yield from ((first, *rest) for rest in every(ranks - 1, samples - first))


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(0, 8))
def test_no_other_shares_are_done_earlier(speeds: list[float], more: int) -> None:
    samples = len(speeds) + more
    shares = fair_shares(speeds, samples) or (1,) * len(speeds)
    dealt = [share * samples / sum(shares) for share in shares]
    if len(set(shares)) > 1:
        assert all(n == int(n) for n in dealt)
    best = min(max(n / speed for n, speed in zip(each, speeds, strict=True)) for each in every(len(speeds), samples))
    assert max(n / speed for n, speed in zip(dealt, speeds, strict=True)) == pytest.approx(best)


def test_a_plan_with_shares_takes_as_long_as_its_slowest_rank() -> None:
    pricer, batch = Pricer(graph_of((4096, 4096, 4096))), 65536
    unlike = Cluster.load("1x1xh100-sxm,1x1xa100-40gb")

    def compute(cluster: Cluster, shares: tuple[int, ...], batch: int = batch) -> float:
        return pricer.price(Plan((PlanAxis("data", 2, ("batch",), shares),)), cluster, batch).seconds["compute"]

    slow, fast = (compute(Cluster.load(f"2x1x{name}"), (), batch // 2) for name in ("a100-40gb", "h100-sxm"))
    assert compute(unlike, ()) == pytest.approx(compute(Cluster.load("2x1xa100-40gb"), ()))
    assert compute(unlike, (3, 1)) == pytest.approx(max(slow, 3 * fast), rel=0.02)
    assert compute(unlike, (1, 3)) == pytest.approx(3 * slow, rel=0.02), "the slow one has most of the batch"


def test_the_planner_gives_the_faster_device_more() -> None:
    job, unlike = perceptron((4096, 4096, 4096), 4096), Cluster.load("1x1xh100-sxm,1x1xa100-40gb")
    maker = maker_of(job, cluster=unlike)
    assert isinstance(maker, Maker)
    found = search(maker, unlike, Options(fixed={"data": 2}))
    assert found.best is not None and found.gap == 0
    (axis,) = found.best.plan.axes
    h100, a100 = axis.shares
    assert 2 < h100 / a100 < 3.2, "as one has more operations a second than the other"
    alike = maker.pricer.price(Plan((PlanAxis("data", 2, ("batch",)),)), unlike, 4096)
    assert found.best.estimate.step < 0.8 * alike.step
    same = Cluster.load("2x1xa100-40gb")
    best = search(maker, same, Options(fixed={"data": 2})).best
    assert best is not None and best.plan.axes[0].shares == ()


def test_memory_is_that_of_the_rank_with_least_room() -> None:
    """An H100 has 80 GB and an A100 40: with three quarters of the batch it is the H100 that has less left."""
    pricer, unlike = Pricer(graph_of((4096, 4096, 4096))), Cluster.load("1x1xh100-sxm,1x1xa100-40gb")
    plan = Plan((PlanAxis("data", 2, ("batch",), (3, 1)),))
    small, large = (pricer.price(plan, unlike, batch) for batch in (1024, 2_000_000))
    assert small.limits == pytest.approx((42.3e9,), rel=0.01) and small.fits
    assert large.limits == pytest.approx((85.0e9,), rel=0.02) and not large.fits
