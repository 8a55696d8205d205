"""What the figures draw, computed from a loaded run: rolling percentiles, CDFs and samples of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.runs import Columns, LoadedRun

Array = npt.NDArray[Any]

MAX_POINTS = 400  # of a line over time: more cannot be seen, and make PDFs slow
MAX_DOTS = 4_000


def finished(run: LoadedRun, column: str) -> tuple[Array, Array]:
    """(arrival s, value) of finished requests that have the value, in order of arrival."""
    table = run.requests
    if not {column, "status", "arrival_s"} <= table.keys():
        return np.empty(0), np.empty(0)
    keep = (table["status"] == "finished") & ~np.isnan(table[column].astype(np.float64))
    arrival, values = table["arrival_s"][keep], table[column][keep]
    order = np.argsort(arrival, kind="stable")
    return arrival[order], values[order]


def rolling(
    time_s: Array, values: Array, percents: Sequence[float], num_windows: int = 60
) -> tuple[Array, Array, float]:
    """Percentiles over overlapping windows of equal time: (centres, one row per percent, window in s)."""
    if not len(time_s):
        return np.empty(0), np.empty((len(percents), 0)), 0.0
    begin, end = float(time_s[0]), float(time_s[-1])
    window = max((end - begin) / num_windows, 1e-9)
    centres = np.linspace(begin, end, 2 * num_windows + 1)
    first = np.searchsorted(time_s, centres - window / 2, side="left")
    last = np.searchsorted(time_s, centres + window / 2, side="right")
    out = np.full((len(percents), len(centres)), np.nan)
    for i, (a, b) in enumerate(zip(first, last)):
        if b > a:
            out[:, i] = np.percentile(values[a:b], percents)
    keep = ~np.isnan(out[0])
    return centres[keep], out[:, keep], window


def cdf(values: Array) -> tuple[Array, Array]:
    """(value, share of values at or below it), at most 500 points, the tail kept whole."""
    if not len(values):
        return np.empty(0), np.empty(0)
    ordered = np.sort(values)
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    if len(ordered) <= 500:
        return ordered, shares
    pick = np.unique(
        np.concatenate((np.linspace(0, len(ordered) - 101, 400).astype(int), np.arange(-100, 0) + len(ordered)))
    )
    return ordered[pick], shares[pick]


def samples(run: LoadedRun, column: str) -> tuple[Array, Array, Array]:
    """(time s, instances, values [sample, instance]) of the timeline, NaN where an instance has no row."""
    table: Columns = run.timeline
    if not {"time_s", "instance", column} <= table.keys() or not len(table["time_s"]):
        return np.empty(0), np.empty(0, np.int64), np.empty((0, 0))
    times, row = np.unique(table["time_s"], return_inverse=True)
    instances, col = np.unique(table["instance"], return_inverse=True)
    values = np.full((len(times), len(instances)), np.nan)
    values[row, col] = table[column]
    return times, instances, values


def thin(times: Array, values: Array, peak: bool = False) -> tuple[Array, Array]:
    """At most MAX_POINTS samples: means of neighbours, or with `peak` the highest of them."""
    if len(times) <= MAX_POINTS:
        return times, values
    starts = np.unique(np.linspace(0, len(times), MAX_POINTS, endpoint=False).astype(int))
    if peak:
        return times[starts], np.fmax.reduceat(values, starts, axis=0)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
    count = np.add.reduceat(known.astype(np.float64), starts, axis=0)
    return times[starts], np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def setting(run: LoadedRun, *keys: str) -> Any:
    """A value of the run's configuration by its path, None when absent."""
    value: Any = run.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
