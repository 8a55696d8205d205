"""Writing new keys and values into cells, and moving whole cells: within an instance, to and from a send buffer.

A slot is one token of one cell: cell * B + offset. Cells are contiguous in memory, so a moved cell is one run of
bytes. On CUDA the Triton kernels of `triton_cache` do it without waiting for the device; elsewhere torch does.
"""

from __future__ import annotations

import torch

from common.errors import ContractError


def write_kv(kv_C2BGD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Write K and V of T tokens into their slots (int64; -1 skips the token). Slots are distinct."""
    if k_TGD.shape != v_TGD.shape or k_TGD.shape != (len(slots_T), *kv_C2BGD.shape[3:]):
        raise ContractError(f"K {tuple(k_TGD.shape)}, V {tuple(v_TGD.shape)} do not fit {len(slots_T)} slots")
    if kv_C2BGD.is_cuda:
        from common.kernels import triton_cache

        triton_cache.write_kv(kv_C2BGD, k_TGD, v_TGD, slots_T)
        return
    if bool((slots_T < 0).any()):
        kept = slots_T >= 0
        k_TGD, v_TGD, slots_T = k_TGD[kept], v_TGD[kept], slots_T[kept]
    block = kv_C2BGD.shape[2]
    token_rows = kv_C2BGD.view(-1, *kv_C2BGD.shape[3:])
    k_rows = slots_T + torch.div(slots_T, block, rounding_mode="floor") * block
    token_rows.index_copy_(0, k_rows, k_TGD.to(kv_C2BGD.dtype))
    token_rows.index_copy_(0, k_rows + block, v_TGD.to(kv_C2BGD.dtype))


def gather_cells(kv_C2BGD: torch.Tensor, cells_N: torch.Tensor) -> torch.Tensor:
    """A new contiguous buffer [N, 2, B, G, D] with copies of the cells (int64, in this order)."""
    if kv_C2BGD.is_cuda:
        from common.kernels import triton_cache

        buffer = kv_C2BGD.new_empty(len(cells_N), *kv_C2BGD.shape[1:])
        triton_cache.copy_cells(kv_C2BGD, cells_N, buffer, None)
        return buffer
    return kv_C2BGD.index_select(0, cells_N)


def scatter_cells(kv_C2BGD: torch.Tensor, cells_N: torch.Tensor, buffer: torch.Tensor) -> None:
    """Put a buffer [N, 2, B, G, D] into the cells (int64, distinct)."""
    _check_cells(kv_C2BGD, cells_N, buffer.shape)
    if kv_C2BGD.is_cuda:
        from common.kernels import triton_cache

        triton_cache.copy_cells(buffer, None, kv_C2BGD, cells_N)
        return
    kv_C2BGD.index_copy_(0, cells_N, buffer)


def copy_cells(src_kv: torch.Tensor, src_cells: torch.Tensor, dst_kv: torch.Tensor, dst_cells: torch.Tensor) -> None:
    """Copy cells between KV ranges of the same shape of cell (int64, `dst_cells` distinct; ids may come from the host).

    Within one range a cell may not be both read and written: the order of the copies is not fixed.
    """
    _check_cells(dst_kv, dst_cells, torch.Size((len(src_cells), *src_kv.shape[1:])))
    src_cells, dst_cells = src_cells.to(src_kv.device), dst_cells.to(dst_kv.device)
    if dst_kv.is_cuda and src_kv.is_cuda:
        from common.kernels import triton_cache

        triton_cache.copy_cells(src_kv, src_cells, dst_kv, dst_cells)
        return
    dst_kv.index_copy_(0, dst_cells, src_kv.index_select(0, src_cells).to(dst_kv.device))


def _check_cells(kv_C2BGD: torch.Tensor, cells_N: torch.Tensor, moved: torch.Size) -> None:
    if moved != (len(cells_N), *kv_C2BGD.shape[1:]):
        raise ContractError(f"{tuple(moved)} cannot be put into {len(cells_N)} cells of {tuple(kv_C2BGD.shape[1:])}")
