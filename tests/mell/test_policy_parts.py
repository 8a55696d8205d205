"""The division of migrations, the planners of the baselines, and what configuration refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.sched.binpack import first_fit_decreasing
from common.sched.lane import EngineConfig, Seq
from common.sched.plan import Candidate
from systems.baselines.consolidate import BalancePlanner, FitPlanner, RepackPlanner
from systems.mell.division import Boundaries, divide
from systems.registry import ORACLES, make_policy
from tests.fakes import cluster
from tests.laws.strategies import law

LIMITS = Boundaries(1_000_000, 500, 1_000, 2e6, 1e3)


def candidate(ident, tokens, src=0, dst=1, urgent=False):
    return Candidate(ident, src, dst, tokens, urgent)


@law(60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 900)), max_size=12),
    st.sampled_from(("hybrid", "kv", "tokens")),
    st.randoms(use_true_random=False),
)
def test_the_division_never_exceeds_a_boundary_and_depends_on_no_order(drawn, mode, rng):
    moves = [candidate(index, tokens, src, dst) for index, (src, dst, tokens) in enumerate(drawn) if src != dst]
    modes = divide(moves, {}, LIMITS, mode)
    shuffled = list(moves)
    rng.shuffle(shuffled)
    assert divide(shuffled, {}, LIMITS, mode) == modes
    for instance in range(4):
        kv = [move.tokens * 1_000 for move in moves
              if modes.get(move.request_id) == "kv" and instance in (move.src, move.dst)]
        tokens = sum(move.tokens for move in moves
                     if modes.get(move.request_id) == "tokens" and move.dst == instance)
        assert sum(kv) <= LIMITS.link_bytes or len(kv) == 1
        assert tokens <= LIMITS.prefill_tokens


def test_what_fits_neither_waits_unless_its_source_overflows():
    busy = {0: 900, 1: 900}
    assert divide([candidate(0, 600)], busy, LIMITS, "hybrid") == {}
    assert divide([candidate(0, 600, urgent=True)], busy, LIMITS, "hybrid") == {0: "kv"}  # 0.3 s against 0.6 s
    assert divide([candidate(0, 400)], busy, LIMITS, "hybrid") == {0: "tokens"}
    assert divide([candidate(0, 400)], {}, LIMITS, "hybrid") == {0: "kv"}
    assert divide([candidate(0, 400)], {}, LIMITS, "off") == {}


def test_any_fit_opens_a_gpu_only_when_none_fits():
    for fit, goal in (("best", 1), ("worst", 2), ("first", 1)):
        planner = FitPlanner(100, 16, fit, "preempt")
        planner.epoch([], {}, {0: 70, 1: 40, 2: 10 if fit == "best" else 35})
        assert planner.bin_of(0) == 1 and planner.bin_of(1) == 2
        planner.epoch([2], {}, {3: 25})
        assert planner.bin_of(3) == goal and len(planner.bins()) == 2


def test_who_outgrows_a_gpu_is_dispatched_again():
    planner = FitPlanner(100, 16, "best", "preempt")
    planner.epoch([], {}, {0: 50, 1: 50})
    assert list(planner.epoch([], {0: 60}, {})) == [1] and planner.bin_of(1) != planner.bin_of(0)
    assert planner.modes([candidate(1, 5)], {}) == {1: "tokens"}


def test_balancing_narrows_the_gap_and_draining_empties_a_gpu():
    planner = BalancePlanner(100, 16, "preempt", drain=False)
    planner.epoch([], {}, {0: 60, 1: 60, 2: 20, 3: 20})
    planner.epoch([1], {}, {})
    spread = planner.loads
    assert max(spread.values()) - min(spread.values()) <= 60
    draining = BalancePlanner(100, 16, "preempt", drain=True)
    draining.epoch([], {}, {0: 60, 1: 60})
    draining.epoch([], {}, {2: 20})
    draining.epoch([1], {}, {})
    assert len(draining.bins()) == 1


def test_repacking_follows_first_fit_decreasing():
    planner = RepackPlanner(100, 16, "best", "preempt")
    planner.epoch([], {}, {index: size for index, size in enumerate((60, 60, 60, 40, 40, 40))})
    planner.epoch([0, 4], {}, {})
    sizes = list(planner.sizes.values())
    assert len(planner.bins()) == len(first_fit_decreasing(sizes, 100)) == 2


def test_overflow_rules_book_what_they_say():
    seq = Seq(0, 32, 160, None, -1)
    assert FitPlanner(100, 16, "best", "preempt").charge(seq, 3, None) == 3
    assert FitPlanner(100, 16, "best", "reserve_max").charge(seq, 3, None) == 12
    assert FitPlanner(100, 16, "best", "oracle").charge(seq, 3, 16) == 3
    with pytest.raises(ConfigError, match="overflow=oracle"):
        FitPlanner(100, 16, "best", "oracle").charge(seq, 3, None)


@pytest.mark.parametrize("name, options, text", [
    ("mell", {"rules": "literal"}, "system.rules='literal' is unknown"),
    ("mell", {"batching": 1}, "system.batching=1"),
    ("mell", {"watermark": 1.5}, "system.watermark=1.5"),
    ("best_fit", {"overflow": "oracle"}, "system.overflow='oracle' is unknown"),
])  # fmt: skip
def test_bad_options_are_one_line(name, options, text):
    with pytest.raises(ConfigError, match=text):
        make_policy(name, cluster().info(), EngineConfig(), options)


@pytest.mark.parametrize("name", ["mell", "load_balance"])
def test_prefix_caching_is_refused(name):
    with pytest.raises(ConfigError, match="prefix_caching"):
        make_policy(name, cluster().info(), EngineConfig(prefix_caching=True), {})


def test_who_knows_true_lengths_says_so():
    assert {name for name in ORACLES if name.startswith("oracle_")} == ORACLES and len(ORACLES) == 6
