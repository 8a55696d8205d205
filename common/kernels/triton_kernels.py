"""The Triton kernels of paged attention, and how each is launched (`compile_check` compiles the same choices).

All keep a running maximum m, the sum and the accumulator in fp32, in base 2 inside (`scale_log2` = scale * log2 e),
and give natural-log lse. Keys are addressed token by token through the table, so a block may have any size and a tile
of keys may cross blocks. Masked lanes are never loaded: what a free cell holds does not matter. With WIDE (fp32
inputs, and always under the interpreter, which computes bf16 wrongly) products are taken in full fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

DECODE_META = 4
"""int32 per decode row: query, output row, keys seen, first table entry."""
PREFILL_TILE = 64
"""Queries of one prefill program."""
TILE_META = 6
"""int32 per prefill tile: first query, first output row, queries, keys that the first query sees (may be negative),
keys of the span, first table entry."""


@triton.jit
def attend_tile(
    q, m, total, acc, kv_ptr, table_ptr, layer, kv_head, keys, loaded, visible, scale_log2,
    stride_cell, stride_half, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into m, total, acc of M queries.

    `keys` [N]: their indices in the span. `loaded` [N]: any query sees it. `visible` [M, N]: this query sees it.
    """
    dims = tl.arange(0, BLOCK_D)
    cells = tl.load(table_ptr + keys // BLOCK_SIZE, mask=loaded, other=0).to(tl.int64) + layer
    base = cells * stride_cell + (keys % BLOCK_SIZE) * stride_token + kv_head * stride_head
    inside = loaded[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(kv_ptr + base[:, None] + dims[None, :], mask=inside, other=0.0)
    v = tl.load(kv_ptr + stride_half + base[:, None] + dims[None, :], mask=inside, other=0.0)
    if WIDE:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    else:
        s = tl.dot(q, tl.trans(k)) * scale_log2
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    m_base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_base[:, None])
    alpha = tl.exp2(m - m_base)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if WIDE:
        acc += tl.dot(p, v, input_precision="ieee")
    else:
        acc += tl.dot(p.to(v.dtype), v)
    return m_new, total, acc


@triton.jit
def store_result(
    m, total, acc, o_ptr, lse_ptr, rows, heads, written, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise and write [M, D] outputs and [M] natural-log sums; no key seen gives 0 and -inf."""
    dims = tl.arange(0, BLOCK_D)
    empty = total == 0.0
    o = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), m * 0.6931471805599453 + tl.log(tl.where(empty, 1.0, total)))
    at = rows.to(tl.int64) * num_heads + heads
    tl.store(lse_ptr + at, lse, mask=written)
    out = o_ptr + at[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, o.to(o_ptr.dtype.element_ty), mask=written[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def decode_kernel(
    q_ptr, kv_ptr, table_ptr, meta_ptr, o_ptr, lse_ptr, layer, scale_log2,
    stride_q_token, stride_q_head, stride_cell, stride_half, stride_token, stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, split): the GROUP query heads of one KV head over one share of the row's keys.

    With one split the result goes to its output row; else to [split, row], to be merged by `merge_kernel`.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    meta = meta_ptr + row * 4
    query, seen, first_entry = tl.load(meta), tl.load(meta + 2), tl.load(meta + 3)
    share = tl.cdiv(tl.cdiv(seen, BLOCK_N), NUM_SPLITS) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, seen)
    members, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + members
    at = query.to(tl.int64) * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_ptr + at, mask=(members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(start, stop, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        loaded = keys < stop
        m, total, acc = attend_tile(
            q, m, total, acc, kv_ptr, table_ptr + first_entry, layer, kv_head, keys,
            loaded, loaded[None, :], scale_log2,
            stride_cell, stride_half, stride_token, stride_head, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WIDE,
        )  # fmt: skip
    if NUM_SPLITS == 1:
        out_row = tl.load(meta + 1)
    else:
        out_row = split * tl.num_programs(0) + row
    num_heads = tl.num_programs(1) * GROUP
    store_result(m, total, acc, o_ptr, lse_ptr, out_row, heads, members < GROUP, num_heads, HEAD_DIM, BLOCK_D)


@triton.jit
def merge_kernel(
    part_o_ptr, part_lse_ptr, meta_ptr, o_ptr, lse_ptr,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (row, head): merge the splits' partial results into the row's output (flash-decoding's second half)."""
    row, head = tl.program_id(0), tl.program_id(1)
    num_rows, num_heads = tl.num_programs(0), tl.num_programs(1)
    out_row = tl.load(meta_ptr + row * 4 + 1)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    at = (splits.to(tl.int64) * num_rows + row) * num_heads + head
    lse = tl.load(part_lse_ptr + at)
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp(lse - base)
    total = tl.sum(w, 0)
    inside = (w > 0.0)[:, None] & (dims < HEAD_DIM)[None, :]
    o = tl.load(part_o_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    whole = tl.where(total == 0.0, 1.0, total)
    o = tl.sum(o * w[:, None], 0) / whole
    out = out_row.to(tl.int64) * num_heads + head
    tl.store(lse_ptr + out, tl.where(total == 0.0, float("-inf"), base + tl.log(whole)))
    tl.store(o_ptr + out * HEAD_DIM + dims, o.to(o_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def prefill_kernel(
    q_ptr, kv_ptr, table_ptr, meta_ptr, o_ptr, lse_ptr, layer, scale_log2,
    stride_q_token, stride_q_head, stride_cell, stride_half, stride_token, stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile, query head): up to BLOCK_M queries of one row over all the keys that the last of them sees."""
    head = tl.program_id(1)
    meta = meta_ptr + tl.program_id(0) * 6
    query, out_row, count = tl.load(meta), tl.load(meta + 1), tl.load(meta + 2)
    first, kv_len, first_entry = tl.load(meta + 3), tl.load(meta + 4), tl.load(meta + 5)
    members, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = (query + members).to(tl.int64)[:, None] * stride_q_token + head * stride_q_head + dims[None, :]
    q = tl.load(q_ptr + at, mask=(members < count)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen = tl.where(members < count, tl.minimum(first + members, kv_len), 0)
    stop = tl.max(seen, 0)
    for tile in range(0, stop, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        m, total, acc = attend_tile(
            q, m, total, acc, kv_ptr, table_ptr + first_entry, layer, head // GROUP, keys,
            keys < stop, keys[None, :] < seen[:, None], scale_log2,
            stride_cell, stride_half, stride_token, stride_head, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WIDE,
        )  # fmt: skip
    heads = head + tl.zeros([BLOCK_M], tl.int32)
    store_result(
        m, total, acc, o_ptr, lse_ptr, out_row + members, heads, members < count, tl.num_programs(1), HEAD_DIM, BLOCK_D
    )


class Launch(NamedTuple):
    """Compile-time choices of one kernel."""

    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int


def decode_launch(
    dtype: torch.dtype, group: int, head_size: int, block_size: int, num_splits: int, wide: bool
) -> Launch:
    """Choices of `decode_kernel`; for fp32 they are those that do not spill."""
    constants = {
        "GROUP": group, "HEAD_DIM": head_size, "BLOCK_SIZE": block_size, "NUM_SPLITS": num_splits,
        "BLOCK_M": max(16, triton.next_power_of_2(group)), "BLOCK_N": 16 if dtype == torch.float32 else 64,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)), "WIDE": wide or dtype == torch.float32,
    }  # fmt: skip
    return Launch(constants, num_warps=4, num_stages=2)


def merge_launch(head_size: int, num_splits: int) -> Launch:
    """Choices of `merge_kernel`."""
    width = max(16, triton.next_power_of_2(head_size))
    return Launch({"HEAD_DIM": head_size, "NUM_SPLITS": num_splits, "BLOCK_D": width}, num_warps=4, num_stages=1)


def prefill_launch(dtype: torch.dtype, group: int, head_size: int, block_size: int, wide: bool) -> Launch:
    """Choices of `prefill_kernel`; for fp32 they are those that do not spill."""
    full = dtype == torch.float32
    constants = {
        "GROUP": group, "HEAD_DIM": head_size, "BLOCK_SIZE": block_size,
        "BLOCK_M": PREFILL_TILE, "BLOCK_N": 16 if full else 64,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)), "WIDE": wide or full,
    }  # fmt: skip
    return Launch(constants, num_warps=16 if full else 4, num_stages=3 if full else 2)
