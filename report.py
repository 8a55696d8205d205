"""Tables and figures from results folders: `python report.py results/runs/a results/runs/b [--out DIR]`.

Redraws the figures of each run, prints the runs side by side and, for two runs or more, writes figures that compare
them. A damaged or partial folder is named in one line, and what there is of it is drawn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError, KVPlaneError
from common.runs import LoadedRun, load_run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr about what the user can change."""
    arguments = _parser().parse_args(argv)
    try:
        _report([load_run(path) for path in arguments.runs], arguments.out)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run, such as results/runs/burst")
    parser.add_argument(
        "--out", type=Path, default=Path("results/report"), help="folder for figures that compare runs (%(default)s)"
    )
    return parser


def _report(runs: Sequence[LoadedRun], out: Path) -> None:
    from common.console import comparison_table, summary_table

    for run in runs:
        if run.warning:
            print(f"warning: {run.warning}", file=sys.stderr)
    if len(runs) > 1:
        print(comparison_table(runs, width=max(shutil.get_terminal_size((110, 24)).columns, 80)))
    elif runs[0].summary:
        print(
            summary_table(runs[0].summary, runs[0].name, runs[0].manifest.get("runtime", "unknown"), runs[0].manifest)
        )
    for path in _draw(runs, out):
        print(f"wrote {os.path.relpath(path)}")


def _draw(runs: Sequence[LoadedRun], out: Path) -> list[Path]:
    from common.plots import draw_comparison, draw_run

    try:
        paths = [path for run in runs for path in draw_run(run)]
        if len(runs) > 1:
            out.mkdir(parents=True, exist_ok=True)
            paths += draw_comparison(runs, out)
    except OSError as error:
        where = error.filename or out
        raise ConfigError(f"{where}: cannot be written ({error.strerror}); choose another folder with --out") from error
    return paths


if __name__ == "__main__":
    sys.exit(main())
