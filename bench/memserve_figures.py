"""python -m bench.memserve_figures [name ...]: MemServe's figures, from the tables under results/memserve.

Nothing is run: each experiment draws its own figure once its table is written; this draws them anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import exit_with
from bench.memserve import RESULTS
from common.errors import ConfigError
from common.plots.style import INK, PALETTE, new_figure, save, styled
from systems.memserve.config import MODES, POLICIES

FIGURES = RESULTS.parent / "figures" / "memserve"
Rows = list[dict[str, Any]]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHAPES = ("ShareGPT", "LooGLE", "ReAct")
METRICS = {"jct_s_mean": "mean JCT (s)", "ttft_s_mean": "mean TTFT (s)", "tpot_ms_mean": "mean TPOT (ms)"}


def table(name: str, heading: str) -> Rows:
    """The rows of a committed table."""
    rows: Rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tables"][heading]
    return rows


def plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis of values: even steps where it spans little, else those of its decades."""
    from matplotlib.ticker import MaxNLocator

    low, high = axis.get_ylim()
    steps = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    if high / low < 8:
        ticks = [float(tick) for tick in MaxNLocator(5).tick_values(low, high)]
    inside = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(inside, [f"{tick:,g}" for tick in inside])
    axis.set_yticks([], minor=True)


def legend(figure: Any, axis: Any, columns: int, height: float = 1.0) -> None:
    """One legend for all, above the panels."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, height))


def fig8() -> Any:
    """Ours and the paper's side by side; colour: topology, dashed with an open marker: with caching."""
    rows = table("fig8", "points")
    figure, axes = new_figure(3, 6, 17.0, 9.0)
    shapes = {"PD": "o", "1P1D": "s", "1P2D": "^", "2P1D": "D"}
    for place, shape in enumerate(SHAPES):
        for pair, (key, label) in enumerate(METRICS.items()):
            for side, (whose, prefix) in enumerate((("simulated", ""), ("paper, digitised", "paper_"))):
                axis = axes[place][2 * pair + side]
                for color, (base, marker) in zip(PALETTE, shapes.items()):
                    for setting, line in ((base, "-"), (f"{base}-CC", "--")):
                        mine = [row for row in rows if (row["workload"], row["setting"]) == (shape, setting)]
                        values = [row[f"{prefix}{key}"] for row in mine]
                        axis.plot([row["rate"] for row in mine], values, color=color, ls=line, marker=marker, ms=4.5,
                                  mfc="white" if line == "--" else color, label=setting)  # fmt: skip
                axis.set_yscale("log")
                axis.set_title(f"{shape}: {whose}", fontsize=9)
                axis.set_ylabel(label)
                axis.set_xticks([1, 2, 3, 4, 5])
                plain(axis)
    for axis in axes[-1]:
        axis.set_xlabel("requests/s per instance")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    legend(figure, axes[0][0], 8)
    return figure


def ladder() -> Any:
    """Four counters by turn; lines that coincide are named together."""
    rows = table("ladder", "by turn")
    figure, axes = new_figure(1, 4, 14.0, 3.8)
    designs = list(dict.fromkeys(row["design"] for row in rows))
    for axis, key in zip(axes[0], ("P hit tokens", "P computed tokens", "P→D MB", "D→P MB")):
        for place, design in enumerate(designs):
            mine = [row for row in rows if row["design"] == design]
            axis.plot([row["turn"] for row in mine], [row[key] for row in mine], color=PALETTE[place], label=design,
                      marker=MARKERS[place], ms=9 - 2 * place, lw=5 - 1.2 * place)  # fmt: skip
        axis.set_title(f"{key} a request")
        axis.set_xlabel("turn of the session (simulated)")
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    legend(figure, axes[0][0], 4)
    return figure


def index() -> Any:
    """Insert and match over length, both sizes of names."""
    rows = table("index", "by length")
    figure, axes = new_figure(2, 2, 9.0, 6.8)
    for row_of, call in zip(axes, ("insert", "match")):
        for axis, piece in zip(row_of, (512, 16)):
            mine = [row for row in rows if row["piece"] == piece]
            lengths = [row["tokens"] for row in mine]
            for place, name in enumerate(("hash", "radix", "pool_tree")):
                axis.loglog(lengths, [row[f"{name}_{call}_ms"] for row in mine], color=PALETTE[place],
                            marker=MARKERS[place], ms=8 - 2 * place, lw=2.6 - 0.7 * place, label=name)  # fmt: skip
            first, last = mine[0][f"hash_{call}_ms"], lengths[-1] / lengths[0]
            axis.loglog([lengths[0], lengths[-1]], [first, first * last], ls=":", color=INK, lw=1, label="slope 1")
            axis.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
            axis.set_xticks([], minor=True)
            plain(axis)
            axis.set_ylabel(f"{call} (ms of CPU)")
            axis.set_title(f"names of {piece} tokens (measured on a CPU)")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    legend(figure, axes[0][0], 4)
    return figure


