"""What is timed. Loaded by path in a child process, so that `common` is whichever tree the child was given.

Each case makes its inputs once and returns what one call does; one CPU thread, seeded, no files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Call = Callable[[], object]
BLOCK = 16
SMALL = ["cluster.num_instances=2", "run.figures=false"]


def _attention(rows: int, new: int, context: int) -> Call:
    import numpy as np
    import torch

    from common.kernels.plan import Rows
    from common.kernels.reference import TorchBackend

    blocks = context // BLOCK
    tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    ones = np.ones(rows, np.int32)
    plan_rows = Rows(np.arange(rows, dtype=np.int32) * new, ones * new, ones * (context - new), ones * 0,
                     ones * context, tables)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows * new, 8, 64, generator=generator)
    kv = torch.randn(rows * blocks, 2, BLOCK, 4, 64, generator=generator)
    backend = TorchBackend(BLOCK)

    def call() -> object:
        return backend.run(backend.plan(plan_rows, "cpu"), q, kv, 0, 0.125)

    return call


def decode() -> Call:
    """16 requests, one query each over 512 keys."""
    return _attention(16, 1, 512)


def prefill() -> Call:
    """One prompt piece of 128 tokens over 512 keys."""
    return _attention(1, 128, 512)


def write() -> Call:
    """256 tokens into their blocks."""
    import torch

    from common.kernels.cache import write_kv

    generator = torch.Generator().manual_seed(0)
    kv = torch.zeros(64, 2, BLOCK, 4, 64)
    k, v = torch.randn(2, 256, 4, 64, generator=generator)
    slots = torch.randperm(64 * BLOCK, generator=generator)[:256]
    return lambda: write_kv(kv, k, v, slots)


def merge() -> Call:
    """Two partial results of 256 queries."""
    import torch

    from common.kernels.merge import merge_two

    generator = torch.Generator().manual_seed(0)
    old, new = ((torch.randn(256, 8, 64, generator=generator), torch.randn(256, 8, generator=generator))
                for _ in range(2))  # fmt: skip
    return lambda: merge_two(old, new)


def _run(overrides: list[str]) -> Call:
    from bench.harness import run

    return lambda: run([*SMALL, *overrides])


def engine() -> Call:
    """A small model serves twelve requests on two instances: real tensors, the engine's whole loop."""
    return _run(["runtime=local", "model=tiny_llama", "hardware=cpu", "workload=poisson", "workload.num_requests=12",
                 "workload.rate=50", "workload.lengths=fixed", "workload.prompt_tokens=48",
                 "workload.output_tokens=16"])  # fmt: skip


def simulator() -> Call:
    """A simulated burst of a few hundred requests."""
    return _run(["workload=burst", "workload.rate=10", "workload.duration_s=60", "workload.first_burst_s=20"])


CASES: dict[str, tuple[Callable[[], Call], int]] = {  # what, and how many calls make one timing
    "kernel: decode attention": (decode, 6),
    "kernel: prefill attention": (prefill, 12),
    "kernel: KV write": (write, 300),
    "kernel: merge": (merge, 180),
    "engine: tiny model, 12 requests": (engine, 1),
    "simulator: burst": (simulator, 1),
}


def timed(call: Call, inner: int) -> int:
    """CPU ns of this process for `inner` calls: another process that takes the core away does not count."""
    import gc
    import time

    gc.collect()
    begin = time.process_time_ns()
    for _ in range(inner):
        call()
    return time.process_time_ns() - begin


def prepared(name: str) -> tuple[Any, int]:
    """A case, warmed up."""
    make, inner = CASES[name]
    call = make()
    call()
    return call, inner
