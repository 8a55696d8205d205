"""Run records for the tests of results, figures and reports: a small queueing model, not the simulator."""

from __future__ import annotations

from array import array

import numpy as np

from common.policy import Gauge
from common.record import RequestColumns, RunRecord
from common.types import RequestStatus

BLOCK = 16
MS = 1_000_000


def synthetic_record(
    num_requests: int = 400, num_instances: int = 4, rate: float = 8.0, blocks: int = 1600, seed: int = 0
) -> RunRecord:
    """Poisson arrivals, faster in the middle fifth, on instances that batch and run out of KV."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1e9 / rate, num_requests)
    gaps[2 * num_requests // 5 : 3 * num_requests // 5] /= 2.5
    record = RunRecord(RequestColumns.empty(num_requests))
    requests = record.requests
    requests.arrival_ns = array("q", np.cumsum(gaps).astype(np.int64).tobytes())
    prompts = rng.lognormal(6.3, 0.8, num_requests).astype(np.int64) + 1
    requests.prompt_tokens = array("q", prompts.tobytes())
    outputs = rng.lognormal(4.8, 0.7, num_requests).astype(np.int64) + 1
    rows: list[tuple[int, Gauge]] = []
    for instance in range(num_instances):
        _serve(record, instance, list(range(instance, num_requests, num_instances)), outputs, blocks, rows)
    for now_ns, gauge in sorted(rows):
        record.timeline.sample(now_ns, gauge)
    record.timeline.flush()
    record.end_ns = max(requests.finish_ns)
    record.up_intervals = {i: [(0, record.end_ns)] for i in range(num_instances)}
    return record


def _serve(record, instance, queue, outputs, blocks, rows) -> None:  # type: ignore[no-untyped-def]
    """Prompts alone and whole, then decodes; samples every second."""
    requests, segments = record.requests, record.segments
    now, sample, waiting, running = 0, 0, list(queue), {}

    def add_segment(duration: int, iterations: int, decodes: int, prefill: int) -> None:
        row = (now, now + duration, instance, instance, iterations, decodes, prefill)
        for name, value in zip(segments.__slots__, row):
            getattr(segments, name).append(value)

    while waiting or running:
        if not running and waiting:
            now = max(now, requests.arrival_ns[waiting[0]])
        used = sum((requests.prompt_tokens[r] + done) // BLOCK + 1 for r, done in running.items())
        arrived = [r for r in waiting if requests.arrival_ns[r] <= now]
        while sample <= now:
            rows.append((sample, Gauge(instance, len(running), len(arrived), used, blocks)))
            sample += 1_000_000_000
        if arrived and (used + requests.prompt_tokens[arrived[0]] // BLOCK < 0.9 * blocks or not running):
            r = waiting.pop(0)
            duration = int(5 * MS + requests.prompt_tokens[r] * 0.1 * MS)
            add_segment(duration, 1, 0, requests.prompt_tokens[r])
            now += duration
            running[r] = 1
            requests.first_token_ns[r] = now
            requests.status[r] = RequestStatus.LIVE
        elif running:
            steps = min(min(int(outputs[r]) - done for r, done in running.items()), 8)
            duration = steps * (25 * MS + len(running) * MS // 4)
            if steps:
                add_segment(duration, steps, len(running), 0)
            now += duration
            running = {r: done + steps for r, done in running.items()}
        for r in [r for r, done in running.items() if done >= outputs[r]]:
            requests.finish_ns[r], requests.status[r] = now, RequestStatus.FINISHED
            requests.output_tokens[r], requests.instance[r] = running.pop(r), instance


def random_record(num_requests: int, num_segments: int, seed: int = 0) -> RunRecord:
    """Plausible columns of any size, drawn at once: for timing only."""
    rng = np.random.default_rng(seed)

    def column(values) -> array[int]:  # type: ignore[no-untyped-def]
        return array("q", np.asarray(values).astype(np.int64).tobytes())

    arrival = np.cumsum(rng.exponential(3e8, num_requests)).astype(np.int64)
    first = arrival + rng.integers(10 * MS, 5000 * MS, num_requests)
    output = rng.integers(1, 400, num_requests)
    record = RunRecord(RequestColumns.empty(num_requests))
    requests = record.requests
    requests.arrival_ns, requests.first_token_ns = column(arrival), column(first)
    requests.finish_ns = column(first + (output - 1) * rng.integers(20 * MS, 60 * MS, num_requests))
    requests.prompt_tokens = column(rng.integers(1, 4000, num_requests))
    requests.output_tokens = column(output)
    requests.status = column(np.full(num_requests, int(RequestStatus.FINISHED)))
    requests.instance = column(rng.integers(0, 4, num_requests))
    start = np.sort(rng.integers(0, int(arrival[-1]), num_segments))
    record.segments.start_ns, record.segments.end_ns = column(start), column(start + 20 * MS)
    record.segments.lane = record.segments.instance = column(rng.integers(0, 4, num_segments))
    record.segments.iterations = column(rng.integers(1, 30, num_segments))
    record.segments.decodes = column(rng.integers(0, 60, num_segments))
    record.segments.prefill_tokens = column(rng.integers(0, 600, num_segments))
    record.end_ns = max(requests.finish_ns)
    for now_ns in range(0, int(arrival[-1]), max(int(arrival[-1]) // 2000, 1)):
        for instance in range(4):
            record.timeline.sample(now_ns, Gauge(instance, 10, 3, 500 + now_ns % 300, 1000))
    record.timeline.flush()
    record.up_intervals = {i: [(0, record.end_ns)] for i in range(4)}
    return record


def test_synthetic_records_are_complete() -> None:
    record = synthetic_record(40)
    assert set(record.requests.status) == {RequestStatus.FINISHED}
    assert max(record.timeline.kv_used_blocks) > 0
