"""python -m bench.gallery [NAME …]: run the experiments of conf/experiment and keep their figures in results/figures/.

Each figure is the overview of one run (PNG and PDF) with its summary beside it; every one says which runtime made it.
Experiments whose trace is not at hand are skipped with a line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from bench.harness import exit_with
from common.config import available, compose
from common.errors import TraceError
from common.results import replacing
from run import execute

FIGURES = Path(__file__).resolve().parent.parent / "results" / "figures"
DEFAULT = {"vllm_burst": ["system=vllm", "workload=burst", "run.name=gallery/vllm_burst"]}


def keep(name: str, overrides: list[str]) -> None:
    """Run once and copy its overview figure and summary."""
    outcome = execute(compose([*overrides, "run.trace=false"]), quiet=True)
    target = FIGURES / name
    target.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        shutil.copyfile(outcome.folder / f"overview.{kind}", target.with_suffix(f".{kind}"))
    with replacing(target.with_suffix(".json")) as path:
        record = {"overrides": overrides, "manifest": _stable(outcome.manifest), "summary": outcome.summary}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {target.with_suffix('.png').relative_to(FIGURES.parent.parent)}")


def _stable(manifest: dict[str, object]) -> dict[str, object]:
    keys = ("system", "workload", "model", "hardware", "hardware_derived_from", "runtime", "seed", "git", "commit")
    return {key: manifest[key] for key in keys if key in manifest}


def main() -> int:
    """Everything, or the named experiments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments (default: all)")
    options = parser.parse_args()
    jobs = {**DEFAULT, **{name: [f"experiment={name}"] for name in available("experiment")}}
    for name in options.names or jobs:
        try:
            keep(name, jobs.get(name, [f"experiment={name}"]))
        except TraceError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with(main)
