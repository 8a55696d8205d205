"""What the sections of `bench.gpu_suite` share: sizes, cases of paged attention, and what a section hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.timing import Timer, copy_bandwidth, matmul_rate
from common.kernels.flash import PAGE_MULTIPLE
from common.kernels.plan import Rows

BLOCK_SIZE = 16


def block_size_of(backend: str) -> int:
    """What a backend is checked and timed with: flash-attn's smallest, else ours."""
    return PAGE_MULTIPLE if backend == "flash" else BLOCK_SIZE


class Heads(NamedTuple):
    """Query heads, KV heads, head size."""

    query: int
    kv: int
    size: int


class Work(NamedTuple):
    """`batch` rows of `new` queries each that see `context` keys, their own included."""

    batch: int
    new: int
    context: int


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    heads: Heads
    checks: tuple[Work, ...]
    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]
    copy_bytes: int
    matmul: int
    arena: tuple[tuple[int, int, int], ...]  # (layers, MiB of a slab, layers dropped)
    batches: tuple[int, ...]
    context: int  # of the engine's decodes
    budget_s: float  # of one timing


LLAMA = Heads(32, 8, 128)
SMALL = Heads(8, 2, 64)
FULL = Sizes(
    LLAMA, (Work(5, 1, 700), Work(1, 1, 5000), Work(2, 130, 400), Work(1, 300, 300)),
    tuple(Work(batch, 1, keys) for batch in (1, 16, 64, 256) for keys in (1024, 8192) if batch * keys <= 1 << 20),
    (Work(1, 2048, 2048), Work(1, 8192, 8192), Work(8, 512, 1024), Work(1, 512, 16384)),
    4 << 30, 8192, ((32, 416, 8), (64, 16, 32)), (1, 16, 64), 1024, 0.2,
)  # fmt: skip
CPU = Sizes(
    SMALL, (Work(5, 1, 70), Work(2, 30, 50)), (Work(1, 1, 512), Work(16, 1, 512)),
    (Work(1, 256, 256), Work(4, 64, 256)), 1 << 26, 1024, ((16, 16, 4),), (1, 16), 128, 0.05,
)  # fmt: skip
TOY = Sizes(SMALL, (Work(3, 1, 33), Work(1, 9, 20)), (Work(2, 1, 64),), (Work(1, 16, 32),), 1 << 20, 64, ((4, 1, 2),),
            (2,), 32, 0.002)  # fmt: skip
SIZES = {"full": FULL, "cpu": CPU, "toy": TOY}


@dataclass
class Section:
    """What a section found: tables by title, and checks that failed (one line each)."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def absent(self, what: str, reason: BaseException) -> None:
        """Note, once, what cannot be had here."""
        note = f"Not to be had here: {what} ({first_line(reason)})."
        if note not in self.notes:
            self.notes.append(note)

    def check(self, holds: bool, what: str) -> None:
        """Note a check that does not hold."""
        if not holds:
            self.failed.append(what)


@dataclass
class Context:
    """Where and how large; ceilings are measured at their first use."""

    device: torch.device
    sizes: Sizes
    _ceilings: tuple[float, float] | None = None

    @property
    def cuda(self) -> bool:
        """On a GPU."""
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Types to check; the first is the one to time."""
        return (torch.bfloat16, torch.float16, torch.float32) if self.cuda else (torch.float32, torch.bfloat16)

    @property
    def timer(self) -> Timer:
        """With the sizes' budget."""
        return Timer(self.device, self.sizes.budget_s)

    def ceilings(self) -> tuple[float, float]:
        """(bytes/s of a copy, read plus written; FLOP/s of a large product) of this very device."""
        if self._ceilings is None:
            rate = matmul_rate(self.device, self.dtypes[0], self.sizes.matmul)
            self._ceilings = copy_bandwidth(self.device, self.sizes.copy_bytes), rate
        return self._ceilings


@dataclass
class Paged:
    """A case of paged attention: rows over scattered cells, with enough copies of KV to miss the caches."""

    rows: Rows
    q: torch.Tensor  # [T, H, D]
    kvs: list[torch.Tensor]  # [C, 2, B, G, D] each

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return int(self.kvs[0].shape[2])

    @property
    def dense(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each copy, contiguous and in order: [R, G, S, D] (all rows are equally long)."""
        length = int(self.rows.kv_len[0])
        at = torch.from_numpy(self.rows.tables.astype(np.int64)).to(self.q.device)
        found = []
        for kv in self.kvs:
            halves = kv[at].permute(2, 0, 4, 1, 3, 5).flatten(3, 4)[:, :, :, :length].contiguous()
            found.append((halves[0], halves[1]))
        return found


def paged(
    work: Work, heads: Heads, dtype: torch.dtype, device: torch.device, reach: int = 0, most: int = 8,
    block_size: int = BLOCK_SIZE,
) -> Paged:  # fmt: skip
    """Random queries and KV; copies of KV up to `reach` bytes."""
    blocks = -(-work.context // block_size)
    order = np.random.default_rng(0).permutation(work.batch * blocks).astype(np.int32)
    num = np.full(work.batch, work.new, np.int32)
    rows = Rows(
        np.arange(work.batch, dtype=np.int32) * work.new, num, np.full(work.batch, work.context, np.int32) - num,
        np.zeros(work.batch, np.int32), np.full(work.batch, work.context, np.int32), order.reshape(work.batch, blocks),
    )  # fmt: skip
    shape = (work.batch * blocks, 2, block_size, heads.kv, heads.size)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    copies = max(1, min(most, -(-reach // num_bytes)))
    kvs = [torch.randn(shape, device=device, dtype=torch.float32).to(dtype) for _ in range(copies)]
    q = torch.randn(work.batch * work.new, heads.query, heads.size, device=device).to(dtype)
    return Paged(rows, q, kvs)


def cold_reach(device: torch.device) -> int:
    """Bytes of inputs over which a turn leaves nothing in the last cache: four times the L2, or 64 MiB."""
    if device.type != "cuda":
        return 1 << 26
    return 4 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def first_line(error: BaseException, most: int = 160) -> str:
    """An error on one line."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:most]
