"""python -m bench.infinite_llm_ablations: what each part of Infinite-LLM does, simulated; several seeds.

Every variant sees the same requests at the same times. Writes results/infinite_llm/ablations.json and .md
(ablations_32 and so on for other numbers of instances).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from common.config import compose
from run import execute

ROOT = Path(__file__).resolve().parent.parent / "results" / "infinite_llm"
BASE = ["experiment=infinite_llm/ablations", "run.figures=false", "run.trace=false", "log.segments=false"]
KEPT = ("completed", "output_throughput", "mean_e2el_ms", "p99_e2el_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms",
        "num_preemptions", "bytes_moved", "duration_s")  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "vllm_multi": ["system=vllm_multi"],
    "vllm_single": ["system=vllm_single"],
    "off": ["system.mode=off"],
    "debt": ["system.mode=debt"],
    "debt, no DGFM": ["system.mode=debt", "system.dgfm=false"],
    "debt, CPU rBlocks": ["system.mode=debt", "system.cpu_share=0.25"],
    "reactive": ["system.mode=reactive"],
    "proactive": [],
    "proactive, random creditor": ["system.creditor=random"],
    "proactive, no overlap": ["system.overlap=false"],
    "proactive, moves stop decoding": ["system.move_overlap=false"],
    "proactive, 0 tokens/iteration": ["system.pace=0"],
    "proactive, 8 tokens/iteration": ["system.pace=8"],
    "proactive, 32 tokens/iteration": ["system.pace=32"],
    "proactive, 64 tokens/iteration": ["system.pace=64"],
}


def measure(overrides: list[str], seed: int, instances: int) -> dict[str, Any]:
    """One run's numbers; a part of a run is no result."""
    begin = time.perf_counter()
    name = f"run.name=infinite_llm_ablations/s{seed}"
    size = [f"cluster.num_instances={instances}", f"workload.rate={1.5 * instances}"]
    outcome = execute(compose([*BASE, *size, *overrides, f"seed={seed}", name]), quiet=True)
    if outcome.manifest["stopped"]:
        raise SystemExit(f"{overrides}: {outcome.manifest['stopped']}")
    found = {key: outcome.summary.get(key) for key in KEPT}
    return {**found, "wall_s": round(time.perf_counter() - begin, 1)}


def over(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> str:
    """The mean over seeds."""
    return f"{mean(row[key] for row in rows) / scale:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and the range of throughput against vllm_multi seed by seed."""
    base = {row["seed"]: row for row in rows if row["variant"] == "vllm_multi"}
    lines = [
        "| variant (simulated) | tokens/s | against vllm_multi, by seed | mean e2e, s | P99 e2e, s | mean TPOT, ms "
        "| P99 TTFT, s | preemptions | moved, GB | served |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        ratios = [f"{row['output_throughput'] / base[row['seed']]['output_throughput'] - 1:+.1%}" for row in mine
                  if row["seed"] in base]  # fmt: skip

        cells = [variant, over(mine, "output_throughput"), ", ".join(ratios), over(mine, "mean_e2el_ms", 1e3),
                 over(mine, "p99_e2el_ms", 1e3), over(mine, "mean_tpot_ms"), over(mine, "p99_ttft_ms", 1e3),
                 over(mine, "num_preemptions"), over(mine, "bytes_moved", 1e9), over(mine, "completed")]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All variants, all seeds; the files are rewritten after each run, so a run cut short leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--instances", type=int, default=8, help="of one GPU; the rate grows with them")
    options = parser.parse_args()
    file = "ablations" if options.instances == 8 else f"ablations_{options.instances}"
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for variant in options.variants:
            rows.append({"variant": variant, "seed": seed, **measure(VARIANTS[variant], seed, options.instances)})
            print(json.dumps(rows[-1]), flush=True)
            (ROOT / f"{file}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            (ROOT / f"{file}.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
