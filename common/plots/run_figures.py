"""The figures of one run: what happened over time, and how latencies are spread."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.metrics import format_metric
from common.plots import series, style
from common.runs import LoadedRun

MAX_LINES = 8  # more instances are drawn as a band


def overview(run: LoadedRun) -> Any:
    """TTFT, TPOT, KV memory and queue over time, one above the other."""
    height = 8.4
    figure, axes = style.new_figure(
        4, 1, 7.4, height, sharex=True, left=0.1, right=0.985, top=0.925, bottom=0.085, hspace=0.32
    )
    ttft, tpot, memory, queue = axes[:, 0]
    window_s = _latency(run, ttft, "ttft_ms", "TTFT (ms)", "Time to first token", ("slo", "ttft_ms"))
    _latency(run, tpot, "tpot_ms", "TPOT (ms)", "Time per output token", ("slo", "tpot_ms"))
    _memory(run, memory)
    _queue(run, queue)
    _marks(run, memory)
    queue.set_xlabel(f"time (s); requests at their arrival, percentiles over windows of {window_s:.3g} s")
    queue.set_xlim(left=0)
    style.title(figure, f"{run.name}: {run.label}", height)
    style.footer(figure, [run])
    return figure


def latency_cdf(run: LoadedRun) -> Any:
    """CDFs of TTFT, TPOT and end-to-end latency with their median and P99."""
    height = 3.1
    figure, axes = style.new_figure(1, 3, 9.0, height, left=0.065, right=0.985, top=0.82, bottom=0.215, wspace=0.2)
    for panel, (column, name) in zip(axes[0], CDF_COLUMNS):
        _, values = series.finished(run, column)
        draw_cdf(panel, values, name, style.P50, None)
        for percent, colour in ((50, style.P50), (99, style.P99)):
            if len(values):
                at = float(np.percentile(values, percent))
                panel.plot([at], [percent / 100], "o", color=colour, ms=4, label=f"P{percent} {format_metric(at)} ms")
        if len(values):
            panel.legend(loc="lower right", handletextpad=0.2)
    axes[0][0].set_ylabel("share of finished requests")
    style.title(figure, f"{run.name}: {run.label}", height)
    style.footer(figure, [run])
    return figure


CDF_COLUMNS = (("ttft_ms", "TTFT (ms)"), ("tpot_ms", "TPOT (ms)"), ("e2el_ms", "End-to-end latency (ms)"))


def draw_cdf(panel: Any, values: Any, name: str, colour: str, label: str | None, dashes: str = "-") -> None:
    """One CDF in a panel; the axis is logarithmic when the values span much."""
    panel.set_title(name)
    panel.set_ylim(0, 1.02)
    if not len(values):
        if label is None:
            style.empty(panel, "no finished request")
        return
    x, y = series.cdf(values)
    panel.plot(x, y, color=colour, label=label, linestyle=dashes, drawstyle="steps-post")
    if x[0] > 0 and x[-1] > 8 * np.median(values):
        panel.set_xscale("log")
    style.plain_numbers(panel.xaxis, log=panel.get_xscale() == "log")


def _latency(run: LoadedRun, panel: Any, column: str, unit: str, name: str, slo: tuple[str, str]) -> float:
    """One dot per request, rolling P50 and P99, the target; returns the window in s."""
    panel.set_ylabel(unit)
    times, values = series.finished(run, column)
    if not len(times):
        panel.set_title(name)
        style.empty(panel, "no finished request" if run.requests else "requests.parquet is missing")
        return 0.0
    centres, (median, high), window = series.rolling(times, values, (50, 99))
    panel.set_title(name)
    every = -(-len(times) // series.MAX_DOTS)
    panel.plot(
        times[::every], values[::every], ".", color="#C4C4C4", ms=1.8, rasterized=True, zorder=1, label="one request"
    )
    panel.plot(centres, high, color=style.P99, label="P99")
    panel.plot(centres, median, color=style.P50, label="P50")
    limit = series.setting(run, *slo)
    if isinstance(limit, int | float):
        panel.axhline(limit, color=style.LIMIT, linestyle=":", linewidth=1, label=f"SLO {limit:g} ms")
    if values.min() > 0 and values.max() > 30 * np.median(values):
        panel.set_yscale("log")
        style.plain_numbers(panel.yaxis, log=True)
    else:
        panel.set_ylim(bottom=0)
        style.plain_numbers(panel.yaxis)
    _legend(panel)
    return window


def _memory(run: LoadedRun, panel: Any) -> None:
    """Blocks in use against the capacity of each instance, or their band when there are many."""
    times, instances, used = series.samples(run, "kv_used_blocks")
    _, _, capacity = series.samples(run, "kv_capacity_blocks")
    scale, unit = _block_unit(run)
    panel.set_ylabel(f"KV per instance ({unit})")
    panel.set_title("KV memory")
    style.plain_numbers(panel.yaxis)
    if not len(used) or not len(capacity):
        style.empty(panel, "no samples" if run.timeline else "timeline.parquet is missing")
        return
    at, used = series.thin(times, used * scale, peak=True)
    _, capacity = series.thin(times, capacity * scale, peak=True)
    if len(instances) <= MAX_LINES:
        for i, instance in enumerate(instances):
            panel.plot(
                at,
                used[:, i],
                label=f"instance {instance}" if not i else f"{instance}",
                linewidth=1.1,
                **style.line_style(i),
            )
    else:
        panel.fill_between(at, np.nanmin(used, 1), np.nanmax(used, 1), color=style.P50, alpha=0.2, linewidth=0,
                           label=f"{len(instances)} instances, lowest to highest")  # fmt: skip
        panel.plot(at, np.nanmean(used, 1), color=style.P50, label="mean")
    _capacity(panel, at, capacity, peak=float(np.nanmax(used)))
    _legend(panel)


def _capacity(panel: Any, at: Any, capacity: Any, peak: float) -> None:
    """Dashed lines at the highest and lowest capacity; off the axis, and said so, where use is far below."""
    low, high = np.nanmin(capacity, 1), np.nanmax(capacity, 1)
    top, bottom = float(high.max()), float(low.min())
    look = {"color": style.LIMIT, "linestyle": "--", "linewidth": 1, "drawstyle": "steps-post"}
    if 0 < peak < 0.3 * bottom:
        panel.plot([], [], label=f"capacity {format_metric(bottom)} (off axis)", **look)
        panel.set_ylim(0, peak * 1.15)
        return
    panel.plot(at, high, label="capacity", **look)
    if (low != high).any():
        panel.plot(at, low, **look)
    panel.set_ylim(0, max(top, peak, 1e-9) * 1.06)


def _block_unit(run: LoadedRun) -> tuple[float, str]:
    block_bytes = run.manifest.get("kv_block_bytes")
    if isinstance(block_bytes, int | float) and block_bytes > 0:
        return float(block_bytes) / 2**30, "GiB"
    return 1.0, "blocks"


def _queue(run: LoadedRun, panel: Any) -> None:
    panel.set_title("Requests in the cluster")
    style.plain_numbers(panel.yaxis)
    panel.set_ylabel("requests")
    times, _, running = series.samples(run, "running")
    if not len(times):
        style.empty(panel, "no samples")
        return
    for name, values, colour in (
        ("running", running, style.PALETTE[2]),
        ("waiting", series.samples(run, "waiting")[2], style.P99),
    ):
        at, total = series.thin(times, np.nansum(values, 1))
        panel.plot(at, total, color=colour, label=name)
    panel.set_ylim(bottom=0)
    _legend(panel)


def _marks(run: LoadedRun, panel: Any) -> None:
    """Thin lines where the policy marked something (at most 200)."""
    if not {"kind", "time_ns"} <= run.marks.keys():
        return
    kinds = list(dict.fromkeys(run.marks["kind"].tolist()))
    for i, kind in enumerate(kinds[:4]):
        at = run.marks["time_ns"][run.marks["kind"] == kind][:200] / 1e9
        low, high = panel.get_ylim()
        panel.vlines(at, low, high, color=style.PALETTE[-1 - i], linewidth=0.8, alpha=0.7, label=kind)
    _legend(panel)


def _legend(panel: Any) -> None:
    """A legend above the panel at the right, where it hides no data; in two rows when it is long."""
    entries = len(panel.get_legend_handles_labels()[1])
    columns = entries if entries <= 9 else -(-entries // 2)
    panel.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=columns, borderaxespad=0.1, handlelength=1.4,
        columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip
