"""python -m bench.profile: measure this device's operators for `python -m common.cost.fit --measure`, which calls it.

Writes, below --out: one folder per model with the tables that `common.cost.tables_vllm` reads (`dense.csv`,
`per_sequence.csv`, `attention.csv`, us) and `iterations.csv` (whole iterations of the engine), and `device.json`
(rates and bytes). Every operator runs with the engine's own code and kernels, in its type.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from bench.harness import exit_with
from bench.iterations import SHAPES, Engine
from bench.operators import BLOCK_SIZE, LATTICES, Lattice, Operators
from bench.timing import Timer, copy_bandwidth, matmul_rate
from common.config import CONF
from common.cost.specs import ModelSpec, load_model
from common.engine.spec import check_device, dtype_named, from_model_spec
from common.errors import ConfigError
from common.kernels.cache import copy_cells
from common.provenance import git_state

Job = tuple[str, tuple[int | str, ...], Callable[[], float]]
COLUMNS = {
    "dense.csv": ("layer", "tokens", "time_us"),
    "per_sequence.csv": ("layer", "sequences", "time_us"),
    "attention.csv": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "iterations.csv": ("chunks", "new", "cached", "decodes", "context", "time_us"),
}


def model_named(name: str) -> ModelSpec:
    """A model of conf/model."""
    path = CONF / "model" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise ConfigError(f"model {name!r} is unknown; known: {known}")
    return load_model(yaml.safe_load(path.read_text(encoding="utf-8")))


def operator_jobs(operators: Operators, lattice: Lattice) -> list[Job]:
    """(file, key, measure in ns) of every operator."""
    jobs: list[Job] = [("dense.csv", (name, m), job) for name, m, job in operators.linears(lattice.tokens)]
    jobs += [("dense.csv", (name, m), job) for name, m, job in operators.elements(lattice.tokens)]
    jobs += [("per_sequence.csv", (name, n), job) for name, n, job in operators.head(lattice.rows)]
    jobs += [("attention.csv", key, job) for key, job in operators.attentions(lattice)]
    return jobs


def iteration_jobs(engine: Engine, repeats: int) -> list[Job]:
    """Whole iterations."""
    return [("iterations.csv", tuple(shape), partial(engine.nanoseconds, shape, repeats)) for shape in SHAPES]


def run_jobs(jobs: Sequence[Job], passes: int, what: str, quiet: bool) -> dict[str, list[tuple[Any, ...]]]:
    """Rows by file: of each point the fastest of several passes over all of them, as disturbances only slow things.

    Progress, rate and time to go are on stderr."""
    best = [float("inf")] * len(jobs)
    order = [index for _ in range(passes) for index in range(len(jobs))]
    for index in tqdm(order, desc=what, unit=" points", disable=quiet, file=sys.stderr, mininterval=1.0):
        best[index] = min(best[index], jobs[index][2]())
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for (file, key, _), time_ns in zip(jobs, best):
        rows.setdefault(file, []).append((*key, round(time_ns / 1e3, 4)))
    return rows


def write_rows(folder: Path, rows: dict[str, list[tuple[Any, ...]]]) -> None:
    """One csv each."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in rows.items():
        with (folder / file).open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(COLUMNS[file])
            writer.writerows(lines)


def cell_copies(device: torch.device, dtype: torch.dtype, big: int) -> dict[str, float]:
    """KV copies within the device (between instances) and to and from the host: bytes/s of many cells, ns of one."""
    out = {}
    shape = (2, BLOCK_SIZE, 8, 64)
    cell_bytes = 2 * BLOCK_SIZE * 8 * 64 * dtype.itemsize
    num = max(2, big // cell_bytes)
    here, there = (torch.randn(num, *shape, device=device).to(dtype) for _ in range(2))
    host = torch.empty(num, *shape, dtype=dtype, pin_memory=device.type == "cuda").normal_()
    timer = Timer(device, 0.1)
    for name, src, dst in (("peer", here, there), ("to_host", here, host), ("from_host", host, there)):
        times = {}
        for count in (1, num):
            src_ids, dst_ids = (torch.arange(count, device=kv.device) for kv in (src, dst))
            times[count] = timer.median_ns([partial(copy_cells, src, src_ids, dst, dst_ids)], eager=True)
        out[f"{name}_latency_ns"] = times[1]
        out[f"{name}_bandwidth"] = (num - 1) * cell_bytes / max(times[num] - times[1], 1.0) * 1e9
    return out


def describe(device: torch.device, dtype: torch.dtype, big: int, size: int) -> dict[str, Any]:
    """Rates and bytes of the device, and what measured them."""
    cuda = device.type == "cuda"
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()}), one thread",
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_bytes": dtype.itemsize,
        "memory_bytes": torch.cuda.mem_get_info(device)[1] if cuda else host_memory,
        "host_memory_bytes": host_memory,
        "num_sm": torch.cuda.get_device_properties(device).multi_processor_count if cuda else torch.get_num_threads(),
        "matmul_flops": matmul_rate(device, dtype, size),
        "copy_bandwidth": copy_bandwidth(device, big),
        **cell_copies(device, dtype, big),
        "torch": torch.__version__,
        "git": git_state(),
    }  # fmt: skip


def measure(
    names: Iterable[str], device: torch.device, dtype: torch.dtype, lattice: str, out: Path, quiet: bool = False
) -> None:
    """Everything, into `out`."""
    began, toy = time.perf_counter(), lattice == "toy"
    timer, passes = Timer(device, 0.002 if toy else 0.015, 3), 1 if toy else 2
    out.mkdir(parents=True, exist_ok=True)
    models = {name: model_named(name) for name in names}
    big = (1 << 20) if toy else (1 << 30 if device.type == "cuda" else 1 << 26)
    facts = describe(device, dtype, big, 128 if toy else (8192 if device.type == "cuda" else 1024))
    for name, model in models.items():
        spec = from_model_spec(model, dtype)
        rows = run_jobs(
            operator_jobs(Operators(model, spec, device, timer), LATTICES[lattice]), passes, f"{name} operators", quiet
        )
        write_rows(out / name, rows)
        engine = Engine(spec, device, max(shape.kv_blocks for shape in SHAPES) + 8)
        write_rows(out / name, run_jobs(iteration_jobs(engine, 3), passes, f"{name} iterations", quiet))
        facts["attention"] = engine.world.describe()["attention"]
        engine.close()
    facts |= {"models": list(models), "seconds": round(time.perf_counter() - began, 1)}
    (out / "device.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on CUDA, unless given")
    parser.add_argument("--model", action="append", help="of conf/model; may be given more than once")
    parser.add_argument("--lattice", choices=tuple(LATTICES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = dtype_named(options.dtype or ("bfloat16" if cuda else "float32"))
    check_device(device, dtype)
    names = options.model or (["llama3.1-8b"] if cuda else ["tiny_llama", "llama_23m"])
    measure(names, device, dtype, options.lattice or ("large" if cuda else "small"), options.out, options.quiet)
    return 0


if __name__ == "__main__":
    exit_with(main)
