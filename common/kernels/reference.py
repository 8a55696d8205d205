"""Attention in plain torch: what every other backend is compared with, and what a CPU serves with.

Decode rows (one query each) go through buckets of similar length: one gather of their blocks into a buffer, one
batched attention with the query heads of a KV head as its rows (so K and V are never repeated). Prefill rows go one
by one: the keys before the row's first query are seen by all its queries, the rest causally, so two dense calls and
a merge do it without a mask. Sums are in fp32, and everything is in fp64 for fp64 inputs.

On the CPU the dense calls are torch's flash kernel, which returns the log-sum-exp; elsewhere two matmuls.
Hidden keys (behind a span's end, or padding of a bucket) are overwritten by zeros in the buffer and masked: what a
free cell holds, NaN included, cannot reach a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.kernels.merge import merge_two
from common.kernels.plan import Longs, Rows, Sight, check_rows, check_tensors, lse_dtype

PADDING_SHARE = 8
"""A bucket may pad an eighth of its blocks ..."""
PADDING_FREE = 24
"""... or this many, as another bucket costs about as much (40 us a layer) as copying them."""
BUCKET_BLOCKS = 192
"""Blocks in a bucket at most (unless one row has more): the gathered keys should not leave the cache."""
BUFFER_NUMEL = 1 << 25
"""The largest gather buffer that is kept between calls; its pages would be faulted in anew each time."""


@dataclass(frozen=True)
class DecodeBucket:
    """Rows of one query each and nearly the same number of blocks. R' rows, S keys: what the longest of them sees."""

    q_R: torch.Tensor
    out_R: torch.Tensor
    halves: torch.Tensor
    """[L or 1, 2 * R' * W'] which half-cells (2 * cell for K, + 1 for V) make up the buffer [2, R', W' * B, G, D]."""
    hidden: torch.Tensor
    """[X] the tokens of the buffer [2 * R' * W' * B] that no query may see, of the first S of each row."""
    mask_RS: torch.Tensor | None
    """[R', 1, 1, S] 0 or -inf, fp32; None if nothing is hidden."""
    seen: int
    """S. Keys behind it are in no tensor that is computed with."""


@dataclass(frozen=True)
class PrefillRow:
    """Queries of one row, cut where their sight begins and where it turns causal."""

    q_start: int
    q_len: int
    out_start: int
    halves: torch.Tensor
    """[L or 1, 2 * W'] half-cells of the keys that the row sees."""
    prefix: int
    """Keys that all its queries see; those after it are seen causally, one more by each query."""
    seen: int


@dataclass(frozen=True)
class TorchPlan:
    """One iteration's rows as index tensors on the device."""

    num_queries: int
    banded: bool
    """Tables name the cells of each layer, instead of the first one's."""
    decode: tuple[DecodeBucket, ...]
    prefill: tuple[PrefillRow, ...]

    def layer_halves(self, halves: torch.Tensor, layer: int) -> torch.Tensor:
        """The half-cells of one layer."""
        return halves[layer] if self.banded else halves[0] + 2 * layer


