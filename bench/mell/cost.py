"""python -m bench.mell.cost     cost of a scheduling operation, 10 to 10,000 GPUs; results/mell/cost.{json,md}."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.mell.gpus import measured_at
from systems.mell.groups import Groups

CAPACITY = 1264  # blocks: Llama-2-13B on 40 GB
OPERATIONS = 4_000


def fill(rng: random.Random, num_gpus: int, requests_per_gpu: int, mixed: bool) -> Groups:
    """A cluster of about that many GPUs: all small requests, or a mix of all classes."""
    groups, ident = Groups(CAPACITY), 0
    while len(groups.bins) < num_gpus:
        groups.allocate(ident, _size(rng, requests_per_gpu, mixed))
        ident += 1
    return groups


def _size(rng: random.Random, requests_per_gpu: int, mixed: bool) -> int:
    if mixed:
        return max(1, int(CAPACITY * min(1.0, rng.expovariate(requests_per_gpu))))
    return rng.randint(1, 2 * CAPACITY // requests_per_gpu - 1)


def measure(num_gpus: int, requests_per_gpu: int, mixed: bool, seed: int) -> dict[str, Any]:
    """Mean microseconds of a random operation (a third each), growth by one block, in a steady state."""
    rng = random.Random(seed)
    groups = fill(rng, num_gpus, requests_per_gpu, mixed)
    live = list(groups.sizes)
    next_id, moves, most = len(live), 0, 0
    by_operation: Counter[int] = Counter()  # group moves -> operations
    worst = spent = 0
    for step in range(OPERATIONS):
        at = rng.randrange(len(live))
        request_id, kind = live[at], step % 3
        size = _size(rng, requests_per_gpu, mixed)
        begin = time.thread_time_ns()
        if kind == 0:
            made = groups.allocate(next_id, size)
        elif kind == 1:
            made = groups.depart(request_id)
        else:
            made = groups.update(request_id, min(CAPACITY, groups.sizes[request_id] + 1))
        spent += (took := time.thread_time_ns() - begin)
        worst = max(worst, took)
        if kind == 0:
            live.append(next_id)
            next_id += 1
        elif kind == 1:
            live[at] = live[-1]
            live.pop()
        moves += len(made)
        most = max(most, len(made))
        by_operation[groups.packing.group_moves] += 1
    return {
        "gpus": len(groups.bins),
        "requests": len(live),
        "mix": "all classes" if mixed else "small",
        "mean_us": spent / OPERATIONS / 1e3,
        "worst_us": worst / 1e3,
        "group_moves_per_op": sum(many * times for many, times in by_operation.items()) / OPERATIONS,
        "most_request_moves": most,
        "operations_by_group_moves": [by_operation[many] for many in range(max(by_operation) + 1)],
        "request_moves_per_op": moves / OPERATIONS,
    }


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results/mell")
    out = Path(parser.parse_args().out)
    rows: list[dict[str, Any]] = []
    commit = measured_at()
    for mixed, per_gpu in ((False, 12), (True, 5)):
        for num_gpus in (10, 100, 1_000, 10_000):
            rows.append(min((measure(num_gpus, per_gpu, mixed, seed) for seed in range(2)),
                            key=lambda row: float(row["mean_us"])))  # fmt: skip
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cost.md").write_text("\n".join(report(rows, commit)) + "\n", encoding="utf-8")
    (out / "cost.json").write_text(json.dumps({"commit": commit, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def report(rows: list[dict[str, Any]], commit: str) -> list[str]:
    """Both tables."""
    lines = [
        "Measured (CPU time of the scheduler's thread; `python -m bench.mell.cost`): Allocate, Depart, Update by one",
        f"block, a third each, best of 2 seeds x {OPERATIONS:,} operations, GPUs of {CAPACITY} blocks. A shared",
        f"machine: the growth is the result, not the microseconds. Measured at commit {commit}.",
        "",
        "| requests | GPUs | live | mean, us | worst, us | group moves/op | request moves/op | most request moves |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {row['mix']} | {row['gpus']:,} | {row['requests']:,} | {row['mean_us']:.1f} | "
              f"{row['worst_us']:.0f} | "
              f"{row['group_moves_per_op']:.2f} | {row['request_moves_per_op']:.2f} | "
              f"{row['most_request_moves']} |"
              for row in rows]  # fmt: skip
    lines += ["", f"Operations (of {OPERATIONS:,}) by their group moves; the bound is 10.", "",
              "| requests | GPUs | " + " | ".join(str(many) for many in range(11)) + " |", "|---|---:|" + "---:|" * 11]
    for row in rows:
        counts = row["operations_by_group_moves"]
        assert len(counts) <= 11
        lines.append(f"| {row['mix']} | {row['gpus']:,} | "
                     + " | ".join(str(many) for many in [*counts, *[0] * (11 - len(counts))]) + " |")
    return lines


if __name__ == "__main__":
    main()