def cached() -> Any:
    """From HBM and from DRAM, a line for each length."""
    rows = table("cached", "points")
    figure, axes = new_figure(1, 2, 9.0, 3.9)
    for axis, place in zip(axes[0], ("hbm", "dram")):
        for number, prompt in enumerate((512, 1024, 2048, 4096)):
            mine = [row for row in rows if (row["prompt"], row["cached_in"]) == (prompt, place)]
            axis.plot([row["ratio"] for row in mine], [row["percent_of_uncached"] for row in mine],
                      color=PALETTE[number], marker=MARKERS[number], ms=5, label=f"{prompt} tokens")  # fmt: skip
        axis.set_ylim(0, 105)
        axis.set_xlabel("cached ratio")
        axis.set_ylabel("TTFT, % of uncached")
        axis.set_title(f"cached in {place.upper()} (simulated)")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    legend(figure, axes[0][0], 4)
    return figure


def modes() -> Any:
    """Colour: mode; a column for each number of communicators, and one for transfers side by side. Below the times:
    over those of by_request_agg, so that it shows where the order turns."""
    rows = table("modes", "points")
    figure, axes = new_figure(3, 4, 15.0, 9.4)
    ways = dict.fromkeys((row["communicators"], row["ordered"]) for row in rows)
    for column, (communicators, ordered) in enumerate(ways):
        here = [row for row in rows if (row["communicators"], row["ordered"]) == (communicators, ordered)]
        base = [row for row in here if row["mode"] == "by_request_agg"]
        for place, mode in enumerate(MODES):
            mine = [row for row in here if row["mode"] == mode]
            rates = [row["rate"] for row in mine]
            look = {"color": PALETTE[place], "marker": MARKERS[place], "ms": 8 - 2 * place, "lw": 2.4 - 0.5 * place}
            axes[0][column].loglog(rates, [row["jct_s_p50"] for row in mine], label=mode, **look)
            for axis, key in zip(axes[1:, column], ("jct_s_p50", "jct_s_p99")):
                axis.semilogx(rates, [row[key] / other[key] for row, other in zip(mine, base)], **look)
        for axis in axes[:, column]:
            axis.set_xticks(rates, [str(rate) for rate in rates])
            axis.set_xticks([], minor=True)
        axes[0][column].set_title(f"{communicators} communicator{'s' * (communicators > 1)}, "
                                  f"{'in order' if ordered else 'side by side'} (simulated)")  # fmt: skip
        axes[2][column].set_xlabel("requests/s")
    for axis in axes[0]:
        axis.set_ylim(min(one.get_ylim()[0] for one in axes[0]), max(one.get_ylim()[1] for one in axes[0]))
        axis.set_ylabel("P50 JCT (s)")
        plain(axis)
    for row_of, name in zip(axes[1:], ("P50", "P99")):
        for axis in row_of:
            axis.set_ylim(0.96, 1.32)  # what is above is as far beyond as the panel at the top shows
            axis.set_ylabel(f"{name} JCT / by_request_agg's")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    legend(figure, axes[0][0], 3)
    return figure


def calls() -> Any:
    """Ours solid, the paper's dotted with an open marker."""
    rows = table("calls", "points")
    figure, axes = new_figure(1, 1, 6.4, 4.2)
    axis = axes[0][0]
    for place, mode in enumerate(MODES):
        mine = [row for row in rows if row["mode"] == mode]
        counts = [row["communicators"] for row in mine]
        look = {"color": PALETTE[place], "marker": MARKERS[place], "ms": 6}
        axis.loglog(counts, [row["transfer_ms"] for row in mine], label=f"{mode} (simulated)", **look)
        if mode != "by_layer":
            axis.loglog(counts, [row["paper_ms"] for row in mine], ls=":", mfc="white", label=f"{mode} (paper)", **look)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xticks([], minor=True)
    plain(axis)
    axis.set_xlabel("communicators")
    axis.set_ylabel("transfer of 2,048 tokens (ms)")
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    legend(figure, axis, 3)
    return figure


