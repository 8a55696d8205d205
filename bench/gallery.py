"""python -m bench.gallery: make every figure of results/figures/manifest.yaml again, and their page.

`--list`: names and commands. `--only NAME …`: some figures. `--page`: the page only. `--run NAME …`: overviews of the
experiments of conf/experiment (what the manifest names for the harness's own figures). A figure whose trace is not at
hand is skipped with a line; one whose command fails is named at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time

from bench.gallery_page import FIGURES, ROOT, Figure, manifest, page
from bench.harness import exit_with
from common.config import available, compose
from common.errors import ConfigError, TraceError
from common.results import replacing
from run import execute

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


def overviews(names: list[str]) -> int:
    """Overview figures of named experiments (none: all of them)."""
    jobs = {**DEFAULT, **{name: [f"experiment={name}"] for name in available("experiment")}}
    for name in names or jobs:
        try:
            keep(name, jobs.get(name, [f"experiment={name}"]))
        except TraceError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
    return 0


def remade(figures: list[Figure]) -> list[str]:
    """Run every command once; the names of figures whose command failed."""
    done: dict[str, bool] = {}
    commands = [(command, figure) for figure in figures for command in (figure.after, figure.command) if command]
    for index, (command, _) in enumerate(commands, 1):
        if command not in done:
            print(f"[{index}/{len(commands)}] python -m {command}", file=sys.stderr, flush=True)
            begin = time.perf_counter()
            done[command] = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT).returncode == 0
            print(f"  {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return [f"{figure.name} (python -m {command})" for command, figure in commands if not done[command]]


def main() -> int:
    """Everything, or what is asked for."""
    parser = argparse.ArgumentParser(prog="bench.gallery", description=__doc__)
    parser.add_argument("--list", action="store_true", help="names and commands")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="figures of the manifest")
    parser.add_argument("--page", action="store_true", help="the page only")
    parser.add_argument("--run", nargs="*", metavar="NAME", help="overviews of experiments")
    options = parser.parse_args()
    if options.run is not None:
        return overviews(options.run)
    figures = manifest()
    if options.list:
        print("\n".join(f"{figure.name:<32} {figure.runtime:<10} python -m {figure.command}" for figure in figures))
        return 0
    wanted = [figure for figure in figures if not options.only or figure.name in options.only]
    if options.only and len(wanted) < len(set(options.only)):
        unknown = set(options.only) - {figure.name for figure in figures}
        raise ConfigError(f"no such figure: {', '.join(sorted(unknown))} (--list names them)")
    failed = [] if options.page else remade(wanted)
    with replacing(FIGURES / "README.md") as path:
        path.write_text(page(figures), encoding="utf-8")
    for name in failed:
        print(f"error: not made: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    exit_with(main)
