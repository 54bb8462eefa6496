"""What of a step counts as communication."""

from __future__ import annotations

from shardwise.measure.communication import exposed, outside


def test_a_collective_alone_counts_whole() -> None:
    assert exposed([(0.0, 10.0)], []) == 10.0


def test_a_collective_behind_computing_does_not_count() -> None:
    assert exposed([(1.0, 4.0)], [(0.0, 5.0)]) == 0.0


def test_only_what_sticks_out_counts() -> None:
    assert exposed([(0.0, 10.0)], [(2.0, 5.0), (8.0, 20.0)]) == 5.0


def test_collectives_at_the_same_time_count_once() -> None:
    assert exposed([(0.0, 6.0), (2.0, 8.0), (8.0, 9.0)], [(3.0, 4.0)]) == 8.0


def test_short_pauses_between_operators_are_no_waits() -> None:
    between = [(0.0, 4.0), (4.5, 8.0)]
    assert exposed([(0.0, 9.0)], between) == 1.5
    assert exposed([(0.0, 9.0)], between, pause=0.5) == 1.0


def test_order_does_not_matter() -> None:
    assert exposed([(8.0, 9.0), (0.0, 2.0)], [(8.5, 8.75), (0.0, 1.0)]) == 1.75


def test_operators_that_do_a_collective_are_no_computing() -> None:
    spans = [(0.0, 2.0), (2.5, 3.0), (4.0, 4.5), (5.0, 6.0)]
    assert outside(spans, [(2.0, 4.5), (7.0, 8.0)]) == [(0.0, 2.0), (5.0, 6.0)]
    assert outside(spans, []) == spans
