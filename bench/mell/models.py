"""python -m bench.mell.models     two models over one stock of GPUs, against halves; results/mell/two_models.{json,md}.

Simulated (conf/experiment/mell/two_models.yaml): loads that swing against each other. `shared`: a pool per model over
all GPUs. `halves`: the same requests, each model with half of the GPUs for itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.mell.gpus import Watched, measured_at
from common.build import each_model
from common.config import RunConfig, compose
from common.driver import drive
from common.record import RequestColumns, RunRecord
from common.sched.fleet import FleetPolicy
from common.sched.pools import PoolsPolicy
from run import make_executor, served
from systems.mell.bounds import martello_toth
from systems.registry import make_policy
from workloads.build import build
from workloads.several import by_cluster

STOCKS = (20, 28)
SEEDS = range(3)
SYSTEMS = ("mell",)


def only(workload: Any, model: int) -> Any:
    """The requests of one model, as a workload of its own."""
    mine = workload.model == model
    return replace(workload, arrival_ns=workload.arrival_ns[mine], prompt_tokens=workload.prompt_tokens[mine],
                   output_tokens=workload.output_tokens[mine], models=(), model=None)  # fmt: skip


def play(config: RunConfig, workload: Any) -> tuple[RunRecord, list[Watched]]:
    """One run; the planners with their snapshots."""
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = make_executor(config, workload, record)
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    pools = policy.pools if isinstance(policy, PoolsPolicy) else (policy,)
    watched = []
    for pool in pools:
        assert isinstance(pool, FleetPolicy)
        pool.planner = Watched(pool.planner, pool)
        watched.append(pool.planner)
    drive(policy, executor, record, 1_000_000_000)
    return record, watched


def numbers(
    records: Sequence[RunRecord], watched: Sequence[Watched], capacity: Sequence[int], stock: int
) -> dict[str, Any]:
    """Over all of a setting's runs (one when GPUs are shared, one per model when not)."""
    requests = [record.requests for record in records]
    ttft = np.concatenate([np.array(one.first_token_ns) - np.array(one.arrival_ns) for one in requests]) / 1e9
    spans = [span for record in records for one in record.up_intervals.values() for span in one]
    edges = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    plans = [np.mean([num for _, num, _ in one.seen]) for one in watched]
    low = [np.mean([martello_toth(sizes, room) for _, _, sizes in one.seen]) for one, room in zip(watched, capacity)]
    return {
        "gpu_hours": sum(end - begin for begin, end in spans) / 3600e9,
        "peak": int(np.cumsum([step for _, step in edges]).max()),
        "plan_mean": float(sum(plans)), "l2_mean": float(sum(low)),
        "ttft_p50_s": float(np.percentile(ttft, 50)), "ttft_p90_s": float(np.percentile(ttft, 90)),
        "ttft_p99_s": float(np.percentile(ttft, 99)), "unserved": int((ttft < 0).sum()),
        "handed_over": handed_over(records[0], stock) if len(records) == 1 else 0,
    }  # fmt: skip


def handed_over(record: RunRecord, stock: int) -> int:
    """How often a GPU came up for another model than the one before."""
    owners: dict[int, list[tuple[int, int]]] = {}
    for instance, spans in record.up_intervals.items():
        owners.setdefault(instance % stock, []).extend((begin, instance // stock) for begin, _ in spans)
    return sum(before[1] != after[1] for turns in owners.values()
               for before, after in zip(sorted(turns), sorted(turns)[1:]))  # fmt: skip


def simulate(system: str, stock: int, seed: int) -> dict[str, dict[str, Any]]:
    """Shared and in halves."""
    config = compose(["experiment=mell/two_models", f"system={system}", f"seed={seed}",
                      f"cluster.num_instances={stock}"])  # fmt: skip
    workload = served(by_cluster(build(config.workload, seed), config.cluster.models), config.engine.max_model_len)
    record, watched = play(config, workload)
    halves = [replace(one, cluster=replace(one.cluster, models=(), num_instances=stock // 2, num_running=4))
              for one in each_model(config)]  # fmt: skip
    apart = [play(half, only(workload, model)) for model, half in enumerate(halves)]
    capacity = [planner.planner.capacity if hasattr(planner.planner, "capacity") else planner.planner.groups.capacity
                for planner in watched]  # fmt: skip
    return {"shared": numbers([record], watched, capacity, stock),
            "halves": numbers([one for one, _ in apart], [one for _, many in apart for one in many], capacity, stock)}


def main() -> None:
    """Print and write."""
    commit = measured_at()
    rows: dict[str, Any] = {"commit": commit}
    lines = [
        "Simulated (`python -m bench.mell.models`; conf/experiment/mell/two_models.yaml): Llama-2-7B and 13B on A100",
        "40 GB, 600 s in which their loads swing against each other; means over seeds 0 to 2. `shared`: a pool per",
        "model over one stock; `halves`: the same requests, half of the GPUs for each model. / L2: planned GPUs over",
        "both models' bounds on the run's own snapshots (who waits counts, so both grow where GPUs lack).",
        f"Measured at commit {commit}.",
        "",
        "| system | stock | GPUs | GPU-hours | peak used | plan | / L2 | handed over | TTFT P50 s | P90 s | P99 s |",
        "|---|--:|---|" + "--:|" * 8,
    ]
    for system in SYSTEMS:
        for stock in STOCKS:
            runs = [simulate(system, stock, seed) for seed in SEEDS]
            for kind in ("shared", "halves"):
                mean = {key: float(np.mean([run[kind][key] for run in runs])) for key in runs[0][kind]}
                peak = max(run[kind]["peak"] for run in runs)
                assert peak <= stock and mean["unserved"] == 0
                rows[f"{system}/{stock}/{kind}"] = mean | {"peak_of_all_seeds": peak}
                cells = [system, str(stock), kind, f"{mean['gpu_hours']:.2f}", str(peak), f"{mean['plan_mean']:.1f}",
                         f"{mean['plan_mean'] / mean['l2_mean']:.2f}", f"{mean['handed_over']:.1f}",
                         *(f"{mean[f'ttft_p{rank}_s']:.1f}" for rank in (50, 90, 99))]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    out = Path("results/mell")
    (out / "two_models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "two_models.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
