"""Invariants 1 to 5 after every operation, and at most ten group-moves in each."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.mell.groups import Groups
from systems.mell.invariants import violations
from tests.laws.strategies import law

HISTOGRAM: Counter[int] = Counter()
OPERATIONS = 150


def shares(rng, mix, capacity):
    """A size of a drawn class."""
    low, high = {"tiny": (0.002, 0.125), "T": (0.126, 0.25), "S": (0.251, 0.333), "M": (0.334, 0.5),
                 "L": (0.501, 1.0)}[rng.choice(mix)]  # fmt: skip
    return max(1, int(capacity * rng.uniform(low, high)))


def drive(seed, capacity, mix, growth, operations=OPERATIONS, rules="repaired", check=True):
    """Random arrivals, growth and departures; yields the scheduler after each."""
    rng = random.Random(seed)
    groups = Groups(capacity, rules)
    where: dict[int, int] = {}
    for ident in range(operations):
        kind = rng.random()
        live = list(groups.sizes)
        target = rng.choice((5, 20, 60))
        if not live or (kind < 0.45 and len(live) < target):
            moves = groups.allocate(ident, shares(rng, mix, capacity))
            where[ident] = -1
            if (moved := [move for move in moves if move.request_id == ident]):
                assert moved[0].src >= 0
        elif kind < 0.7:
            gone = rng.choice(live)
            moves = groups.depart(gone)
            del where[gone]
        else:
            grown = rng.choice(live)
            step = 1 if growth == "block" else rng.randint(1, max(1, capacity // (3 if growth == "jump" else 50)))
            moves = groups.update(grown, min(capacity, groups.sizes[grown] + step))
        for move in moves:
            if move.request_id in where and where[move.request_id] >= 0:
                assert where[move.request_id] == move.src, "moves chain"
                where[move.request_id] = move.dst
        for request_id in where:
            now = groups.bin_of(request_id)
            assert where[request_id] in (-1, now), "every change of GPU is logged"
            where[request_id] = now
        yield groups


@law(80)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from((8, 24, 38, 100, 787, 1264)),
    st.sampled_from((("tiny",), ("tiny", "T"), ("T", "L"), ("S", "M", "L"), ("M", "T"), ("M", "tiny"),
                     ("tiny", "T", "S", "M", "L"))),
    st.sampled_from(("block", "small", "jump")),
)  # fmt: skip
def test_invariants_hold_after_every_operation(seed, capacity, mix, growth):
    """80 x 150 = 12,000 operations."""
    for groups in drive(seed, capacity, mix, growth):
        assert violations(groups) == []
        HISTOGRAM[groups.packing.group_moves] += 1
        assert groups.packing.group_moves <= 10


def counter_example(rules, n=12, capacity=1000):
    """3n T of 0.16, then n L of 0.51: one GPU for each L and three T is optimal."""
    groups = Groups(capacity, rules)
    for ident in range(3 * n):
        groups.allocate(ident, 160)
    for ident in range(3 * n, 4 * n):
        groups.allocate(ident, 510)
    return groups, n


def test_the_literal_rules_break_invariant_5_and_the_bound():
    groups, optimum = counter_example("paper")
    assert any("invariant 5" in text for text in violations(groups))
    assert len(groups.bins) == 1.5 * optimum


def test_the_repaired_rules_do_not():
    groups, optimum = counter_example("repaired")
    assert violations(groups) == []
    assert len(groups.bins) <= 4 / 3 * optimum


def test_the_literal_rules_fail_on_random_sequences_too():
    broken = sum(bool(violations(groups)) for groups in drive(3, 1000, ("T", "M", "L"), "small", 400, "paper"))
    assert broken > 0


def test_runs_are_the_same_every_time():
    for _ in range(2):
        first = [len(groups.bins) for groups in drive(7, 787, ("tiny", "T", "S", "M", "L"), "small")]
        again = [len(groups.bins) for groups in drive(7, 787, ("tiny", "T", "S", "M", "L"), "small")]
        assert first == again


@pytest.mark.parametrize("size", [0, 101])
def test_what_no_gpu_holds_is_refused(size):
    with pytest.raises(ValueError, match="blocks on GPUs of 100"):
        Groups(100).allocate(0, size)
