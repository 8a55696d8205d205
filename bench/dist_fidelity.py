"""python -m bench.dist_fidelity: does the simulator say what workers do on this machine?

The same trace under each system: `runtime=dist` by the wall clock, and `runtime=sim` over a profile of this machine:
operators (`python -m common.cost.fit --measure`), links (`python -m bench.comm`) and what a worker's iterations cost
beyond their operators (`python -m bench.worker_cost`). As the speed of a shared machine changes within minutes, each of
several rounds measures a profile of its own and then runs the systems beside it; the median of the rounds' ratios
counts. A profile has never seen a trace. Aimed at: P50 and throughput within 15%, P99 within 30%."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.comm import between_workers, links_of, orders
from bench.comm import write_profile as write_links
from bench.harness import exit_with, run, write_report
from bench.local_fidelity import numbers
from bench.worker_cost import host_profile
from bench.workers import MODEL, OUT, iteration_ms, run_workers
from common.cost.profile import measure
from common.errors import ConfigError

STEADY = ["workload=poisson", "workload.lengths=azure_conv", "workload.length_scale=0.2", "workload.num_requests=60"]
SYSTEMS = {
    "vllm": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=200"],
    "kunserve": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60", "system.poll_ms=20",
                 "system.min_pipeline_ms=200", "system.min_serving_ms=50", "system.calm_polls=2"],
    "infinite_llm": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60",
                     "system.period_ms=100", "system.low_share=0.2", "system.pace=64"],
    "memserve": ["workload=sessions", "workload.think_mean_s=0.5", "workload.length_scale=0.25", "workload.rate=2",
                 "workload.system_tokens=64", "workload.num_requests=60", "cluster.num_instances=2",
                 "engine.kv_blocks=300", "engine.prefix_caching=true", "system.roles=1P1D"],
    "mell": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60", "system.epoch_ms=100",
             "system.cooldown_s=2"],
}  # fmt: skip
GOALS = {"p50_ttft_ms": 0.15, "p99_ttft_ms": 0.30, "p50_tpot_ms": 0.15, "p99_tpot_ms": 0.30,
         "output_tokens_per_s": 0.15}  # fmt: skip


class Found(NamedTuple):
    """One system in one round: what workers did, what the simulator said, and where a real iteration's time went."""

    real: dict[str, float]
    sim: dict[str, float]
    spent: dict[str, float]


def profile(folder: Path) -> tuple[Path, str]:
    """A hardware file of this machine as it is now, and its host times in words."""
    base = measure("cpu", "operators", folder, ["--model", "tiny_llama", "--quiet"])
    found = between_workers("gloo", 30)
    base = write_links(base, "links", *links_of(found), orders(100)[0]["P5 (us)"])
    path, said, _ = host_profile(base, "workers", 1)
    return path, said


def compare(system: str, hardware: Path) -> Found:
    """A real run and a simulated one."""
    overrides = [f"system={system}", *MODEL, *SYSTEMS[system], f"hardware={hardware}"]
    record, spent, _ = run_workers(overrides)
    simulated = run(overrides)[1]
    return Found(numbers(record), numbers(simulated), {**spent, "sim": iteration_ms(simulated)})


def table(rounds: list[Found]) -> list[dict[str, Any]]:
    """Rows by metric: medians over the rounds, of the two and of their ratio, whose range is beside it."""
    rows = []
    for key, goal in GOALS.items():
        off = [found.sim[key] / found.real[key] - 1 for found in rounds]
        middle = float(np.median(off))
        rows.append({"metric": key, "dist": float(np.median([found.real[key] for found in rounds])),
                     "sim": float(np.median([found.sim[key] for found in rounds])), "difference of sim": middle,
                     "least": min(off), "most": max(off),
                     "within": "yes" if abs(middle) <= goal else f"no ({goal:.0%})"})  # fmt: skip
    return rows


def main() -> int:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.dist_fidelity", description=__doc__)
    parser.add_argument("--system", action="append", choices=tuple(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: give at least 1")
    systems = options.system or list(SYSTEMS)
    found: dict[str, list[Found]] = {system: [] for system in systems}
    hosts = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            hardware, said = profile(Path(folder))
            hosts.append({"round": number + 1, "profile": said})
            for system in systems:
                found[system].append(compare(system, hardware))
        print(f"round {number + 1} of {options.rounds}: {said}", flush=True)
    tables = {system: table(rounds) for system, rounds in found.items()}
    rows = [row for table in tables.values() for row in table]
    spent = [{"an iteration (ms)": system, **{key: float(np.median([one.spent[key] for one in rounds]))
                                              for key in rounds[0].spent}}
             for system, rounds in found.items()]  # fmt: skip
    good = sum(row["within"] == "yes" for row in rows)
    off = float(np.median([abs(row["difference of sim"]) for row in rows]))
    real = [max(same) / min(same) - 1 for rounds in found.values()
            for same in ([one.real[key] for one in rounds] for key in GOALS if "p50" in key)]  # fmt: skip
    notes = [
        f"Measured (dist) and simulated (sim): tiny_llama in float32, two workers and the policy process on "
        f"{os.cpu_count()} cores that others use as well (load {load:.1f} to {os.getloadavg()[0]:.1f}); torch "
        f"{torch.__version__}; 60 requests a run; {options.rounds} rounds, each with a profile measured in it.",
        f"{good} of {len(rows)} numbers are within their goal (P50 and throughput 15%, P99 30%) in the median of the "
        f"rounds. The simulator is off by {off:.0%} in the median. Between rounds real P50s of one system differ by "
        f"up to {max(real):.0%} (median {np.median(real):.0%}), which is how much the machine changed meanwhile.",
        "The misses: three processes share the cores of this machine with its other users and wait for each other. "
        "That the simulator cannot know: it has the policy process answer at once, and every instance a core of its "
        "own. The last table but one says where an iteration's time went: by the clock as the policy process saw it "
        "and at the worker, in CPU seconds, and as simulated.",
    ]
    write_report("dist_fidelity", "Workers and their simulation", notes,
                 {**tables, "Where an iteration's time goes": spent, "Profiles": hosts}, options.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    exit_with(main)
