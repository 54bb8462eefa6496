"""Dims: positions become products of logical dims by unification with splitting, major first."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.graph.dims import BATCH, ONE, Dim, Size, carve, product, tie


def dims(*sizes: int) -> list[Dim]:
    return [Dim(Size(n)) for n in sizes]


def sizes(dim: Dim) -> list[int]:
    return [leaf.size.coefficient for leaf in dim.leaves()]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_multiply_and_divide_where_the_quotient_is_whole_for_every_batch() -> None:
    assert Size(3) * 4 == Size(12)
    assert Size(3) * BATCH * BATCH == Size(3, 2)
    assert (Size(6) * BATCH).divide(Size(3)) == Size(2, 1)
    assert (Size(6) * BATCH).divide(BATCH) == Size(6)
    assert Size(6).divide(Size(4)) is None
    assert Size(6).divide(BATCH) is None
    assert Size(0).divide(Size(0)) is None
    assert (Size(2) * BATCH).at(5) == 10
    assert product([]) == ONE and ONE.one and not BATCH.one


def test_a_size_that_is_an_expression_divides_only_itself() -> None:
    odd = Size(7, 0, "s0 // 2")
    assert odd.divide(odd) == ONE
    assert odd.divide(Size(7)) is None
    assert Size(7).divide(odd) is None
    assert (odd * 2).expression == "s0 // 2"


# --- tying ------------------------------------------------------------------------------------------------------------


def test_equal_sizes_become_one_dim() -> None:
    (a,), (b,), (c,) = dims(8), dims(8), dims(8)
    assert tie([a], [b]) and tie([b], [c])
    assert a.leaves() == b.leaves() == c.leaves()
    assert len(a.leaves()) == 1


def test_a_product_splits_what_it_meets_everywhere_major_first() -> None:
    (whole,), (alias,), (heads, depth) = dims(64), dims(64), dims(4, 16)
    assert tie([whole], [alias])
    assert tie([whole], [heads, depth])
    assert sizes(alias) == [4, 16]
    assert alias.leaves() == heads.leaves() + depth.leaves()


def test_a_split_is_refined_from_either_side() -> None:
    (a,), (b, c), (d, e) = dims(24), dims(4, 6), dims(2, 12)
    assert tie([a], [b, c])
    assert tie([a], [d, e])
    # Cuts after 2 and after 4 of 24.
    assert sizes(a) == [2, 2, 6]
    assert e.leaves() == a.leaves()[1:] and b.leaves() == a.leaves()[:2]


def test_where_no_whole_quotient_is_left_the_common_prefix_stays_tied() -> None:
    (x, y), (u, v) = dims(2, 15), dims(2, 15)
    assert tie([x, y], [u, v])
    (a, b, c), (d, e, f) = dims(5, 2, 3), dims(5, 3, 2)
    assert not tie([a, b, c], [d, e, f])
    assert a.leaves() == d.leaves()
    assert b.leaves() != e.leaves() and c.leaves() != f.leaves()


def test_sizes_of_one_vanish() -> None:
    (a, one, b), (c,) = dims(4, 1, 6), dims(24)
    assert one.leaves() == ()
    assert tie([a, one, b], [c])
    assert sizes(c) == [4, 6]


def test_the_batch_splits_off_a_flattened_position() -> None:
    batch, seq, flat = Dim(BATCH), Dim(Size(16)), Dim(BATCH * 16)
    assert tie([batch, seq], [flat])
    assert flat.leaves() == (batch.leaves()[0], seq.leaves()[0])


def test_a_dim_tied_to_a_product_that_it_is_part_of_is_refined_while_it_waits() -> None:
    # 4·4 against 4·4 shifted by one tie: splitting one side changes what waits on the other.
    (a,), (b, c), (d, e) = dims(16), dims(2, 8), dims(8, 2)
    assert tie([a], [b, c]) and tie([a], [d, e])
    assert sizes(a) == [2, 4, 2]
    assert tie([b, c], [a])
    assert sizes(a) == [2, 4, 2]


def test_labels_that_say_more_replace_those_that_say_less_and_owners_are_joined() -> None:
    a, b = Dim(Size(8), "width", ["up.weight"]), Dim(Size(8), "heads", ["q.weight"])
    tie([a], [b])
    (leaf,) = a.leaves()
    assert leaf.label == "heads"
    assert sorted(leaf.owners) == ["q.weight", "up.weight"]
    leaf.hint("width")
    assert leaf.label == "heads"
    leaf.hint("sequence")
    assert leaf.label == "sequence"


# --- carving ----------------------------------------------------------------------------------------------------------


def test_carving_takes_the_major_part_and_splits_a_leaf_where_needed() -> None:
    (a, b) = dims(4, 6)
    parts = carve([a, b], Size(8))
    assert parts is not None
    major, minor = parts
    assert [d.size.coefficient for d in major] == [4, 2]
    assert [d.size.coefficient for d in minor] == [3]
    assert sizes(b) == [2, 3]


@pytest.mark.parametrize("count", [5, 9, 48])
def test_carving_what_does_not_divide_is_refused(count: int) -> None:
    assert carve(dims(4, 6), Size(count)) is None


# --- any factorisation ------------------------------------------------------------------------------------------------

FACTORS = st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), min_size=1, max_size=4)


@given(FACTORS, st.data())
def test_two_groupings_of_the_same_factors_tie_completely(factors: list[int], drawn: st.DataObject) -> None:
    """A reshape: both sides are runs of the same atoms, so all of both must be tied, and to equal strides."""

    def grouping() -> list[Dim]:
        cuts = drawn.draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
        found, run = [], 1
        for factor, cut in zip(factors, cuts, strict=True):
            run *= factor
            if cut:
                found.append(run)
                run = 1
        return dims(*found, run)

    left, right = grouping(), grouping()
    assert tie(left, right)
    leaves = [leaf for dim in left for leaf in dim.leaves()]
    assert leaves == [leaf for dim in right for leaf in dim.leaves()]
    assert math.prod(leaf.size.coefficient for leaf in leaves) == math.prod(factors)


@given(FACTORS, FACTORS, FACTORS)
def test_ties_never_change_a_size(a: list[int], b: list[int], c: list[int]) -> None:
    groups = [dims(*a), dims(*b), dims(*c)]
    for left, right in ((0, 1), (1, 2), (0, 2)):
        tie(groups[left], groups[right])
    for given_, group in zip((a, b, c), groups, strict=True):
        assert [math.prod(sizes(dim)) for dim in group] == given_


@given(FACTORS, FACTORS, FACTORS)
def test_ties_are_an_equivalence(a: list[int], b: list[int], c: list[int]) -> None:
    x, y, z = dims(*a), dims(*b), dims(*c)
    if tie(x, y) and tie(y, z):
        assert tie(x, z)
        assert [leaf for d in x for leaf in d.leaves()] == [leaf for d in z for leaf in d.leaves()]
