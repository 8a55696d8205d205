"""Predicted against realised throughput of planned moves: marks, windows, the table and the summary."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from common.marks import DONE, PLANNED
from common.metrics import Slo, summarize
from common.predictions import Tokens, prediction_summary, predictions
from common.record import RequestColumns, RunRecord, pack_segment
from common.results import optional_tables
from common.types import MessageArrived
from systems.infinite_llm.messages import MoveKvcache
from tests.infinite_llm.test_switches import BUSY
from tests.infinite_llm.worlds import FAST, MS

SECOND = 1_000_000_000


def record(marks) -> RunRecord:
    """Instance 0 makes 10 tokens/s for 4 s, then 30; instance 1 always 20."""
    made = RunRecord(RequestColumns.empty(0), end_ns=8 * SECOND)
    for start, end, instance, iterations, decodes in ((0, 4, 0, 40, 1), (4, 8, 0, 60, 2), (0, 8, 1, 80, 2)):
        made.segments.packed += pack_segment(start * SECOND, end * SECOND, instance, instance, iterations, decodes, 0)
    made.segments.flush()
    made.marks = [(at * SECOND, src, kind, json.dumps(said)) for at, src, kind, said in marks]
    return made


MOVE = {"plan": 3, "request": 7, "src": 0, "dst": 1, "blocks": 5}
SAID = {**MOVE, "before": 28.0, "stay": 31.0, "after": 40.0, "window_ns": 2 * SECOND}


def test_realised_is_both_ends_tokens_over_the_windows() -> None:
    [row] = predictions(record([(3, 0, PLANNED, SAID), (5, 0, DONE, MOVE)]))
    assert (row.plan_ns, row.done_ns, row.src, row.dst, row.num_blocks) == (3 * SECOND, 5 * SECOND, 0, 1, 5)
    assert row.realised_before == pytest.approx(10 + 20) and row.realised_after == pytest.approx(30 + 20)
    found = prediction_summary([row])
    assert found["mean_predicted_gain_tps"] == pytest.approx(9), "against no move, not against now"
    assert found["mean_predicted_change_tps"] == pytest.approx(12)
    assert found["mean_realised_change_tps"] == pytest.approx(20)
    assert found["median_change_error_tps"] == pytest.approx(8) and found["share_of_moves_with_a_rise"] == 1.0
    assert found["median_tps_error_before"] == pytest.approx(2 / 30)
    assert found["median_tps_error_after"] == pytest.approx(10 / 50)


def test_a_window_within_a_segment_takes_its_share() -> None:
    assert Tokens(record([])).per_second((0,), 3 * SECOND, 5 * SECOND) == pytest.approx((10 + 30) / 2)


def test_what_was_never_made_or_runs_over_the_end_is_not_verified() -> None:
    late = {**MOVE, "plan": 4}
    rows = predictions(record([(1, 0, PLANNED, SAID), (3, 0, PLANNED, {**SAID, "plan": 4}), (7, 0, DONE, late)]))
    assert rows[0].done_ns == -1 and math.isnan(rows[0].realised_before) and math.isnan(rows[0].realised_after)
    assert rows[1].done_ns == 7 * SECOND and math.isnan(rows[1].realised_after)
    found = prediction_summary(rows)
    assert (found["num_planned_moves"], found["num_moves_made"], found["num_moves_verified"]) == (2, 1, 0)
    assert found["median_change_error_tps"] is None


def test_a_run_marks_every_order_of_its_plans_and_every_switch() -> None:
    run = replace(BUSY, settings=replace(FAST, verify_ns=MS)).run()
    orders = [event.payload for _, event, _ in run.trace
              if isinstance(event, MessageArrived) and isinstance(event.payload, MoveKvcache)]  # fmt: skip
    rows = predictions(run.record)
    assert len(rows) == len(orders) > 0
    assert [(row.dst, row.num_blocks) for row in rows] == [(order.dst, order.num_blocks) for order in orders]
    assert all(row.predicted_after > row.predicted_stay >= row.predicted_before > 0 for row in rows), "no gain, no plan"
    made = [row for row in rows if row.done_ns >= 0]
    assert made and all(row.done_ns > row.plan_ns for row in made)
    run.record.segments.flush()
    assert summarize(run.record, Slo(None, None))["num_moves_made"] == len(made)
    assert set(optional_tables(run.record, False)["predictions"]) == set(rows[0]._fields)
    reactive = replace(BUSY, settings=replace(FAST, mode="reactive")).run()
    assert not predictions(reactive.record)


def test_a_run_of_fewer_plans_is_the_same_up_to_the_one_that_it_lacks() -> None:
    """What a plan realised is the difference to the run that stops before it."""
    settings = replace(FAST, verify_ns=MS)
    whole = replace(BUSY, settings=settings).run()
    plans = [at for at, _, kind, _ in whole.record.marks if kind == PLANNED]
    first = [json.loads(text)["plan"] for *_, kind, text in whole.record.marks if kind == PLANNED]
    assert first[0] == 1 and first[-1] >= 2
    cut = replace(BUSY, settings=replace(settings, plan_limit=1)).run()
    made = [json.loads(text)["plan"] for *_, kind, text in cut.record.marks if kind == PLANNED]
    assert made == [plan for plan in first if plan <= 1]
    second = plans[first.index(2)]
    same = [[(at, event) for at, event, _ in run.trace if at < second] for run in (whole, cut)]
    assert same[0] == same[1]
    none = replace(BUSY, settings=replace(settings, plan_limit=0)).run()
    reactive = replace(BUSY, settings=replace(settings, mode="reactive")).run()
    assert none.record.requests.finish_ns == reactive.record.requests.finish_ns
