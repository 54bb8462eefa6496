"""Random numbers are functions of seed, step, operator and position, so that a part has the numbers of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.graph.random import bits, dropout_at, normal_at, positions, stream, uniform_at

CPU = torch.device("cpu")


def at(*shape: int) -> torch.Tensor:
    return positions(shape, None, shape, CPU)


def test_positions_are_those_of_the_whole_tensor() -> None:
    assert torch.equal(at(3, 5), torch.arange(15).view(3, 5))
    rows, columns = torch.tensor([1, 2]), torch.tensor([0, 4])
    part = positions((2, 2), [rows, columns], (3, 5), CPU)
    assert torch.equal(part, at(3, 5)[1:3][:, [0, 4]])


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_any_part_has_the_mask_of_the_whole(rows: int, columns: int, drawn: st.DataObject) -> None:
    top = drawn.draw(st.integers(0, rows - 1))
    left = drawn.draw(st.integers(0, columns - 1))
    x = torch.ones(rows, columns, dtype=torch.float64)
    whole = dropout_at(x, 0.5, at(rows, columns), stream(7, 0, 3))
    axes = [torch.arange(top, rows), torch.arange(left, columns)]
    place = positions((rows - top, columns - left), axes, (rows, columns), CPU)
    assert torch.equal(dropout_at(x[top:, left:], 0.5, place, stream(7, 0, 3)), whole[top:, left:])


def test_streams_differ_by_seed_step_and_operator() -> None:
    keys = {stream(seed, step, op) for seed in range(8) for step in range(8) for op in range(8)}
    assert len(keys) == 512


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_streams_are_not_correlated(other: tuple[int, int, int]) -> None:
    place = at(100_000)
    a, b = (uniform_at(place, stream(*key), torch.float64) - 0.5 for key in ((0, 0, 0), other))
    # Of independent uniform numbers the correlation has a standard deviation of 1/√n.
    assert abs(float((a * b).mean() * 12)) < 4 / 100_000**0.5


def test_bits_are_even_and_neighbours_are_independent() -> None:
    found = bits(at(100_000), stream(3, 1, 4))
    assert int(found.min()) >= 0 and int(found.max()) < 1 << 32
    ones = torch.stack([(found >> k & 1).double().mean() for k in range(32)])
    assert float((ones - 0.5).abs().max()) < 4 * 0.5 / 100_000**0.5
    high = (found >> 31).double() * 2 - 1
    assert abs(float((high[1:] * high[:-1]).mean())) < 4 / 100_000**0.5


def test_uniform_and_normal_numbers_are_what_they_say() -> None:
    u = uniform_at(at(200_000), stream(0, 0, 1), torch.float64)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.003 and abs(float(u.var()) - 1 / 12) < 0.001
    z = normal_at(at(200_000), stream(0, 0, 2), torch.float64)
    assert abs(float(z.mean())) < 0.01 and abs(float(z.var()) - 1) < 0.02
    assert bool(torch.isfinite(z).all())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_mean_and_drops_its_share(p: float) -> None:
    x = torch.ones(100_000, dtype=torch.float64, requires_grad=True)
    found = dropout_at(x, p, at(100_000), stream(1, 2, 3))
    dropped = float((found == 0).double().mean())
    assert abs(dropped - p) < 0.006
    if p < 1:
        assert torch.equal(found[found != 0].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64))
    found.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, found.detach())
