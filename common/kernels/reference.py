"""Attention in plain torch: what every other backend is compared with, and what a CPU serves with.

Decode rows (one query each) go through buckets of similar length: one gather of their blocks into a buffer, one
batched attention with the query heads of a KV head as its rows (so K and V are never repeated). In fp32 on a CPU
they need no gather where KV heads are not shared by many (`sparse.py`). Prefill rows of one shape go together: the
keys before a row's first query are seen by all its queries, the rest causally, so two dense calls and a merge do it
without a mask. Sums are in fp32, and everything is in fp64 for fp64 inputs.

Hidden keys (behind a span's end, or padding of a bucket) are overwritten by zeros in the buffer and masked: what a
free cell holds, NaN included, cannot reach a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from common.kernels import sparse
from common.kernels.dense import dense
from common.kernels.merge import merge_two
from common.kernels.plan import Longs, Rows, Sight, check_rows, check_tensors, lse_dtype
from common.kernels.sparse import SparseBucket

PADDING_SHARE = 8
"""A bucket may pad an eighth of its blocks ..."""
PADDING_FREE = 24
"""... or this many, as another bucket costs about as much (40 us a layer) as copying them."""
BUCKET_BLOCKS = 192
"""Blocks in a bucket at most (unless one row has more): the gathered keys should not leave the cache."""
SPARSE_BLOCKS = 1 << 14
"""The same without a gather: logits of so many blocks are in memory at once."""
BUFFER_NUMEL = 1 << 25
"""The largest gather buffer that is kept between calls; its pages would be faulted in anew each time."""


class Part(NamedTuple):
    """Results of some rows: [N'] where they go, [N', H, D] in the type of the computation, and [N', H]."""

    out: torch.Tensor
    o: torch.Tensor
    lse: torch.Tensor


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
class PrefillGroup:
    """X rows of equal shape: T queries each, cut where their sight begins and where it turns causal."""

    q_XT: torch.Tensor
    """Queries, row by row, flat."""
    out_XT: torch.Tensor
    num_rows: int
    halves: torch.Tensor
    """[L or 1, 2 * X * W'] half-cells of the keys that the rows see."""
    prefix: int
    """Keys that all queries of a row see; those after it are seen causally, one more by each query."""
    seen: int


class TorchPlan:
    """One iteration's rows as index tensors on the device. Decodes are laid out when the first layer's tensors have
    shown which way they go."""

    def __init__(self, rows: Rows, sight: Sight, block_size: int, device: torch.device) -> None:
        self._rows, self._sight, self._block_size, self._device = rows, sight, block_size, device
        self._blocks = -(-sight.seen // block_size)
        self._single = np.flatnonzero((rows.q_len == 1) & (self._blocks > 0))
        self._in_order: bool | None = None
        self.num_queries = sight.num_queries
        self.banded = rows.tables.ndim == 3
        """Tables name the cells of each layer, instead of the first one's."""
        self.prefill = tuple(self._group(*shape) for shape in self._shapes())

    def in_order(self, out: torch.Tensor) -> bool:
        """Whether these results are those of all queries, in order. Looked at once: no two parts have them all."""
        if len(out) != self.num_queries:
            return False
        if self._in_order is None:
            self._in_order = torch.equal(out, torch.arange(len(out), device=out.device))
        return self._in_order

    def layer_halves(self, halves: torch.Tensor, layer: int) -> torch.Tensor:
        """The half-cells of one layer."""
        return halves[layer] if self.banded else halves[0] + 2 * layer

    @cached_property
    def gathered(self) -> tuple[DecodeBucket, ...]:
        """Decodes whose keys are gathered first."""
        return tuple(self._bucket(members) for members in cut_buckets(self._single, self._blocks, BUCKET_BLOCKS))

    @cached_property
    def sparse(self) -> tuple[SparseBucket, ...]:
        """Decodes that read their keys where they lie."""
        buckets = cut_buckets(self._single, self._blocks, SPARSE_BLOCKS)
        return tuple(SparseBucket.of(self._rows, self._sight, members, self._block_size) for members in buckets)

    def _bucket(self, members: Longs) -> DecodeBucket:
        rows, sight, num_blocks = self._rows, self._sight, int(self._blocks[members].max())
        num_keys, seen = num_blocks * self._block_size, int(sight.seen[members].max())
        hidden_RS = np.arange(seen) >= sight.seen[members, None]
        row, key = np.nonzero(hidden_RS)
        hidden = row * num_keys + key
        mask_RS = torch.zeros(hidden_RS.shape).masked_fill_(torch.from_numpy(hidden_RS), float("-inf"))
        return DecodeBucket(
            q_R=torch.from_numpy(rows.q_start[members].astype(np.int64)).to(self._device),
            out_R=torch.from_numpy(sight.out_start[members]).to(self._device),
            halves=self._halves(members, num_blocks),
            hidden=torch.from_numpy(np.concatenate([hidden, hidden + len(members) * num_keys])).to(self._device),
            mask_RS=mask_RS[:, None, None].to(self._device) if len(hidden) else None,
            seen=seen,
        )

    def _shapes(self) -> Iterator[tuple[Longs, int, int, int, int]]:
        """(rows, blind queries, queries, prefix, seen) of groups: as many rows as the gathered keys may have."""
        rows, sight = self._rows, self._sight
        groups: dict[tuple[int, int, int, int], list[int]] = {}
        for row in np.flatnonzero((rows.q_len > 1) & (self._blocks > 0)).tolist():
            first, seen = int(sight.first[row]), int(sight.seen[row])
            blind = max(0, 1 - first)  # queries before the span: they keep o = 0, lse = -inf
            shape = (blind, int(rows.q_len[row]) - blind, min(max(first - 1, 0), seen), seen)
            groups.setdefault(shape, []).append(row)
        for shape, members in groups.items():
            most = max(1, BUCKET_BLOCKS // int(self._blocks[members[0]]))
            for start in range(0, len(members), most):
                yield np.array(members[start : start + most]), *shape

    def _group(self, members: Longs, blind: int, num: int, prefix: int, seen: int) -> PrefillGroup:
        token = np.arange(blind, blind + num)
        queries = (self._rows.q_start[members, None] + token).ravel().astype(np.int64)
        out = (self._sight.out_start[members, None] + token).ravel()
        halves = self._halves(members, int(self._blocks[members[0]]))
        q_XT, out_XT = (torch.from_numpy(index).to(self._device) for index in (queries, out))
        return PrefillGroup(q_XT, out_XT, len(members), halves, prefix, seen)

    def _halves(self, members: Longs, num_blocks: int) -> torch.Tensor:
        """[L or 1, 2 * R' * W'] int64; entries past a row's last block repeat its first cell, which exists."""
        tables = self._rows.tables if self.banded else self._rows.tables[None]
        cells = tables[:, members, :num_blocks].astype(np.int64)
        past = np.arange(num_blocks) * self._block_size >= self._sight.seen[members, None]
        cells = np.where(past, cells[:, :, :1], cells)
        flat = 2 * cells.reshape(len(cells), -1)
        return torch.from_numpy(np.concatenate([flat, flat + 1], axis=1)).to(self._device)


class TorchBackend:
    """The reference backend (see the module). It keeps a gather buffer: use one object per thread."""

    name = "torch"

    def __init__(self, block_size: int, reason: str = "torch: made by hand") -> None:
        self.block_size = block_size
        self.reason = reason
        self._buffer: torch.Tensor | None = None

    def plan(self, rows: Rows, device: torch.device | str) -> TorchPlan:
        """Sort the rows into buckets and prefill rows (ContractError on impossible rows)."""
        return TorchPlan(rows, check_rows(rows, self.block_size), self.block_size, torch.device(device))

    def run(
        self, plan: TorchPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o_NHD, lse_NH) of the planned rows on one layer (see `plan.Backend`)."""
        check_tensors(q_THD, kv_C2BGD, self.block_size)
        parts = self._parts(plan, q_THD, kv_C2BGD, layer, scale)
        first = next(parts, None)
        if first is not None and plan.in_order(first.out):
            return first.o.to(q_THD.dtype), first.lse
        o_NHD = q_THD.new_zeros(plan.num_queries, *q_THD.shape[1:])
        lse_NH = o_NHD.new_full(o_NHD.shape[:2], float("-inf"), dtype=lse_dtype(q_THD.dtype))
        for part in () if first is None else chain((first,), parts):
            o_NHD.index_copy_(0, part.out, part.o.to(o_NHD.dtype))
            lse_NH.index_copy_(0, part.out, part.lse)
        return o_NHD, lse_NH

    def _parts(
        self, plan: TorchPlan, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> Iterator[Part]:
        wide = lse_dtype(q_THD.dtype)
        if sparse.serves(q_THD, kv_C2BGD):
            for one in plan.sparse:
                yield Part(one.out_R, *sparse.attend(one, q_THD, kv_C2BGD, layer, scale))
        else:
            for bucket in plan.gathered:
                kv_2SGD = self._gather(kv_C2BGD, plan.layer_halves(bucket.halves, layer), wide)
                yield _run_bucket(bucket, q_THD, kv_2SGD, scale)
        for group in plan.prefill:
            kv_2SGD = self._gather(kv_C2BGD, plan.layer_halves(group.halves, layer), wide)
            yield _run_prefill(group, q_THD, kv_2SGD, scale)

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


def _run_bucket(bucket: DecodeBucket, q_THD: torch.Tensor, kv_2SGD: torch.Tensor, scale: float) -> Part:
    """The query heads of a KV head are the rows of one matrix (M = H / G)."""
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
    return Part(bucket.out_R, o_RGMD.reshape(num_rows, heads, size), lse_RGM.reshape(num_rows, heads))


def _run_prefill(group: PrefillGroup, q_THD: torch.Tensor, kv_2SGD: torch.Tensor, scale: float) -> Part:
    """Two dense calls: the keys that all queries see, and those seen causally."""
    kv_heads, size = kv_2SGD.shape[2:]
    q = q_THD.index_select(0, group.q_XT).to(kv_2SGD.dtype).view(group.num_rows, -1, *q_THD.shape[1:])
    q_XHTD = q.transpose(1, 2)
    k_XGSD, v_XGSD = kv_2SGD.view(2, group.num_rows, -1, kv_heads, size).transpose(2, 3)
    parts = []
    for keys, causal in ((slice(0, group.prefix), False), (slice(group.prefix, group.seen), True)):
        if keys.stop > keys.start:
            o_XHTD, lse_XHT = dense(q_XHTD, k_XGSD[:, :, keys], v_XGSD[:, :, keys], scale, causal)
            o, lse = o_XHTD.transpose(1, 2), lse_XHT.transpose(1, 2)
            parts.append((o.reshape(-1, *q_THD.shape[1:]), lse.reshape(-1, q_THD.shape[1])))
    return Part(group.out_XT, *(parts[0] if len(parts) == 1 else merge_two(*parts)))


def cut_buckets(rows: Longs, blocks: Longs, most: int) -> list[Longs]:
    """Cut rows, longest first, into buckets whose padding (to the bucket's longest) is bounded, of `most` blocks
    unless one row has more. Within a bucket rows keep their order."""
    order = rows[np.argsort(-blocks[rows], kind="stable")]
    cuts, start, padding = [], 0, 0
    lengths = blocks[order].tolist()
    for i, length in enumerate(lengths):
        widest, padding = lengths[start], padding + lengths[start] - length
        total = (i + 1 - start) * widest
        if i > start and (padding > max(PADDING_FREE, total // PADDING_SHARE) or total > most):
            cuts.append(i)
            start, padding = i, 0
    return [np.sort(part) for part in np.split(order, cuts)] if len(order) else []
