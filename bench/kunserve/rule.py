"""The operating points, by rule and not by result: what the experiments' files hold.

1. *Rate.* Outside bursts the prompts take 30% of the cluster's prefill speed, so 60% while the rate is doubled: the
   burst itself can be computed. The share is ours; the paper gives none.
2. *Memory.* KV memory is what makes the average demand 55% of it (the paper: "< 60%", 56.3-58.4%; 51.5% in its 640 s
   run). Demand is measured on the same arrivals without a limit of KV, from 0 to the last arrival, mean over seeds.

The paper scales the trace and keeps the card's memory. That was tried first and is in the second table: where the
average demand of our simulated A800s is 55% of the card's own KV, the peak hardly exceeds it, and compute is saturated.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from bench.kunserve.runs import UNLIMITED, demand, keep, mean_until, simulate
from common.build import cluster_model
from common.config import RunConfig, compose
from workloads.build import build

SEEDS = range(5)
SHARE = 0.30
POINTS = {"memory_burst": 0.55, "memory_sharegpt": 0.55, "memory_longbench": 0.55, "restore": 0.515,
          "testbed_b": 0.55}  # fmt: skip
CARD_RATES = (36.0, 40.0, 44.0)
NUM_PROMPTS = 300


def prefill_s(config: RunConfig) -> float:
    """Mean seconds of a prompt alone on an instance, in chunks of the token budget."""
    cost = cluster_model(config).cost(config.model.num_layers, True, True)
    budget = config.engine.max_num_batched_tokens
    total = 0
    for prompt in build(config.workload, 0).prompt_tokens[:NUM_PROMPTS].tolist():
        for done in range(0, prompt, budget):
            total += cost.iteration_ns([(min(budget, prompt - done), done)], 0, 0, 1)
    return total / 1e9 / NUM_PROMPTS


def unlimited(experiment: str, *overrides: str) -> tuple[float, float, float]:
    """Mean and peak demand in blocks per instance, means over seeds; and P99 TTFT in ms without a limit of KV."""
    found = [simulate(experiment, "system=vllm", UNLIMITED, f"seed={seed}", *overrides) for seed in SEEDS]
    num, end_s = found[0].config.cluster.num_instances, cast(float, found[0].config.workload.duration_s)
    series = [demand(one.record)[:2] for one in found]
    mean = np.mean([mean_until(seconds, used, end_s) for seconds, used in series]) / num
    return float(mean), float(np.mean([used.max() for _, used in series]) / num), float(
        np.mean([one.summary["p99_ttft_ms"] for one in found])
    )  # fmt: skip


def points() -> list[dict[str, Any]]:
    """Rates and blocks by the rule, beside what the files say."""
    rows = []
    for name, share in POINTS.items():
        config = compose([f"experiment=kunserve/{name}"])
        quiet = SHARE * config.cluster.num_instances / prefill_s(config)
        levels = getattr(config.workload, "levels", None)
        by_rule = quiet if levels is None else quiet * float(np.mean(levels))  # `rate` is the mean of the levels
        mean, peak, ttft = unlimited(name)
        card = cluster_model(compose([f"experiment=kunserve/{name}", "engine.kv_blocks=null"])).instances[0]
        rows.append({"experiment": name, "rate by rule": by_rule, "in the file": getattr(config.workload, "rate", None),
                     "KV blocks by rule": mean / share, "in file": config.kv_blocks,
                     "the card's": card.kv_cells // card.num_layers, "mean demand, blocks": mean,
                     "peak / mean": peak / mean, "unlimited P99 TTFT ms": ttft})  # fmt: skip
    return rows


def card_memory() -> list[dict[str, Any]]:
    """The other reading: the card's own memory, and the rate scaled."""
    rows = []
    for rate in CARD_RATES:
        change = (f"workload.rate={rate}", "workload.duration_s=150")
        mean, peak, ttft = unlimited("burst", *change)
        card = cluster_model(compose(["experiment=kunserve/burst"])).instances[0]
        have = card.kv_cells // card.num_layers
        rows.append({"rate": rate, "mean demand / KV": mean / have, "peak demand / KV": peak / have,
                     "unlimited P99 TTFT ms": ttft})  # fmt: skip
    return rows


def rule() -> None:
    """Table of the operating points."""
    notes = ["Demand without a limit of KV, mean of 5 seeds, per instance.", __doc__.split("\n", 2)[2]]
    keep("rule", "Operating points", notes, {"by the rule": points(), "the card's own KV": card_memory()})
