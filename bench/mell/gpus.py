"""python -m bench.mell.gpus     GPU counts beside the bounds and the paper's bars; results/mell/gpus.json.

Simulated. Every run is appended to the file when it ends, and runs that are in it already are not repeated; so a run
that is stopped goes on later. `python -m bench.mell.figure` makes table and figure of what there is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.config import compose
from common.driver import drive
from common.metrics import summarize
from common.provenance import git_state
from common.record import RequestColumns, RunRecord
from common.sched.fleet import FleetPolicy
from run import make_executor, served
from systems.mell.bounds import first_fit, martello_toth, volume
from systems.mell.policy import MellPlanner
from systems.registry import make_policy
from workloads.build import build

RATES = {"infrequent": 0.5, "middle": 0.8, "frequent": 1.1}
MAIN = ("mell", "load_balance", "worst_fit", "best_fit", "oracle_worst_fit", "oracle_best_fit")
SNAPSHOT_S = 5.0
SLOS = ((5_000, 50), (5_000, 100), (1_000, 50))  # TTFT and TPOT, ms
RAMP, RAMP_S = 1 / 3, 500.0  # of the span of arrivals, at most so many s: left out of means and peaks


class Case(NamedTuple):
    """One line of the table."""

    experiment: str
    load: str
    system: str
    variant: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.experiment}/{self.load}/{self.system}/{self.variant}/s{self.seed}"


def cases(seeds: int) -> Iterator[Case]:
    """All runs: what is not the comparison of the paper's Figure 11 is in `bench.mell.variants`."""
    for seed in range(seeds):
        for load, rate in reversed(RATES.items()):
            for experiment in ("13b_x10", "7b_x10"):
                for system in MAIN:
                    yield Case(experiment, load, system, "", seed, (f"workload.rate={rate}",))
                yield Case(experiment, load, "mell", "compute_share=1", seed,
                           (f"workload.rate={rate}", "system.compute_share=1.0"))  # fmt: skip


def simulate(case: Case, change: Callable[[FleetPolicy], None] = lambda policy: None) -> dict[str, Any]:
    """One run and its numbers over the steady part; `change` the policy before it starts."""
    config = compose([f"experiment=mell/{case.experiment}", f"system={case.system}", f"seed={case.seed}",
                      *case.overrides])  # fmt: skip
    workload = served(build(config.workload, config.seed), config.engine.max_model_len)
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = make_executor(config, workload, record)
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    assert isinstance(policy, FleetPolicy)
    change(policy)
    watched = Watched(policy.planner, policy)
    policy.planner = watched
    begin = time.process_time()
    drive(policy, executor, record, 1_000_000_000)
    info = executor.cluster.instances[0]
    capacity = info.kv_cells // info.num_layers
    span = float(workload.arrival_ns.max()) / 1e9
    ramp = min(span * RAMP, RAMP_S)
    steady = [sample for sample in watched.seen if ramp <= sample[0] < span]
    return {
        "key": case.key,
        "case": case._asdict(),
        "cpu_s": time.process_time() - begin,
        "requests": workload.num_requests,
        **_latency(record, config, workload),
        **_service(record, ramp),
        **_gpus(record, steady, capacity, float(config.system_options["watermark"])),
        "timeline": _timeline(watched.seen, capacity),
        **_moves(policy, record, span),
    }


def _latency(record: RunRecord, config: Any, workload: Any) -> dict[str, Any]:
    summary = summarize(record, config.slo)
    names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "num_preemptions", "rejected",
             "gpu_seconds", "mean_num_gpus", "peak_num_gpus")  # fmt: skip
    return {**{name: summary[name] for name in names}, "clipped_output": workload.counts.get("clipped_output", 0)}


