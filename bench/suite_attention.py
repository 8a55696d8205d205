"""Section `attention`: our kernels and every other one that is to be had, against the ceilings of this device.

Decode moves bytes: its KV once, over the measured copy bandwidth. Prefill computes: 4 x heads x head size FLOPs per
query-key pair, over the measured rate of a large product. Inputs rotate so that the L2 is cold.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.suite import BLOCK_SIZE, Context, Paged, Section, Work, block_size_of, cold_reach, paged
from bench.suite_kernels import error, plain
from bench.suite_rivals import RIVALS, as_rows
from bench.timing import Call
from common.kernels.select import NAMES, choose

PLAIN = 1 << 22
"""Query-key pairs up to which plain torch is asked too."""
AGREES = 0.05
"""A rival whose output differs by more than this from plain torch's does not do the same thing."""


def ours(name: str, case: Paged, scale: float, context: Context) -> list[Call]:
    """A backend's `run` over each copy; planning is done before."""
    backend = choose(context.device, case.q.dtype, case.block_size, name)
    plan = backend.plan(case.rows, context.device)
    return [partial(backend.run, plan, case.q, kv, 0, scale) for kv in case.kvs]


def attention(context: Context) -> Section:
    """One table of decodes and one of prefills."""
    section = Section()
    bandwidth, rate = context.ceilings()
    section.tables["Ceilings measured here"] = [
        {"copy (GB/s, read + written)": bandwidth / 1e9, "matmul (TFLOP/s)": rate / 1e12}
    ]
    section.tables["Decode"] = [row for work in context.sizes.decodes for row in timed(section, context, work)]
    section.tables["Prefill"] = [row for work in context.sizes.prefills for row in timed(section, context, work)]
    return section


def timed(section: Section, context: Context, work: Work) -> list[dict[str, Any]]:
    """Rows of one shape: ours first."""
    heads, dtype = context.sizes.heads, context.dtypes[0]
    small, scale = paged(work, heads, dtype, context.device, cold_reach(context.device)), heads.size**-0.5
    floor = floor_ns(context, work, dtype)
    known = work.batch * work.new * work.context <= PLAIN
    want = plain(small, scale).cpu().double() if known else None
    rows = []
    for name in [*NAMES, *RIVALS]:
        row = {"attention": f"ours: {name}" if name in NAMES else name, "rows": work.batch, "queries": work.new,
               "keys": work.context}  # fmt: skip
        try:
            with torch.inference_mode():
                case = small if block_size_of(name) == BLOCK_SIZE else as_blocks(small, block_size_of(name))
                calls = ours(name, case, scale, context) if name in NAMES else RIVALS[name](case, scale)
                off = 0.0 if want is None else error(as_rows(calls[0](), case, name), want)
            time_ns = context.timer.median_ns(calls)
        except Exception as reason:  # whatever a library does, the others go on
            section.absent(f"{row['attention']}, queries: {'one' if work.new == 1 else 'several'}", reason)
            continue
        same = off <= AGREES
        if name in NAMES:
            section.check(same, f"{name} {tuple(work)}: differs from plain torch by {off:.1e}")
        rows.append({**row, "us": time_ns / 1e3, "of ceiling": floor / time_ns, "difference": f"{off:.1e}",
                     "note": "" if same else "does something else"})  # fmt: skip
    return rows


def as_blocks(case: Paged, block_size: int) -> Paged:
    """The same keys in blocks of another size, in order."""
    num_rows, length = len(case.rows.q_len), int(case.rows.kv_len[0])
    blocks = -(-length // block_size)
    kvs = []
    for k, v in case.dense:
        halves = torch.stack([F.pad(half, (0, 0, 0, blocks * block_size - length)) for half in (k, v)], dim=1)
        cut = halves.view(*halves.shape[:3], blocks, block_size, halves.shape[-1])
        kvs.append(cut.permute(0, 3, 1, 4, 2, 5).flatten(0, 1).contiguous())
    tables = np.arange(num_rows * blocks, dtype=np.int32).reshape(num_rows, blocks)
    return Paged(case.rows._replace(tables=tables), case.q, kvs)


def floor_ns(context: Context, work: Work, dtype: torch.dtype) -> float:
    """The larger of the bytes over the copy bandwidth and the FLOPs over the matmul rate."""
    heads, (bandwidth, rate) = context.sizes.heads, context.ceilings()
    pairs = work.batch * work.new * (work.context - work.new + (work.new + 1) / 2)
    kv_bytes = 2 * work.batch * work.context * heads.kv * heads.size * dtype.itemsize
    io_bytes = 2 * work.batch * work.new * heads.query * heads.size * dtype.itemsize
    return 1e9 * max((kv_bytes + io_bytes) / bandwidth, 4 * heads.query * heads.size * pairs / rate)
