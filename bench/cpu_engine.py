"""python -m bench.cpu_engine: the engine beside transformers on one CPU thread, and where the engine's time goes.

The same weights (one Hugging Face folder), prompts and output lengths, greedy, in fp32. Ours: `run.py runtime=local
system=vllm`, all requests at time 0, wall clock of the whole drive loop, queue and prefill included. Theirs: `generate`
with one static batch, and `generate_batch` (continuous batching). Rounds are interleaved, ratios taken within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.harness import exit_with, write_report
from bench.peers import Load, Ours, Theirs, Timing, folder_of, timed
from bench.stopwatch import Stopwatch
from common.engine.products import Products, onednn
from common.engine.spec import DecoderSpec

OUT = Path(__file__).resolve().parent.parent / "results" / "engine"
SPEC = DecoderSpec(
    name="llama-23m", family="llama", num_layers=6, hidden_size=384, intermediate_size=1024, num_heads=6,
    num_kv_heads=6, head_dim=64, vocab_size=32000, tied=True, max_position=2048,
)  # fmt: skip
# Of continuous batching: tokens a batch, blocks of KV (None: enough for all). Larger batches were no faster.
SETTINGS = ((256, 128), (256, None), (512, None))
SEED = 1
Settings = Sequence[tuple[int, int | None]]
OURS, STATIC = "kvplane", "generate, static batch"


# ------------------------------------------------------------ the comparison


def compare(ours: Ours, theirs: Theirs, rounds: int, settings: Settings) -> dict[str, list[Timing]]:
    """Rounds of everybody in turn, after one that warms up."""
    runs: dict[str, Callable[[], Timing]] = {OURS: ours.once, STATIC: lambda: timed(theirs.static)}
    for tokens, blocks in settings:
        name = f"generate_batch, {tokens} tokens a batch" + (f", {blocks} blocks" if blocks else "")
        runs[name] = partial(_continuous, theirs, tokens, blocks)
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            timing = run()
            if turn:
                found[name].append(timing)
    return found


def _continuous(theirs: Theirs, tokens: int, blocks: int | None) -> Timing:
    return timed(lambda: theirs.continuous(tokens, blocks))


def speed_table(found: dict[str, list[Timing]], load: Load) -> list[dict[str, Any]]:
    """A row each: times, and how many times as long as ours, round by round."""
    rows = []
    for name, timings in found.items():
        wall = [timing.wall_s for timing in timings]
        by_wall = [timing.wall_s / own.wall_s for timing, own in zip(timings, found[OURS])]
        by_cpu = [timing.cpu_s / own.cpu_s for timing, own in zip(timings, found[OURS])]
        rows.append({
            "engine": name, "median (s)": float(median(wall)), "min (s)": min(wall),
            "tokens/s (median)": load.new_tokens / median(wall),
            "CPU (s, median)": float(median(timing.cpu_s for timing in timings)),
            "times ours (median)": float(median(by_wall)), "from": min(by_wall), "to": max(by_wall),
            "min to min": min(wall) / min(own.wall_s for own in found[OURS]),
            "CPU times ours (median)": float(median(by_cpu)),
        })  # fmt: skip
    return rows


def token_table(found: dict[str, list[Timing]], prompts: list[list[int]], theirs: Theirs) -> list[dict[str, Any]]:
    """Who says the same as `generate`, in every round; for the first difference, how near a tie it is."""
    rows = []
    want = found[STATIC][0].replies
    for name, timings in found.items():
        wrong = {(index, tuple(reply)) for timing in timings
                 for index, reply in enumerate(timing.replies) if reply != want[index]}  # fmt: skip
        gaps = []
        for index, reply in sorted(wrong):
            at = next((at for at, (a, b) in enumerate(zip(reply, want[index])) if a != b), None)
            if at is not None:
                gaps.append(theirs.gap(prompts[index] + want[index][:at], reply[at], want[index][at]))
        same = len(prompts) - len({index for index, _ in wrong})
        widest = f"{max(gaps):.1e}" if gaps else ("-" if not wrong else "lengths differ")
        rows.append({"engine": name, "requests": len(prompts), "identical in all rounds": same,
                     "widest gap of two logits where it differs": widest})  # fmt: skip
    return rows


# ------------------------------------------------------------ where the time goes


def breakdown(ours: Ours) -> list[dict[str, Any]]:
    """Exclusive wall seconds of the engine's parts in one run under a stopwatch."""
    import common.engine.model
    import common.engine.runner

    executor, watch = ours.executor(), Stopwatch()
    runner = executor.world.runner
    watched = (
        (runner, "run_stage", "iterations, other"),
        (runner, "_prepare", "plan: rows, tables, slots"),
        (runner.backend, "plan", "plan: attention"),
        (runner.backend, "run", "attention"),
        (common.engine.runner, "write_kv", "KV writes"),
        (runner.decoder, "layer", "layers: linear and SiLU"),
        (runner.decoder, "norm", "norms"),
        (common.engine.model, "rotate", "rotary embedding"),
        (runner.decoder, "likeliest", "LM head, likeliest token"),
    )
    for owner, attribute, name in watched:
        watch.watch(owner, attribute, name)
    try:
        with watch.under("host: policy, queue, books"):
            ours.serve(executor)
    finally:
        watch.restore()
        executor.close()
    total = sum(watch.seconds.values())
    parts = sorted(watch.seconds.items(), key=lambda part: -part[1])
    return [{"part": name, "seconds": seconds, "percent": 100 * seconds / total} for name, seconds in parts]



