"""What a run prints: a table of its summary, several summaries side by side, and progress while it runs."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from common.metrics import PERCENTILES, as_numpy, format_metric
from common.provenance import label, provenance_line, runtime_label
from common.record import RunRecord
from common.runs import LoadedRun
from common.types import RequestStatus

Summary = Mapping[str, Any]

LATENCIES = {"ttft": "TTFT (ms)", "tpot": "TPOT (ms)", "itl": "ITL (ms)", "e2el": "end to end (ms)"}

# metric, header, factor from the summary's unit to the header's, best: -1 lowest, +1 highest, 0 no judgement
Column = tuple[str, str, float, int]
BEST_NOTE = "* best of its column (none marked where all are equal or nothing is better)"
COLUMNS: tuple[Column, ...] = (
    ("mean_ttft_ms", "TTFT mean ms", 1, -1),
    ("median_ttft_ms", "TTFT P50 ms", 1, -1),
    ("p99_ttft_ms", "TTFT P99 ms", 1, -1),
    ("mean_tpot_ms", "TPOT mean ms", 1, -1),
    ("p99_tpot_ms", "TPOT P99 ms", 1, -1),
    ("p99_itl_ms", "ITL P99 ms", 1, -1),
    ("p99_e2el_ms", "E2E P99 ms", 1, -1),
    ("completed", "finished", 1, 0),
    ("request_throughput", "requests /s", 1, 1),
    ("output_throughput", "output tok/s", 1, 1),
    ("goodput", "goodput req/s", 1, 1),
    ("slo_attainment", "SLO met %", 100, 1),
    ("gpu_seconds", "GPU s", 1, -1),
    ("mean_kv_utilisation", "KV mean %", 100, 0),
    ("num_preemptions", "preempt.", 1, -1),
    ("num_migrations", "migrat.", 1, 0),
    ("bytes_moved", "moved GB", 1e-9, 0),
)


# ---------------------------------------------------------------- tables


def summary_table(summary: Summary, name: str, runtime: str, manifest: Mapping[str, Any] | None = None) -> str:
    """One run's summary: what it is, then counts, rates, latencies and cost.

    With the run's manifest the first line says where the numbers come from and the last how long they took.
    """
    manifest = manifest or {}
    known = label(manifest) if manifest else runtime_label(runtime)

    def f(key: str, scale: float = 1) -> str:
        value = summary.get(key)
        return format_metric(value if value is None or scale == 1 else value * scale)

    rows = [
        f"{name}: {provenance_line([manifest]) if manifest else known}",
        _row("requests", f"{f('completed')} of {f('num_requests')} finished, {f('rejected')} rejected, "
             f"{f('live_at_end')} live at the end, in {f('duration_s')} s ({known})"),
        _row("throughput", f"{f('request_throughput')} requests/s, {f('output_throughput')} output tokens/s, "
             f"{f('total_token_throughput')} tokens/s"),
        _row("within SLO", "no target set (slo.ttft_ms, slo.tpot_ms)" if summary.get("goodput") is None else
             f"{f('slo_attainment', 100)}% of requests, goodput {f('goodput')} requests/s"),
        "",
        *_latency_rows(summary),
        "",
        _row("KV memory", f"{f('mean_kv_utilisation', 100)}% used on average, "
             f"{f('peak_kv_utilisation', 100)}% at peak"),
        _row("in the cluster", f"{f('mean_running')} running, {f('mean_waiting')} waiting on average"),
        _row("movement", f"{f('num_preemptions')} preemptions, {f('num_migrations')} migrations, "
             f"{f('bytes_moved', 1e-9)} GB moved, {f('cached_token_share', 100)}% of prompt tokens cached"),
        *_mechanism_rows(f, summary),
        _row("GPUs", f"{f('mean_num_gpus')} on average, {f('peak_num_gpus')} at peak, {f('gpu_seconds')} GPU-seconds"),
    ]  # fmt: skip
    wall_s = manifest.get("wall_seconds")
    if wall_s:
        rate = (summary.get("num_requests") or 0) / wall_s
        rows.append(_row("wall time", f"{wall_s:.3f} s, {rate:,.0f} requests/s"))
    return "\n".join(rows)


def refusals(reasons: Iterable[str], most: int = 3) -> list[str]:
    """Why requests were rejected, the commonest reason first: reasons that differ in numbers only are one, told by an
    example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reason in reasons:
        kind = re.sub(r"\d+", "#", reason)
        counts[kind] += 1
        examples.setdefault(kind, reason)
    lines = [f"rejected: {count:,} × {examples[kind]}" for kind, count in counts.most_common(most)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(most))
    return lines + ([f"rejected: {rest:,} for other reasons (requests.parquet: reject_reason)"] if rest else [])


