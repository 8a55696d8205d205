"""An epoch's operations together: order and pruning."""

from __future__ import annotations

from systems.mell.batch import Batch, prune
from systems.mell.groups import Groups
from systems.mell.invariants import violations
from systems.mell.packing import Move


def test_chains_collapse_returns_vanish_and_the_departed_stay():
    moves = [Move(1, 0, 2), Move(2, 0, 1), Move(1, 2, 3), Move(2, 1, 0), Move(3, 0, 1)]
    assert prune(moves, frozenset({3})) == [Move(1, 0, 3)]


def test_a_request_that_comes_and_goes_within_an_epoch_never_was():
    groups, batch = Groups(100), Batch()
    batch.allocate(0, 10)
    batch.update(0, 12)
    batch.depart(0)
    assert batch.flush(groups) == ([], 0, 0) and not groups.sizes


def test_departures_make_room_before_arrivals_take_it():
    groups, batch = Groups(100), Batch()
    batch.allocate(0, 60)
    batch.flush(groups)
    batch.allocate(1, 60)
    batch.depart(0)
    assert batch.flush(groups) == ([], 0, 0)
    assert len(groups.bins) == 1 and violations(groups) == []


def test_batching_executes_fewer_moves_than_it_makes():
    together, apart = 0, 0
    for batching in (True, False):
        groups, batch, done = Groups(100), Batch(), 0
        for ident in range(60):
            batch.allocate(ident, 14 + ident % 40)
            if ident >= 12:
                batch.depart(ident - 12)
            if ident % 6 == 5:
                moves, _, raw = batch.flush(groups, batching)
                assert len(moves) <= raw and violations(groups) == []
                done += len(moves)
        together, apart = (done, apart) if batching else (together, done)
    assert 0 < together < apart
