"""The histogram of block phases against counting each request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sched.phase import PhaseCounter


def counted(size, offsets):
    phase = PhaseCounter(size)
    for offset in offsets:
        phase.add(offset)
    return phase


def blocks_taken(size, offsets, iteration, count):
    """One by one: an iteration that finds a multiple of the block size stored takes a new block."""
    return sum((offset + at) % size == 0 for offset in offsets for at in range(iteration, iteration + count))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from((1, 2, 4, 16)), st.lists(st.integers(-40, 40), max_size=6), st.integers(0, 50),
       st.integers(0, 60), st.integers(0, 30))  # fmt: skip
def test_growth_and_its_inverse(size, offsets, iteration, count, free):
    phase = counted(size, offsets)
    assert phase.growth(iteration, count) == blocks_taken(size, offsets, iteration, count)
    within = phase.iterations_within(iteration, free)
    if not offsets:
        assert within >= 1 << 40
    else:
        assert blocks_taken(size, offsets, iteration, within) <= free
        assert blocks_taken(size, offsets, iteration, within + 1) > free


def test_by_hand():
    """Blocks of 4; two requests store 4 and 6 tokens: the first needs a block now, the second in two iterations."""
    phase = counted(4, (4, 6))
    assert [phase.growth(0, count) for count in range(8)] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [phase.iterations_within(0, free) for free in range(4)] == [0, 2, 4, 6]
    assert [phase.growth(at, 1) for at in range(5)] == [1, 0, 1, 0, 1]
    phase.remove(4)
    assert phase.num == 1 and phase.iterations_within(0, 0) == 2
    with pytest.raises(AssertionError):
        phase.remove(4)
