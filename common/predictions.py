"""Predicted against realised throughput of moves that a policy planned, from its marks and the run's segments.

A policy that predicts marks each planned move (`PLANNED`) and its end (`DONE`), both with a JSON text. Realised is what
the executor saw: tokens per second of both ends, over `window_ns` before the plan and `window_ns` after the move's end.
Arrivals, prompts and finishes within the windows are in it; nothing is corrected for them.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.marks import DONE, PLANNED
from common.record import RunRecord

Floats = npt.NDArray[np.float64]
Summary = dict[str, float | int | None]


class Prediction(NamedTuple):
    """One move. Tokens per second of source and destination together; realised is NaN where a window is cut short by
    the run's begin or end, or the move was never made."""

    plan_ns: int
    done_ns: int  # -1: refused, dropped, or under way at the end
    src: int
    dst: int
    num_blocks: int
    predicted_before: float
    predicted_stay: float  # without the move, once those who wait and fit are in
    predicted_after: float
    realised_before: float
    realised_after: float


def predictions(record: RunRecord) -> list[Prediction]:
    """A row per planned move, in order of planning."""
    done: dict[tuple[int, ...], list[int]] = {}
    for time_ns, _, kind, text in record.marks:
        if kind == DONE:
            said = json.loads(text)
            done.setdefault((said["plan"], said["request"], said["src"], said["dst"]), []).append(time_ns)
    planned = [(time_ns, json.loads(text)) for time_ns, _, kind, text in record.marks if kind == PLANNED]
    if not planned:
        return []
    made = Tokens(record)
    rows = []
    for time_ns, said in planned:
        ends = done.get((said["plan"], said["request"], said["src"], said["dst"]), [])
        end = next((at for at in ends if at >= time_ns), -1)
        if end >= 0:
            ends.remove(end)
        both, window = (said["src"], said["dst"]), said["window_ns"]
        before = made.per_second(both, time_ns - window, time_ns)
        after = made.per_second(both, end, end + window) if end >= 0 else np.nan
        rows.append(Prediction(time_ns, end, *both, said["blocks"], said["before"], said["stay"],
                               said["after"], before, after))  # fmt: skip
    return rows


class Tokens:
    """Tokens that instances' decoding requests got over time; within a segment evenly."""

    def __init__(self, record: RunRecord) -> None:
        columns = record.segments
        names = ("start_ns", "end_ns", "instance", "iterations", "decodes")
        start, end, self.instance, iterations, decodes = (np.array(getattr(columns, name), np.int64) for name in names)
        self.start, self.length = start, np.maximum(1, end - start)
        self.tokens = (iterations * decodes).astype(np.float64)
        self.end_ns = record.end_ns

    def per_second(self, instances: tuple[int, ...], begin: int, end: int) -> float:
        """NaN where the window leaves the run."""
        if begin < 0 or end > self.end_ns or end <= begin:
            return float("nan")
        mine = np.isin(self.instance, instances)
        start, length = self.start[mine], self.length[mine]
        share = np.clip(end - start, 0, length) - np.clip(begin - start, 0, length)
        return float((share / length * self.tokens[mine]).sum()) * 1e9 / (end - begin)


def prediction_summary(rows: list[Prediction]) -> Summary:
    """Nothing where nothing was predicted. Errors are of moves with both windows; relative ones leave out zeros."""
    if not rows:
        return {}
    before, stay, after, real_before, real_after = (np.array([row[index] for row in rows]) for index in range(5, 10))
    known = ~np.isnan(real_before) & ~np.isnan(real_after)
    change, real = (after - before)[known], (real_after - real_before)[known]
    out: Summary = {"num_planned_moves": len(rows), "num_moves_made": sum(row.done_ns >= 0 for row in rows),
                    "num_moves_verified": int(known.sum())}  # fmt: skip
    some = bool(known.any())
    out["mean_predicted_gain_tps"] = float((after - stay)[known].mean()) if some else None
    out["mean_predicted_change_tps"] = float(change.mean()) if some else None
    out["mean_realised_change_tps"] = float(real.mean()) if some else None
    out["median_change_error_tps"] = float(np.median(np.abs(change - real))) if some else None
    out["share_of_moves_with_a_rise"] = float((real > 0).mean()) if some else None
    out["median_tps_error_before"] = _relative(before[known], real_before[known])
    out["median_tps_error_after"] = _relative(after[known], real_after[known])
    return out


def _relative(predicted: Floats, realised: Floats) -> float | None:
    some = realised > 0
    return float(np.median(np.abs(predicted[some] / realised[some] - 1.0))) if some.any() else None
