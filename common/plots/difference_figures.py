"""How far systems are apart, and how sure that is: changes against a baseline with their intervals."""

from __future__ import annotations

from typing import Any

from common.comparison import DIFFERENCES, Comparison
from common.plots import style


def differences(comparison: Comparison) -> Any:
    """One panel per metric, one mark per row: the change in percent and its 95% interval over seeds."""
    metrics = [(key, name) for key, name in DIFFERENCES if any(d.metric == key for d in comparison.differences)]
    others = [row.name for row in comparison.rows if row.name != comparison.baseline]
    lines = -(-len(metrics) // 3)
    height = 1.0 + lines * (0.75 + 0.22 * len(others))
    figure, axes = style.new_figure(
        lines, 3, 9.0, height, left=0.13, right=0.985, top=1 - 0.62 / height, bottom=0.5 / height, wspace=0.12,
        hspace=0.7,
    )  # fmt: skip
    for i, panel in enumerate(axes.flat):
        if i >= len(metrics):
            panel.set_axis_off()
            continue
        key, name = metrics[i]
        panel.set_title(f"{name} (% of {comparison.baseline})")
        panel.axvline(0, color=style.LIMIT, linewidth=0.8)
        for found in comparison.differences:
            if found.metric != key:
                continue
            at = others.index(found.row)
            colour = style.line_style(at + 1)["color"]
            panel.plot([100 * found.change], [at], "o", ms=4, color=colour)
            if found.interval:
                panel.plot([100 * value for value in found.interval], [at, at], color=colour, linewidth=1.6)
        panel.set_yticks(range(len(others)), others if i % 3 == 0 else [""] * len(others))
        panel.set_ylim(len(others) - 0.5, -0.5)
        style.plain_numbers(panel.xaxis)
    seeds = max(len(row.runs) for row in comparison.rows)
    style.title(figure, f"Change against {comparison.baseline}, 95% bootstrap interval over {seeds} seeds", height)
    style.footer(figure, [run for row in comparison.rows for run in row.runs])
    return figure
