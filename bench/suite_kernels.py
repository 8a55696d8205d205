"""Sections `kernels` (every kernel against fp64) and `copies` (KV writes and cell copies: exact, and how fast)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.suite import BLOCK_SIZE, Context, Paged, Section, Work, block_size_of, cold_reach, first_line, paged
from bench.timing import Call
from common.errors import KVPlaneError
from common.kernels import cache
from common.kernels.merge import merge_into
from common.kernels.plan import Backend
from common.kernels.reference import TorchBackend
from common.kernels.select import NAMES, choose
from common.kernels.static import can_be_static, static_key, static_plan

FACTOR, SLACK = 2.0, 1e-6
"""An error may be this many times plain torch's in the same type, plus rounding of the outputs' sum."""


def plain(case: Paged, scale: float) -> torch.Tensor:
    """Attention in plain torch, in the inputs' own type throughout: what a kernel's error is measured by."""
    (k, v), rows = case.dense[0], case.rows
    num_rows, new = len(rows.q_len), int(rows.q_len[0])
    group = case.q.shape[1] // k.shape[1]
    q = case.q.view(num_rows, new, *case.q.shape[1:]).transpose(1, 2)
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.matmul(q, keys.transpose(2, 3)) * scale
    position = int(rows.q_pos[0]) + torch.arange(new, device=q.device)
    later = torch.arange(keys.shape[2], device=q.device)[None] > position[:, None]
    o = torch.matmul(torch.softmax(logits.masked_fill(later, float("-inf")), dim=-1), values)
    return o.transpose(1, 2).reshape(case.q.shape)


def truth(case: Paged, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) in fp64 on the CPU, by the reference that the tests hold against the definition."""
    judge = TorchBackend(case.block_size)
    return judge.run(judge.plan(case.rows, "cpu"), case.q.cpu().double(), case.kvs[0].cpu().double(), 0, scale)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN if anything is."""
    return float((found.cpu().double() - true).norm() / true.norm())


def kernels(context: Context) -> Section:
    """Each backend that is to be had here, each type, each shape; also plans with fixed buffers, and merging."""
    section = Section()
    section.tables["Attention against fp64"] = [
        row for dtype in context.dtypes for work in context.sizes.checks for name in NAMES
        for row in checked(section, context, dtype, work, name)]  # fmt: skip
    section.tables["Merging two halves against fp64"] = [merging(section, context, dtype) for dtype in context.dtypes]
    return section


def checked(section: Section, context: Context, dtype: torch.dtype, work: Work, name: str) -> list[dict[str, Any]]:
    """Rows of one backend, if it is to be had."""
    block_size, scale = block_size_of(name), context.sizes.heads.size**-0.5
    try:
        backend = choose(context.device, dtype, block_size, name)
        case = paged(work, context.sizes.heads, dtype, context.device, block_size=block_size)
        found = run_all(backend, case, work, context, scale)
    except KVPlaneError as reason:
        section.check(not (context.cuda and name == "triton"), f"triton {dtype}: {first_line(reason)}")
        section.absent(f"our {name} kernels in {dtype}", reason)
        return []
    true_o, true_lse = truth(case, scale)
    bound, rows = FACTOR * error(plain(case, scale), true_o) + SLACK, list[dict[str, Any]]()
    for kind, (o, lse) in found.items():
        wrong = error(o, true_o)
        off = 0.0 if lse is None else float((lse.cpu().double() - true_lse).abs().max())
        ok = wrong <= bound and off <= 1e-2
        section.check(ok, f"{name}{kind} {dtype} {tuple(work)}: error {wrong:.2e}, bound {bound:.2e}, lse {off:.1e}")
        what = {"backend": name + kind, "type": str(dtype)[6:], "rows": work.batch, "queries": work.new}
        rows.append({**what, "keys": work.context, "error": wrong, "bound": bound, "lse error": off, "ok": str(ok)})
    return rows


def run_all(
    backend: Backend, case: Paged, work: Work, context: Context, scale: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """(o, lse) of the ordinary plan, and of the static one where the rows are decodes."""
    plan = backend.plan(case.rows, context.device)
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {"": backend.run(plan, case.q, case.kvs[0], 0, scale)}
    if work.new == 1 and can_be_static(backend):
        key = static_key(backend, case.rows, work.batch, context.sizes.heads.kv, context.device)
        static = static_plan(backend, key, work.batch, case.rows.tables.shape[1], context.device)
        static.fill(case.rows)
        found[" static"] = static.run(case.q, case.kvs[0], 0, scale), None
    return found


def merging(section: Section, context: Context, dtype: torch.dtype) -> dict[str, Any]:
    """Keys cut in two at a block border, each half attended apart, then merged."""
    work, scale = context.sizes.checks[0], context.sizes.heads.size**-0.5
    case = paged(work, context.sizes.heads, dtype, context.device)
    cut = work.context // 2 // BLOCK_SIZE * BLOCK_SIZE
    r, parts = case.rows, []
    backend = choose(context.device, dtype, BLOCK_SIZE)
    for start, stop in ((0, cut), (cut, work.context)):
        length = r.kv_len * 0 + (stop - start)
        tables = r.tables[:, start // BLOCK_SIZE :]
        half = r._replace(kv_start=r.kv_start + start, kv_len=length, tables=tables.copy())
        parts.append(backend.run(backend.plan(half, context.device), case.q, case.kvs[0], 0, scale))
    (o, lse), (other, other_lse) = parts
    merge_into(o, lse, torch.arange(len(o), device=o.device), other, other_lse)
    true_o, _ = truth(case, scale)
    wrong, bound = error(o, true_o), FACTOR * error(plain(case, scale), true_o) + SLACK
    section.check(wrong <= bound, f"merge {dtype}: error {wrong:.2e}, bound {bound:.2e}")
    return {"backend": backend.name, "type": str(dtype)[6:], "error": wrong, "bound": bound, "ok": str(wrong <= bound)}


def copies(context: Context) -> Section:
    """KV writes, gathers, scatters and copies of cells: bitwise, and against the copy bandwidth of the device."""
    section, heads = Section(), context.sizes.heads
    dtype, device = context.dtypes[0], context.device
    cell = 2 * BLOCK_SIZE * heads.kv * heads.size * dtype.itemsize
    num = max(8, min(context.sizes.copy_bytes, 1 << 30) // 4 // cell)
    kv = torch.randn(num, 2, BLOCK_SIZE, heads.kv, heads.size, device=device).to(dtype)
    other = torch.zeros_like(kv)
    order = torch.randperm(num, device=device)
    tokens = min(4096, num * BLOCK_SIZE // 2)
    k, v = (torch.randn(tokens, heads.kv, heads.size, device=device).to(dtype) for _ in range(2))
    slots = torch.randperm(num * BLOCK_SIZE, device=device)[:tokens]
    cache.copy_cells(kv, order, other, torch.arange(num, device=device))
    section.check(torch.equal(other, kv[order]), "copy_cells: a cell differs")
    buffer = cache.gather_cells(kv, order)
    section.check(torch.equal(buffer, other), "gather_cells: a cell differs")
    cache.scatter_cells(other, order, buffer)
    section.check(torch.equal(other, kv), "scatter_cells: a cell differs")
    cache.write_kv(other, k, v, slots)
    cells, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    section.check(torch.equal(other[cells, 0, offset], k) and torch.equal(other[cells, 1, offset], v),
                  "write_kv: a token differs")  # fmt: skip
    bandwidth, _ = context.ceilings()
    straight = torch.arange(num, device=device)
    moves: dict[str, tuple[Call, int]]
    moves = {"copy_cells": (partial(cache.copy_cells, kv, order, other, straight), 2 * num * cell),
             "gather_cells": (partial(cache.gather_cells, kv, order), 2 * num * cell),
             "scatter_cells": (partial(cache.scatter_cells, other, order, buffer), 2 * num * cell),
             "write_kv": (partial(cache.write_kv, other, k, v, slots), 2 * tokens * cell // BLOCK_SIZE)}  # fmt: skip
    rows = []
    for name, (call, num_bytes) in moves.items():
        time_ns = context.timer.median_ns([call])
        rows.append({"kernel": name, "MiB read + written": num_bytes / 2**20, "us": time_ns / 1e3,
                     "GB/s": num_bytes / time_ns,
                     "of copy bandwidth": num_bytes / time_ns * 1e9 / bandwidth})  # fmt: skip
    section.tables["Cells moved and KV written"] = rows
    if num * cell < cold_reach(device):
        section.notes.append("Copies: what is moved fits in the caches.")
    return section