class TorchBackend:
    """The reference backend (see the module). It keeps a gather buffer: use one object per thread."""

    name = "torch"

    def __init__(self, block_size: int, reason: str = "torch: made by hand") -> None:
        self.block_size = block_size
        self.reason = reason
        self._buffer: torch.Tensor | None = None

    def plan(self, rows: Rows, device: torch.device | str) -> TorchPlan:
        """Sort the rows into buckets and prefill rows (ContractError on impossible rows)."""
        sight = check_rows(rows, self.block_size)
        blocks = -(-sight.seen // self.block_size)
        single = (rows.q_len == 1) & (blocks > 0)
        decode = tuple(
            self._decode_bucket(rows, sight, members, int(blocks[members[0]]), torch.device(device))
            for members in cut_buckets(np.flatnonzero(single), blocks)
        )
        prefill = tuple(
            self._prefill_row(rows, sight, row, int(blocks[row]), torch.device(device))
            for row in np.flatnonzero((rows.q_len > 1) & (blocks > 0)).tolist()
        )
        return TorchPlan(sight.num_queries, rows.tables.ndim == 3, decode, prefill)

    def run(
        self, plan: TorchPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o_NHD, lse_NH) of the planned rows on one layer (see `plan.Backend`)."""
        check_tensors(q_THD, kv_C2BGD, self.block_size)
        wide = lse_dtype(q_THD.dtype)
        o_NHD = q_THD.new_zeros(plan.num_queries, *q_THD.shape[1:])
        lse_NH = torch.full(o_NHD.shape[:2], float("-inf"), dtype=wide, device=q_THD.device)
        for bucket in plan.decode:
            kv_2SGD = self._gather(kv_C2BGD, plan.layer_halves(bucket.halves, layer), wide)
            self._run_bucket(bucket, q_THD, kv_2SGD, scale, o_NHD, lse_NH)
        for row in plan.prefill:
            kv_2SGD = self._gather(kv_C2BGD, plan.layer_halves(row.halves, layer), wide)
            _run_prefill(row, q_THD, kv_2SGD[:, : row.seen], scale, o_NHD, lse_NH)
        return o_NHD, lse_NH

    def _decode_bucket(
        self, rows: Rows, sight: Sight, members: Longs, num_blocks: int, device: torch.device
    ) -> DecodeBucket:
        num_keys, seen = num_blocks * self.block_size, int(sight.seen[members].max())
        hidden_RS = np.arange(seen) >= sight.seen[members, None]
        row, key = np.nonzero(hidden_RS)
        hidden = row * num_keys + key
        mask_RS = torch.zeros(hidden_RS.shape).masked_fill_(torch.from_numpy(hidden_RS), float("-inf"))
        return DecodeBucket(
            q_R=torch.from_numpy(rows.q_start[members].astype(np.int64)).to(device),
            out_R=torch.from_numpy(sight.out_start[members]).to(device),
            halves=_halves(rows, sight, members, num_blocks, self.block_size).to(device),
            hidden=torch.from_numpy(np.concatenate([hidden, hidden + len(members) * num_keys])).to(device),
            mask_RS=mask_RS[:, None, None].to(device) if len(hidden) else None,
            seen=seen,
        )

    def _prefill_row(self, rows: Rows, sight: Sight, row: int, num_blocks: int, device: torch.device) -> PrefillRow:
        first, seen = int(sight.first[row]), int(sight.seen[row])
        blind = max(0, 1 - first)  # queries before the span: they keep o = 0, lse = -inf
        members = np.array([row])
        return PrefillRow(
            q_start=int(rows.q_start[row]) + blind,
            q_len=int(rows.q_len[row]) - blind,
            out_start=int(sight.out_start[row]) + blind,
            halves=_halves(rows, sight, members, num_blocks, self.block_size).to(device),
            prefix=min(max(first - 1, 0), seen),
            seen=seen,
        )

    def _gather(self, kv_C2BGD: torch.Tensor, halves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[2, keys, G, D] contiguous, in the type to compute in; overwritten by the next gather."""
        _, _, block, heads, size = kv_C2BGD.shape
        source = kv_C2BGD.view(-1, block, heads, size)
        if kv_C2BGD.dtype != dtype:
            return source.index_select(0, halves).to(dtype).view(2, -1, heads, size)
        numel = halves.numel() * block * heads * size
        buffer = self._buffer
        if buffer is None or buffer.numel() < numel or (buffer.dtype, buffer.device) != (dtype, source.device):
            buffer = torch.empty(numel, dtype=dtype, device=source.device)
            self._buffer = buffer if numel <= BUFFER_NUMEL else None
        out = buffer[:numel].view(-1, block, heads, size)
        return torch.index_select(source, 0, halves, out=out).view(2, -1, heads, size)

    def _run_bucket(
        self, bucket: DecodeBucket, q_THD: torch.Tensor, kv_2SGD: torch.Tensor, scale: float,
        o_NHD: torch.Tensor, lse_NH: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the results of one bucket; the query heads of a KV head are the rows of one matrix (M = H / G)."""
        kv_heads, size = kv_2SGD.shape[2:]
        num_rows, heads = bucket.q_R.numel(), q_THD.shape[1]
        mask = bucket.mask_RS
        if mask is not None:
            kv_2SGD.view(-1, kv_heads * size).index_fill_(0, bucket.hidden, 0.0)
            mask = mask.to(kv_2SGD.dtype)
        kv_2RGSD = kv_2SGD.view(2, num_rows, -1, kv_heads, size)[:, :, : bucket.seen].transpose(2, 3)
        q_RHD = q_THD.index_select(0, bucket.q_R).to(kv_2SGD.dtype)
        q_RGMD = q_RHD.view(num_rows, kv_heads, heads // kv_heads, size)
        o_RGMD, lse_RGM = dense(q_RGMD, kv_2RGSD[0], kv_2RGSD[1], scale, mask=mask)
        o_NHD.index_copy_(0, bucket.out_R, o_RGMD.reshape(num_rows, heads, size).to(o_NHD.dtype))
        lse_NH.index_copy_(0, bucket.out_R, lse_RGM.reshape(num_rows, heads))


def cut_buckets(rows: Longs, blocks: Longs) -> list[Longs]:
    """Cut rows, longest first, into buckets whose padding (to the bucket's first row) is bounded."""
    order = rows[np.argsort(-blocks[rows], kind="stable")]
    cuts, start, padding = [], 0, 0
    lengths = blocks[order].tolist()
    for i, length in enumerate(lengths):
        widest, padding = lengths[start], padding + lengths[start] - length
        total = (i + 1 - start) * widest
        if i > start and (padding > max(PADDING_FREE, total // PADDING_SHARE) or total > BUCKET_BLOCKS):
            cuts.append(i)
            start, padding = i, 0
    return np.split(order, cuts) if len(order) else []


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    causal: bool = False, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o [X, H, T, D], lse [X, H, T]) of q [X, H, T, D] over k and v [X, G, S, D], S > 0; H a multiple of G.

    causal: query i sees keys 0..i. mask [X, 1, 1, S]: added to the logits. Each query must see a key.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    return dense_by_matmul(q, k, v, scale, causal, mask)


def dense_by_matmul(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    causal: bool = False, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`dense` on any device, with all the logits in memory."""
    num, heads, tokens, size = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(num, kv_heads, heads // kv_heads * tokens, size)
    logits = torch.matmul(q * scale, k.transpose(2, 3))
    if mask is not None:
        logits += mask
    if causal:
        later = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu_(1)
        logits.view(num, heads, tokens, keys).masked_fill_(later, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    o = torch.matmul(logits.sub_(lse[..., None]).exp_(), v)
    return o.view(num, heads, tokens, size), lse.view(num, heads, tokens)


def _run_prefill(
    row: PrefillRow, q_THD: torch.Tensor, kv_2SGD: torch.Tensor, scale: float,
    o_NHD: torch.Tensor, lse_NH: torch.Tensor,
) -> None:  # fmt: skip
    q_1HTD = q_THD[row.q_start : row.q_start + row.q_len].to(kv_2SGD.dtype).transpose(0, 1)[None]
    k_1GSD, v_1GSD = kv_2SGD.transpose(1, 2)[:, None]
    parts = []
    for keys, causal in ((slice(0, row.prefix), False), (slice(row.prefix, row.seen), True)):
        if keys.stop > keys.start:
            o_1HTD, lse_1HT = dense(q_1HTD, k_1GSD[:, :, keys], v_1GSD[:, :, keys], scale, causal)
            parts.append((o_1HTD[0].transpose(0, 1), lse_1HT[0].transpose(0, 1)))
    o_THD, lse_TH = parts[0] if len(parts) == 1 else merge_two(*parts)
    out = slice(row.out_start, row.out_start + row.q_len)
    o_NHD[out] = o_THD.to(o_NHD.dtype)
    lse_NH[out] = lse_TH


def _halves(rows: Rows, sight: Sight, members: Longs, num_blocks: int, block_size: int) -> torch.Tensor:
    """[L or 1, 2 * R' * W'] int64; entries past a row's last block repeat its first cell, which exists."""
    tables = rows.tables if rows.tables.ndim == 3 else rows.tables[None]
    cells = tables[:, members, :num_blocks].astype(np.int64)
    past = np.arange(num_blocks) * block_size >= sight.seen[members, None]
    cells = np.where(past, cells[:, :, :1], cells)
    flat = 2 * cells.reshape(len(cells), -1)
    return torch.from_numpy(np.concatenate([flat, flat + 1], axis=1))
