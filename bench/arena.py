"""python -m bench.arena: what it costs to turn layers into KV and back, and that the memory really moves.

For slabs of several sizes: drop k layers, write the new KV, shrink, restore, write the layers; several times. Times are
of the arena's own calls (medians). On CPU the resident set of the process is read after each step; on CUDA the free
memory of the device (which must not change: pages move, none is freed). Writing pages that the system has just given
costs more than writing old ones: the fill times show it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.harness import exit_with, write_report
from common.engine.arena import Arena, Remap, make_arena
from common.engine.rss import current_rss

MIB = 1 << 20
CELL_BYTES = 64 * 1024
# (layers, MiB of a slab, layers dropped each time): the same 1 GiB of parameters in small and large slabs.
CASES = ((64, 16, (1, 8, 32)), (16, 64, (1, 4, 8)), (4, 256, (1, 2)))
OUT = Path(__file__).resolve().parent.parent / "results" / "engine"


def occupied(device: torch.device) -> int:
    """Bytes that this process holds on CPU, or that anybody holds on the GPU."""
    if device.type == "cpu":
        return current_rss()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def fill_ms(fill: Callable[[], object], device: torch.device) -> float:
    """Wall time of writing."""
    start = time.perf_counter_ns()
    fill()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def fill_layers(arena: Arena, low: int, high: int) -> None:
    """Write whole slabs."""
    for layer in range(low, high):
        arena.layer(layer).fill_(1)


def once(arena: Arena, dropped: int, kv_bytes: int, device: torch.device) -> dict[str, Any]:
    """One round; the arena is as before at its end."""
    layers = (len(arena.resident) - dropped, len(arena.resident))
    held = [occupied(device)]
    drop = arena.drop(layers)
    held.append(occupied(device))
    cells = arena.num_cells
    write = fill_ms(lambda: arena.kv[kv_bytes:].fill_(2), device)
    rewrite = fill_ms(lambda: arena.kv[kv_bytes:].fill_(3), device)
    held.append(occupied(device))
    shrink = arena.shrink(kv_bytes)
    held.append(occupied(device))
    restore = arena.restore(layers)
    fill_layers(arena, *layers)
    held.append(occupied(device))
    return {"drop": drop, "shrink": shrink, "restore": restore, "held": held, "cells": cells,
            "write": write, "rewrite": rewrite}  # fmt: skip


def case(
    num_layers: int, slab_mib: int, dropped: int, repeat: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of times and a row of memory: medians over the rounds after a first one that warms up."""
    kv_bytes = 128 * MIB
    arena = make_arena(device, num_layers, slab_mib * MIB, kv_bytes, CELL_BYTES)
    fill_layers(arena, 0, num_layers)
    arena.kv.fill_(1)
    rounds = [once(arena, dropped, kv_bytes, device) for _ in range(repeat + 1)][1:]
    arena.close()

    def ms(change: str) -> float:
        return float(median(found[change].elapsed_ns for found in rounds)) / 1e6

    def mib(step: int) -> float:
        return float(median(found["held"][step] for found in rounds)) / MIB

    first: Remap = rounds[0]["drop"]
    key = {"layers": num_layers, "slab (MiB)": slab_mib, "dropped": dropped}
    times = {
        **key, "pages": first.num_pages, "moved (MiB)": first.num_bytes / MIB, "drop (ms)": ms("drop"),
        "shrink (ms)": ms("shrink"), "restore (ms)": ms("restore"),
        "new KV, first write (ms)": float(median(found["write"] for found in rounds)),
        "second write (ms)": float(median(found["rewrite"] for found in rounds)),
    }  # fmt: skip
    memory = {
        **key, "KV cells before": kv_bytes // CELL_BYTES, "KV cells after": rounds[0]["cells"],
        "before (MiB)": mib(0), "dropped (MiB)": mib(1), "new KV written (MiB)": mib(2), "shrunk (MiB)": mib(3),
        "restored and written (MiB)": mib(4),
    }  # fmt: skip
    return times, memory


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows = [case(layers, slab, dropped, options.repeat, device)
            for layers, slab, drops in CASES for dropped in drops]  # fmt: skip
    if device.type == "cpu":
        what = "host memory (no GPU: these are the system's page calls, and say nothing about a GPU), 1 thread"
        held = "resident set of the process"
    else:
        what, held = torch.cuda.get_device_name(device), "memory in use on the device"
    notes = [
        f"Device: {what}. Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"
        f" {platform.machine()}; other work may share the machine.",
        f"Medians of {options.repeat} rounds. Held memory: {held}. KV starts with 128 MiB in cells of 64 KiB. Times"
        " of drop, shrink and restore are the arena's calls alone, without writing anything.",
    ]
    name = "arena" if device.type == "cpu" else "arena_cuda"
    write_report(
        name,
        "Arena: layers into KV and back",
        notes,
        {"Time of remaps": [row[0] for row in rows], "Memory held": [row[1] for row in rows]},
        options.out,
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
