"""The leap law for KunServe: steps of 1, 7 and any number of iterations decide alike, to the nanosecond."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given

from tests.kunserve.strategies import bursts, law
from tests.kunserve.worlds import Burst, Run

COLUMNS = ("first_token_ns", "finish_ns", "status", "instance", "num_preemptions", "num_migrations")


def times(burst: Burst, leap: int | None) -> tuple[dict[str, list[int]], Run]:
    run = Run(replace(burst, max_leap=leap)).drive()
    found = {name: list(getattr(run.record.requests, name)) for name in COLUMNS}
    return {**found, "marks": [mark[0] for mark in run.record.marks]}, run


def test_leaps_of_any_size_give_the_same_times_under_drops_exchange_restore_and_preemption():
    met: Counter[str] = Counter()

    @law(150, 1500)
    @given(bursts(crowded=True))
    def draws(burst):
        far, run = times(burst, None)
        assert times(burst, 1)[0] == far
        assert times(burst, 7)[0] == far
        met.update({*run.kinds(), *run.situations()})
        met["preempted"] += any(far["num_preemptions"])

    draws()
    wanted = ("drop", "exchanged", "restored", "drained", "lost", "preempted", "straddles a drop",
              "straddles a restore", "lives through two merges")  # fmt: skip
    assert all(met[kind] for kind in wanted), met


def test_events_of_an_instance_alone_do_not_grow_with_tokens():
    """Only who shares memory is asked at every iteration: replies ten times as long take no more events."""
    short, long = (Run(Burst(tuple((500, 30, output) for _ in range(20)), 2, 800)).drive() for output in (30, 300))
    timers = [sum("TimerFired" in type(event).__name__ for _, event, _ in run.trace) for run in (short, long)]
    assert len(long.trace) - timers[1] <= 1.2 * (len(short.trace) - timers[0])
