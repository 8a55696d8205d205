"""python -m bench.infinite_llm capacity|mixes|links|pace|planner: Infinite-LLM's experiments, simulated.

Each writes results/infinite_llm/<name>.json and a figure in results/figures/infinite_llm/. Nothing here is tuned to a
paper's number.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from common.build import cluster_model
from common.config import compose
from common.driver import drive
from common.executors.network import LinkSpec
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from run import execute, replay
from systems.infinite_llm.messages import Load
from systems.infinite_llm.planner import Planner, View
from systems.infinite_llm.throughput import Throughput
from systems.registry import make_policy
from workloads.types import plain

ROOT = Path(__file__).resolve().parent.parent / "results"
MODELS = (("llama2-7b", 1), ("llama2-13b", 2), ("llama2-70b", 4))
BASE = ["experiment=infinite_llm/mixes", "run.figures=false", "run.trace=false", "log.segments=false"]


def keep(name: str, rows: list[dict[str, Any]], figure: Any) -> None:
    """The table and the picture, under one name."""
    (ROOT / "infinite_llm").mkdir(exist_ok=True)
    (ROOT / "infinite_llm" / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    folder = ROOT / "figures" / "infinite_llm"
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    for kind in ("png", "pdf"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150)
    for row in rows:
        print(json.dumps(row))


def one_request(system: str, overrides: list[str], prompt: int, output: int) -> dict[str, Any]:
    """A single request on an otherwise empty cluster."""
    config = compose([*BASE, f"system={system}", *overrides])
    workload = plain("one", np.zeros(1, np.int64), np.array([prompt]), np.array([output]), output, "one request")
    begin = time.perf_counter()
    record = replay(config, workload).record
    requests = record.requests
    return {
        "finished": int(requests.status[0]) == 2,
        "ttft_s": (requests.first_token_ns[0] - requests.arrival_ns[0]) / 1e9,
        "tpot_ms": (requests.finish_ns[0] - requests.first_token_ns[0]) / 1e6 / max(1, output - 1),
        "wall_s": round(time.perf_counter() - begin, 1),
    }


def capacity() -> None:
    """Longest servable context: pooled free KV against one instance's, and requests at and over both limits."""
    rows = []
    for model, tp in MODELS:
        overrides = [f"model={model}", f"cluster.tp={tp}", f"cluster.num_instances={32 // tp}"]
        infos = cluster_model(compose([*BASE, *overrides])).instances
        each = infos[0].kv_cells // infos[0].num_layers
        pool = each * len(infos)
        output = 16
        longest = pool * 16 - output
        row: dict[str, Any] = {"model": model, "instances": len(infos), "blocks_each": each, "tokens_each": each * 16,
                               "tokens_pooled": pool * 16, "ratio": len(infos)}  # fmt: skip
        tries = (("vllm", each * 16 - output), ("vllm", each * 16 + 1), ("infinite_llm", each * 16 + 1),
                 ("infinite_llm", min(2_000_000, longest)), ("infinite_llm", longest),
                 ("infinite_llm", pool * 16 + 1))  # fmt: skip
        row["tries"] = [{"system": s, "prompt": p, **one_request(s, overrides, p, output)} for s, p in tries]
        rows.append(row)
        print(json.dumps(row), flush=True)
    figure, axis = plt.subplots(figsize=(6, 3.2))
    place = np.arange(len(rows))
    axis.bar(place - 0.2, [row["tokens_each"] / 1e3 for row in rows], 0.4, label="one instance (vllm_multi)")
    axis.bar(place + 0.2, [row["tokens_pooled"] / 1e3 for row in rows], 0.4, label="pool (infinite_llm)")
    axis.axhline(2000, color="grey", lw=0.8, ls=":")
    for index, row in enumerate(rows):
        axis.annotate(f"{row['ratio']}×", (index + 0.2, row["tokens_pooled"] / 1e3), ha="center", va="bottom")
    axis.set_yscale("log")
    axis.set_xticks(place, [f"{row['model']}\n{row['instances']} instances" for row in rows])
    axis.set_ylabel("longest context, K tokens")
    axis.set_title("32 A100-80GB, simulated; dotted: 2,000K", fontsize=9)
    axis.set_ylim(top=40000)
    axis.legend(fontsize=8, loc="upper left")
    keep("capacity", rows, figure)


def summary(overrides: list[str]) -> dict[str, Any]:
    """One run's numbers that are compared here."""
    begin = time.perf_counter()
    outcome = execute(compose([*BASE, *overrides]), quiet=True)
    if outcome.manifest["stopped"]:
        raise SystemExit(f"{overrides}: {outcome.manifest['stopped']}")  # a part of a run is no result
    kept = {key: value for key, value in outcome.summary.items() if isinstance(value, int | float)}
    return {**kept, "wall_s": round(time.perf_counter() - begin, 1)}


