"""The numbers of a run: latency, throughput, goodput, memory and cost, under the names vLLM's benchmark uses.

Everything is vectorised over the columns of a `RunRecord`; `docs/results.md` defines each name. Latencies
are of finished requests, as in vLLM's benchmark. Shares of requests (`slo_attainment`) are of all that
arrived, so that refusing or losing requests never makes a system look better.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, ContractError
from common.mechanisms import mechanisms
from common.predictions import prediction_summary, predictions
from common.record import RequestColumns, RunRecord, SegmentColumns, TimelineColumns
from common.types import RequestStatus

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Metric = float | int | None
Summary = dict[str, Metric]

PERCENTILES = {"median": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
LITTLE_TOLERANCE = 1e-6
_LOW_BITS = 20  # integrals are summed in two halves: requests x nanoseconds overflow 64 bits


@dataclass(frozen=True)
class Slo:
    """Latency targets in ms that a request must meet to count as good; None: not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for key, value in (("slo.ttft_ms", self.ttft_ms), ("slo.tpot_ms", self.tpot_ms)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{key}={value:g}: a latency target must be above 0 ms (null: no target)")


@dataclass(frozen=True)
class Requests:
    """The request columns as arrays, with the masks and durations that metrics, files and figures share."""

    arrival_ns: Ints
    first_ns: Ints
    finish_ns: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    arrived: Bools
    finished: Bools
    rejected: Bools

    @classmethod
    def of(cls, columns: RequestColumns) -> Requests:
        """Views of the columns (no copies); checks that no finished request breaks causality."""
        status = as_numpy(columns.status)
        view = cls(
            as_numpy(columns.arrival_ns),
            as_numpy(columns.first_token_ns),
            as_numpy(columns.finish_ns),
            as_numpy(columns.prompt_tokens),
            as_numpy(columns.output_tokens),
            status != RequestStatus.PENDING,
            status == RequestStatus.FINISHED,
            status == RequestStatus.REJECTED,
        )
        ordered = (view.arrival_ns <= view.first_ns) & (view.first_ns <= view.finish_ns)
        ordered &= view.arrival_ns >= 0
        if not ordered[view.finished].all():
            row = int(np.flatnonzero(view.finished & ~ordered)[0])
            raise ContractError(f"request {row} finished, but not 0 <= arrival <= first token <= finish")
        return view

    @property
    def ttft_ms(self) -> Floats:
        """Arrival to first token, NaN without one."""
        return np.where(self.first_ns >= 0, (self.first_ns - self.arrival_ns) / 1e6, np.nan)

    @property
    def tpot_ms(self) -> Floats:
        """(finish - first token) / (n - 1) of finished requests with n >= 2 output tokens, else NaN."""
        gaps = np.where(self.finished & (self.output_tokens >= 2), self.output_tokens - 1, np.nan)
        return np.asarray((self.finish_ns - self.first_ns) / 1e6 / gaps)

    @property
    def e2el_ms(self) -> Floats:
        """Arrival to finish of finished requests, else NaN."""
        return np.where(self.finished, (self.finish_ns - self.arrival_ns) / 1e6, np.nan)


def as_numpy(column: array[int]) -> Ints:
    """A view of an integer column; the column cannot grow while the view lives."""
    return np.frombuffer(column, dtype=np.int64) if len(column) else np.empty(0, np.int64)


def summarize(record: RunRecord, slo: Slo, num_gpus_per_instance: int | tuple[int, ...] = 1) -> Summary:
    """Every metric of a run, None where there is nothing to measure. GPUs: of all instances alike, or of each.

    Raises ContractError when a request breaks causality or the run Little's law.
    """
    view = Requests.of(record.requests)
    window = _window(record, view)
    out = _counts(view)
    out |= _throughput(view, window)
    ttft, tpot = view.ttft_ms, view.tpot_ms
    out |= distribution("ttft", ttft[view.finished])
    out |= distribution("tpot", tpot[~np.isnan(tpot)])
    out |= _itl(record.segments, record.requests, view)
    out |= distribution("e2el", view.e2el_ms[view.finished])
    out |= _goodput(view, slo, ttft, tpot, out["duration_s"])
    out |= _requests_extra(record.requests, view)
    out |= _timeline(record.timeline, window[1])
    out |= _gpus(record.up_intervals, record.end_ns, window, num_gpus_per_instance)
    out["bytes_moved"] = sum(record.moves.num_bytes)
    out |= mechanisms(record)
    out |= prediction_summary(predictions(record))
    out |= _littles_law(view, window)
    return out


def distribution(name: str, values_ms: Floats) -> Summary:
    """`mean_<name>_ms` and its percentiles (linear interpolation, as numpy and vLLM do)."""
    if not len(values_ms):
        return {f"{stat}_{name}_ms": None for stat in ("mean", *PERCENTILES)}
    points = np.percentile(values_ms, list(PERCENTILES.values()))
    out: Summary = {f"mean_{name}_ms": float(values_ms.mean())}
    return out | {f"{stat}_{name}_ms": float(value) for stat, value in zip(PERCENTILES, points)}


def weighted_percentiles(values: Floats, weights: Floats, percents: list[float]) -> Floats:
    """The smallest values below or at which at least that share of the weight lies."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    targets = np.asarray(percents) / 100.0 * reached[-1]
    index = np.searchsorted(reached, targets * (1 - 1e-12), side="left")
    return np.asarray(values[order][np.minimum(index, len(values) - 1)])


def _window(record: RunRecord, view: Requests) -> tuple[int, int]:
    """First arrival to the last request's end, ns; to the record's end while requests live."""
    if not view.arrived.any():
        return 0, max(record.end_ns, 0)
    start = int(view.arrival_ns[view.arrived].min())
    all_ended = bool((view.finished | view.rejected)[view.arrived].all())
    end = int(view.finish_ns.max())
    if not all_ended or end < 0:
        end = max(end, record.end_ns)
    return start, max(start, end)


def _counts(view: Requests) -> Summary:
    arrived, completed = int(view.arrived.sum()), int(view.finished.sum())
    rejected = int(view.rejected.sum())
    return {
        "num_requests": len(view.arrival_ns),
        "completed": completed,
        "rejected": rejected,
        "live_at_end": arrived - completed - rejected,
    }


def _throughput(view: Requests, window: tuple[int, int]) -> Summary:
    """Rates per second of the window; tokens of finished requests only."""
    duration_s = (window[1] - window[0]) / 1e9
    prompt = int(view.prompt_tokens[view.finished].sum())
    output = int(view.output_tokens[view.finished].sum())

    def rate(amount: int) -> float | None:
        return amount / duration_s if duration_s else None

    return {
        "duration_s": duration_s,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": rate(int(view.finished.sum())),
        "output_throughput": rate(output),
        "total_token_throughput": rate(prompt + output),
    }


def _goodput(view: Requests, slo: Slo, ttft_ms: Floats, tpot_ms: Floats, duration_s: Metric) -> Summary:
    """Share of the arrived requests, and requests per second, that finished within every target."""
    if slo.ttft_ms is None and slo.tpot_ms is None:
        return {"slo_attainment": None, "goodput": None}
    good = view.finished.copy()
    if slo.ttft_ms is not None:
        good &= ttft_ms <= slo.ttft_ms
    if slo.tpot_ms is not None:
        good &= np.isnan(tpot_ms) | (tpot_ms <= slo.tpot_ms)
    num_good, num_arrived = int(good.sum()), int(view.arrived.sum())
    return {
        "slo_attainment": num_good / num_arrived if num_arrived else None,
        "goodput": num_good / duration_s if duration_s else None,
    }


def _requests_extra(columns: RequestColumns, view: Requests) -> Summary:
    prompt = int(view.prompt_tokens[view.arrived].sum())
    cached = int(as_numpy(columns.cached_tokens)[view.arrived].sum())
    return {
        "num_preemptions": int(as_numpy(columns.num_preemptions).sum()),
        "num_migrations": int(as_numpy(columns.num_migrations).sum()),
        "cached_token_share": cached / prompt if prompt else None,
    }


# ---------------------------------------------------------------- time between tokens


def _itl(segments: SegmentColumns, columns: RequestColumns, view: Requests) -> Summary:
    """Mean from the requests (exact); percentiles over the token gaps of all segments."""
    many = view.finished & (view.output_tokens >= 2)
    num_gaps = int((view.output_tokens[many] - 1).sum())
    out: Summary = {f"{stat}_itl_ms": None for stat in ("mean", *PERCENTILES)}
    if num_gaps:
        out["mean_itl_ms"] = _exact_sum((view.finish_ns - view.first_ns)[many]) / 1e6 / num_gaps
    gaps_ms, weights = token_gaps(segments, columns)
    if weights.sum() > 0:
        points = weighted_percentiles(gaps_ms, weights, list(PERCENTILES.values()))
        out |= {f"{stat}_itl_ms": float(value) for stat, value in zip(PERCENTILES, points)}
    return out


def token_gaps(segments: SegmentColumns, columns: RequestColumns) -> tuple[Floats, Floats]:
    """Times between tokens in ms and how many gaps were of that length.

    A segment of k iterations with d decoding requests has k*d gaps of its mean length. When its lane first
    spent time on prompts alone, the requests that decoded before and still do waited for that too: their
    first gap counts from the end of the lane's previous decoding segment. Gaps of preempted requests are in
    the mean only.
    """
    rows = _by_lane(segments)
    start, end, lane, instance, iterations, decodes = rows
    if not len(start):
        return np.empty(0), np.empty(0)
    mean_ms = (end - start) / 1e6 / np.maximum(iterations, 1)
    weights = (iterations * decodes).astype(np.float64)
    stall_ms = np.zeros(len(start))
    stall_ms[1:] = (start[1:] - end[:-1]) / 1e6
    same_lane = np.zeros(len(start), bool)
    same_lane[1:] = lane[1:] == lane[:-1]
    at = np.flatnonzero(same_lane & (stall_ms > 0))
    ended = _finishes_at(end[at - 1], instance[at - 1], columns)
    carried = np.clip(decodes[at - 1] - ended, 0, decodes[at]).astype(np.float64)
    weights[at] -= carried
    return np.concatenate((mean_ms, mean_ms[at] + stall_ms[at])), np.concatenate((weights, carried))


def _by_lane(segments: SegmentColumns) -> tuple[Ints, ...]:
    """(start, end, lane, instance, iterations, decodes) of decoding segments, by lane and then time."""
    decoding = as_numpy(segments.decodes) > 0
    names = ("start_ns", "end_ns", "lane", "instance", "iterations", "decodes")
    rows = [as_numpy(getattr(segments, name))[decoding] for name in names]
    start, lane = rows[0], rows[2]
    fits = len(lane) and lane.min() >= 0 and lane.max() < 2**15
    order = np.argsort(lane.astype(np.int16) if fits else lane, kind="stable")  # 16 bits: a radix sort
    if not _sorted_by(lane[order], start[order]):
        order = np.lexsort((start, lane))
    return tuple(row[order] for row in rows)


def _sorted_by(lane: Ints, start: Ints) -> bool:
    return bool(((lane[1:] != lane[:-1]) | (start[1:] >= start[:-1])).all())


def _finishes_at(time_ns: Ints, instance: Ints, columns: RequestColumns) -> Ints:
    """How many requests finished on `instance` at exactly `time_ns`, row by row."""
    finish, where = as_numpy(columns.finish_ns), as_numpy(columns.instance)
    stride = int(max(finish.max(initial=0), time_ns.max(initial=0))) + 1
    keys = np.sort(where * stride + finish)
    wanted = instance * stride + time_ns
    return np.searchsorted(keys, wanted, side="right") - np.searchsorted(keys, wanted, side="left")


# ---------------------------------------------------------------- samples of the cluster


def sample_starts(time_ns: Ints) -> Ints:
    """First row of every sample: a sample is a run of rows (one per instance) of one time."""
    return np.flatnonzero(np.diff(time_ns, prepend=time_ns[:1] - 1))


def _timeline(timeline: TimelineColumns, end_ns: int) -> Summary:
    """Cluster-wide means over time and peaks; a sample holds until the next one."""
    names = ("mean_kv_utilisation", "peak_kv_utilisation", "mean_running", "mean_waiting")
    time_ns = as_numpy(timeline.time_ns)
    if not len(time_ns):
        return dict.fromkeys(names)
    starts = sample_starts(time_ns)

    def total(column: array[int]) -> Ints:
        return np.asarray(np.add.reduceat(as_numpy(column), starts))

    at = time_ns[starts]
    held = np.diff(at, append=max(end_ns, int(at[-1]))).astype(np.float64)
    if not held.sum():
        held[:] = 1.0
    capacity = total(timeline.kv_capacity_blocks)
    used = total(timeline.kv_used_blocks) / np.maximum(capacity, 1)
    values = (
        np.average(used, weights=held),
        used.max(),
        np.average(total(timeline.running), weights=held),
        np.average(total(timeline.waiting), weights=held),
    )
    return {name: float(value) for name, value in zip(names, values)}


def _gpus(
    up_intervals: Mapping[int, list[tuple[int, int]]], end_ns: int, window: tuple[int, int],
    per_instance: int | tuple[int, ...],
) -> Summary:  # fmt: skip
    """GPU-seconds of instances being up; mean over the window, and peak of the number of GPUs."""
    spans = [(*span, per_instance if isinstance(per_instance, int) else per_instance[instance])
             for instance in sorted(up_intervals) for span in up_intervals[instance]]  # fmt: skip
    if not spans:
        return {"gpu_seconds": None, "mean_num_gpus": None, "peak_num_gpus": None}
    begin, end, gpus = np.array(spans, np.int64).T
    end = np.where(end < begin, max(end_ns, window[1]), end)  # still up
    clipped = np.maximum(np.minimum(end, window[1]) - np.maximum(begin, window[0]), 0)
    width_ns = window[1] - window[0]
    copies = np.repeat(np.arange(len(gpus)), gpus)  # an interval for each GPU
    return {
        "gpu_seconds": float(((end - begin) * gpus).sum()) / 1e9,
        "mean_num_gpus": float((clipped * gpus).sum()) / width_ns if width_ns else None,
        "peak_num_gpus": int(num_up(begin[copies], end[copies], begin).max()),
    }


def num_up(begin_ns: Ints, end_ns: Ints, at_ns: Ints) -> Ints:
    """How many half-open intervals [begin, end) hold each time."""
    started = np.searchsorted(np.sort(begin_ns), at_ns, side="right")
    return np.asarray(started - np.searchsorted(np.sort(end_ns), at_ns, side="right"))


# ---------------------------------------------------------------- Little's law


def _littles_law(view: Requests, window: tuple[int, int]) -> Summary:
    """L, the integral of the number in the system, against lambda x W from each request's own stay."""
    width_ns = window[1] - window[0]
    live = view.arrived & ~view.finished & ~view.rejected
    stays = live | (view.arrived & (view.finish_ns >= 0))  # refused on sight: no stay
    if not width_ns or not view.arrived.any():
        return {"littles_law_L": None, "littles_law_lambda_W": None}
    arrival = view.arrival_ns[stays]
    leave = np.where(view.finish_ns < 0, window[1], view.finish_ns)[stays]
    in_system = integrate_count(arrival, leave) / width_ns
    if live.any():
        return {"littles_law_L": in_system, "littles_law_lambda_W": None}
    num_arrived = int(view.arrived.sum())
    mean_stay_ns = _exact_sum(leave - arrival) / num_arrived
    rate_per_ns = num_arrived / width_ns
    product = rate_per_ns * mean_stay_ns
    if abs(in_system - product) > LITTLE_TOLERANCE * max(in_system, product):
        raise ContractError(f"Little's law fails: L = {in_system!r}, lambda * W = {product!r}")
    return {"littles_law_L": in_system, "littles_law_lambda_W": product}


def integrate_count(arrival_ns: Ints, leave_ns: Ints) -> int:
    """The integral over time of the number of requests present, exact, in request-nanoseconds."""
    times = np.concatenate((arrival_ns, leave_ns))
    steps = np.repeat(np.array([1, -1], np.int64), len(arrival_ns))
    order = np.argsort(times, kind="stable")  # of one time: arrivals first
    present = np.cumsum(steps[order])[:-1]
    if len(present) and present.min() < 0:
        raise ContractError("a request left before it arrived")
    return _exact_sum(np.diff(times[order]), present)


def _exact_sum(values: Ints, counts: Ints | None = None) -> int:
    """The sum of values (x counts) as a Python integer, whatever its size. Values and counts are >= 0."""
    high, low = values >> _LOW_BITS, values & ((1 << _LOW_BITS) - 1)
    if counts is None:
        return (int(high.sum()) << _LOW_BITS) + int(low.sum())
    return (int(high @ counts) << _LOW_BITS) + int(low @ counts)


def format_metric(value: Any) -> str:
    """A metric for people: three significant digits, thousands whole, a dash for nothing to measure."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
