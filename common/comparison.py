"""Several systems on the same workload: means over seeds, and differences to a baseline with their uncertainty.

A *row* is one system (or setting); its runs differ by seed only. Rows are compared seed by seed: the same seed gives
every row the same requests. docs/comparison.md says what is compared and what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.runs import LoadedRun, load_run

BASELINE = "vllm"
SLO_FACTOR = 5.0  # of the baseline's medians, where no target is given
EXACT_SEEDS = 5  # up to so many, all resamples are enumerated (5 ** 5)
NUM_RESAMPLES = 10_000
DIFFERENCES: tuple[tuple[str, str], ...] = (
    ("mean_ttft_ms", "TTFT mean"), ("p99_ttft_ms", "TTFT P99"), ("mean_tpot_ms", "TPOT mean"),
    ("p99_tpot_ms", "TPOT P99"), ("mean_e2el_ms", "JCT mean"), ("p99_e2el_ms", "JCT P99"),
    ("output_throughput", "output tok/s"), ("goodput", "goodput req/s"), ("gpu_seconds", "GPU s"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Runs of one system or setting, in order of their seeds."""

    name: str
    runs: tuple[LoadedRun, ...]

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seed of each run."""
        return tuple(run.manifest.get("seed") for run in self.runs)

    def values(self, key: str) -> list[float | None]:
        """A metric of each run; None where it has nothing to measure."""
        return [run.summary.get(key) for run in self.runs]

    def mean(self, key: str) -> Any:
        """The mean over seeds; None unless every run has the metric. One run's value stays as it is."""
        values = self.values(key)
        if len(values) == 1:
            return values[0]
        numbers = [value for value in values if isinstance(value, int | float)]
        return float(np.mean(numbers)) if len(numbers) == len(values) and numbers else None

    def averaged(self) -> LoadedRun:
        """The row as one run: the first seed's data under the row's name, and the means of all seeds as summary."""
        first = self.runs[0]
        return replace(first, path=Path(self.name), summary={key: self.mean(key) for key in first.summary})


@dataclass(frozen=True)
class Difference:
    """A metric of a row against the baseline, as a share of it; the interval is None for one seed."""

    metric: str
    row: str
    change: float
    interval: tuple[float, float] | None
    num_seeds: int


@dataclass(frozen=True)
class Comparison:
    """Everything that the tables, files and figures say."""

    rows: tuple[Row, ...]
    baseline: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compared(runs: Sequence[tuple[str, LoadedRun]], failures: Sequence[str] = ()) -> Comparison:
    """Group (row, run) pairs and compare them; the baseline is the row `vllm`, or the first."""
    names = list(dict.fromkeys(name for name, _ in runs))
    rows = [Row(name, _by_seed([run for other, run in runs if other == name])) for name in names]
    baseline = next((row for row in rows if row.name == BASELINE), rows[0])
    rows, target_note = _with_targets(rows, baseline)
    baseline = next(row for row in rows if row.name == baseline.name)
    found = [difference for row in rows if row is not baseline for key, _ in DIFFERENCES
             for difference in _difference(row, baseline, key)]  # fmt: skip
    seeds = max(len(row.runs) for row in rows)
    spread = (f"means over {seeds} seeds; differences with 95% bootstrap intervals over paired seeds"
              if seeds > 1 else "one seed: differences have no interval (seed=0,1,2 gives them)")  # fmt: skip
    notes = [spread, *([target_note] if target_note else []), *unequal(rows), *(f"failed: {text}" for text in failures)]
    return Comparison(tuple(rows), baseline.name, tuple(found), tuple(notes))


def _by_seed(runs: list[LoadedRun]) -> tuple[LoadedRun, ...]:
    return tuple(sorted(runs, key=lambda run: (str(type(run.manifest.get("seed"))), run.manifest.get("seed") or 0)))


def present(jobs: Sequence[tuple[str, Path]], failures: Sequence[str] = ()) -> str:
    """Compare finished jobs, write comparison.json, .md and figures into the folder above theirs; the text to print."""
    from common.comparison_text import files, text

    runs = [(row, load_run(folder)) for row, folder in jobs]
    comparison = compared(runs, failures)
    folder = jobs[0][1].parent
    written = files(comparison, folder)
    return (text(comparison) + "\n\ncomparison: " + ", ".join(str(path) for path in written)
            + f"\npage: python report.py {folder}")  # fmt: skip


# ---------------------------------------------------------------- differences


