"""python -m bench.mell.precision     what migration does to replies in fp32, bf16 and fp16; results/mell/precision.md.

Real tensors (`runtime=local` on a CPU, modelled clock, random weights, greedy): each reply is compared with that of the
same requests when nobody migrates, and when each has the cluster for itself. In fp32 they must be equal; below it a
re-prefill sums in another order than the decodes did, and so does another batch.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from bench.mell.gpus import measured_at
from bench.mell.restless import Restless
from common.config import compose
from common.driver import drive
from common.record import RequestColumns, RunRecord
from common.sched.fleet import FleetPolicy
from common.sched.moving import Mode
from run import make_executor
from systems.registry import make_policy
from workloads.build import build

MODES: dict[str, tuple[Mode, ...]] = {"kv": ("kv",), "tokens": ("tokens",), "both in turn": ("kv", "tokens")}
DTYPES = ("float32", "bfloat16", "float16")
REQUESTS, OUTPUT, INSTANCES = 8, 64, 3
MODELS = ("tiny_llama",)


def replies(model: str, dtype: str, mode: tuple[Mode, ...] | None, once: bool, apart: bool) -> tuple[Any, int]:
    """(request -> generated ids, migrations done). `apart`: seconds between arrivals, so that each runs alone."""
    rate = 0.2 if apart else 50.0
    config = compose(["system=mell", "runtime=local", f"runtime.dtype={dtype}", "runtime.clock=modelled",
                      f"model={model}", "hardware=cpu", f"cluster.num_instances={INSTANCES}", "system.epoch_ms=3",
                      "system.min_instances=3",
                      "workload=poisson", "workload.lengths=fixed", "workload.prompt_tokens=64",
                      f"workload.output_tokens={OUTPUT}", f"workload.num_requests={REQUESTS}", f"workload.rate={rate}",
                      "engine.kv_blocks=200"])  # fmt: skip
    workload = build(config.workload, 0)
    record = RunRecord(RequestColumns.empty(REQUESTS))
    executor = make_executor(config, workload, record)
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    assert isinstance(policy, FleetPolicy)
    policy.planner = Restless(INSTANCES, cycle(mode) if mode else None, once)
    drive(policy, executor, record)
    found = executor.outputs()
    executor.close()
    return found, policy.mover.stats.kv_done + policy.mover.stats.token_done


def compare(found: Any, wanted: Any) -> tuple[int, float]:
    """(replies that are equal, mean share of a reply before its first difference)."""
    same = sum(found[request] == wanted[request] for request in wanted)
    firsts = [next((at for at, pair in enumerate(zip(found[request], wanted[request])) if pair[0] != pair[1]), OUTPUT)
              for request in wanted]  # fmt: skip
    return same, sum(firsts) / len(firsts) / OUTPUT


def main() -> None:
    """Print and write."""
    torch.set_num_threads(1)
    lines = [
        "Real tensors, emulated on one device (`python -m bench.mell.precision`): CPU, random weights, greedy, 8",
        "requests of 64 + 64 tokens on 3 instances. Equal: replies identical to the reference. Until: mean share of a",
        "reply before its first difference. `never` migrates nobody: it differs from `alone` by who shares the batch.",
        f"Measured at commit {measured_at()}.",
        "",
        "| model | type | migrates | as | migrations | equal to alone | until | equal to never | until |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for model in MODELS:
        for dtype in DTYPES:
            alone, _ = replies(model, dtype, None, False, True)
            never, moved = replies(model, dtype, None, False, False)
            rows: list[tuple[str, str, Any, int]] = [("never", "", never, moved)]
            for name, mode in MODES.items():
                for once in (True, False):
                    when = "once" if once else "every epoch"
                    rows.append((when, name, *replies(model, dtype, mode, once, False)))
            for when, name, found, moves in rows:
                first, second = compare(found, alone), compare(found, never)
                lines.append(f"| {model} | {dtype} | {when} | {name} | {moves} | {first[0]}/{REQUESTS} | "
                             f"{first[1]:.2f} | {second[0]}/{REQUESTS} | {second[1]:.2f} |")  # fmt: skip
                print(lines[-1], flush=True)
                assert dtype != "float32" or first[0] == second[0] == REQUESTS
    Path("results/mell/precision.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
