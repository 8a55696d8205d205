"""python -m bench.worker_cost --base FILE: what an iteration costs beyond its operators when a worker runs it.

Closed loops of 1 to 16 equal requests on one worker, by the wall clock: from token to token nothing happens but one
iteration, its order, its answer and their books (CPU seconds of worker and policy process are beside it). What is left
beyond the operators of FILE (python -m common.cost.fit --measure) is fitted as host time, so much an iteration and so
much a request.

Then prompts with a reply of one token, one after the other: what they take beyond that is the host time of a piece of
a prompt. And the same prompts with pauses between them, as an arrival finds cores that sleep and caches that are
others': how much longer they take, by the clock, and after how long a pause. All of it, with FILE's other numbers,
makes a new hardware file."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.comm import beside
from bench.harness import exit_with, latencies, write_report
from bench.workers import MODEL, OUT, run_workers
from common.build import cluster_model
from common.config import RunConfig, compose
from common.cost.model import InstanceCost
from common.cost.profile import nonnegative
from common.errors import ConfigError

BATCHES = (1, 2, 4, 8, 16)
PROMPT, OUTPUT, ROUNDS = 16, 9, 30  # all prompts of a loop fit in one iteration
PROMPTS = (16, 64, 128, 256)  # tokens, of requests of one iteration
PAUSES_MS = (1, 2, 5, 10, 20)
LONG_MS, MIDDLE = 50, 64  # the pause that is long, and the prompt of the others
TRIES = 3  # of everything, in turn; the quickest counts, as neighbours only slow things down
CLOCK = "clock, P50 (ms)"
Rows = list[dict[str, Any]]


class Start(NamedTuple):
    """What a prompt's iteration and one after idleness take beyond others, as `HardwareSpec` names it."""

    chunk_ns: float
    wake_share: float
    wake_after_ns: float


def worker(base: Path, prompt: int, output: int, num: int, *arrivals: str) -> list[str]:
    """So many equal requests for one worker."""
    return ["system=vllm", *MODEL, f"hardware={base}", "cluster.num_instances=1", "engine.kv_blocks=200",
            *arrivals, f"workload.num_requests={num}", "workload.lengths=fixed", f"workload.prompt_tokens={prompt}",
            f"workload.output_tokens={output}"]  # fmt: skip


def loop(base: Path, batch: int, prompt: int = PROMPT, output: int = OUTPUT) -> list[str]:
    """A closed loop of so many requests, `ROUNDS` times."""
    return worker(base, prompt, output, batch * ROUNDS, "workload=closed_loop", f"workload.concurrency={batch}")


def spaced(base: Path, prompt: int, every_ms: float) -> list[str]:
    """Requests of one iteration at even distances."""
    return worker(base, prompt, 1, ROUNDS, "workload=poisson", f"workload.rate={1e3 / every_ms}", "workload.cv=0.01")


