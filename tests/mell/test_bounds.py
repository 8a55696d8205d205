"""The bracket around the optimum, and the 4/3 of the scheduler on exactly solved cases."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.mell import bounds
from tests.laws.strategies import law
from tests.mell.test_packing import drive

exact = pytest.importorskip("bench.mell.exact", reason="needs scipy: pip install '.[exact]'")

OPEN = 4  # the constant: one open GPU per class


def brute(sizes, capacity):
    """Fewest bins by exhaustion."""
    best = len(sizes)

    def place(index, fills):
        nonlocal best
        if len(fills) >= best:
            return
        if index == len(sizes):
            best = len(fills)
            return
        for bin_, fill in enumerate(fills):
            if fill + sizes[index] <= capacity:
                place(index + 1, [*fills[:bin_], fill + sizes[index], *fills[bin_ + 1 :]])
        place(index + 1, [*fills, sizes[index]])

    place(0, [])
    return best


@law(60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_the_bounds_bracket_the_optimum(sizes):
    want = brute(sizes, 30)
    assert exact.optimum(sizes, 30) == want
    assert bounds.volume(sizes, 30) <= bounds.martello_toth(sizes, 30) <= want <= bounds.first_fit(sizes, 30)
    assert 3 * bounds.martello_toth(sizes, 30) >= 2 * want


def test_martello_toth_by_hand():
    assert bounds.martello_toth([6, 6, 6], 10) == 3 and bounds.volume([6, 6, 6], 10) == 2
    assert bounds.martello_toth([7, 7, 4, 4], 10) == 3  # alpha = 4: two alone, 8 of small ones for nobody's room
    assert bounds.martello_toth([], 10) == bounds.volume([], 10) == bounds.first_fit([], 10) == 0


def test_first_fit_decreasing_by_hand():
    assert bounds.first_fit([5, 7, 5, 2, 4, 2, 5, 1, 6], 10) == 4
    with pytest.raises(ValueError, match="an item of 11 in bins of 10"):
        bounds.first_fit([11], 10)


@law(60)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from((("T", "L"), ("S", "M", "L"), ("M", "T"), ("tiny", "T", "S", "M", "L"))),
    st.sampled_from(("block", "small", "jump")),
)
def test_at_most_four_thirds_of_the_optimum(seed, mix, growth):
    rng = random.Random(seed)
    for groups in drive(seed, 1000, mix, growth, 100):
        if rng.random() < 0.05:
            optimum = exact.optimum(list(groups.sizes.values()), 1000)
            assert 3 * len(groups.bins) <= 4 * optimum + 3 * OPEN
