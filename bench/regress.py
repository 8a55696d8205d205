"""python -m bench.regress: has anything moved? Each of three checks says what and by how much; the exit code is 1.

matrix    two fixed matrices of simulated runs (the harness; four systems x four workloads x two seeds), exactly
micro     kernels, engine and simulator against the code of a pinned commit, in turns in this run: a regression if
          slower by more than 10% and significantly so, twice
accuracy  simulated against measured, where the data is at hand: the mean error may not worsen by 5%, a part by 10%

Baselines are results/baselines/*.json. `--bless --reason "why"` writes new ones (`micro` pins the current commit) and
the reason into them. `--quick`: one seed, fewer rounds, the shorter measurement. `--only`: some of the checks.
`--json FILE`: every number as github-action-benchmark reads it (customSmallerIsBetter). Exit code 2: bad usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.golden import HARNESS, SYSTEMS, Matrix, moved
from bench.harness import exit_with
from bench.regress_parts import Check, accuracy_check, micro_check
from common.results import replacing

MATRICES = (HARNESS, SYSTEMS)
UNITS = {"_ms": "ms", "_s": "s", "_seconds": "s", "_throughput": "tokens/s", "_share": "share", "_utilisation": "share",
         "bytes_moved": "bytes"}  # fmt: skip
CHECKS = ("matrix", "micro", "accuracy")
Cells = dict[str, dict[str, Any]]


def measured(matrix: Matrix) -> tuple[Cells, list[str]]:
    """Every cell's metrics, and a line for each cell that raised instead of ending."""
    cells: Cells = {}
    broken = []
    for case, seed in matrix.cells():
        try:
            cells[f"{case}/{seed}"] = matrix.measure(case, seed)
        except Exception as error:  # whatever it is, the other cells are still worth knowing
            text = " ".join(str(error).split())[:200]
            broken.append(f"{case}, seed {seed}: raised {type(error).__name__}: {text}")
    return cells, broken


def compared(matrix: Matrix, cells: Cells) -> list[str]:
    """What moved against the baselines, a line per cell and metric."""
    old = matrix.read()
    found = [(case, seed, cells.get(f"{case}/{seed}")) for case, seed in matrix.cells()]
    return [line for case, seed, cell in found if cell is not None for line in moved(matrix, case, seed, cell, old)]


def bless(matrix: Matrix, cells: Cells, reason: str) -> None:
    """Write these cells as the new baselines, the reason after the earlier ones."""
    matrix.baseline.parent.mkdir(parents=True, exist_ok=True)
    with replacing(matrix.baseline) as path:
        text = json.dumps({"reasons": [*matrix.read()["reasons"], reason], "cells": cells}, indent=1) + "\n"
        path.write_text(text, encoding="utf-8")


def benchmark_rows(cells: Cells) -> list[dict[str, Any]]:
    """[{name, unit, value}], one per number."""
    return [{"name": f"{name}: {key}", "unit": _unit(key), "value": value} for name, cell in cells.items()
            for key, value in cell.items() if isinstance(value, int | float)]  # fmt: skip


def _unit(key: str) -> str:
    return next((unit for end, unit in UNITS.items() if key.endswith(end)), "count")


def matrix_check(matrix: Matrix) -> Check:
    """One matrix, measured and compared."""
    cells, broken = measured(matrix)
    changed = bool(compared(matrix, cells)) or matrix.read()["cells"].keys() != cells.keys()
    return Check(
        f"{len(matrix.cells())} cells of {matrix.baseline.name}", [*broken, *compared(matrix, cells)],
        benchmark_rows(cells), [], broken=bool(broken), baseline=matrix.baseline.name,
        bless=(lambda reason: bless(matrix, cells, reason)) if changed else None,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, matrices: Sequence[Matrix] = MATRICES) -> int:
    """0 nothing moved (or blessed), 1 something did, 2 bad usage."""
    options = _options(argv)
    if options is None:
        return 2
    if options.quick:
        matrices = [replace(matrix, seeds=matrix.seeds[:1]) for matrix in matrices]
    checks = [matrix_check(matrix) for matrix in matrices] if "matrix" in options.only else []
    checks += [accuracy_check(options.quick)] if "accuracy" in options.only else []
    checks += [micro_check(options.quick)] if "micro" in options.only else []
    if options.json:
        rows = [row for check in checks for row in check.rows]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for check in checks:
        print("\n".join([*check.notes, *(check.lines or [f"{check.what} unchanged"])]))
    if not options.bless:
        return 1 if any(check.lines for check in checks) else 0
    return _bless(checks, options.reason)


def _bless(checks: Sequence[Check], reason: str) -> int:
    if any(check.broken for check in checks):
        print("error: cells that raise cannot be blessed", file=sys.stderr)
        return 1
    for check in checks:
        if check.bless is not None:
            check.bless(reason)
            print(f"blessed {check.baseline}: {reason}")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace | None:
    parser = argparse.ArgumentParser(prog="bench.regress", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rounds, the shorter measurement")
    parser.add_argument("--only", default=",".join(CHECKS), metavar="CHECKS", help="some of %(default)s")
    parser.add_argument("--bless", action="store_true", help="write new baselines; needs --reason")
    parser.add_argument("--reason", metavar="WHY", help="why the numbers may move")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write [{name, unit, value}]")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if not set(options.only) <= set(CHECKS):
        print(f"error: --only takes {', '.join(CHECKS)}", file=sys.stderr)
    elif options.bless != bool((options.reason or "").strip()) or (options.bless and options.quick):
        print('error: --bless and --reason "why" go together, and not with --quick', file=sys.stderr)
    else:
        return options
    return None


if __name__ == "__main__":
    exit_with(main)
