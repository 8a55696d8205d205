"""python -m bench.memory_engine: does the engine take the memory that its books say?

Each case is a process of its own: it runs a toy first, so that the interpreter, torch and its matrix library have what
they always need, and reads its resident set; then it loads a model, serves, and reads its peak. The difference is
compared with the sum of what the engine accounts for, part by part. It should lie within 10%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import exit_with, write_report
from bench.peers import Load, Ours, folder_of
from common.engine.rss import current_rss, peak_rss
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource
from common.kernels.reference import BUCKET_BLOCKS
from common.types import Tier

OUT = Path(__file__).resolve().parent.parent / "results" / "engine"
MIB = 1 << 20
SPEC = DecoderSpec(
    name="llama-82m", family="llama", num_layers=8, hidden_size=768, intermediate_size=2048, num_heads=12,
    num_kv_heads=12, head_dim=64, vocab_size=32000, tied=True, max_position=2048,
)  # fmt: skip
LOAD = Load(16, 256, 16)
TOY = DecoderSpec(
    name="toy", family="llama", num_layers=2, hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=2,
    head_dim=32, vocab_size=512, tied=True, max_position=256,
)  # fmt: skip
BLOCK = 16  # tokens
CASES = ("random weights, copy on the host", "folder of weights, mapped")


@dataclass(frozen=True)
class Measured:
    """One case: bytes that the process took, and what is accounted for."""

    taken: int
    parts: dict[str, int]
    budget: int
    in_arena: int

    @property
    def accounted(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def overrides(spec: DecoderSpec) -> list[str]:
    """A model of these sizes with random weights."""
    sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return ["model=tiny_llama", f"model.tied_embeddings={str(spec.tied).lower()}",
            f"model.max_position={spec.max_position}", f"model.name={spec.name}",
            *(f"model.{key}={getattr(spec, key)}" for key in sizes)]  # fmt: skip


def activation_bytes(spec: DecoderSpec, tokens: int, rows: int) -> int:
    """Buffers that are kept from layer to layer, and what else is alive at once of the largest iteration, in fp32."""
    width, kv = spec.hidden_size, spec.kv_size
    gathered = min(BUCKET_BLOCKS * BLOCK, tokens) * 2 * kv
    kept = tokens * (spec.qkv_size + spec.q_size + kv) + min(tokens, 512) * 3 * spec.intermediate_size + gathered
    attention = tokens * (2 * spec.q_size + 2 * width)  # queries, o, hidden, normed
    logits = rows * (spec.vocab_size + 2 * width) + tokens * width
    return 4 * (kept + max(attention, logits))


def parts_of(executor: Any, load: Load, touched: int) -> dict[str, int]:
    """What is in memory at the peak by the books, in bytes."""
    world = executor.world
    engine, spec, source = world.instances[0], world.spec, world.source
    table = spec.vocab_size * spec.hidden_size * 4
    parts = {
        "parameters (slabs)": spec.num_layers * engine.info.layer_param_bytes,
        "KV written": touched * engine.info.cell_bytes,
        "embedding and final norm": table + 4 * spec.hidden_size,
        "LM head, transposed": table,
        "rotary tables": spec.max_position * spec.head_dim * 4,
    }
    if isinstance(source, MemorySource):
        parts["host copy of the source"] = spec.num_layers * source.layout.num_bytes + (0 if spec.tied else table)
    else:
        parts["mapped files"] = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    tokens = min(load.num * load.prompt, 2048)
    parts["activations"] = activation_bytes(spec, tokens, load.num)
    return parts


def serve(ours: Ours) -> tuple[Any, int]:
    """Serve all; the executor, and how many cells have been handed out."""
    executor = ours.executor()
    cells: set[int] = set()
    for store in executor.world.instances[0].stores.values():
        store.poison = lambda new: cells.update(new.tolist())  # it is told of every cell that is handed out
    assert Tier.HBM in executor.world.instances[0].stores
    ours.serve(executor)
    return executor, len(cells)


def child(spec: DecoderSpec, load: Load, folder: str | None) -> Measured:
    """Measure in this process, which has done nothing else."""
    toy, _ = serve(Ours(Load(4, 32, 4), *overrides(TOY)))
    toy.close()
    before = current_rss()
    ours = Ours(load, f"runtime.weights={folder}") if folder else Ours(load, *overrides(spec))
    executor, touched = serve(ours)
    taken = peak_rss() - before
    arena = executor.world.instances[0].arena
    arena.book.check()
    parts = parts_of(executor, load, touched)
    in_arena = parts["parameters (slabs)"] + parts["KV written"]
    assert in_arena <= arena.book.used_bytes <= arena.budget_bytes, "parameters and KV exceed the instance's budget"
    return Measured(taken, parts, arena.budget_bytes, in_arena)


def measure(spec: DecoderSpec, load: Load, folder: str | None) -> Measured:
    """In a fresh process of one thread."""
    sizes = asdict(spec) | {"rope": None, "dtype": None}
    question = json.dumps({"spec": sizes, "load": asdict(load), "folder": folder})
    command = [sys.executable, "-m", "bench.memory_engine", "--child", question]
    answer = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=OUT.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    return Measured(**json.loads(answer.stdout.splitlines()[-1]))


def answer_child(question: str) -> None:
    """The child's side of `measure`."""
    asked = json.loads(question)
    sizes = {key: value for key, value in asked["spec"].items() if value is not None}
    torch.set_num_threads(1)
    print(json.dumps(asdict(child(DecoderSpec(**sizes), Load(**asked["load"]), asked["folder"]))))


def report(found: dict[str, Measured], spec: DecoderSpec, load: Load, out: Path) -> Path:
    """Totals and parts."""
    totals: list[dict[str, Any]] = [
        {"case": name, "peak taken (MiB)": one.taken / MIB, "accounted (MiB)": one.accounted / MIB,
         "difference": one.taken / one.accounted - 1, "parameters and KV (MiB)": one.in_arena / MIB,
         "their budget (MiB)": one.budget / MIB}
        for name, one in found.items()
    ]  # fmt: skip
    parts = [{"case": name, "part": part, "MiB": size / MIB} for name, one in found.items() for part, size in
             one.parts.items()]  # fmt: skip
    notes = [
        f"{spec.name}: {spec.num_layers} layers x {spec.hidden_size}, vocabulary {spec.vocab_size:,}, fp32. "
        f"{load.num} requests of {load.prompt} + {load.output} tokens, all at once, one thread. "
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}.",
        "Peak taken: highest resident set of a fresh process less that after a toy run (imports, libraries). KV "
        "written: cells that were ever handed out, whole. Activations are an estimate; mapped files are pages that "
        "the system may take back at any time.",
    ]
    return write_report("memory", "Resident memory of the engine and its accounts", notes,
                        {"Peak and accounts": totals, "Accounts": parts}, out)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both cases, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        answer_child(options.child)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder_of(SPEC, 0, Path(name))
        found = {case: measure(SPEC, LOAD, folder) for case, folder in zip(CASES, (None, name))}
    report(found, SPEC, LOAD, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
