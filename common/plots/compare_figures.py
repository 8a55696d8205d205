"""Figures that lay several runs beside each other: one colour per run, in every panel the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.metrics import format_metric
from common.plots import series, style
from common.plots.run_figures import CDF_COLUMNS, draw_cdf
from common.runs import LoadedRun

BARS = (
    ("p99_ttft_ms", "P99 TTFT (ms)", "lower is better"),
    ("p99_tpot_ms", "P99 TPOT (ms)", "lower is better"),
    ("p99_e2el_ms", "P99 end-to-end (ms)", "lower is better"),
    ("goodput", "Goodput (requests/s)", "higher is better"),
    ("output_throughput", "Output tokens/s", "higher is better"),
    ("gpu_seconds", "GPU-seconds", "lower is better"),
)


def latency_cdfs(runs: Sequence[LoadedRun]) -> Any:
    """CDFs of TTFT, TPOT and end-to-end latency, one line per run."""
    height, legend = 3.2, _legend_inches(runs)
    figure, axes = _grid(1, 3, 9.0, height + legend, legend, wspace=0.2, bottom_inches=0.62)
    for panel, (column, name) in zip(axes[0], CDF_COLUMNS):
        for i, run in enumerate(runs):
            look = style.line_style(i)
            draw_cdf(panel, series.finished(run, column)[1], name, look["color"], names(runs)[i], look["linestyle"])
    axes[0][0].set_ylabel("share of finished requests")
    return _finish(figure, axes[0][0], runs, height + legend)


def over_time(runs: Sequence[LoadedRun]) -> Any:
    """P99 TTFT, P99 TPOT, KV use of the cluster and waiting requests over time, one line per run."""
    height, legend = 8.0, _legend_inches(runs)
    figure, axes = _grid(4, 1, 7.4, height + legend, legend, sharex=True, hspace=0.3, bottom_inches=0.72)
    ttft, tpot, memory, waiting = axes[:, 0]
    for i, run in enumerate(runs):
        look = {**style.line_style(i), "label": names(runs)[i]}
        for panel, column in ((ttft, "ttft_ms"), (tpot, "tpot_ms")):
            centres, (high,), _ = series.rolling(*series.finished(run, column), (99,))
            panel.plot(centres, high, **look)
        times, _, used = series.samples(run, "kv_used_blocks")
        capacity = series.samples(run, "kv_capacity_blocks")[2]
        if len(used) and len(capacity):
            share = 100 * np.nansum(used, 1) / np.maximum(np.nansum(capacity, 1), 1)
            memory.plot(*series.thin(times, share), **look)
        times, _, queued = series.samples(run, "waiting")
        if len(queued):
            waiting.plot(*series.thin(times, np.nansum(queued, 1)), **look)
    for panel, name, unit in (
        (ttft, "P99 time to first token", "ms"),
        (tpot, "P99 time per output token", "ms"),
        (memory, "KV memory in use, all instances", "% of capacity"),
        (waiting, "Waiting requests, all instances", "requests"),
    ):
        panel.set_title(name)
        panel.set_ylabel(unit)
        _spread_axis(panel)
    waiting.set_xlabel("time (s)")
    waiting.set_xlim(left=0)
    return _finish(figure, ttft, runs, height + legend)


def bars(runs: Sequence[LoadedRun]) -> Any:
    """Headline numbers of each run; a run without the number has a dash."""
    height, legend = 4.6, _legend_inches(runs)
    figure, axes = _grid(2, 3, 9.0, height + legend, legend, wspace=0.28, hspace=0.42, bottom_inches=0.52)
    for panel, (key, name, better) in zip(axes.flat, BARS):
        panel.set_title(name)
        panel.set_xlabel(better, color="#555555", fontsize=8)
        panel.set_xticks([])
        panel.grid(axis="x", visible=False)
        for i, run in enumerate(runs):
            value = run.summary.get(key)
            bar = panel.bar([i], [value or 0], color=style.line_style(i)["color"], label=names(runs)[i], width=0.72)
            panel.bar_label(bar, [format_metric(value)],
                            fontsize=7.5, padding=1)  # fmt: skip
        panel.margins(y=0.14)
        style.plain_numbers(panel.yaxis)
        panel.set_xlim(-0.6, max(len(runs), 3) - 0.4)
    return _finish(figure, axes[0][0], runs, height + legend)


def names(runs: Sequence[LoadedRun]) -> list[str]:
    """Folder names; the runtime's label is added where the runs differ in it."""
    mixed = len({run.label for run in runs}) > 1
    return [f"{run.name} ({run.label})" if mixed else run.name for run in runs]


def _spread_axis(panel: Any) -> None:
    """Logarithmic when the lines are decades apart, else from zero."""
    values = np.concatenate([line.get_ydata() for line in panel.lines] or [np.empty(0)])
    values = values[values > 0]
    if len(values) and panel.get_ylabel() == "ms" and values.max() > 50 * np.median(values):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    style.plain_numbers(panel.yaxis, log=panel.get_yscale() == "log")


def _legend_columns(runs: Sequence[LoadedRun]) -> int:
    longest = max((len(name) for name in names(runs)), default=1)
    return max(1, min(len(runs), 8, 90 // (longest + 6)))


def _legend_inches(runs: Sequence[LoadedRun]) -> float:
    return 0.19 * -(-len(runs) // _legend_columns(runs)) + 0.05


def _grid(
    rows: int, columns: int, width: float, height: float, legend: float, bottom_inches: float, **options: Any
) -> tuple[Any, Any]:
    """Axes below a headline and a legend of `legend` inches."""
    return style.new_figure(
        rows, columns, width, height, left=0.72 / width, right=1 - 0.12 / width, top=1 - (0.62 + legend) / height,
        bottom=bottom_inches / height, **options,
    )  # fmt: skip


def _finish(figure: Any, panel: Any, runs: Sequence[LoadedRun], height: float) -> Any:
    """Headline, one legend for all panels, provenance."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.01, 1 - 0.3 / height), ncols=_legend_columns(runs),
        borderaxespad=0, columnspacing=1.4, handlelength=1.8,
    )  # fmt: skip
    kinds = " and ".join(dict.fromkeys(run.label for run in runs))
    style.title(figure, f"{len(runs)} runs side by side: {kinds}", height)
    style.footer(figure, runs)
    return figure