def _difference(row: Row, baseline: Row, key: str) -> list[Difference]:
    """A list of one, or of none where the metric is missing or the baseline has 0 of it."""
    theirs = dict(zip(baseline.seeds, baseline.values(key)))
    pairs = [(value, theirs[seed]) for seed, value in zip(row.seeds, row.values(key))
             if value is not None and theirs.get(seed) is not None]  # fmt: skip
    both = np.array(pairs, np.float64).reshape(-1, 2)
    if not len(both) or not (both[:, 1] > 0).all():
        return []
    mine, other = both.mean(0)
    return [Difference(key, row.name, float(mine / other - 1), interval(both), len(both))]


def interval(pairs: npt.NDArray[np.float64]) -> tuple[float, float] | None:
    """The 95% percentile-bootstrap interval of mean(pairs[:, 0]) / mean(pairs[:, 1]) - 1, resampling seeds (rows)."""
    number = len(pairs)
    if number < 2:
        return None
    if number <= EXACT_SEEDS:
        picks = np.array(list(product(range(number), repeat=number)))
    else:
        picks = np.random.default_rng(0).integers(0, number, (NUM_RESAMPLES, number))
    means = pairs[picks].mean(1)
    low, high = np.percentile(means[:, 0] / means[:, 1] - 1, (2.5, 97.5))
    return float(low), float(high)


# ---------------------------------------------------------------- targets


def _with_targets(rows: list[Row], baseline: Row) -> tuple[list[Row], str | None]:
    """Goodput and SLO attainment where no target was set: 5 times the baseline's medians, the same for every row."""
    slo = [run.config.get("slo") or {} for row in rows for run in row.runs]
    if any(targets.get(key) is not None for targets in slo for key in ("ttft_ms", "tpot_ms")):
        return rows, None
    ttft, tpot = (SLO_FACTOR * _median(baseline, key) for key in ("ttft_ms", "tpot_ms"))
    if np.isnan(ttft) or np.isnan(tpot):
        return rows, None
    note = (f"no slo.ttft_ms or slo.tpot_ms was set: goodput and SLO attainment are for TTFT {ttft:,.0f} ms and TPOT "
            f"{tpot:,.0f} ms, {SLO_FACTOR:g} times {baseline.name}'s medians (our rule)")  # fmt: skip
    return [Row(row.name, tuple(_judged(run, ttft, tpot) for run in row.runs)) for row in rows], note


def _median(row: Row, column: str) -> float:
    values = np.concatenate([np.asarray(run.requests.get(column, ()), np.float64) for run in row.runs])
    return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")


def _judged(run: LoadedRun, ttft: float, tpot: float) -> LoadedRun:
    table, duration_s = run.requests, run.summary.get("duration_s")
    if not {"status", "ttft_ms", "tpot_ms"} <= table.keys() or not duration_s:
        return run
    times = np.asarray(table["tpot_ms"], np.float64)
    good = (table["status"] == "finished") & (np.asarray(table["ttft_ms"], np.float64) <= ttft)
    number = int((good & (np.isnan(times) | (times <= tpot))).sum())
    arrived = int((table["status"] != "pending").sum())
    judged = {"goodput": number / duration_s, "slo_attainment": number / arrived if arrived else None}
    return replace(run, summary={**run.summary, **judged})


# ---------------------------------------------------------------- the fair arena


def unequal(rows: Sequence[Row]) -> list[str]:
    """What makes the comparison unfair, a line each: other requests, other settings, refused or unfinished work."""
    out = []
    keys = _flat(rows[0].runs[0].config)
    for other in rows[1:]:
        theirs = _flat(other.runs[0].config)
        for key in sorted(keys.keys() | theirs.keys()):
            if not key.startswith(("system.", "run.", "logger.", "log.", "seed")) and keys.get(key) != theirs.get(key):
                out.append(f"not the same arena: {key} is {keys.get(key)} ({rows[0].name}), {theirs.get(key)} "
                           f"({other.name})")  # fmt: skip
    reference = {seed: run for seed, run in zip(rows[0].seeds, rows[0].runs)}
    for row in rows:
        for seed, run in zip(row.seeds, row.runs):
            base = reference.get(seed)
            if base is not None and not _same_requests(base, run):
                out.append(f"not the same arena: {row.name} had other prompts than {rows[0].name} (seed {seed})")
        missed = sum(int(run.summary.get(key) or 0) for run in row.runs for key in ("rejected", "live_at_end"))
        if missed:
            out.append(f"{row.name} did not finish {missed:,} requests; its latencies are of the others")
    wanted = {seed for row in rows for seed in row.seeds}
    out += [f"{row.name} has {len(row.runs)} of {len(wanted)} seeds" for row in rows if len(row.runs) < len(wanted)]
    return out


def _same_requests(a: LoadedRun, b: LoadedRun) -> bool:
    one, two = a.requests.get("prompt_tokens"), b.requests.get("prompt_tokens")
    return one is None or two is None or np.array_equal(one, two)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{prefix}{key}."))
    return out
