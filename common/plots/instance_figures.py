"""What each instance did over time: its KV (own, lent, cached) under its capacity, parameters, and its queue."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.plots import series, style
from common.runs import LoadedRun

MAX_INSTANCES = 8  # more are named as left out
KV = ("kv_used_blocks", "kv_cached_blocks", "kv_lent_blocks", "kv_borrowed_blocks", "kv_capacity_blocks")


def instances(run: LoadedRun) -> Any:
    """One row per instance: blocks stacked under the capacity, then running and waiting requests.

    Own KV is what is in use minus what is cached or lent. Blocks borrowed elsewhere are a line, for they lie there.
    """
    found = series.samples(run, "kv_used_blocks")[1]
    shown = found[:MAX_INSTANCES]
    height = 1.35 + 1.25 * max(len(shown), 1)
    figure, axes = style.new_figure(
        max(len(shown), 1), 2, 9.0, height, sharex=True, left=0.085, right=0.94, top=1 - 0.78 / height,
        bottom=0.55 / height, hspace=0.28, wspace=0.22,
    )  # fmt: skip
    extra = f", the first {len(shown)} of {len(found)} instances" if len(found) > len(shown) else ""
    style.title(figure, f"{run.name}: {run.label}{extra}", height)
    style.footer(figure, [run])
    if not len(shown):
        for panel in axes.flat:
            style.empty(panel, "no samples" if run.timeline else "timeline.parquet is missing")
        return figure
    columns = {name: series.samples(run, name) for name in (*KV, "param_bytes", "running", "waiting")}
    for row, instance in enumerate(shown):
        values = {name: (times, table[:, row]) for name, (times, _, table) in columns.items() if table.size}
        _memory(axes[row][0], values, int(instance))
        _queue(axes[row][1], values)
    handles, labels = axes[0][0].get_legend_handles_labels()
    more = axes[0][1].get_legend_handles_labels()
    figure.legend([*handles, *more[0]], [*labels, *more[1]], loc="upper left", ncols=8, borderaxespad=0,
                  bbox_to_anchor=(0.01, 1 - 0.3 / height), columnspacing=1.2, handlelength=1.4)  # fmt: skip
    for panel in axes[-1]:
        panel.set_xlabel("time (s)")
        panel.set_xlim(left=0)
    return figure


def _memory(panel: Any, values: dict[str, Any], instance: int) -> None:
    panel.set_title(f"instance {instance}: KV blocks, parameters")
    line = {name: series.thin(*values[name]) for name in (*KV, "param_bytes") if name in values}
    if not {"kv_used_blocks", "kv_capacity_blocks"} <= line.keys():
        style.empty(panel, "no samples")
        return
    times, used = line["kv_used_blocks"]
    zero = np.zeros_like(used)
    cached, lent = (line.get(name, (times, zero))[1] for name in ("kv_cached_blocks", "kv_lent_blocks"))
    own = np.maximum(used - cached - lent, 0)
    colours = (style.PALETTE[0], style.PALETTE[4], style.PALETTE[5])
    panel.stackplot(times, own, lent, cached, colors=colours, alpha=0.75, linewidth=0, labels=("own", "lent", "cached"))
    borrowed = line.get("kv_borrowed_blocks", (times, zero))[1]
    panel.plot(times, borrowed, color=style.PALETTE[1], linewidth=0.9, label="borrowed elsewhere")
    panel.plot(times, line["kv_capacity_blocks"][1], color=style.LIMIT, linestyle="--", linewidth=1, label="capacity")
    panel.set_ylim(bottom=0)
    style.plain_numbers(panel.yaxis)
    if "param_bytes" in line:
        side = panel.twinx()
        times, held = line["param_bytes"]
        side.plot(times, held / 2**30, color=style.PALETTE[2], linestyle=":", linewidth=1.2)
        side.set_ylim(0, max(float(np.nanmax(held)) / 2**30 * 1.15, 1e-9))
        side.grid(False)
        side.tick_params(axis="y", labelcolor=style.PALETTE[2])
        panel.plot([], [], color=style.PALETTE[2], linestyle=":", label="parameters (GiB, right)")


def _queue(panel: Any, values: dict[str, Any]) -> None:
    panel.set_title("requests")
    for name, colour in (("running", style.PALETTE[2]), ("waiting", style.P99)):
        if name in values:
            panel.plot(*series.thin(*values[name]), color=colour, label=name)
    panel.set_ylim(bottom=0)
    style.plain_numbers(panel.yaxis)
