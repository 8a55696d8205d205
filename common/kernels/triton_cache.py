"""Triton kernels for KV writes and cell copies. Importing this module needs triton; running it, a GPU (or the
interpreter: TRITON_INTERPRET=1 set before the import)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096
"""Elements of a cell that one program copies."""


@triton.jit
def write_kernel(
    kv_ptr, k_ptr, v_ptr, slots_ptr, k_stride, v_stride,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program writes K and V ([G * D] each) of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        offsets = tl.arange(0, BLOCK_WIDTH)
        inside = offsets < WIDTH
        k_row = (slot + slot // BLOCK_SIZE * BLOCK_SIZE) * WIDTH
        k = tl.load(k_ptr + token * k_stride + offsets, mask=inside)
        v = tl.load(v_ptr + token * v_stride + offsets, mask=inside)
        tl.store(kv_ptr + k_row + offsets, k, mask=inside)
        tl.store(kv_ptr + k_row + BLOCK_SIZE * WIDTH + offsets, v, mask=inside)


@triton.jit
def copy_kernel(
    src_ptr, src_cells_ptr, dst_ptr, dst_cells_ptr, numel,
    HAS_SRC: tl.constexpr, HAS_DST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program copies one chunk of one cell of `numel` elements; without cells, the n-th cell is n."""
    n = tl.program_id(0).to(tl.int64)
    src, dst = n, n
    if HAS_SRC:
        src = tl.load(src_cells_ptr + n)
    if HAS_DST:
        dst = tl.load(dst_cells_ptr + n)
    offsets = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = offsets < numel
    tl.store(dst_ptr + dst * numel + offsets, tl.load(src_ptr + src * numel + offsets, mask=inside), mask=inside)


def write_kv(kv_C2BGD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """`cache.write_kv` on the device; slots int64. Tokens may be strided, their [G, D] may not."""
    _, _, block, heads, size = kv_C2BGD.shape
    width = heads * size
    if len(slots_T) == 0:
        return
    k_TE, v_TE = (x.reshape(len(slots_T), width) for x in (k_TGD, v_TGD))
    write_kernel[(len(slots_T),)](
        kv_C2BGD.view(-1), k_TE, v_TE, slots_T, k_TE.stride(0), v_TE.stride(0),
        WIDTH=width, BLOCK_SIZE=block, BLOCK_WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


def copy_cells(
    src: torch.Tensor, src_cells: torch.Tensor | None, dst: torch.Tensor, dst_cells: torch.Tensor | None
) -> None:
    """Copy cells (int64) between two ranges [.., 2, B, G, D] of one type; None means 0, 1, 2, .. in order."""
    cells = src_cells if src_cells is not None else dst_cells
    num_cells = len(src) if cells is None else len(cells)
    numel = src[0].numel() if len(src) else 0
    if num_cells == 0 or numel == 0:
        return
    copy_kernel[(num_cells, triton.cdiv(numel, CHUNK))](
        src.view(-1), src_cells, dst.view(-1), dst_cells, numel,
        HAS_SRC=src_cells is not None, HAS_DST=dst_cells is not None, CHUNK=CHUNK,
    )  # fmt: skip
