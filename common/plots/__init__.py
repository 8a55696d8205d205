"""Figures, drawn from results folders only. matplotlib is imported when something is drawn, not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.runs import LoadedRun, load_run

if TYPE_CHECKING:
    from common.comparison import Comparison


def draw_run(run: LoadedRun | str | Path) -> list[Path]:
    """Draw every figure of one run into its folder, as PNG and PDF; the paths written."""
    from common.plots import run_figures, style

    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    with style.styled():
        paths = style.save(run_figures.overview(loaded), loaded.path, "overview")
        paths += style.save(run_figures.latency_cdf(loaded), loaded.path, "latency_cdf")
    return paths


def draw_instances(run: LoadedRun) -> list[Path]:
    """Draw what each instance did over time into the run's folder; the paths written."""
    from common.plots import instance_figures, style

    with style.styled():
        return style.save(instance_figures.instances(run), run.path, "instances")


def draw_comparison(
    runs: Sequence[LoadedRun], out: str | Path, comparison: Comparison | None = None
) -> list[Path]:
    """Draw several runs against each other into the folder `out`; the paths written.

    With a comparison over several seeds also its differences and their intervals.
    """
    from common.plots import compare_figures, difference_figures, style

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with style.styled():
        paths = style.save(compare_figures.latency_cdfs(runs), folder, "compare_cdf")
        paths += style.save(compare_figures.over_time(runs), folder, "compare_over_time")
        paths += style.save(compare_figures.bars(runs), folder, "compare_bars")
        if comparison is not None and any(found.interval for found in comparison.differences):
            paths += style.save(difference_figures.differences(comparison), folder, "compare_differences")
    return paths
