"""python -m bench.validate_server: the `vllm` baseline against real vLLM 0.19 server runs.

Reference: any folder with `meta.json` (resolved engine configuration) and `requests.jsonl` (times of each request) as
LLMServingSim publishes them; arrivals and prefix hashes come from the trace that the meta file names. Only operator
tables are fitted; nothing here is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import RESULTS, Latencies, compare, exit_with, latencies, run, write_report
from common.errors import ConfigError
from common.record import RunRecord
from workloads.paths import data_root

RUN = "measured/vllm_0.19_rtx4090_llama-3.1-8b"
NULL_BLOCKS = 1  # vLLM keeps block 0 as the null block: it is counted in num_gpu_blocks and never holds KV


def measured(folder: Path) -> Latencies:
    """TTFT = first - queued, TPOT = (last - first)/(n - 1), latency = last - queued, in ms."""
    if not (folder / "requests.jsonl").is_file():
        raise ConfigError(f"{folder}/requests.jsonl is missing; set KVPLANE_DATA or give the run's folder")
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]

    def column(name: str) -> Any:
        return np.array([row[name] for row in rows], dtype=np.float64)

    queued, first, last, output = (column(k) for k in ("queued_ts", "first_token_ts", "last_token_ts", "output_toks"))
    many = output > 1
    return Latencies(1e3 * (first - queued), 1e3 * ((last - first)[many] / (output[many] - 1)), 1e3 * (last - queued))


def overrides(folder: Path, trace: str, model: str, hardware: str) -> list[str]:
    """The server's own configuration, from its meta file, in our words."""
    meta = json.loads((folder / "meta.json").read_text())
    scheduler, cache = meta["resolved_config"]["scheduler_config"], meta["kv_cache"]
    if not scheduler["enable_chunked_prefill"]:
        raise ConfigError(f"{folder}/meta.json: only chunked prefill (vLLM V1) is compared here")
    traits = "vllm-async" if scheduler.get("async_scheduling") else "vllm-sync"
    return [
        f"model={model}", f"hardware={hardware}", "cluster.num_instances=1",
        f"cluster.tp={meta['engine_kwargs']['tensor_parallel_size']}",
        "workload=file", f"workload.path={trace}", "engine.scheduler=chunked",
        f"engine.kv_blocks={cache['num_gpu_blocks'] - NULL_BLOCKS}", f"engine.block_size={cache['block_size']}",
        f"engine.prefix_caching={str(cache['enable_prefix_caching']).lower()}",
        f"engine.max_num_batched_tokens={scheduler['max_num_batched_tokens']}",
        f"engine.max_num_seqs={scheduler['max_num_seqs']}",
        f"engine.max_model_len={meta['engine_kwargs']['max_model_len']}", f"cost.traits={traits}",
        "run.sample_ms=250",
    ]  # fmt: skip


def draw(folder: Path, record: RunRecord, name: str) -> Path | None:
    """Running, waiting and KV use of the simulation over what the server logged each second."""
    if not (folder / "timeseries.csv").is_file():
        return None
    from common.plots.style import P50, new_figure, save, styled

    real = np.genfromtxt(folder / "timeseries.csv", delimiter=",", names=True)
    timeline = record.timeline
    time_s = np.array(timeline.time_ns) / 1e9
    used = 100 * np.array(timeline.kv_used_blocks) / np.maximum(1, np.array(timeline.kv_capacity_blocks))
    with styled():
        figure, axes = new_figure(3, 1, 7.5, 6.5, sharex=True)
        for axis, ours, theirs, label in (
            (axes[0, 0], np.array(timeline.running), real["running"], "running requests"),
            (axes[1, 0], np.array(timeline.waiting), real["waiting"], "waiting requests"),
            (axes[2, 0], used, real["kv_cache_pct"], "KV blocks in use (%)"),
        ):
            axis.plot(real["t"], theirs, color="0.6", linewidth=2.6, label="vLLM, measured")
            axis.plot(time_s, ours, color=P50, linewidth=1.2, label="kvplane, simulated")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        axes[0, 0].legend(loc="upper right")
        axes[2, 0].set_xlabel("time since the first arrival (s)")
        figure.tight_layout()
        return save(figure, RESULTS, name)[0]


def main(arguments: list[str] | None = None) -> int:
    """Compare, print, write; exit status 2 when data is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=data_root() / RUN)
    parser.add_argument("--trace", default="sharegpt_300")
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--hardware", default="rtx4090")
    parser.add_argument("--name", default="server_rtx4090_llama3.1-8b")
    options = parser.parse_args(arguments)
    reference = measured(options.run)
    _, record = run(overrides(options.run, options.trace, options.model, options.hardware))
    rows = compare(latencies(record), reference)
    notes = [
        f"Simulated against measured: one real vLLM server run ({options.run.name}), the same arrivals and lengths.",
        f"{sum(record.requests.num_preemptions)} preemptions simulated. Nothing was fitted to this run.",
    ]
    path = draw(options.run, record, options.name)
    if path is not None:
        notes.append(f"Figure: {path.name}.")
    write_report(options.name, "Against a real vLLM server", notes, {"latency": rows})
    return 0


if __name__ == "__main__":
    exit_with(main)
