"""Conservation, no starvation, both ledgers alike: under random arrivals, migrations, starts, stops and losses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.laws.strategies import law
from tests.mell.fleets import FleetRun, RestlessRun


@law(120)
@given(st.integers(0, 1 << 30))
def test_conservation(seed):
    FleetRun(seed).run()


@law(40)
@given(st.integers(0, 1 << 30))
def test_conservation_when_everybody_moves_all_the_time(seed):
    RestlessRun(seed).run()


@law(8)
@given(st.integers(0, 1 << 30))
def test_a_run_is_the_same_every_time(seed):
    assert FleetRun(seed).run().trace == FleetRun(seed).run().trace


def test_the_mechanisms_really_happen():
    """Else the laws above hold vacuously."""
    kv = tokens = starts = stops = stalls = promised = 0
    for seed in range(40):
        run = FleetRun(seed).run()
        stats = run.policy.mover.stats
        kv += stats.kv_done
        promised += run.promised
        tokens += stats.token_done
        stalls += sum(map(len, stats.stalls_ns.values()))
        starts += run.policy.stats.starts
        stops += run.policy.stats.stops
    assert kv > 20 and tokens > 5 and promised > 5 and starts > 30 and stops > 10
    assert stalls >= kv