def lost_workers(lost: Mapping[str, str], summary: Summary) -> list[str]:
    """A line for each instance whose worker was lost, and one on the requests that ran there."""
    if not lost:
        return []
    lines = [f"worker of instance {instance} was lost: {how}" for instance, how in lost.items()]
    anew, live = summary.get("num_lost_stalls") or 0, summary.get("live_at_end") or 0
    what = [f"{anew:,} running requests lost their KV by that and were computed anew"] if anew else []
    what += [f"{live:,} requests were left unfinished"] if live else []
    return [*lines, "; ".join(what) or "no running request lost its KV by that"]


def stalled(error: Exception, lost: Mapping[str, str]) -> str:
    """Why a run stalled, and the workers that are missing."""
    gone = ", ".join(f"{instance} ({how})" for instance, how in lost.items())
    return f"{error}; lost workers, by instance: {gone}" if gone else str(error)


def _mechanism_rows(f: Callable[..., str], summary: Summary) -> list[str]:
    """What moving, remapping and pipelining cost; nothing where there was none of it."""
    rows = []
    for cause, what in (("parked", "parked"), ("removed", "removed, computed anew")):
        if summary.get(f"num_{cause}_stalls"):
            rows.append(_row("stalls", f"{f(f'num_{cause}_stalls')} {what}: {f(f'mean_{cause}_stall_ms')} ms on "
                             f"average, P99 {f(f'p99_{cause}_stall_ms')} ms, longest {f(f'max_{cause}_stall_ms')} ms"))
    if summary.get("copy_gb") or summary.get("load_gb"):
        rows.append(_row("links", f"{f('copy_gb')} GB copied at {f('copy_gb_per_s')} GB/s, "
                         f"{f('load_gb')} GB of parameters at {f('load_gb_per_s')} GB/s"))  # fmt: skip
    if summary.get("stage_work_s"):
        rows.append(_row("pipelines", f"stages idle {f('stage_idle_share', 100)}% of {f('stage_work_s')} s with work, "
                         f"the worst {f('max_stage_idle_share', 100)}%"))  # fmt: skip
    return rows


def _row(name: str, text: str) -> str:
    return f"  {name:<15} {text}"


def _latency_rows(summary: Summary) -> list[str]:
    stats = ("mean", *PERCENTILES)
    header = {"mean": "mean", "median": "P50", "p90": "P90", "p95": "P95", "p99": "P99", "p999": "P99.9"}
    rows = [f"  {'':<15} " + " ".join(f"{header[stat]:>9}" for stat in stats)]
    for key, title in LATENCIES.items():
        cells = (format_metric(summary.get(f"{stat}_{key}_ms")) for stat in stats)
        rows.append(f"  {title:<15} " + " ".join(f"{cell:>9}" for cell in cells))
    return rows


def comparison_table(
    runs: Sequence[LoadedRun], width: int = 110, blocks: Sequence[Sequence[Column]] = (COLUMNS,)
) -> str:
    """Runs below each other, metrics in columns, `*` at the best of each; each block of columns wraps at `width`."""
    names = ["run", *(run.name for run in runs)]
    parts = [wrapped(names, metric_columns(runs, block), width) for block in blocks]
    return "\n\n".join([provenance_line([run.manifest for run in runs]), *(part for part in parts if part), BEST_NOTE])


