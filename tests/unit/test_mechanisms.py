"""What the executor records of stalls, bubbles, remaps and links, against times by hand."""

from __future__ import annotations

import pytest

from common.executors.memory import InstanceMemory
from common.mechanisms import mechanisms
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, DropLayers, Entry, InstanceInfo, LoadLayers, ShrinkKV, Stage
from tests.unit.test_sim_moves import ALL, HIGH, LOW, decode_ns, finish, parked, play, prefill_ns


def rows(columns):
    return list(zip(*(getattr(columns, name) for name in columns.__slots__)))


@pytest.mark.parametrize("leap", [1, 4, 7])
def test_a_stall_goes_from_the_boundary_to_the_next_token(leap):
    """Parked while it decodes, copied, and resumed elsewhere: the leap that it resumes in counts by its first
    iteration."""

    stored = []

    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 32),))
        yield s.reached(0)
        yield s.change(0, park=(0,))
        s.clock()
        yield s.ask(CopySpan, 0, 0, 1, ALL, (0, s.stored(0)))
        s.clock()
        stored.append(s.stored(0))
        s.change(1, stages=(Stage(1, ALL),), add=(s.again(0),))
        yield s.finished(0)

    done = play(story, [32], [40], leap)
    left, back = done.times
    assert rows(done.record.stalls) == [(0, left, back + decode_ns(stored[0] + 1), "parked")]


def two_lanes(s):
    for lane in (0, 1):
        s.change(lane, stages=(Stage(0, LOW), Stage(1, HIGH)), add=(Entry(lane, 0, 32),))
    yield s.finished(0, 1)


def test_a_pipeline_with_one_lane_idles_all_but_its_own_stage():
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, LOW), Stage(1, HIGH)), add=(Entry(0, 0, 32),))
        yield s.finished(0)

    record = play(story, [32], [1]).record
    first, second = prefill_ns(32, layers=2, head=False, logits=0) + 11, prefill_ns(32, layers=2)
    [(start, end, _, busy), (start1, end1, _, busy1)] = sorted(rows(record.stages), key=lambda row: row[2])
    assert (start, end) == (start1, end1) and (busy, busy1) == (first, second)
    found = mechanisms(record)
    assert found["stage_idle_share"] == pytest.approx(1 - (busy + busy1) / (2 * (end - start)))


def test_busy_time_is_what_stages_served():
    """Two lanes in turn: busy time is the sum of all items, and no row is longer than the time in work."""

    def story(s):
        yield s.arrived(0, 1)
        yield from two_lanes(s)

    record = play(story, [32, 32], [9, 5]).record
    for start, end, _, busy in rows(record.stages):
        assert 0 < busy <= end - start
    assert mechanisms(record)["stage_idle_share"] < 0.6


def test_a_drop_tells_what_makes_no_whole_cell_and_no_whole_block():
    def story(s):
        yield s.arrived(0)
        yield s.ask(DropLayers, 0, (1, 4))
        yield s.ask(ShrinkKV, 0, 64 * 4)
        yield s.ask(LoadLayers, 0, (1, 4), 1)
        yield from parked(s, 0)
        yield from finish(s, 0)

    record = play(story, [32], [2]).record
    kinds = [(row[2], row[3], row[4], row[6], row[7]) for row in rows(record.remaps)]
    assert kinds == [(0, 3, 64 * 4 + 24, 0, "drop"), (0, 0, 64 * 4, 0, "shrink"), (0, 3, 64 * 4, 0, "load")]
    found = mechanisms(record)
    assert (found["num_layer_drops"], found["num_layer_loads"], found["num_kv_shrinks"]) == (1, 1, 1)
    assert found["mean_drop_ms"] == 0.05 and found["load_gb"] == 3 * 8 * 4096 / 1e9


def test_spare_bytes_of_layers_that_are_no_whole_cells():
    memory = InstanceMemory(InstanceInfo(0, 4, 40, 4096, 10_000, 0, True, 0))
    memory.resident[1:] = [False] * 3
    memory.capacity = memory.full_capacity()
    assert memory.capacity == 40 + 30_000 // 4096 == 47 and memory.spare_bytes() == 30_000 % 4096
    memory.resident[1] = True
    memory.capacity = memory.full_capacity()
    assert (memory.capacity, memory.spare_cells()) == (44, 0)


def test_an_empty_record_has_nothing_to_tell():
    found = mechanisms(RunRecord(RequestColumns.empty(0)))
    assert {value for value in found.values()} == {0, None}
