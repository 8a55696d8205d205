"""python -m bench.regress: fixed matrices of simulated runs, compared exactly with results/baselines/*.json.

Names each cell and metric that moved and by how much, and exits 1. `--bless --reason "why"` writes new baselines and
the reason into them. `--quick` takes the first seed only. `--json FILE` writes every metric in the shape that
github-action-benchmark reads. Exit code 2: bad usage.
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
from common.results import replacing

MATRICES = (HARNESS, SYSTEMS)
UNITS = {"_ms": "ms", "_s": "s", "_seconds": "s", "_throughput": "tokens/s", "_share": "share", "_utilisation": "share",
         "bytes_moved": "bytes"}  # fmt: skip
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


def main(argv: Sequence[str] | None = None, matrices: Sequence[Matrix] = MATRICES) -> int:
    """0 nothing moved (or blessed), 1 something did, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="bench.regress", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first seed only")
    parser.add_argument("--bless", action="store_true", help="write new baselines; needs --reason")
    parser.add_argument("--reason", metavar="WHY", help="why the numbers may move")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write [{name, unit, value}]")
    options = parser.parse_args(argv)
    if options.bless != bool((options.reason or "").strip()) or (options.bless and options.quick):
        print('error: --bless and --reason "why" go together, and not with --quick', file=sys.stderr)
        return 2
    if options.quick:
        matrices = [replace(matrix, seeds=matrix.seeds[:1]) for matrix in matrices]
    results = [(matrix, *measured(matrix)) for matrix in matrices]
    lines = [line for matrix, cells, broken in results for line in (*broken, *compared(matrix, cells))]
    if options.json:
        rows = [row for _, cells, _ in results for row in benchmark_rows(cells)]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines) or f"{sum(len(matrix.cells()) for matrix in matrices)} cells unchanged")
    if not options.bless:
        return 1 if lines else 0
    if any(broken for _, _, broken in results):
        print("error: cells that raise cannot be blessed", file=sys.stderr)
        return 1
    for matrix, cells, _ in results:
        if compared(matrix, cells) or matrix.read()["cells"].keys() != cells.keys():
            bless(matrix, cells, options.reason)
            print(f"blessed {matrix.baseline.name}: {options.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