def operators_ns(config: RunConfig, batch: int, prompt: int = 0) -> float:
    """What the operators take of a decode iteration in the middle of such a request, or of a prompt's."""
    cost = cluster_model(config).cost(config.model.num_layers, True, True)
    assert isinstance(cost, InstanceCost)
    bare = replace(cost.engine, host_ns=0, host_per_seq_ns=0, host_per_chunk_ns=0)
    alone = InstanceCost(config.model, config.hardware, engine=bare)
    if prompt:
        return float(alone.iteration_ns([(prompt, 0)], 0, 0, 1))
    return float(alone.iteration_ns([], batch, PROMPT + OUTPUT // 2, batch))


def measure(base: Path, tries: int) -> Rows:
    """A row for each batch."""
    tried = [[_measure(base, batch) for batch in BATCHES] for _ in range(tries)]
    return [min(same, key=lambda row: row[CLOCK]) for same in zip(*tried)]


def _measure(base: Path, batch: int) -> dict[str, Any]:
    overrides = loop(base, batch)
    record, spent, _ = run_workers(overrides)
    tpot_ms = latencies(record).tpot
    return {"requests": batch, "operators (ms)": operators_ns(compose(overrides), batch) / 1e6,
            "CPU, at the worker (ms)": spent["CPU, at the worker"],
            "CPU, in the policy process (ms)": spent["CPU, in the policy process"],
            "clock, P10 (ms)": float(np.percentile(tpot_ms, 10)), CLOCK: float(np.median(tpot_ms))}  # fmt: skip


def fit(rows: Rows) -> tuple[float, float]:
    """Host time in ns: of an iteration, and of each of its requests."""
    batch, took, device = (np.array([row[key] for row in rows]) for key in ("requests", CLOCK, "operators (ms)"))
    shape = np.stack([np.ones(len(rows)), batch], axis=1)
    host = nonnegative(shape, (took - device) * 1e6, 1.0 / took)
    for row, value in zip(rows, shape @ host):
        row["with host time (ms)"] = row["operators (ms)"] + value / 1e6
    return float(host[0]), float(host[1])


def first_tokens(tries: int, *loops: list[str]) -> list[float]:
    """P50 of the time to first token of each of these, in ms: the least of several tries in turn."""
    tried = [[float(np.median(latencies(run_workers(overrides)[0]).ttft)) for overrides in loops]
             for _ in range(tries)]  # fmt: skip
    return [min(same) for same in zip(*tried)]


def measure_prompts(base: Path, tries: int) -> Rows:
    """A row for each prompt: one after the other, and with long pauses."""
    rows = []
    for prompt in PROMPTS:
        overrides = loop(base, 1, prompt, 1)
        operators = operators_ns(compose(overrides), 1, prompt) / 1e6
        warm, cold = first_tokens(tries, overrides, spaced(base, prompt, LONG_MS))
        rows.append({"prompt (tokens)": prompt, "operators (ms)": operators, CLOCK: warm,
                     f"every {LONG_MS} ms, P50 (ms)": cold, "longer": cold / warm - 1})  # fmt: skip
    return rows


def measure_pauses(base: Path, tries: int) -> Rows:
    """A row for each pause before a prompt."""
    alone = loop(base, 1, MIDDLE, 1)
    (usual,) = first_tokens(tries, alone)
    pauses = (*PAUSES_MS, LONG_MS)
    warm, *cold = first_tokens(tries, alone, *(spaced(base, MIDDLE, usual + pause) for pause in pauses))
    rows: Rows = [{"pause (ms)": 0, CLOCK: warm, "longer": 0.0}]
    return rows + [{"pause (ms)": pause, CLOCK: one, "longer": one / warm - 1} for pause, one in zip(pauses, cold)]


def fit_start(prompts: Rows, pauses: Rows, host: tuple[float, float]) -> Start:
    """Medians over prompts; and the longest pause after which less than half of the effect was there."""
    beyond = [row[CLOCK] - row["operators (ms)"] - sum(host) / 1e6 for row in prompts]
    share = float(np.median([row["longer"] for row in prompts]))
    full = pauses[-1]["longer"]
    short = [row["pause (ms)"] for row in pauses if row["longer"] < full / 2]
    return Start(max(0.0, float(np.median(beyond)) * 1e6), max(0.0, share), max(short, default=0) * 1e6)


def write_profile(base: Path, name: str, host: tuple[float, float], start: Start) -> Path:
    """The hardware file with these host times; its grid beside it."""
    import yaml

    values = yaml.safe_load(base.read_text(encoding="utf-8"))
    values.update(name=name, host_ns=max(1, int(host[0])), host_per_seq_ns=max(1, int(host[1])),
                  host_per_chunk_ns=int(start.chunk_ns) or None,
                  wake_share=round(start.wake_share, 3) or None, wake_after_ns=int(start.wake_after_ns) or None,
                  provenance=f"{values.get('provenance', '')}; host times: python -m bench.worker_cost")  # fmt: skip
    return beside(base, values)


def host_profile(base: Path, name: str, tries: int) -> tuple[Path, str, dict[str, Rows]]:
    """The hardware file with all host times of workers, in words, and what was measured."""
    rows, prompts, pauses = measure(base, tries), measure_prompts(base, tries), measure_pauses(base, tries)
    host = fit(rows)
    start = fit_start(prompts, pauses, host)
    worst = max(abs(row["with host time (ms)"] / row[CLOCK] - 1) for row in rows)
    said = (
        f"Host time: {host[0] / 1e3:,.0f} us an iteration and {host[1] / 1e3:,.0f} us a request; with it the closed "
        f"loops are met within {worst:.0%}. Of each piece of a prompt {start.chunk_ns / 1e3:,.0f} us more. An "
        f"iteration after a pause of more than {start.wake_after_ns / 1e6:g} ms takes {start.wake_share:.0%} longer."
    )
    tables = {"Iterations": rows, "Prompts with a reply of one token": prompts,
              f"A prompt of {MIDDLE} tokens after a pause": pauses}  # fmt: skip
    return write_profile(base, name, host, start), said, tables


def main() -> int:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker_cost", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a measured hardware file")
    parser.add_argument("--name", default="measured-workers", help="of the hardware file that gets the host times")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not options.base.is_file():
        raise ConfigError(f"--base {options.base}: no such file")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    path, said, tables = host_profile(options.base, options.name, TRIES)
    notes = [
        f"Measured: tiny_llama in float32, one worker and the policy process on {os.cpu_count()} cores, shared with "
        f"others (load {load:.1f} to {os.getloadavg()[0]:.1f}); torch {torch.__version__}; {ROUNDS} rounds of a closed "
        f"loop of equal requests ({PROMPT} + {OUTPUT} tokens); the quickest of {TRIES} tries.",
        f"{said} Hardware file: {path.name}.",
    ]
    write_report("worker_cost", "What a worker's iteration costs beyond its operators", notes, tables, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
