"""python -m bench.static_pp [--by p99_ttft_ms] [key=value …]: the best static pipeline depth for one trace, an oracle.

Runs `system=static_pp` with every depth that divides the cluster (1 is data parallel), over the same requests, and
prints all of them; the best has the least of `--by` among those that finished the most requests. No online system can
choose so: the whole trace is known before the first request. Simulated; nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bench.harness import exit_with, markdown, run
from common.config import RunConfig, compose
from common.errors import ConfigError
from common.metrics import summarize

SHOWN = ("completed", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms",
         "output_throughput", "num_preemptions")  # fmt: skip


def depths(config: RunConfig) -> list[int]:
    """The declared search: divisors of the number of instances, at most one stage per layer."""
    num, layers = config.cluster.num_instances, config.model.num_layers
    return [depth for depth in range(1, min(num, layers) + 1) if num % depth == 0]


def search(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """One row per depth, `SHOWN` of its summary."""
    if any(override.startswith(("system=", "system.stages=")) for override in overrides):
        raise ConfigError("bench.static_pp chooses system and system.stages itself: leave them out")
    own = [*overrides, "system=static_pp"]
    rows = []
    for depth in depths(compose(own)):
        config, record = run([*own, f"system.stages={depth}"])
        summary = summarize(record, config.slo, config.cluster.tp)
        rows.append({"stages": depth, **{name: summary[name] for name in SHOWN}})
    return rows


def best(rows: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    """Most requests finished, then the least of `by`, then the shallowest."""
    return min(rows, key=lambda row: (-row["completed"], float("inf") if row[by] is None else row[by], row["stages"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    metrics = [name for name in SHOWN if name.endswith("_ms")]
    parser.add_argument("--by", default="p99_ttft_ms", choices=metrics, help="what is to be least")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py, but no system")
    options = parser.parse_args(arguments)
    rows = search(options.overrides)
    print("static pipelines, simulated; the choice is an oracle's\n")
    print(markdown(rows))
    print(f"best by {options.by}: system.stages={best(rows, options.by)['stages']}")
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