def mixes(traces: list[int], rates: list[float], num: int, instances: int) -> None:
    """The mixes at a few rates: proactive and reactive against vllm_multi."""
    rows = []
    for trace in traces:
        for rate in rates:
            for system in ("vllm", "infinite_llm"):
                for mode in ("",) if system == "vllm" else ("reactive", "proactive"):
                    label = mode or "vllm_multi"
                    found = summary([f"system={system}", *([f"system.mode={mode}"] if mode else []),
                                     f"workload.trace={trace}", f"workload.rate={rate}",
                                     f"workload.num_requests={num}", f"cluster.num_instances={instances}",
                                     f"run.name=infinite_llm/{label}"])  # fmt: skip
                    rows.append({"instances": instances, "trace": trace, "rate": rate, "system": label, **found})
                    print(trace, rate, label, {k: found.get(k) for k in ("completed", "output_throughput",
                          "mean_e2el_ms", "wall_s")}, flush=True)  # fmt: skip
    figure, axes = plt.subplots(2, len(traces), figsize=(2.6 * len(traces), 4.6), squeeze=False, sharey="row")
    for column, trace in enumerate(traces):
        for label, marker in (("vllm_multi", "o"), ("reactive", "s"), ("proactive", "^")):
            mine = [row for row in rows if row["trace"] == trace and row["system"] == label]
            axes[0][column].plot([row["rate"] for row in mine], [row["output_throughput"] for row in mine],
                                 marker=marker, ms=4, lw=1, label=label, alpha=0.8)  # fmt: skip
            axes[1][column].plot([row["rate"] for row in mine], [row["completed"] for row in mine], marker=marker, ms=4,
                                 lw=1, alpha=0.8)  # fmt: skip
        axes[0][column].set_title(f"mix {trace}", fontsize=9)
        axes[1][column].set_xlabel("requests/s")
    axes[0][0].set_ylabel("output tokens/s")
    axes[1][0].set_ylabel(f"served, of {num}")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"Llama-2-7B, {instances} A100-80GB, simulated", fontsize=9)
    keep(f"mixes_{instances}", rows, figure)


def links() -> None:
    """One request of 300K tokens over three instances' memory: what a link costs per output token."""
    rows = []
    config = compose([*BASE, "cluster.num_instances=4"])
    built = cluster_model(config)
    for bandwidth in (3e11, 5e10, 1.25e10, 1.25e9, 1.25e8):
        for latency_us in (2, 10, 50, 200):
            link = LinkSpec(bandwidth, latency_us * 1000)
            cluster = changed(built, nvlink=link, nic=link)
            workload = plain("one", np.zeros(1, np.int64), np.array([300_000]), np.array([64]), 64, "one request")
            record = RunRecord(RequestColumns.empty(1))
            executor = SimExecutor(cluster, workload, record)  # type: ignore[arg-type]
            policy = make_policy("infinite_llm", cluster.info(), config.engine, config.system_options)
            drive(policy, executor, record)
            done = record.requests
            kv_ms = 200_000 * cluster.instances[0].cell_bytes / 16 * cluster.num_layers / bandwidth * 1e3
            rows.append({"bandwidth": bandwidth, "latency_us": latency_us,
                         "tpot_ms": (done.finish_ns[0] - done.first_token_ns[0]) / 63e6,
                         "ship_kv_wire_ms": kv_ms})  # fmt: skip
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    for latency_us in (2, 10, 50, 200):
        mine = [row for row in rows if row["latency_us"] == latency_us]
        axis.plot([row["bandwidth"] / 1e9 for row in mine], [row["tpot_ms"] for row in mine], marker="o", ms=4,
                  label=f"ship queries, {latency_us} µs")  # fmt: skip
    mine = [row for row in rows if row["latency_us"] == 2]
    axis.plot([row["bandwidth"] / 1e9 for row in mine], [row["ship_kv_wire_ms"] for row in mine], "k--", lw=1,
              label="ship KV: wire time alone")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("link, GB/s one way")
    axis.set_ylabel("ms per output token")
    axis.set_title("300K tokens of Llama-2-7B over A100s, simulated", fontsize=9)
    axis.legend(fontsize=7)
    keep("links", rows, figure)


def planner() -> None:
    """Wall time of one plan."""
    rows = []
    rng = np.random.default_rng(0)
    for instances in (8, 32, 128, 512, 1024):
        loads, requests = {}, {}
        for index in range(instances):
            own = {index * 100 + i: int(rng.integers(10, 200)) for i in range(30)}
            used, waiting = sum(own.values()), int(rng.integers(0, 6)) * (index % 2)
            capacity = 7000 if index % 2 == 0 else used + 5
            loads[index] = Load(capacity, capacity - used, len(own), waiting, waiting * 200, used * 16)
            requests[index] = own
        made = Planner(Throughput(((1, 1e7), (256, 1.5e7)), 50.0), 16, hysteresis=0.0)  # a case in which moves pay
        begin = time.perf_counter()
        moves = made.plan(View(loads, requests))
        rows.append({"instances": instances, "plan_ms": round((time.perf_counter() - begin) * 1e3, 2),
                     "moves": len(moves)})  # fmt: skip
    figure, axis = plt.subplots(figsize=(4.4, 3))
    axis.loglog([row["instances"] for row in rows], [row["plan_ms"] for row in rows], marker="o")
    axis.set_xlabel("instances (30 requests each)")
    axis.set_ylabel("one plan, ms (measured, CPU)")
    keep("planner", rows, figure)


def main() -> None:
    """One experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("capacity", "mixes", "links", "planner"))
    parser.add_argument("--traces", type=int, nargs="*", default=[0, 1, 2, 3, 5, 8])
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0, 10.0])
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--instances", type=int, default=8)
    options = parser.parse_args()
    if options.name == "mixes":
        mixes(options.traces, options.rates, options.num, options.instances)
    else:
        {"capacity": capacity, "links": links, "planner": planner}[options.name]()


if __name__ == "__main__":
    main()