def share() -> Any:
    """Policies side by side at each degree, so that none hides another."""
    figure, axes = new_figure(3, 3, 17.0, 9.6)
    keys = {"hit_ratio": "token hit ratio", "ttft_s_p99": "P99 TTFT (s)",
            "max_over_mean_tokens": "max/mean prompt tokens of a P"}  # fmt: skip
    for column, case in enumerate(("single questions", "sessions", "sessions, loaded")):
        rows = table("share", case)
        degrees = sorted({row["share_degree"] for row in rows})
        for row_of, (key, label) in zip(axes, keys.items()):
            axis, places = row_of[column], np.arange(len(degrees))
            for number, policy in enumerate(POLICIES):
                values = [row[key] for row in rows if row["policy"] == policy]
                axis.bar(places + (number - 3) * 0.12, values, 0.11, color=PALETTE[number], label=policy)
            axis.set_xticks(places, [str(degree) for degree in degrees])
            axis.set_ylabel(label)
            axis.set_title(f"{case} (simulated)")
            if key.startswith("max"):
                axis.set_ylim(1.0)
    for axis, name in zip(axes[-1], ("questions", "sessions", "sessions")):
        axis.set_xlabel(f"{name} about a document")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    legend(figure, axes[0][0], 7)
    return figure


def bars(axes: Any, labels: list[str], rows: Rows, keys: dict[str, str]) -> None:
    """A panel of horizontal bars for each key, each bar with its number."""
    for axis, (key, label) in zip(axes, keys.items()):
        values = [row[key] for row in rows]
        axis.barh(labels, values, color=PALETTE[0])
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3g}", va="center", fontsize=7.5,
                      bbox={"fc": "white", "ec": "none", "pad": 0.3})  # fmt: skip
        axis.set_title(label)
        axis.set_xlim(0, max(*values, 1e-9) * 1.16)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
    for axis in axes[1:]:
        axis.set_yticklabels([])


def ablation() -> Any:
    """One change at a time."""
    rows = table("ablation", "one at a time")
    figure, axes = new_figure(1, 3, 12.5, 5.4)
    bars(axes[0], [row["variant"] for row in rows], rows, {
        "hit_ratio": "token hit ratio (simulated)", "false_hit_ratio": "false hits, of prompt tokens",
        "ttft_s_mean": "mean TTFT (s)"})  # fmt: skip
    figure.tight_layout()
    return figure


def failures() -> Any:
    """What became of the requests, and how long they took."""
    rows = table("failures", "failures")
    figure, axes = new_figure(1, 4, 15.0, 4.4)
    bars(axes[0], [row["variant"] for row in rows], rows, {
        "finished": "requests finished, of 400 (simulated)", "ttft_s_p99": "P99 TTFT (s)",
        "jct_s_mean": "mean JCT (s)", "load_left": "requests left in the load tables"})  # fmt: skip
    figure.tight_layout()
    return figure


def mooncake() -> Any:
    """Hits against an infinite cache, times, balance."""
    rows = table("mooncake", "policies")
    figure, axes = new_figure(1, 5, 17.0, 3.8)
    bars(axes[0], [row["policy"] for row in rows], rows, {
        "hit_ratio": "token hit ratio (simulated)", "ttft_s_mean": "mean TTFT (s)", "ttft_s_p99": "P99 TTFT (s)",
        "max_over_mean_tokens": "max/mean prompt tokens of a P",
        "max_over_mean_minute_p95": "computed, by minutes, P95"})  # fmt: skip
    bound = table("mooncake", "infinite cache")[0]["tokens"]
    axes[0][0].axvline(bound, color=INK, ls="--", lw=1)
    axes[0][0].text(bound, -0.75, "infinite cache", ha="right", fontsize=7.5)
    figure.tight_layout()
    return figure


DRAWN: dict[str, Callable[[], Any]] = {
    "fig8": fig8, "ladder": ladder, "index": index, "cached": cached, "modes": modes, "calls": calls, "share": share,
    "ablation": ablation, "failures": failures, "mooncake": mooncake,
}  # fmt: skip


def draw(name: str) -> list[Path]:
    """PNG and PDF of one of them."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    with styled():
        return save(DRAWN[name](), FIGURES, name)


def main() -> int:
    """Those named, or all."""
    for name in sys.argv[1:] or DRAWN:
        if name not in DRAWN:
            raise ConfigError(f"no figure {name}; there are: {', '.join(DRAWN)}")
        draw(name)
    return 0


if __name__ == "__main__":
    exit_with(main)
