"""What the measuring scripts share: run a configuration without files, compare distributions, write reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig, compose
from common.errors import ConfigError, KVPlaneError
from common.provenance import git_state
from common.record import RunRecord
from common.results import replacing

Floats = NDArray[np.float64]
_Job = TypeVar("_Job")
STATISTICS = ("mean", "p50", "p90", "p99")
RESULTS = Path(__file__).resolve().parent.parent / "results" / "validation"


@dataclass(frozen=True)
class Latencies:
    """Per finished request, in ms, in request order."""

    ttft: Floats
    tpot: Floats
    e2e: Floats


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with its status; 2 and one line for what a user can mend."""
    try:
        status = main()
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def asked(jobs: Mapping[str, _Job], alone: bool = True) -> _Job:
    """The job that the command line's first word names. ConfigError, with the names, where it names none, or where
    more words follow a job that stands `alone`."""
    if len(sys.argv) < 2 or (alone and len(sys.argv) > 2) or sys.argv[1] not in jobs:
        raise ConfigError(f"which of {', '.join(jobs)}?")
    return jobs[sys.argv[1]]


def run_named(
    description: str | None, jobs: Mapping[str, Callable[[], None]], clock: Callable[[], float], unit: str
) -> None:
    """Run the jobs that the command line names, or all; say how long each took by `clock`, in `unit`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(jobs))
    names = parser.parse_args().names
    unknown = [name for name in names if name not in jobs]
    if unknown:
        parser.error(f"{unknown[0]}: choose from {', '.join(jobs)}")
    for name in names or jobs:
        begin = clock()
        jobs[name]()
        print(f"{name}: {clock() - begin:.0f} {unit}", flush=True)


def run(overrides: Sequence[str]) -> tuple[RunConfig, RunRecord]:
    """Simulate one configuration in this process; nothing is written."""
    from run import replay, served
    from workloads.build import build

    config = compose(overrides)
    workload = served(build(config.workload, config.seed), config.engine.max_model_len)
    record = replay(config, workload).record
    return config, record


def latencies(record: RunRecord, select: slice = slice(None)) -> Latencies:
    """TTFT, TPOT = (finish - first) / (n - 1) for n > 1, and end-to-end latency."""
    columns = record.requests
    arrival, first, finish, output = (
        np.array(column, dtype=np.float64)[select]
        for column in (columns.arrival_ns, columns.first_token_ns, columns.finish_ns, columns.output_tokens)
    )
    done = finish >= 0
    arrival, first, finish, output = arrival[done], first[done], finish[done], output[done]
    many = output > 1
    tpot = (finish - first)[many] / (output[many] - 1)
    return Latencies((first - arrival) / 1e6, tpot / 1e6, (finish - arrival) / 1e6)


def statistic(values: Floats, name: str) -> float:
    """Mean or percentile of values."""
    return float(np.mean(values)) if name == "mean" else float(np.percentile(values, float(name[1:])))


def compare(ours: Latencies, theirs: Latencies, statistics: Sequence[str] = STATISTICS) -> list[dict[str, Any]]:
    """One row per metric and statistic with the relative difference of ours to theirs."""
    rows = []
    for metric in ("ttft", "tpot", "e2e"):
        for name in statistics:
            mine = statistic(getattr(ours, metric), name)
            other = statistic(getattr(theirs, metric), name)
            row = {"metric": f"{name}_{metric}_ms", "ours": mine, "reference": other, "difference": mine / other - 1}
            rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that share their keys."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(key, row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:+.2%}" if "difference" in key else f"{value:,.4g}"
    return str(value)


def write_report(
    name: str,
    title: str,
    notes: Sequence[str],
    tables: Mapping[str, list[dict[str, Any]]],
    folder: Path = RESULTS,
) -> Path:
    """<folder>/<name>.json and .md; prints the Markdown. The commit is recorded in both."""
    folder.mkdir(parents=True, exist_ok=True)
    git = git_state()
    state = f"commit {git.get('commit')}" + (" with uncommitted changes" if git.get("dirty") else "")
    parts = [f"# {title}\n", *(f"{note}\n" for note in notes), f"Measured at {state}.\n"]
    parts += [f"## {heading}\n\n{markdown(rows)}" for heading, rows in tables.items()]
    text = "\n".join(parts)
    with replacing(folder / f"{name}.md") as path:
        path.write_text(text, encoding="utf-8")
    with replacing(folder / f"{name}.json") as path:
        data = {"git": git, "notes": list(notes), "tables": tables}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(text)
    return folder / f"{name}.md"
