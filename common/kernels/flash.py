"""Adapter over the flash-attn 2 package: where it is installed, and for the rows that its causal mask can express.

flash-attn aligns its causal mask to the bottom right: the last query sees the last key. That fits a row whose span
ends at its last query, or is seen whole; a span that ends among a row's queries must be cut into two rows first.
Its paged KV wants block sizes divisible by 256. Written against the documented signature of
`flash_attn_varlen_func`; not yet run on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError, ContractError
from common.kernels.plan import Longs, Rows, Sight, check_rows, check_tensors

PAGE_MULTIPLE = 256


@dataclass(frozen=True)
class FlashCall:
    """Rows that go to flash-attn in one call."""

    causal: bool
    tokens: torch.Tensor
    """[N'] queries in q_THD."""
    out: torch.Tensor
    """[N'] their places in o_NHD."""
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    """[R' + 1] int32 running sums."""
    max_queries: int
    max_keys: int
    tables: torch.Tensor
    """[L or 1, R', W] int32 cells."""


@dataclass(frozen=True)
class FlashPlan:
    """One iteration's rows on the device."""

    num_queries: int
    banded: bool
    calls: tuple[FlashCall, ...]


class FlashBackend:
    """flash-attn 2 over whole cells as pages; fp16 and bf16. ConfigError where it cannot be used."""

    name = "flash"

    def __init__(self, block_size: int, reason: str = "flash: made by hand") -> None:
        if block_size % PAGE_MULTIPLE:
            raise ConfigError(f"flash: paged KV of flash-attn needs a block size divisible by {PAGE_MULTIPLE}, "
                              f"not {block_size}; choose triton, or such a block size")  # fmt: skip
        self.block_size = block_size
        self.reason = reason
        self._attend = _import_flash()

    def plan(self, rows: Rows, device: torch.device | str) -> FlashPlan:
        """Sort rows into one causal and one full call; ContractError if a row fits neither."""
        sight = check_rows(rows, self.block_size)
        whole = (rows.q_len == 1) | (sight.first >= rows.kv_len)
        causal = ~whole & (sight.first + rows.q_len - 1 <= rows.kv_len)
        unfit = (sight.seen > 0) & ~whole & ~causal
        if unfit.any():
            row = int(np.argmax(unfit))
            raise ContractError(f"flash: the span of attention row {row} ends among its queries; cut the row there")
        calls = [
            _call(rows, sight, members, is_causal, self.block_size, torch.device(device))
            for is_causal, chosen in ((False, whole), (True, causal))
            if len(members := np.flatnonzero(chosen & (sight.seen > 0)))
        ]
        return FlashPlan(sight.num_queries, rows.tables.ndim == 3, tuple(calls))

    def run(
        self, plan: FlashPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o_NHD, lse_NH) of the planned rows on one layer (see `plan.Backend`)."""
        check_tensors(q_THD, kv_C2BGD, self.block_size)
        o_NHD = q_THD.new_zeros(plan.num_queries, *q_THD.shape[1:])
        lse_NH = torch.full(o_NHD.shape[:2], float("-inf"), dtype=torch.float32, device=q_THD.device)
        for call in plan.calls:
            tables = call.tables[layer] if plan.banded else call.tables[0] + layer
            o, lse_HN, _ = self._attend(
                q_THD.index_select(0, call.tokens), kv_C2BGD[:, 0], kv_C2BGD[:, 1],
                cu_seqlens_q=call.cu_queries, cu_seqlens_k=call.cu_keys,
                max_seqlen_q=call.max_queries, max_seqlen_k=call.max_keys,
                softmax_scale=scale, causal=call.causal, return_attn_probs=True, block_table=tables,
            )  # fmt: skip
            blind = torch.isinf(lse_HN)  # flash-attn says +inf where a query sees no key
            lse_NH.index_copy_(0, call.out, lse_HN.masked_fill(blind, float("-inf")).transpose(0, 1).float())
            o_NHD.index_copy_(0, call.out, o.masked_fill(blind.transpose(0, 1)[..., None], 0.0))
        return o_NHD, lse_NH


def _call(rows: Rows, sight: Sight, members: Longs, causal: bool, block_size: int, device: torch.device) -> FlashCall:
    counts = rows.q_len[members].astype(np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    tables = rows.tables if rows.tables.ndim == 3 else rows.tables[None]
    read = np.arange(tables.shape[2]) * block_size < sight.seen[members, None]
    cells = np.where(read, tables[:, members], tables[:, members, :1])

    def on_device(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return FlashCall(
        causal=causal,
        tokens=on_device(np.repeat(rows.q_start[members], counts) + within),
        out=on_device(np.repeat(sight.out_start[members], counts) + within),
        cu_queries=on_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
        cu_keys=on_device(np.concatenate([[0], np.cumsum(sight.seen[members])]).astype(np.int32)),
        max_queries=int(counts.max()),
        max_keys=int(sight.seen[members].max()),
        tables=on_device(cells),
    )


def _import_flash() -> Callable[..., Any]:
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:
        raise ConfigError("flash: the flash-attn package cannot be imported "
                          f"({str(error).splitlines()[0]}); install it, or choose triton") from error  # fmt: skip
    attend: Callable[..., Any] = module.flash_attn_varlen_func
    return attend