def wrapped(names: Sequence[str], columns: Sequence[Sequence[str]], width: int) -> str:
    """Columns (two lines of header, then a cell per name after the first) beside `names`, in blocks of `width`."""
    first = max(len(name) for name in names)
    blocks: list[list[Sequence[str]]] = [[]]
    used = first
    for column in columns:
        cost = max(len(cell) for cell in column) + 2
        if used + cost > width and blocks[-1]:
            blocks.append([])
            used = first
        blocks[-1].append(column)
        used += cost
    texts = []
    for block in blocks if columns else ():
        lines = []
        for i, name in enumerate(["", *names]):
            cells = (column[i].rjust(max(len(cell) for cell in column)) for column in block)
            lines.append("  ".join([name.ljust(first), *cells]).rstrip())
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def metric_columns(runs: Sequence[LoadedRun], columns: Sequence[Column]) -> list[list[str]]:
    """Cells of each column that any run has: two lines of header, then one per run."""
    out = []
    for key, header, factor, direction in columns:
        values = [run.summary.get(key) for run in runs]
        if all(value is None for value in values):
            continue
        best = _best([value for value in values if value is not None], direction)
        cells = [
            (format_metric(value if factor == 1 or value is None else value * factor)) + ("*" if value == best else " ")
            if value is not None else "- "
            for value in values
        ]  # fmt: skip
        above, below = header.rsplit(" ", 1) if " " in header else ("", header)
        out.append([above + " ", below + " ", *cells])
    return out


def _best(values: Sequence[float], direction: int) -> float | None:
    if not direction or len(values) < 2 or min(values) == max(values):
        return None
    return max(values) if direction > 0 else min(values)


# ---------------------------------------------------------------- progress


class Progress:
    """Requests done so far, on stderr: a bar on a terminal, else at most a line each 10% or 10 s, none under 1 s.

    Call it as often as you like (`drive`'s `progress`): it looks at the record a few times a second at most.
    """

    BAR_S, LINE_S = 0.2, 1.0

    def __init__(
        self, record: RunRecord, total: int | None = None, name: str = "simulating", stream: TextIO | None = None
    ) -> None:
        self._record, self._label = record, name
        self._stream = sys.stderr if stream is None else stream
        self._total = len(record.requests.status) if total is None else total
        self._is_terminal = self._stream.isatty()
        self._begin = time.monotonic()
        self._next = self._begin + (self.BAR_S if self._is_terminal else self.LINE_S)
        self._said_share, self._said_at = 0.0, self._begin
        self._bar: Any = None

    def __call__(self, now_ns: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        done = self._done()
        if self._is_terminal:
            self._next = now + self.BAR_S
            self._draw(done)
            return
        self._next = now + self.LINE_S
        if done / max(self._total, 1) >= self._said_share + 0.1 or now >= self._said_at + 10:
            self._say(done, now)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._draw(self._done())
            self._bar.close()
            self._bar = None

    def _done(self) -> int:
        """Finished and rejected requests. The view lives only here, so that the column stays free to grow."""
        status = as_numpy(self._record.requests.status)
        return int(np.count_nonzero(status >= int(RequestStatus.FINISHED)))

    def _draw(self, done: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, desc=self._label, unit="req", file=self._stream, dynamic_ncols=True, mininterval=0
            )
            self._bar.start_t = self._bar.last_print_t = self._bar.start_t - (time.monotonic() - self._begin)
        self._bar.update(done - self._bar.n)

    def _say(self, done: int, now: float) -> None:
        rate = done / (now - self._begin)
        left = f", {(self._total - done) / rate:,.0f} s left" if rate else ""
        share = done / max(self._total, 1)
        print(f"{self._label}: {share:.0%} ({done:,} of {self._total:,} requests), {rate:,.0f} requests/s{left}",
              file=self._stream, flush=True)  # fmt: skip
        self._said_share, self._said_at = share, now
