"""One end of `bench.comm`: what two workers send each other, timed where it is sent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.comm.copies import Copies
from common.comm.join import join_groups, store_of
from common.comm.peers import Peers
from common.engine.relayout import cut_tokens, put_tokens

SIZES = tuple(1 << power for power in range(6, 25, 2))  # 64 B to 16 MiB
PIECE = 1 << 18
COPY_BYTES = 1 << 25
BESIDE_BYTES = 1 << 14  # of an activation beside a copy
CELL = (2, 16, 2, 16)  # of tiny_llama: K and V, tokens of a block, kv heads, head size; float32


class End:
    """Rank 1 asks and measures, rank 2 answers. Both walk through the same `script`."""

    def __init__(self, rank: int, peers: Peers, backend: str) -> None:
        self.asks, self.other, self.peers = rank == 1, 3 - rank, peers
        self.device = torch.device("cuda", rank - 1) if backend == "nccl" else torch.device("cpu")
        self.number = 0

    def bytes(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def swap(self, kind: str, tensor: Tensor, back: Tensor) -> float:
        """There and back; seconds at the asking end."""
        self.number += 1
        begin = time.perf_counter()
        if self.asks:
            self.peers.send(kind, tensor, self.other, self.number)
            self.peers.receive(kind, back, self.other, self.number)
        else:
            self.peers.receive(kind, back, self.other, self.number)
            self.peers.send(kind, tensor, self.other, self.number)
        return time.perf_counter() - begin

    def one_way(self, kind: str, size: int, rounds: int) -> list[float]:
        """Half of each round trip of a message of this size, in seconds."""
        there, back = self.bytes(size), self.bytes(size)
        return [self.swap(kind, there, back) / 2 for _ in range(rounds + 2)][2:]

    def copy(self, copies: Copies, tensor: Tensor, work: Callable[[], object] | None = None) -> float:
        """A copy in pieces until the receiver has all of it and says so; `work` meanwhile, at both ends."""
        self.number += 1
        number, note = self.number, self.bytes(8)
        arrived: list[float] = []
        begin = time.perf_counter()
        if self.asks:
            copies.send(tensor, self.other, number)
        else:
            copies.take(number, lambda: self._fetched(copies, tensor, number, arrived))
        if work is not None:
            work()
        if self.asks:
            self.peers.receive("queries", note, self.other, number)
        else:
            while not arrived:
                time.sleep(5e-5)
            self.peers.send("queries", note, self.other, number)
        return time.perf_counter() - begin

    def _fetched(self, copies: Copies, tensor: Tensor, number: int, arrived: list[float]) -> Callable[[], Any]:
        copies.receive(tensor, self.other, number)
        arrived.append(time.perf_counter())
        return lambda: None


def percentiles(seconds: list[float], num_bytes: int) -> dict[str, float]:
    """Of one size: microseconds, and bytes per second at the median."""
    low, mid, high = (float(np.percentile(seconds, q)) for q in (5, 50, 95))
    return {"bytes": num_bytes, "P5 (us)": low * 1e6, "P50 (us)": mid * 1e6, "P95 (us)": high * 1e6,
            "MB/s at P50": num_bytes / mid / 1e6}  # fmt: skip


def primitives(end: End, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every primitive over message size."""
    found: dict[str, list[dict[str, float]]] = {}
    for kind, name in (("hidden", "activation (send, receive)"), ("queries", "query or partial (send, receive)")):
        found[name] = [percentiles(end.one_way(kind, size, rounds if size < 1 << 20 else rounds // 4), size)
                       for size in SIZES]  # fmt: skip
    copies = Copies(end.peers, PIECE, lambda arrival: None)
    name = f"copy in pieces of {PIECE >> 10} KiB, until the receiver says that it is there"
    found[name] = [percentiles([end.copy(copies, end.bytes(size)) for _ in range(max(5, rounds // 4))], size)
                   for size in SIZES]  # fmt: skip
    cell = int(np.prod(CELL)) * 4
    found["KV cells: cut out at the source"], found["KV cells: put where they belong"] = [], []
    for blocks in (1, 16, 256):
        kv = torch.zeros(4 * blocks, *CELL, device=end.device)
        cells = np.arange(4 * blocks, dtype=np.int32).reshape(4, blocks)
        tokens = (0, blocks * CELL[1])
        cut, put = [], []
        for _ in range(rounds):
            begin = time.perf_counter()
            rows = cut_tokens(kv, cells, tokens, 0)
            middle = time.perf_counter()
            put_tokens(rows, kv, cells, tokens, 0)
            cut.append(middle - begin)
            put.append(time.perf_counter() - middle)
        found["KV cells: cut out at the source"].append(percentiles(cut, 4 * blocks * cell))
        found["KV cells: put where they belong"].append(percentiles(put, 4 * blocks * cell))
    return found


def beside(end: End, rounds: int) -> list[dict[str, Any]]:
    """Activations alone, beside a copy in pieces, and beside one in a single piece."""
    rows = []
    for name, piece in (("alone", 0), (f"beside a copy in pieces of {PIECE >> 10} KiB", PIECE),
                        ("beside a copy in one piece", COPY_BYTES)):  # fmt: skip
        seconds: list[float] = []
        if piece:
            copies, tensor = Copies(end.peers, piece, lambda arrival: None), end.bytes(COPY_BYTES)
            for _ in range(max(2, rounds // 20)):
                end.copy(copies, tensor, partial(_one_way_into, end, seconds))
        else:
            seconds = end.one_way("hidden", BESIDE_BYTES, rounds)
        rows.append({"an activation of 16 KiB": name, **percentiles(seconds, BESIDE_BYTES)})
    return rows


def _one_way_into(end: End, seconds: list[float]) -> None:
    seconds += end.one_way("hidden", BESIDE_BYTES, 8)


def overlap(end: End, rounds: int) -> list[dict[str, Any]]:
    """A copy and matrix products, one after the other and at the same time."""
    copies, tensor = Copies(end.peers, PIECE, lambda arrival: None), end.bytes(COPY_BYTES)
    a = torch.rand(256, 256, device=end.device)

    def compute() -> None:
        for _ in range(300):
            torch.mm(a, a)

    rows = []
    for _ in range(max(3, rounds // 10)):
        begin = time.perf_counter()
        compute()
        work = time.perf_counter() - begin
        end.swap("queries", end.bytes(8), end.bytes(8))
        alone, both = end.copy(copies, tensor), end.copy(copies, tensor, compute)
        rows.append((work, alone, both))
    work, alone, both = (float(np.median(column)) for column in zip(*rows))
    hidden = (work + alone - both) / min(work, alone)
    return [{"compute (ms)": work * 1e3, "copy of 32 MiB (ms)": alone * 1e3, "both at once (ms)": both * 1e3,
             "share of the shorter that is hidden": hidden}]  # fmt: skip


def run_end(environment: dict[str, str], backend: str, rounds: int, answer: Any) -> None:
    """A process of its own; the asking end sends what it measured."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    store, rank, world_size = store_of(60.0)
    end = End(rank, join_groups(store, rank, world_size, backend, 60.0, 120.0), backend)
    found = {**primitives(end, rounds), "An activation beside a copy": beside(end, rounds),
             "Overlap of copy and compute": overlap(end, rounds)}  # fmt: skip
    if end.asks:
        answer.send(found)
    end.swap("queries", end.bytes(8), end.bytes(8))
    time.sleep(0.2)
    os._exit(0)