def _service(record: RunRecord, from_s: float) -> dict[str, Any]:
    """Of requests that arrived in the steady part: latencies, the share that meets each SLO, and the good ones per hour
    of paid GPU time."""
    rows = record.requests
    columns = (rows.arrival_ns, rows.first_token_ns, rows.finish_ns, rows.output_tokens)
    arrival, first, finish, tokens = (np.array(column) for column in columns)
    steady = (arrival >= from_s * 1e9) & (finish >= 0)
    ttft = (first - arrival)[steady] / 1e6
    many = tokens[steady] > 1
    tpot = np.where(many, (finish - first)[steady] / 1e6 / np.maximum(1, tokens[steady] - 1), 0.0)
    last, until = float(arrival.max()), from_s * 1e9
    spans = [span for spans in record.up_intervals.values() for span in spans]
    paid_h = sum(max(0.0, min(end, last) - max(begin, until)) for begin, end in spans) / 3600e9
    out: dict[str, Any] = {"steady_requests": int(steady.sum()), "paid_gpu_hours": paid_h}
    for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot[many])):
        out |= {f"steady_{name}_p{rank}": float(np.percentile(values, rank)) for rank in (50, 90, 99)}
    for ttft_ms, tpot_ms in SLOS:
        good = (ttft <= ttft_ms) & (tpot <= tpot_ms)
        out[f"good_{ttft_ms}_{tpot_ms}"] = float(good.mean())
        out[f"good_per_gpu_hour_{ttft_ms}_{tpot_ms}"] = float(good.sum() / paid_h)
    return out


class Watched:
    """A planner whose load is noted every few seconds: blocks of every live request, as it plans with them."""

    def __init__(self, planner: Any, policy: FleetPolicy) -> None:
        self.planner = planner
        self.policy = policy
        self.seen: list[tuple[float, int, list[int]]] = []  # (s, GPUs of the plan, blocks by request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planner, name)

    def epoch(self, *args: Any) -> Any:
        """As the planner's."""
        changed = self.planner.epoch(*args)
        now = self.policy.now_ns / 1e9
        if not self.seen or now >= self.seen[-1][0] + SNAPSHOT_S:
            sizes = self.planner.groups.sizes if isinstance(self.planner, MellPlanner) else self.planner.sizes
            self.seen.append((now, len(self.planner.bins()), list(sizes.values())))
        return changed


def _gpus(
    record: RunRecord, seen: list[tuple[float, int, list[int]]], capacity: int, watermark: float
) -> dict[str, Any]:
    """The plan's count (what the paper counts), the paid count, and the bounds on the same load. Where a baseline lets
    requests outgrow a GPU (`preempt`), its utilisation is demand and may exceed 1."""
    at = np.array([moment for moment, _, _ in seen])
    plan = np.array([num for _, num, _ in seen])
    spans = np.array([span for spans in record.up_intervals.values() for span in spans], dtype=np.float64) / 1e9
    paid = ((spans[:, :1] <= at) & (at < spans[:, 1:])).sum(axis=0)
    snapshots = [sizes for _, _, sizes in seen]
    used = np.array([sum(sizes) for sizes in snapshots]) / capacity
    return {
        "plan_mean": float(plan.mean()), "plan_peak": int(plan.max()),
        "paid_mean": float(paid.mean()), "paid_peak": int(paid.max()),
        "utilisation": float(used.sum() / plan.sum()), "utilisation_paid": float(used.sum() / paid.sum()),
        **_bound("volume", [volume(sizes, capacity) for sizes in snapshots]),
        **_bound("l2", [martello_toth(sizes, capacity) for sizes in snapshots]),
        **_bound("ffd", [first_fit(sizes, capacity) for sizes in snapshots]),
        **_classes(snapshots, int(capacity * (1 - watermark))),
        "live_mean": float(np.mean([len(sizes) for sizes in snapshots])),
    }  # fmt: skip


def _bound(name: str, values: list[int]) -> dict[str, Any]:
    return {f"{name}_mean": float(np.mean(values)), f"{name}_peak": int(max(values))}


def _timeline(seen: list[tuple[float, int, list[int]]], capacity: int) -> dict[str, Any]:
    """The whole run, ramp and drain too."""
    return {"at_s": [round(at, 3) for at, _, _ in seen], "plan": [num for _, num, _ in seen],
            "l2": [martello_toth(sizes, capacity) for _, _, sizes in seen]}  # fmt: skip


