"""python -m bench.speed: how fast the simulator is, on one core, in requests per second of wall time.

Cases: the 10,000-request mix of Azure conversation lengths at 3 requests/s on 4 instances of Llama-2-70B (A100, TP2);
the same overloaded twice with preemptions; outputs doubled (events must not grow); `--large`: 1,000,000 requests on
256 instances. Wall time is building the cluster, simulating, and writing the two Parquet files, imports aside; CPU time
is the same but for the files, and what to compare by where other work shares the machine. Each case runs in a process
of its own, several times, and the fastest is reported beside the median.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from bench.harness import write_report

BASE = ["model=llama2-70b", "hardware=a100-80g", "cluster.num_instances=4", "cluster.tp=2", "workload=poisson",
        "workload.rate=3", "workload.num_requests=10000", "workload.lengths=azure_conv",
        "engine.max_num_seqs=256"]  # fmt: skip
CASES: dict[str, list[str]] = {
    "10,000 requests, 4 instances": BASE,
    "20,000 requests, 4 instances": [*BASE, "workload.num_requests=20000"],
    "overloaded 2x, 10,000": [*BASE, "workload.rate=12", "engine.kv_blocks=1200"],
    "overloaded 2x, 20,000": [*BASE, "workload.rate=12", "engine.kv_blocks=1200", "workload.num_requests=20000"],
    "outputs doubled": [*BASE, "workload.rate=1.5", "workload.length_scale=2", "engine.max_model_len=1000000"],
    "outputs as they are, same rate": [*BASE, "workload.rate=1.5", "engine.max_model_len=1000000"],
}
LARGE = {
    "1,000,000 requests, 256 instances": [*BASE, "cluster.num_instances=256", "workload.rate=192",
                                          "workload.num_requests=1000000"],
}  # fmt: skip


def once(overrides: list[str]) -> dict[str, Any]:
    """One run in this process, without figures and trace."""
    from common.config import compose
    from run import execute

    with tempfile.TemporaryDirectory() as folder:
        config = compose([*overrides, f"run.results={folder}", "run.figures=false", "run.trace=false", "run.name=x"])
        outcome = execute(config, quiet=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary, manifest = outcome.summary, outcome.manifest
    return {"requests": summary["num_requests"], "wall_s": manifest["wall_seconds"],
            "cpu_s": manifest["simulate_cpu_s"], "rss_mb": rss / 1e6, "events": summary["num_events"],
            "iterations": summary["num_iterations"], "preemptions": summary["num_preemptions"]}  # fmt: skip


def fresh(overrides: list[str]) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [sys.executable, "-m", "bench.speed", "--once", json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help="also the million requests (minutes)")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(json.loads(options.once))))
        return 0
    rows = []
    for name, overrides in {**CASES, **(LARGE if options.large else {})}.items():
        runs = [fresh(overrides) for _ in range(1 if name in LARGE else options.repeat)]
        best = min(runs, key=lambda found: found["wall_s"])
        rows.append({
            "case": name, "requests": best["requests"], "fastest wall (s)": best["wall_s"],
            "median wall (s)": median(found["wall_s"] for found in runs),
            "requests/s (fastest)": best["requests"] / best["wall_s"],
            "least CPU (s)": min(found["cpu_s"] for found in runs),
            "events/request": best["events"] / best["requests"],
            "iterations": best["iterations"], "preemptions": best["preemptions"], "peak RSS (MB)": best["rss_mb"],
        })  # fmt: skip
    notes = ["Simulated; wall time of this machine, which other work may share. One process, one core."]
    write_report("speed", "Simulator speed", notes, {"cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
