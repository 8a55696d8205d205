"""The Triton backend: paged decode with split KV, and paged prefill, both with log-sum-exp, on one set of tables.

`plan` packs all that the kernels read (one int32 array, one copy to the device); `run` launches at most three
kernels. Split KV is flash-decoding: a long row's keys are shared among programs, and a second kernel merges their
partial results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from common.errors import ContractError
from common.kernels import triton_kernels as kernels
from common.kernels.plan import Ints, Longs, Rows, Sight, check_rows, check_tensors

MAX_SPLITS = 32
MIN_SPLIT_KEYS = 256
"""A split with fewer keys is taken to cost more in merging than it gains (not yet measured on a GPU)."""
PROGRAMS_PER_SM = 2


@dataclass(frozen=True)
class TritonPlan:
    """One iteration's rows on the device, all int32."""

    num_queries: int
    tables: torch.Tensor
    """[L or 1, R * W] cells."""
    banded: bool
    """Tables name the cells of each layer, instead of the first one's."""
    decode: torch.Tensor
    """[rows of one query, DECODE_META]"""
    tiles: torch.Tensor
    """[tiles of the other rows, TILE_META]"""
    longest: int
    """Keys that the longest decode row sees."""
    num_sms: int


class TritonBackend:
    """Triton kernels on CUDA, or on CPU tensors under the interpreter. `num_splits` overrides the heuristic."""

    name = "triton"

    def __init__(self, block_size: int, reason: str = "triton: made by hand", num_splits: int | None = None) -> None:
        self.block_size = block_size
        self.reason = reason
        self._num_splits = num_splits
        self._interpreted = bool(triton.knobs.runtime.interpret)

    def plan(self, rows: Rows, device: torch.device | str) -> TritonPlan:
        """Check the rows and copy what the kernels read to the device (ContractError on impossible rows)."""
        device = torch.device(device)
        sight = check_rows(rows, self.block_size)
        decode, tiles = decode_meta(rows, sight), tile_meta(rows, sight)
        packed = np.concatenate([decode.ravel(), tiles.ravel(), rows.tables.ravel()]).astype(np.int32)
        on_device = _to_device(packed, device)
        decode_D, tiles_D, tables_D = torch.split(on_device, [decode.size, tiles.size, rows.tables.size])
        banded = rows.tables.ndim == 3
        return TritonPlan(
            num_queries=sight.num_queries,
            tables=tables_D.view(len(rows.tables), -1) if banded and rows.tables.size else tables_D[None],
            banded=banded,
            decode=decode_D.view(decode.shape),
            tiles=tiles_D.view(tiles.shape),
            longest=int(decode[:, 2].max(initial=0)),
            num_sms=_count_sms(device),
        )

    def run(
        self, plan: TritonPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o_NHD, lse_NH) of the planned rows on one layer (see `plan.Backend`); no fp64."""
        check_tensors(q_THD, kv_C2BGD, self.block_size)
        if q_THD.dtype != kv_C2BGD.dtype or q_THD.dtype == torch.float64:
            raise ContractError(f"triton: queries in {q_THD.dtype} over KV in {kv_C2BGD.dtype}")
        o_NHD = q_THD.new_zeros(plan.num_queries, *q_THD.shape[1:])
        lse_NH = torch.full(o_NHD.shape[:2], float("-inf"), dtype=torch.float32, device=q_THD.device)
        if len(plan.decode):
            self._decode(plan, q_THD, kv_C2BGD, layer, scale, o_NHD, lse_NH)
        if len(plan.tiles):
            launch = kernels.prefill_launch(q_THD.dtype, *self._shape(q_THD, kv_C2BGD), self._interpreted)
            job = _Job(kernels.prefill_kernel, (len(plan.tiles), q_THD.shape[1]), launch, plan.tiles)
            job.start(plan, q_THD, kv_C2BGD, o_NHD, lse_NH, layer, scale)
        return o_NHD, lse_NH

    def _decode(
        self, plan: TritonPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float,
        o_NHD: torch.Tensor, lse_NH: torch.Tensor,
    ) -> None:  # fmt: skip
        heads, size = q_THD.shape[1:]
        num_rows, kv_heads = len(plan.decode), kv_C2BGD.shape[3]
        splits = self._num_splits or choose_splits(num_rows * kv_heads, plan.longest, plan.num_sms)
        launch = kernels.decode_launch(q_THD.dtype, *self._shape(q_THD, kv_C2BGD), splits, self._interpreted)
        job = _Job(kernels.decode_kernel, (num_rows, kv_heads, splits), launch, plan.decode)
        if splits == 1:
            job.start(plan, q_THD, kv_C2BGD, o_NHD, lse_NH, layer, scale)
            return
        part_o = torch.empty(splits * num_rows, heads, size, dtype=torch.float32, device=q_THD.device)
        part_lse = torch.empty(splits * num_rows, heads, dtype=torch.float32, device=q_THD.device)
        job.start(plan, q_THD, kv_C2BGD, part_o, part_lse, layer, scale)
        merging = kernels.merge_launch(size, splits)
        kernels.merge_kernel[(num_rows, heads)](
            part_o, part_lse, plan.decode, o_NHD, lse_NH, **merging.constants,
            num_warps=merging.num_warps, num_stages=merging.num_stages,
        )  # fmt: skip

    def _shape(self, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor) -> tuple[int, int, int]:
        """Query heads of a KV head, head size, block size."""
        return q_THD.shape[1] // kv_C2BGD.shape[3], q_THD.shape[2], self.block_size


def choose_splits(programs: int, longest: int, num_sms: int) -> int:
    """A power of two: enough splits to fill the device, none so short that merging costs more than it gains."""
    wanted = min(PROGRAMS_PER_SM * num_sms // max(programs, 1), longest // MIN_SPLIT_KEYS, MAX_SPLITS)
    return 1 << max(wanted.bit_length() - 1, 0)


def decode_meta(rows: Rows, sight: Sight) -> Longs:
    """[rows of one query, DECODE_META]."""
    single = np.flatnonzero(rows.q_len == 1)
    first_entry = single * rows.tables.shape[-1]
    return np.stack([rows.q_start[single], sight.out_start[single], sight.seen[single], first_entry], axis=1)


def tile_meta(rows: Rows, sight: Sight) -> Longs:
    """[tiles, TILE_META]: rows of several queries that see any key, cut into PREFILL_TILE queries."""
    members = np.flatnonzero((rows.q_len > 1) & (sight.seen > 0))
    counts = -(-rows.q_len[members].astype(np.int64) // kernels.PREFILL_TILE)
    row = np.repeat(members, counts)
    skipped = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * kernels.PREFILL_TILE
    return np.stack(
        [
            rows.q_start[row] + skipped, sight.out_start[row] + skipped,
            np.minimum(rows.q_len[row] - skipped, kernels.PREFILL_TILE), sight.first[row] + skipped,
            rows.kv_len[row], row * rows.tables.shape[-1],
        ],
        axis=1,
    )  # fmt: skip


class _Job(NamedTuple):
    """A launch of one of the two attention kernels; both take the same arguments."""

    kernel: Any
    grid: tuple[int, ...]
    launch: kernels.Launch
    meta: torch.Tensor

    def start(
        self, plan: TritonPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
        layer: int, scale: float,
    ) -> None:  # fmt: skip
        if q_THD.stride(2) != 1 or kv_C2BGD.stride(4) != 1:
            raise ContractError("triton: the last dimension of queries and KV must be contiguous")
        table, offset = (plan.tables[layer], 0) if plan.banded else (plan.tables[0], layer)
        self.kernel[self.grid](
            q_THD, kv_C2BGD, table, self.meta, o, lse, offset, scale * math.log2(math.e),
            q_THD.stride(0), q_THD.stride(1), *kv_C2BGD.stride()[:4],
            **self.launch.constants, num_warps=self.launch.num_warps, num_stages=self.launch.num_stages,
        )  # fmt: skip


def _to_device(array: Ints, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _count_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