def _classes(snapshots: list[list[int]], capacity: int) -> dict[str, Any]:
    """Share of requests, and of their blocks, in each class of MELL: up to 1/8, 1/4, 1/3, 1/2 and 1 of `capacity`."""
    sizes = np.concatenate([np.array(sizes, dtype=np.float64) for sizes in snapshots])
    index = np.digitize(sizes / capacity, (1 / 8, 1 / 4, 1 / 3, 1 / 2), right=True)
    names = ("tiny", "T", "S", "M", "L")
    return {"class_requests": {name: float((index == at).mean()) for at, name in enumerate(names)},
            "class_blocks": {name: float(sizes[index == at].sum() / sizes.sum()) for at, name in enumerate(names)}}


def _stalls(policy: FleetPolicy, record: RunRecord) -> tuple[list[int], list[int]]:
    """ns to the next token, sorted: of each finished migration from leaving the source on; and of each preemption. By
    the executor's clock: the policy hears of a recomputed prompt at a step's end only."""
    rows = record.stalls
    took = {(request, begin): (end - begin, cause)
            for request, begin, end, cause in zip(rows.request_id, rows.begin_ns, rows.end_ns, rows.cause)}  # fmt: skip
    moved = [took.pop(left)[0] for left in policy.mover.stats.left_ns if left in took]
    return sorted(moved), sorted(stall for stall, cause in took.values() if cause == "removed")


def _moves(policy: FleetPolicy, record: RunRecord, span: float) -> dict[str, Any]:
    done = policy.mover.stats
    stalls, waits = _stalls(policy, record)
    out = {
        "kv_moves_per_s": done.kv_done / span, "token_moves_per_s": done.token_done / span,
        "aborted": done.aborted, "kv_gb": done.kv_bytes / 1e9, "recomputed_per_s": done.recomputed_tokens / span,
        "median_stall_ms": stalls[len(stalls) // 2] / 1e6 if stalls else None,
        "p99_stall_ms": stalls[len(stalls) * 99 // 100] / 1e6 if stalls else None,
        "preempted_per_s": done.preempted / span, "preempted_recomputed_per_s": done.preempted_tokens / span,
        "median_preempted_ms": waits[len(waits) // 2] / 1e6 if waits else None,
        "p99_preempted_ms": waits[len(waits) * 99 // 100] / 1e6 if waits else None,
        "starts": policy.stats.starts, "stops": policy.stats.stops, "fallbacks": policy.stats.fallbacks,
    }  # fmt: skip
    planner = getattr(policy.planner, "planner", policy.planner)
    if isinstance(planner, MellPlanner):
        plan = planner.plan_stats
        out |= {"group_moves_per_s": plan.group_moves / span, "request_moves_per_s": plan.request_moves / span,
                "net_moves_per_s": plan.net_moves / span}  # fmt: skip
    return out


def options(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options of benches whose runs a file gathers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", default=out)
    parser.add_argument("--only", default="", help="a part of the keys")
    return parser


def measured_at() -> str:
    """The commit of the code that runs."""
    git = git_state()
    return f"{git['commit']}" + (" with uncommitted changes" if git["dirty"] else "")


def run_missing(cases: Iterable[Case], given: argparse.Namespace, line: Callable[[dict[str, Any]], str],
                without: Callable[[Case], Iterable[str]] = lambda case: ()) -> None:  # fmt: skip
    """Simulate what the file lacks, and write it after each; `line`: what is printed of a row, `without`: what a row
    leaves out."""
    path, commit = Path(given.out), measured_at()
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for case in cases:
        if case.key in rows or given.only not in case.key:
            continue
        row = rows[case.key] = simulate(case) | {"commit": commit}
        for name in without(case):
            del row[name]
        print(f"{case.key}: {line(row)}, used {row['utilisation']:.2f}, {row['cpu_s']:.0f} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing."""
    parser = options(__doc__, "results/mell/gpus.json")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    run_missing(cases(given.seeds), given, lambda row: f"plan {row['plan_mean']:.1f}/{row['plan_peak']}, paid "
                f"{row['paid_mean']:.1f}, L2 {row['l2_mean']:.1f}",
                lambda case: ("timeline",) if case.seed else ())  # fmt: skip


if __name__ == "__main__":
    main()
