"""What the mechanisms of a run cost: stalls of requests, bubbles of pipelines, bytes over links, remaps and marks.

All of it is what the executor saw, so that it means the same under every system; `docs/results.md` defines each name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.record import MoveColumns, RemapColumns, RunRecord, StageColumns, StallColumns

Ints = npt.NDArray[np.int64]
Summary = dict[str, float | int | None]

CAUSES = ("parked", "removed", "lost")
MOVES = ("copy", "swap", "load")


def mechanisms(record: RunRecord) -> Summary:
    """Summary keys; counts are 0 and the rest None where there was nothing."""
    return {**_stalls(record.stalls), **_stages(record.stages), **_moves(record.moves), **_remaps(record.remaps),
            **_marks(record.marks), **_serving(record)}  # fmt: skip


def _serving(record: RunRecord) -> Summary:
    """Only where somebody served remote attention: what it cost the creditors' own requests. Time per own token while
    serving, against the same instances' tokens in all other iterations (whose batches may differ) and against the same
    iterations without the load (`creditor_slowdown`)."""
    rows = record.serving
    if not len(rows.start_ns):
        return {}
    tokens, token_ns = sum(rows.tokens), sum(rows.token_ns)
    slowed, base = sum(rows.token_slowed_ns), sum(rows.token_ns) - sum(rows.token_slowed_ns)
    segments, served = record.segments, np.unique(np.array(rows.instance, np.int64))
    where = np.isin(np.array(segments.instance, np.int64), served)
    length = np.array(segments.end_ns, np.int64) - np.array(segments.start_ns, np.int64)
    decodes = np.array(segments.decodes, np.int64)
    all_ns = int((length * decodes)[where].sum())
    all_tokens = int((np.array(segments.iterations, np.int64) * decodes)[where].sum())
    return {
        "remote_served_s": sum(rows.served_ns) / 1e9,
        "creditor_tokens_serving": tokens,
        "creditor_slowdown": slowed / base if base else None,
        "creditor_tpot_serving_ms": token_ns / tokens / 1e6 if tokens else None,
        "creditor_tpot_alone_ms": (all_ns - token_ns) / (all_tokens - tokens) / 1e6 if all_tokens > tokens else None,
    }


def _of_kind(kinds: Sequence[str], kind: str) -> npt.NDArray[np.bool_]:
    return np.array([one == kind for one in kinds], bool)


def _stalls(rows: StallColumns) -> Summary:
    """Per cause: how many, and the time from leaving a lane to the next token."""
    out: Summary = {}
    times = (np.array(rows.end_ns, np.int64) - np.array(rows.begin_ns, np.int64)) / 1e6
    for cause in CAUSES:
        found = times[_of_kind(rows.cause, cause)]
        out[f"num_{cause}_stalls"] = len(found)
        some = len(found) > 0
        out[f"mean_{cause}_stall_ms"] = float(found.mean()) if some else None
        out[f"p99_{cause}_stall_ms"] = float(np.percentile(found, 99)) if some else None
        out[f"max_{cause}_stall_ms"] = float(found.max()) if some else None
    return out


def _stages(rows: StageColumns) -> Summary:
    """Share of the time in work that stages idled: over all of them, and of the one that idled most."""
    if not len(rows.start_ns):
        return {"stage_work_s": 0.0, "stage_idle_share": None, "max_stage_idle_share": None}
    length = np.array(rows.end_ns, np.int64) - np.array(rows.start_ns, np.int64)
    work = np.bincount(rows.instance, length)
    idle = np.bincount(rows.instance, length - np.array(rows.busy_ns, np.int64))
    some = work > 0
    return {"stage_work_s": float(work.sum()) / 1e9, "stage_idle_share": float(idle.sum() / work.sum()),
            "max_stage_idle_share": float((idle[some] / work[some]).max())}  # fmt: skip


def _moves(rows: MoveColumns) -> Summary:
    """Per kind: GB, and GB/s of a source while something of that kind was on its way from it."""
    out: Summary = {}
    columns = (rows.src, rows.start_ns, rows.end_ns, rows.num_bytes)
    src, start, end, num_bytes = (np.array(column, np.int64) for column in columns)
    for kind in MOVES:
        some = _of_kind(rows.kind, kind)
        busy_ns = sum(covered(start[some & (src == one)], end[some & (src == one)]) for one in np.unique(src[some]))
        amount = int(num_bytes[some].sum())
        out[f"{kind}_gb"] = amount / 1e9
        out[f"{kind}_gb_per_s"] = amount / busy_ns if busy_ns else None
    return out


def covered(start: Ints, end: Ints) -> int:
    """Length of the union of intervals."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    before = np.maximum.accumulate(np.concatenate((start[:1], end[:-1])))
    return int(np.maximum(0, end - np.maximum(start, before)).sum())


def _remaps(rows: RemapColumns) -> Summary:
    """How many, how long a drop took from its command, and what at worst was of no use at one time."""
    counts = Counter(rows.kind)
    drops = [end - start for start, end, kind in zip(rows.start_ns, rows.end_ns, rows.kind) if kind == "drop"]
    return {
        "num_layer_drops": counts["drop"], "num_layer_loads": counts["load"], "num_kv_shrinks": counts["shrink"],
        "mean_drop_ms": sum(drops) / len(drops) / 1e6 if drops else None,
        "peak_spare_bytes": _peak(rows, "spare_bytes"), "peak_spare_cells": _peak(rows, "spare_cells"),
    }  # fmt: skip


def _peak(rows: RemapColumns, name: str) -> int:
    """The highest sum over instances at any time after a drop or load."""
    now: dict[int, int] = {}
    peak = 0
    for instance, value in zip(rows.instance, getattr(rows, name)):
        now[instance] = value
        peak = max(peak, sum(now.values()))
    return peak


def _marks(marks: Sequence[tuple[int, int, str, str]]) -> Summary:
    """Per kind of mark that the policy made: how many, and when first and last."""
    times: dict[str, list[int]] = {}
    for time_ns, _, kind, _ in marks:
        times.setdefault(kind, []).append(time_ns)
    out: Summary = {}
    for kind in sorted(times):
        found = times[kind]
        out |= {f"marks_{kind}": len(found), f"marks_{kind}_first_s": min(found) / 1e9,
                f"marks_{kind}_last_s": max(found) / 1e9}  # fmt: skip
    return out
