"""`system.mode=remote_attention`: parameters drop, KV stays, queries travel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.executors.network import LinkSpec
from common.kv.plane import first_flaw
from common.sched.ledger import CellLedger
from common.sched.spread import SpreadTable
from common.types import CopySpan, RequestStatus, RunStep, Stage
from systems.kunserve.options import Options
from systems.kunserve.slices import merge_slices
from systems.kunserve.state import State
from tests.kunserve.strategies import law
from tests.kunserve.test_laws import overflowing
from tests.kunserve.worlds import Run

REMOTE = {"mode": "remote_attention"}


def test_an_unknown_mode_is_one_line():
    with pytest.raises(ConfigError, match=r"^system.mode='fast' is unknown; choose .*: pipeline, remote_attention$"):
        Options.of({"mode": "fast"})


def test_nothing_is_exchanged_and_whoever_straddles_reads_its_kv_where_it_is():
    run = Run(overflowing(**REMOTE)).drive()
    kinds = [kind for kind in run.kinds() if kind != "fallback"]
    assert kinds == ["overload", "drop", "restore", "restored", "drained"]
    assert not [c for *_, commands in run.trace for c in commands if isinstance(c, CopySpan)]
    entries = [entry for *_, commands in run.trace for c in commands if isinstance(c, RunStep) for entry in c.add]
    spread = [entry for entry in entries if entry.placement is not None]
    assert spread and all(entry.computed > 0 for entry in spread)
    for entry in spread:
        homes = {span.instance for span in entry.placement if span.token_start == 0}
        assert len(homes) == 1, "all layers of what was computed before the drop stay on one instance"
        assert {span.instance for span in entry.placement if span.token_end is None} == {0, 1}
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 28


def test_stalls_are_shorter_than_with_an_exchange_over_a_slow_link():
    """Whoever straddles the drop waits for the remap and a turn, not for its KV to cross the link."""

    def stalled(**options):
        burst = overflowing(restore="off", **options)
        run = Run(burst, model=burst.model(nvlink=LinkSpec(1e8, 5_000))).drive()
        stalls = run.record.stalls
        parked = [end - begin for begin, end, cause in zip(stalls.begin_ns, stalls.end_ns, stalls.cause)
                  if cause == "parked"]  # fmt: skip
        return sum(parked) / len(parked)

    assert stalled(**REMOTE) < stalled()


@law(60, 600)
@given(st.integers(2, 5), st.integers(4, 9), st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_a_placement_with_pieces_tiles_the_plane_and_gives_back_what_it_was_charged(size, layers, grown):
    """Over any number of merges: every cell in exactly one span, and the ledger ends as it began."""
    routes = [(Stage(0, (0, layers)),)]
    for other in range(1, size):
        merged = merge_slices(routes[-1], (Stage(other, (0, layers)),))
        routes += [merged] if merged is not None else []
    ledger = CellLedger()
    for instance in range(size):
        ledger.open(instance, 1000)
    table, tokens = SpreadTable(ledger, 16), 0
    for route, more in zip(routes, grown):
        old = -(-tokens // 16)
        tokens += more
        ledger.take(route, -(-tokens // 16) - old)  # as a lane there charges what it stores
        assert table.stays(7, route, tokens) == table.blocks(7) == -(-tokens // 16)
        placement = table.placement(7, routes[-1])
        assert first_flaw(placement, layers, 1 << 40) is None
        assert all(not span.token_end or span.token_end % 16 == 0 for span in placement)
    assert sum(1000 - free for free in ledger.free.values()) == -(-tokens // 16) * layers
    table.drop(7)
    assert set(ledger.free.values()) == {1000} and not table.pieces


@pytest.mark.parametrize("state", [State.PARKING, State.DROPPING, State.PIPELINE, State.SHRINKING, State.LOADING,
                                   State.DRAINING])  # fmt: skip
def test_a_member_may_die_in_every_state(state):
    run = Run(replace(overflowing(**REMOTE), kill=(state, 0, 1))).drive()
    assert run.kinds().count("lost") == 1
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 28
