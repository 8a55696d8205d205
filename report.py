"""Tables, figures and one HTML page from results folders: `python report.py results/runs/a results/runs/b`.

A folder of runs (`results/runs/compare-burst`) stands for all runs in it. Redraws the figures of each run, prints the
runs side by side, and writes report.html, which needs nothing beside it, into --out. A damaged or partial folder is
named in one line, and what there is of it is drawn.

Exit code: 0 all drawn, 3 drawn but something is damaged, missing or partial (named on stderr), 2 nothing can be drawn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, KVPlaneError
from common.log import LOG, PARTIAL
from common.runs import LoadedRun, load_run

if TYPE_CHECKING:
    from common.comparison import Comparison

FILES = ("manifest.json", "summary.json", "requests.parquet", "timeline.parquet")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 3 when something is damaged or missing, or 2 after one line about what the user can change."""
    arguments = _parser().parse_args(argv)
    try:
        runs, skipped = _load([folder for path in arguments.runs for folder in run_folders(path)])
        _report(runs, arguments.out)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 3 if skipped or any(run.problems for run in runs) else 0


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run or unknown, else the runs in it, by name, and what is left of damaged ones."""
    if not path.is_dir() or any((path / name).exists() for name in FILES):
        return [path]
    inner = sorted(folder for folder in path.iterdir() if folder.is_dir() and _was_run(folder))
    return inner or [path]


def _was_run(folder: Path) -> bool:
    """Any file of a run, the traceback of one that failed, or nothing at all (then it is to be named, not skipped)."""
    if any((folder / name).exists() for name in (*FILES, "config.yaml", "traceback.txt", LOG, LOG + PARTIAL)):
        return True
    return not folder.name.startswith(".") and not any(folder.iterdir())


def _load(folders: Sequence[Path]) -> tuple[list[LoadedRun], int]:
    """The runs that can be read, and how many folders cannot; ConfigError where none can."""
    runs: list[LoadedRun] = []
    errors: list[ConfigError] = []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except ConfigError as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for problem in errors:
        print(f"warning: {problem}", file=sys.stderr)
    return runs, len(errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run, or of several runs")
    parser.add_argument(
        "--out", type=Path, default=Path("results/report"), help="folder for report.html and comparisons (%(default)s)"
    )
    return parser


def _report(runs: Sequence[LoadedRun], out: Path) -> None:
    from common.comparison_text import WIDTH, text
    from common.console import summary_table

    for run in runs:
        if run.warning:
            print(f"warning: {run.warning}", file=sys.stderr)
    comparison = _compared(runs)
    if comparison is not None:
        print(text(comparison, width=max(shutil.get_terminal_size((WIDTH, 24)).columns, 80)))
    elif runs[0].summary:
        print(
            summary_table(runs[0].summary, runs[0].name, runs[0].manifest.get("runtime", "unknown"), runs[0].manifest)
        )
    for path in _draw(runs, comparison, out):
        print(f"wrote {os.path.relpath(path)}")


def _draw(runs: Sequence[LoadedRun], comparison: Comparison | None, out: Path) -> list[Path]:
    from common.page import page
    from common.plots import draw_comparison, draw_instances, draw_run
    from common.results import replacing

    try:
        paths = [path for run in runs for path in (*draw_run(run), *draw_instances(run))]
        out.mkdir(parents=True, exist_ok=True)
        compare: list[Path] = []
        if comparison is not None:
            compare = draw_comparison([row.averaged() for row in comparison.rows], out, comparison)
        figures = [path for path in (*compare, *paths) if path.suffix == ".png"]
        with replacing(out / "report.html") as temporary:
            temporary.write_text(page(runs, comparison, figures), encoding="utf-8")
    except OSError as error:
        where = error.filename or out
        raise ConfigError(f"{where}: cannot be written ({error.strerror}); choose another folder with --out") from error
    return [*paths, *compare, out / "report.html"]


def _compared(runs: Sequence[LoadedRun]) -> Comparison | None:
    """Runs that differ by seed only, by their folders' names, are one row."""
    if len(runs) < 2:
        return None
    from common.comparison import compared

    return compared([(_row(run), run) for run in runs])


def _row(run: LoadedRun) -> str:
    seed = run.manifest.get("seed")
    return run.name.removesuffix(f"-s{seed}") if seed is not None else run.name


if __name__ == "__main__":
    sys.exit(main())
