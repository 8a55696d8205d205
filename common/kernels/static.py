"""Decode plans with fixed buffers: what a captured graph reads is refilled in place between replays.

A static plan serves up to R rows of one query each over one span of KV with uniform tables ([R, W]). Rows that are
not there see no key: they give zeros. `fill` does all the host work; `run` has the same shapes, addresses and
launches each time, so that it can be captured. Two forms:

- `TritonStatic` keeps the Triton backend's plan and replaces its tensors by buffers. Rows' tables lie one behind the
  other, so only what is read is copied. The number of splits is fixed when it is made (`static_key`).
- `TorchStatic` gathers the same number of blocks for every row and masks; it serves where the torch backend does, and
  is what a machine without a GPU can test.

Neither has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from common.errors import ContractError
from common.kernels.plan import Backend, Ints, Rows, check_rows


class StaticPlan(Protocol):
    """Buffers of one captured shape."""

    def fill(self, rows: Rows) -> None:
        """Put these rows into the buffers (ContractError if they do not fit)."""
        ...

    def run(self, q_RHD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """o_RHD of all R rows on one layer; rows without keys are zeros."""
        ...


def static_key(backend: Backend, rows: Rows, max_rows: int, kv_heads: int, device: torch.device) -> int:
    """What a graph of `max_rows` rows has to fix beside them: the number of splits (triton), the blocks gathered
    of each row, a power of two (torch). Rows with the same key can share a plan."""
    longest = int(rows.kv_len.max(initial=1))
    if backend.name == "triton":
        from common.kernels.triton_paged import _count_sms, choose_splits

        return choose_splits(max_rows * kv_heads, longest, _count_sms(device))
    blocks = -(-longest // _block_size(backend))
    return 1 << max(blocks - 1, 0).bit_length()


def static_plan(backend: Backend, key: int, max_rows: int, max_blocks: int, device: torch.device) -> StaticPlan:
    """A plan of `max_rows` rows whose tables have `max_blocks` entries each at most, all empty."""
    if backend.name == "triton":
        return TritonStatic(_block_size(backend), key, max_rows, max_blocks, device)
    if backend.name == "torch":
        return TorchStatic(_block_size(backend), key, max_rows, device)
    raise ContractError(f"attention backend {backend.name} has no static plan")


def can_be_static(backend: Backend) -> bool:
    """Whether `static_plan` knows this backend."""
    return backend.name in ("triton", "torch")


def _block_size(backend: Any) -> int:
    size: int = backend.block_size
    return size


def _checked(rows: Rows, block_size: int, max_rows: int, max_blocks: int) -> Ints:
    """Keys seen by each row; ContractError where a static plan cannot hold the rows."""
    sight = check_rows(rows, block_size)
    if rows.tables.ndim != 2 or (rows.q_len != 1).any() or len(rows.q_len) > max_rows:
        raise ContractError(f"a static plan takes up to {max_rows} rows of one query with uniform tables")
    if (-(-sight.seen // block_size) > max_blocks).any():
        raise ContractError(f"a static plan for {max_blocks} blocks a row cannot hold {int(sight.seen.max())} keys")
    return sight.seen.astype(np.int32)


class Staging:
    """One int32 buffer on the device and its image on the host (pinned on CUDA), copied up to a length."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.device_I = torch.zeros(length, dtype=torch.int32, device=device)
        self._image = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.host: Ints = self._image.numpy()
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """The host image may be written: the last copy out of it is over."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, length: int) -> None:
        """Copy the first `length` numbers to the device."""
        self.device_I[:length].copy_(self._image[:length], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class TritonStatic:
    """The Triton backend over fixed buffers: metadata of R rows, then their tables one behind the other."""

    def __init__(self, block_size: int, splits: int, max_rows: int, max_blocks: int, device: torch.device) -> None:
        from common.kernels.triton_kernels import DECODE_META
        from common.kernels.triton_paged import TritonBackend, TritonPlan, _count_sms

        self._backend = TritonBackend(block_size, "triton: static", splits)
        self._block_size, self._max_rows, self._max_blocks = block_size, max_rows, max_blocks
        self._width = DECODE_META
        self._head = max_rows * DECODE_META
        self._staging = Staging(self._head + max_rows * max_blocks, device)
        whole = self._staging.device_I
        self.plan = TritonPlan(
            num_queries=max_rows, tables=whole[None, self._head :], banded=False,
            decode=whole[: self._head].view(max_rows, DECODE_META), tiles=whole[:0].view(0, 6), longest=1,
            num_sms=_count_sms(device),
        )  # fmt: skip
        self._clear()
        self._staging.send(self._head)

    def _clear(self) -> None:
        meta = self._staging.host[: self._head].reshape(self._max_rows, self._width)
        meta[:] = 0
        meta[:, 0] = meta[:, 1] = np.arange(self._max_rows)

    def fill(self, rows: Rows) -> None:
        """See `StaticPlan`."""
        seen = _checked(rows, self._block_size, self._max_rows, self._max_blocks)
        blocks = -(-seen // self._block_size)
        self._staging.wait()
        self._clear()
        meta = self._staging.host[: self._head].reshape(self._max_rows, self._width)
        meta[: len(seen), 0] = rows.q_start
        meta[: len(seen), 2] = seen
        meta[: len(seen), 3] = np.cumsum(blocks) - blocks
        read = np.arange(rows.tables.shape[1]) < blocks[:, None]
        total = int(blocks.sum())
        self._staging.host[self._head : self._head + total] = rows.tables[read]
        self._staging.send(self._head + total)

    def run(self, q_RHD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """See `StaticPlan`."""
        return self._backend.run(self.plan, q_RHD, kv_C2BGD, layer, scale)[0]


class TorchStatic:
    """Plain torch over fixed shapes: every row gathers `blocks` blocks; what it does not see is zeroed and masked."""

    def __init__(self, block_size: int, blocks: int, max_rows: int, device: torch.device) -> None:
        self._block_size, self._blocks, self._max_rows = block_size, blocks, max_rows
        self._staging = Staging(max_rows * (1 + blocks), device)
        whole = self._staging.device_I
        self._seen_R, self._table_RW = whole[:max_rows], whole[max_rows:].view(max_rows, blocks)
        self._at_S = torch.arange(blocks * block_size, device=device)

    def fill(self, rows: Rows) -> None:
        """See `StaticPlan`."""
        seen = _checked(rows, self._block_size, self._max_rows, self._blocks)
        if (rows.q_start != np.arange(len(seen))).any():
            raise ContractError("a static plan in torch takes query r as its row r")
        self._staging.wait()
        self._staging.host[:] = 0
        self._staging.host[: len(seen)] = seen
        table = self._staging.host[self._max_rows :].reshape(self._max_rows, self._blocks)
        width = min(rows.tables.shape[1], self._blocks)
        read = np.arange(width) < -(-seen // self._block_size)[:, None]
        table[: len(seen), :width] = np.where(read, rows.tables[:, :width], 0)
        self._staging.send(len(self._staging.host))

    def run(self, q_RHD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """See `StaticPlan`."""
        num_rows, heads, size = q_RHD.shape
        kv_heads = kv_C2BGD.shape[3]
        cells = (self._table_RW + layer).view(-1)
        kv = kv_C2BGD.index_select(0, cells).view(num_rows, self._blocks, 2, self._block_size, kv_heads, size)
        kv_2RGSD = kv.permute(2, 0, 4, 1, 3, 5).reshape(2, num_rows, kv_heads, -1, size).float()
        hidden_RS = self._at_S[None] >= self._seen_R[:, None]
        kv_2RGSD = kv_2RGSD.masked_fill(hidden_RS[None, :, None, :, None], 0.0)
        q_RGMD = q_RHD.float().reshape(num_rows, kv_heads, heads // kv_heads, size) * scale
        logits = torch.matmul(q_RGMD, kv_2RGSD[0].transpose(2, 3))
        masked = hidden_RS & (self._at_S[None] > 0)  # a row without keys sees one of zeros
        logits.masked_fill_(masked[:, None, None], float("-inf"))
        o = torch.matmul(torch.softmax(logits, dim=-1), kv_2RGSD[1])
        return o.reshape(num_rows, heads, size).to(q_RHD.dtype)