Product = tuple[str, int]  # a linear weight of a layer, and the rows that it multiplies


def products(spec: DecoderSpec, tokens: int, sampled: int) -> Iterator[tuple[int, Product]]:
    """(layer, product) of one iteration; the last layer needs only the sampled rows after its keys and values."""
    for layer in range(spec.num_layers):
        rows = tokens if layer < spec.num_layers - 1 else sampled
        yield layer, ("qkv", tokens)
        for name in ("o", "gate_up", "down"):
            yield layer, (name, rows)


def iterations(ours: Ours) -> list[tuple[str, int, int]]:
    """(phase, tokens, sampled rows) of each: whole prompts up to the token budget, then all decodes together."""
    load, left = ours.load, ours.load.num * ours.load.prompt
    budget, found, done = ours.config.engine.max_num_batched_tokens, [], 0
    while left:
        chunk = min(left, budget)
        left -= chunk
        ends = (load.num * load.prompt - left) // load.prompt
        found.append(("prefill", chunk, ends - done))
        done = ends
    return found + [("decode", load.num, load.num)] * (load.output - 1)


def matmul_floor(ours: Ours, repeat: int = 5) -> list[dict[str, Any]]:
    """Seconds that the run's matrix products alone take, on the engine's own weights: the limit of its FLOPs here."""
    executor, load = ours.executor(), ours.load
    runner, engine = executor.world.runner, executor.world.instances[0]
    spec, works = executor.world.spec, iterations(ours)
    rows = []
    with torch.inference_mode():
        for phase in ("prefill", "decode"):
            mine = [(tokens, sampled) for kind, tokens, sampled in works if kind == phase]
            seconds = flops = 0.0
            for tokens, sampled in set(mine):
                times = mine.count((tokens, sampled))
                chain = list(products(spec, tokens, sampled))
                seconds += times * min(_multiply_s(runner.decoder.products, engine, chain) for _ in range(repeat))
                flops += times * sum(2.0 * num * getattr(engine.layer(at), name).numel() for at, (name, num) in chain)
            rows.append(_rate(f"linear layers, {phase}", flops, seconds))
        x = torch.randn(load.num, spec.hidden_size)
        one = min(timed(lambda: _nothing(runner.head(x))).wall_s for _ in range(2 * repeat))
    rows.append(_rate("LM head", 2.0 * spec.hidden_size * spec.vocab_size * load.new_tokens, one * load.output))
    executor.close()
    total = {key: sum(row[key] for row in rows) for key in ("GFLOP", "seconds")}
    return [*rows, _rate("all", 1e9 * total["GFLOP"], total["seconds"])]


