"""python -m bench.infinite_llm_local: a request larger than any instance, with real tensors.

For 2 to 5 instances: its greedy tokens over the pool against those of one instance with all the memory, while blocks
move in mid-decode; and the bytes that a decode step sends, for contexts of several lengths. Tokens and bytes are
measured (a tiny model with random weights on a CPU); the clock is the cost model's. Writes
results/infinite_llm/local.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.config import compose
from common.provenance import git_state
from run import replay
from workloads.types import plain

ROOT = Path(__file__).resolve().parent.parent / "results" / "infinite_llm"
BLOCKS, BLOCK = 32, 16  # of one instance; tokens of a block
OUTPUT = 160
BASE = ["runtime=local", "runtime.clock=modelled", "runtime.device=cpu", "runtime.check=true", "model=tiny_llama",
        "hardware=cpu", "workload=poisson", "engine.max_num_batched_tokens=512"]  # fmt: skip
POOL = ["system=infinite_llm", "system.period_ms=0.5", "system.lease_ms=400", "system.margin_ms=200",
        "system.low_share=0.1", "cluster.control_ms=0.01"]  # fmt: skip


def one(overrides: list[str], prompt: int, output: int = OUTPUT) -> dict[str, Any]:
    """One request alone in a cluster: its tokens, and what was sent for it."""
    config = compose([*BASE, *overrides, "engine.max_model_len=20000", "model.max_position=20000"])
    done = replay(config, plain("one", np.zeros(1, np.int64), np.array([prompt]), np.array([output]), output, "one"))
    executor: Any = done.executor
    first = int(done.record.requests.first_token_ns[0])
    sent = [sum(pair) for pair in zip(*[(out, back) for _, out, back in executor.traffic.per_iteration])]
    found = {"tokens": (executor.outputs() or {}).get(0, []), "status": int(done.record.requests.status[0]),
             "preemptions": int(done.record.requests.num_preemptions[0]),
             "moves_in_decode": sum(start > first for start in done.record.moves.start_ns),
             "moved_bytes": sum(done.record.moves.num_bytes), "sent_bytes": sum(sent),
             "creditors": len({creditor for creditor, *_ in executor.traffic.per_iteration}),
             "last": executor.traffic.per_iteration[-1][1:] if sent else None}  # fmt: skip
    executor.close()
    return found


def pooled(instances: int, prompt: int) -> dict[str, Any]:
    """Over the pool against one instance with as many blocks."""
    size = f"engine.kv_blocks={BLOCKS}"
    over = one([*POOL, f"cluster.num_instances={instances}", size, "system.pace=32"], prompt)
    alone = one(["system=vllm", "cluster.num_instances=1", f"engine.kv_blocks={BLOCKS * instances}"], prompt)
    return {"instances": instances, "tokens_each": BLOCKS * BLOCK, "prompt": prompt, "output": OUTPUT,
            "creditors": over["creditors"], "moves_in_decode": over["moves_in_decode"],
            "preemptions": over["preemptions"], "identical": over["tokens"] == alone["tokens"] != [],
            "num_tokens": len(over["tokens"])}  # fmt: skip


def step_bytes(context: int) -> dict[str, Any]:
    """Bytes of the last decode step to and from a creditor, without moves."""
    blocks = context // BLOCK * 3 // 4  # of each of two: it fits neither alone
    found = one([*POOL, "cluster.num_instances=2", f"engine.kv_blocks={blocks}", "system.pace=0"], context, 8)
    out, back = found["last"]
    return {"context": context, "out_bytes": out, "back_bytes": back}


def markdown(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = ["# One request over several instances, real tensors", "",
             f"Measured on a CPU (tiny_llama, fp32, greedy, {BLOCKS} blocks of {BLOCK} tokens an instance); "
             "the clock is the cost model's.", "", f"Measured at commit {git_state()['commit']}.", "",
             "| instances | tokens each | prompt + output | creditors | moves in mid-decode | preemptions | "
             "tokens of one big instance |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        lines.append(f"| {row['instances']} | {row['tokens_each']} | {row['prompt']} + {row['output']} | "
                     f"{row['creditors']} | {row['moves_in_decode']} | {row['preemptions']} | "
                     f"{'identical' if row['identical'] else 'DIFFERENT'} ({row['num_tokens']}) |")  # fmt: skip
    lines += ["", "Bytes of one decode step, to and from one creditor (all layers):", "",
              "| context | out | back |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {row['context']} | {row['out_bytes']} | {row['back_bytes']} |" for row in steps]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Both tables; exit 1 if tokens differ or bytes depend on the context."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = [pooled(instances, (instances * BLOCKS - 20) * BLOCK) for instances in (2, 3, 4, 5)]
    steps = [step_bytes(context) for context in (1024, 2048, 4096)]
    text = markdown(rows, steps)
    (ROOT / "local.json").write_text(
        json.dumps({"git": git_state(), "pooled": rows, "steps": steps}, indent=1) + "\n", encoding="utf-8"
    )
    (ROOT / "local.md").write_text(text, encoding="utf-8")
    print(text)
    if not all(row["identical"] for row in rows) or len({(row["out_bytes"], row["back_bytes"]) for row in steps}) > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
