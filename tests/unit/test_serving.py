"""What a creditor's own requests pay for serving others, as the run's record and summary tell it."""

from __future__ import annotations

from common.mechanisms import mechanisms
from common.record import RequestColumns, RunRecord
from common.results import optional_tables
from tests.unit.test_sim_moves import decode_ns, play, remote_ns, spread


def test_slowed_iterations_and_served_time_are_told() -> None:
    run = play(spread, [64, 10], [20, 160])
    rows, segments = run.record.serving, run.record.segments
    assert set(rows.instance) == {1} and sum(rows.iterations) > 0
    assert sum(rows.token_ns) == sum(rows.busy_ns), "one request decodes there"
    slow = [(end - start, start) for start, end, lane, num in
            zip(segments.start_ns, segments.end_ns, segments.lane, segments.iterations)
            if lane == 1 and start >= run.times[-1] and num == 1][: sum(rows.iterations)]  # fmt: skip
    assert sum(rows.busy_ns) == sum(took for took, _ in slow)
    served = sum(4 * 3 * 32 for _ in range(19))  # of every decode after the copy: 4 layers, 32 tokens of 3 ns
    assert abs(sum(rows.served_ns) - served) <= 19 and sum(rows.tokens) == sum(rows.iterations)
    share = 4 * 3 * 32 / remote_ns(65, 32)
    first = segments.start_ns.index(slow[0][1])
    before = sum(n for n, lane in zip(segments.iterations[:first], segments.lane[:first]) if lane == 1) - 1
    assert slow[0][0] == int(decode_ns(10 + 1 + before) * (1 + share))


def test_summary_keys_only_where_somebody_served() -> None:
    run = play(spread, [64, 10], [20, 160])
    run.record.segments.flush()
    found = mechanisms(run.record)
    assert found["creditor_tokens_serving"] > 0 and 0 < found["creditor_slowdown"] < 0.1
    assert found["creditor_tpot_serving_ms"] > 0 and found["creditor_tpot_alone_ms"] > 0
    assert "serving" in optional_tables(run.record, False)
    assert "creditor_slowdown" not in mechanisms(RunRecord(RequestColumns.empty(0)))


def test_leaps_of_any_size_tell_the_same() -> None:
    """Iterations that serve never leap, so what is told does not depend on the leap."""
    sums = []
    for leap in (None, 7, 1):
        rows = play(spread, [64, 10], [40, 160], leap).record.serving
        sums.append((sum(rows.served_ns), sum(rows.token_slowed_ns), sum(rows.iterations)))
    assert sums[0] == sums[1] == sums[2]
