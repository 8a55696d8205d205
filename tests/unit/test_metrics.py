"""The metrics against numbers worked out by hand, and the laws that every summary must keep."""

from __future__ import annotations

import time
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_results_synthetic import random_record, synthetic_record

from common import metrics
from common.errors import ConfigError, ContractError
from common.metrics import Slo, integrate_count, summarize, token_gaps, weighted_percentiles
from common.policy import Gauge
from common.record import RequestColumns, RunRecord, SegmentColumns
from common.types import RequestStatus

MS, S = 1_000_000, 1_000_000_000


def _record(rows: list[tuple[int, int, int, int, int, RequestStatus]]) -> RunRecord:
    """Rows of (arrival s, first token s, finish s, prompt, output, status); -1 = never."""
    record = RunRecord(RequestColumns.empty(len(rows)))
    for i, (arrival, first, finish, prompt, output, status) in enumerate(rows):
        r = record.requests
        for column, value in ((r.arrival_ns, arrival), (r.first_token_ns, first), (r.finish_ns, finish)):
            column[i] = value * S if value >= 0 else -1
        r.prompt_tokens[i], r.output_tokens[i], r.status[i] = prompt, output, status
    record.end_ns = max(0, *record.requests.finish_ns, *record.requests.arrival_ns)
    return record


def _segments(*rows: tuple[int, int, int, int, int]) -> SegmentColumns:
    """Rows of (start ms, end ms, lane, iterations, decodes); the lane is the instance."""
    segments = SegmentColumns()
    for start, end, lane, iterations, decodes in rows:
        values = (start * MS, end * MS, lane, lane, iterations, decodes, 0)
        for name, value in zip(segments.__slots__, values):
            getattr(segments, name).append(value)
    return segments


FINISHED, REJECTED, LIVE = RequestStatus.FINISHED, RequestStatus.REJECTED, RequestStatus.LIVE


def test_latencies_and_throughput_by_hand() -> None:
    record = _record([(10, 11, 15, 100, 5, FINISHED), (12, 14, 14, 50, 1, FINISHED), (13, -1, -1, 9, 0, REJECTED)])
    out = summarize(record, Slo(ttft_ms=1500, tpot_ms=2000))
    assert (out["num_requests"], out["completed"], out["rejected"], out["live_at_end"]) == (3, 2, 1, 0)
    assert out["duration_s"] == 5.0
    assert out["request_throughput"] == 2 / 5
    assert out["output_throughput"] == 6 / 5
    assert out["total_token_throughput"] == 156 / 5
    assert (out["mean_ttft_ms"], out["mean_e2el_ms"]) == (1500.0, 3500.0)
    assert out["mean_tpot_ms"] == out["median_tpot_ms"] == 1000.0  # of the one request with two tokens or more
    assert out["mean_itl_ms"] == 1000.0
    assert out["slo_attainment"] == pytest.approx(1 / 3)  # the second is late, the third refused
    assert out["goodput"] == 1 / 5
    assert out["littles_law_L"] == pytest.approx(7 / 5)


def test_percentiles_are_numpys() -> None:
    record = synthetic_record(200)
    ttft = metrics.Requests.of(record.requests).ttft_ms
    out = summarize(record, Slo())
    for name, percent in (("median", 50), ("p90", 90), ("p99", 99), ("p999", 99.9)):
        assert out[f"{name}_ttft_ms"] == np.percentile(ttft, percent)
    assert (out["slo_attainment"], out["goodput"]) == (None, None)


@pytest.mark.parametrize("slo", [{"ttft_ms": 0.0}, {"tpot_ms": -3.0}, {"ttft_ms": float("nan")}])
def test_an_slo_of_zero_is_a_user_error(slo: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"slo\.t.*above 0 ms"):
        Slo(**slo)


def test_an_empty_run_has_a_summary() -> None:
    out = summarize(RunRecord(RequestColumns.empty(0)), Slo(100, 100))
    assert out["completed"] == 0
    assert out["mean_ttft_ms"] is None
    out = summarize(RunRecord(RequestColumns.empty(3)), Slo(100, 100))  # none arrived
    assert (out["num_requests"], out["live_at_end"], out["goodput"]) == (3, 0, None)