def _multiply_s(products: Products, engine: Any, chain: Sequence[tuple[int, Product]]) -> float:
    inputs = {key: torch.randn(key[1], getattr(engine.layer(0), key[0]).shape[0]) for key in {key for _, key in chain}}
    start = time.perf_counter()
    for layer, key in chain:
        products.times(inputs[key], getattr(engine.layer(layer), key[0]), key[0])
    return time.perf_counter() - start


def _nothing(_: object) -> list[list[int]]:
    return []


def _rate(name: str, flops: float, seconds: float) -> dict[str, Any]:
    return {"products": name, "GFLOP": flops / 1e9, "seconds": seconds, "GFLOP/s": flops / 1e9 / max(seconds, 1e-12)}


# ------------------------------------------------------------ the report


def machine() -> str:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return (f"{model}, {os.cpu_count()} CPUs, one thread used, {torch.backends.cpu.get_cpu_capability()}; "
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}; "
            f"load average {os.getloadavg()[0]:.1f}: other work may share the machine")  # fmt: skip


def measure(spec: DecoderSpec, load: Load, rounds: int, seed: int, settings: Settings, out: Path) -> Path:
    """Everything, and the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_of(spec, seed, folder)
        ours = Ours(load, f"runtime.weights={folder}")
        prompts = ours.prompts()
        theirs = Theirs(folder, load, prompts)
        found = compare(ours, theirs, rounds, settings)
        floor = matmul_floor(ours)
        parts = breakdown(ours)
        tokens = token_table(found, prompts, theirs)
    best = min(timing.wall_s for timing in found[OURS])
    notes = [
        f"{spec.name}: {spec.num_layers} layers x {spec.hidden_size}, vocabulary {spec.vocab_size:,}, fp32, random "
        f"weights (seed {seed}) in one folder for all. {load.num} requests, prompt {load.prompt} + {load.output} new "
        "tokens, greedy, nobody stops early; prefill is part of the time, loading is not.",
        f"Machine: {machine()}.",
        f"{rounds} interleaved rounds after a warm-up; ratios are taken within a round. CPU seconds are of all threads "
        "of the process: they exceed one thread's if more were used, and leave out what other work took of the wall.",
        f"{OURS}: system=vllm, runtime=local, a fresh engine each round (its KV pages are faulted in anew), chunks of "
        f"{ours.config.engine.max_num_batched_tokens} tokens. generate: SDPA, no end token. generate_batch: blocks of "
        "32 tokens, enough for all requests unless it says how many, no sharing; with what it sets up for each call.",
        f"Matrix products of ours by {'oneDNN and torch.mm' if onednn() else 'torch.mm'}.",
        f"The matrix products alone take {floor[-1]['seconds']:.2f} s ({floor[-1]['GFLOP/s']:.0f} GFLOP/s, best of 5) "
        f"of {best:.2f} s: {100 * floor[-1]['seconds'] / best:.0f}% of the best round.",
    ]
    tables = {
        "Speed": speed_table(found, load),
        "Tokens, compared with generate": tokens,
        "Where the engine's time goes (one run under a stopwatch)": parts,
        "Matrix products alone": floor,
    }
    return write_report("cpu", "The engine on a CPU, beside transformers", notes, tables, out)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # threads that a library starts have pools of their own
        os.execve(sys.executable, [sys.executable, "-m", "bench.cpu_engine", *sys.argv[1:]],
                  {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})  # fmt: skip
    torch.set_num_threads(1)
    measure(SPEC, Load(), options.rounds, options.seed, SETTINGS, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
