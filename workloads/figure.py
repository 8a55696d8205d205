"""The figure of `describe`: rate over time, length CDFs, gaps between arrivals, and what a prefix cache could reuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.plots import style
from workloads.arrivals import NS
from workloads.types import Floats, Workload

BLUE, ORANGE, GREEN = style.PALETTE[:3]
GREY = "#666666"
Panel = Callable[[Any], None]


def draw(workload: Workload, share: Floats | None, name: str, out: Path) -> list[Path]:
    """`workload.png` and `workload.pdf` in `out`; panels that would say nothing are left out."""
    seconds = np.sort(workload.arrival_ns[workload.arrival_ns >= 0]) / NS
    timed = len(seconds) > 2 and seconds[-1] > seconds[0]
    panels: list[Panel] = []
    if timed:
        panels.append(lambda axes: _rate(axes, seconds, workload))
    panels.append(lambda axes: _lengths(axes, workload))
    if timed:
        panels.append(lambda axes: _gaps(axes, seconds))
    if share is not None:
        panels.append(lambda axes: _prefix(axes, share, workload))
    with style.styled():
        figure, axes = style.new_figure(1, len(panels), 3.4 * len(panels), 3.0)
        for panel, axis in zip(panels, axes[0], strict=True):
            panel(axis)
        where = name if workload.name == name else f"{name}: {workload.name}"
        style.title(figure, f"{where} · {workload.num_requests:,} requests", 3.0)
        figure.tight_layout(rect=(0, 0, 1, 0.94))
        return style.save(figure, out, "workload")


WIDTHS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)


def _rate(axes: Any, seconds: Floats, workload: Workload) -> None:
    """Arrivals in at most 90 whole bins of a round width, and the mean."""
    span = float(seconds[-1])
    width = next((w for w in WIDTHS if span / w <= 90), span / 90)
    edges = np.arange(max(1, int(span / width)) + 1) * width
    counts = np.histogram(seconds, edges)[0] / width
    axes.stairs(counts, edges, color=BLUE, fill=True, alpha=0.2)
    axes.stairs(counts, edges, color=BLUE, linewidth=1)
    mean = len(seconds) / span
    axes.axhline(mean, color=GREY, linewidth=1, linestyle="--", label=f"mean {mean:.3g}/s")
    what = "sessions" if workload.release_after is not None else "requests"
    axes.set(xlabel="time (s)", ylabel=f"{what} per second", title=f"Arrivals, bins of {width:g} s")
    axes.set(ylim=(0, counts.max() * 1.25), xlim=(0, edges[-1]))
    style.plain_numbers(axes.xaxis)
    axes.legend(loc="upper right")


def _cdf(axes: Any, values: Any, colour: str, label: str) -> None:
    """An empirical distribution function of at most 2,000 points."""
    ordered = np.sort(np.asarray(values, float))
    at = np.linspace(0, len(ordered) - 1, min(len(ordered), 2000)).astype(int)
    axes.step(ordered[at], (at + 1) / len(ordered), where="post", color=colour, label=label)


def _lengths(axes: Any, workload: Workload) -> None:
    for tokens, colour, label in (
        (workload.prompt_tokens, BLUE, "prompt"),
        (workload.output_tokens, ORANGE, "output"),
    ):
        _cdf(axes, tokens, colour, f"{label}, mean {tokens.mean():,.0f}")
    axes.set(xscale="log", xlabel="tokens", ylabel="share of requests", title="Lengths")
    style.plain_numbers(axes.xaxis, log=True)
    _room_for_legend(axes)


def _gaps(axes: Any, seconds: Floats) -> None:
    """Tail of the gaps beside that of a Poisson process of the same rate."""
    gaps = np.sort(np.diff(seconds))
    tail = 1 - np.arange(len(gaps)) / len(gaps)
    at = np.unique(np.geomspace(1, len(gaps), 2000).astype(int))
    axes.plot(gaps[len(gaps) - at], tail[len(gaps) - at], color=BLUE, label=f"CV {gaps.std() / gaps.mean():.2f}")
    line = np.linspace(0, np.log(len(gaps)) * gaps.mean(), 100)
    axes.plot(line, np.exp(-line / gaps.mean()), color=GREY, linestyle="--", label="Poisson")
    axes.set(
        yscale="log", xlabel="gap between arrivals (s)", ylabel="share of gaps at least as long", title="Burstiness"
    )
    axes.legend(loc="upper right")


def _prefix(axes: Any, share: Floats, workload: Workload) -> None:
    tokens = workload.prompt_tokens
    weighted = float((share * tokens).sum() / tokens.sum())
    _cdf(axes, share, GREEN, "requests")
    axes.plot([weighted] * 2, [0, 1], color=GREY, linestyle="--", linewidth=1, label=f"of all tokens: {weighted:.2f}")
    axes.set(xlabel="reusable part of the prompt", ylabel="share of requests", title="Prefixes, infinite cache")
    axes.set(xlim=(-0.02, 1.02))
    _room_for_legend(axes)


def _room_for_legend(axes: Any) -> None:
    """A distribution function ends at 1; the legend stands above it."""
    axes.set(ylim=(0, 1.32), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.legend(loc="upper left")