def test_live_requests_count_against_the_slo_and_not_in_latencies() -> None:
    record = _record([(0, 1, 4, 10, 4, FINISHED), (1, 2, -1, 10, 3, LIVE)])
    record.end_ns, record.partial = 6 * S, True
    out = summarize(record, Slo(ttft_ms=5000))
    assert (out["live_at_end"], out["duration_s"], out["slo_attainment"]) == (1, 6.0, 0.5)
    assert out["mean_ttft_ms"] == 1000.0
    assert out["littles_law_L"] == pytest.approx((4 + 5) / 6)
    assert out["littles_law_lambda_W"] is None


def test_causality_is_checked() -> None:
    with pytest.raises(ContractError, match="request 0 finished"):
        summarize(_record([(5, 4, 6, 1, 3, FINISHED)]), Slo())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**13), st.integers(0, 10**13)), min_size=1, max_size=30))
def test_the_integral_of_the_number_present_is_the_sum_of_stays(stays: list[tuple[int, int]]) -> None:
    arrival = np.array([a for a, _ in stays], np.int64)
    leave = arrival + np.array([d for _, d in stays], np.int64)
    assert integrate_count(arrival, leave) == sum(d for _, d in stays)


def test_the_integral_does_not_overflow() -> None:
    arrival, stay = np.zeros(200_000, np.int64), 10**14
    assert integrate_count(arrival, arrival + stay) == 200_000 * stay > 2**63


def test_littles_law_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "integrate_count", lambda a, b: 1)
    with pytest.raises(ContractError, match="Little's law"):
        summarize(synthetic_record(20), Slo())


def test_weighted_percentiles_count_every_gap() -> None:
    values, weights = np.array([30.0, 10.0, 20.0]), np.array([1.0, 98.0, 1.0])
    assert list(weighted_percentiles(values, weights, [50, 98, 99, 99.9])) == [10, 10, 20, 30]


def test_token_gaps_hold_the_stall_behind_a_prompt() -> None:
    requests = RequestColumns.empty(2)
    requests.finish_ns, requests.instance = array("q", [100 * MS, 500 * MS]), array("q", [0, 0])
    # 3 decode until 100 ms (one finishes), a prompt takes until 160 ms, then 3 decode: 2 of them waited
    gaps, weights = token_gaps(_segments((0, 100, 0, 10, 3), (100, 160, 0, 1, 0), (160, 200, 0, 4, 3)), requests)
    seen = sorted((g, w) for g, w in zip(gaps.tolist(), weights.tolist()) if w)
    assert seen == [(10.0, 10.0), (10.0, 30.0), (70.0, 2.0)]


def test_token_gaps_agree_with_the_requests() -> None:
    """Without preemption all gaps of all segments add up to all requests' decoding time."""
    record = synthetic_record(300)
    gaps, weights = token_gaps(record.segments, record.requests)
    view = metrics.Requests.of(record.requests)
    assert weights.sum() == (view.output_tokens - 1).sum()
    assert (gaps * weights).sum() == pytest.approx((view.finish_ns - view.first_ns).sum() / 1e6, rel=0.01)


def test_cluster_metrics() -> None:
    record = _record([(0, 1, 10, 10, 4, FINISHED)])
    for now, used in ((0, 10), (4, 30)):
        record.timeline.sample(now * S, Gauge(0, 1, 2, used, 100))
        record.timeline.sample(now * S, Gauge(1, 0, 0, 0, 100))
    record.timeline.flush()
    record.up_intervals = {0: [(0, 10 * S)], 1: [(5 * S, -1)]}  # -1: still up
    out = summarize(record, Slo(), num_gpus_per_instance=2)
    assert out["mean_kv_utilisation"] == pytest.approx((4 * 0.05 + 6 * 0.15) / 10)
    assert out["peak_kv_utilisation"] == 0.15
    assert (out["mean_running"], out["mean_waiting"]) == (1.0, 2.0)
    assert (out["gpu_seconds"], out["mean_num_gpus"], out["peak_num_gpus"]) == (30.0, 3.0, 4)


def test_a_large_run_is_summarised_quickly() -> None:
    record = random_record(10_000, 40_000)
    best = min(_seconds(record) for _ in range(3))
    assert best < 0.1  # about 15 ms on an idle core


def _seconds(record: RunRecord) -> float:
    begin = time.perf_counter()
    summarize(record, Slo(1000, 50))
    return time.perf_counter() - begin
