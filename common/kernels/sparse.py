"""Decode attention on a CPU straight from the cells: a paged KV cache read as the table of an embedding bag.

One key or value of one KV head is a table row of D numbers, at (cell * 2 * B + offset) * G + head; the value lies B * G
rows behind its key. A query head's logits are dot products with the rows that an index names (torch has them as the
gradient of an embedding bag's weights); its output is their weighted sum (an embedding bag). All is read where it
lies and copied nowhere: the gather that this replaces took longer than the arithmetic. fp32 only: bags sum in the
table's type. Padding of a short row is its first key once more, masked, so no cell is touched that no query sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from common.kernels.plan import Longs, Rows, Sight

QUERY_HEADS = 2
"""Query heads of a KV head at most: each reads the keys anew, where one gather serves them all."""
CHUNK = 1024
"""Keys that are summed one by one at most; the sums of chunks are summed then, as fp32 asks for."""


class Bags(NamedTuple):
    """The shape of an index, for so many query heads. Keys lie token by token, as in memory; values head by head."""

    owner: torch.Tensor  # [R' * S * H] query head of each key
    starts: torch.Tensor  # [R' * H * chunks] where each chunk of a query head's values begins


class Index(NamedTuple):
    """Table rows of what each query head reads, of one layer."""

    keys: torch.Tensor  # [R' * S * H]
    values: torch.Tensor  # [R' * H * S], to be read B * G rows further on


@dataclass(frozen=True)
class SparseBucket:
    """R' rows of one query each, padded to S keys: those that the longest sees, in chunks of equal length."""

    q_R: torch.Tensor
    out_R: torch.Tensor
    keys_LRS: torch.Tensor
    """[L or 1, R', S] int64: cell * 2 * B + offset; of the band's first layer where all lie alike."""
    hidden_R1S: torch.Tensor | None
    """Which are padding; None if none is."""
    chunks: int
    _bags: dict[int, Bags] = field(default_factory=dict)
    _index: dict[tuple[int, int, int], Index] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, sight: Sight, members: Longs, block_size: int) -> SparseBucket:
        """The keys that these rows see."""
        seen = sight.seen[members]
        longest = int(seen.max())
        chunks = -(-longest // CHUNK)
        key = np.arange(chunks * -(-longest // chunks))
        hidden = key >= seen[:, None]
        block, offset = np.divmod(np.where(hidden, 0, key), block_size)
        tables = rows.tables if rows.tables.ndim == 3 else rows.tables[None]
        cells = tables[:, members[:, None], block].astype(np.int64)
        return cls(
            q_R=torch.from_numpy(rows.q_start[members].astype(np.int64)),
            out_R=torch.from_numpy(sight.out_start[members]),
            keys_LRS=torch.from_numpy(cells * (2 * block_size) + offset),
            hidden_R1S=torch.from_numpy(hidden)[:, None] if hidden.any() else None,
            chunks=chunks,
        )

    def bags(self, heads: int) -> Bags:
        """For this many query heads; the same for all layers."""
        if heads not in self._bags:
            _, num_rows, keys = self.keys_LRS.shape
            queries = torch.arange(num_rows * heads)
            owner = queries.view(num_rows, 1, heads).expand(num_rows, keys, heads).reshape(-1).contiguous()
            self._bags[heads] = Bags(owner, torch.arange(0, len(owner), keys // self.chunks))
        return self._bags[heads]

    def index(self, layer: int, heads: int, kv_heads: int) -> Index:
        """Where everything is. Kept until another layer's is asked for."""
        key = (layer, heads, kv_heads)
        if key not in self._index:
            self._index.clear()
            group = torch.arange(heads) // (heads // kv_heads)
            rows_RSH = self.keys_LRS[layer][..., None] * kv_heads + group
            self._index[key] = Index(rows_RSH.view(-1), rows_RSH.transpose(1, 2).reshape(-1))
        return self._index[key]


def serves(q_THD: torch.Tensor, kv_C2BGD: torch.Tensor) -> bool:
    """Whether tensors like these are better served here."""
    alike = q_THD.dtype == kv_C2BGD.dtype == torch.float32
    return alike and q_THD.device.type == "cpu" and q_THD.shape[1] <= QUERY_HEADS * kv_C2BGD.shape[3]


def attend(
    bucket: SparseBucket, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [R', H, D], lse [R', H]) of a bucket's rows on one layer (its number counts as in `plan.Backend`)."""
    _, _, block, kv_heads, size = kv_C2BGD.shape
    num_rows, heads = len(bucket.q_R), q_THD.shape[1]
    banded = len(bucket.keys_LRS) > 1
    table = kv_C2BGD.view(-1, size)[0 if banded else layer * 2 * block * kv_heads :]
    owner, starts = bucket.bags(heads)
    index = bucket.index(layer if banded else 0, heads, kv_heads)
    q = (q_THD.index_select(0, bucket.q_R) * scale).view(-1, size)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(q, table, index.keys, starts, owner, 0)
    logits = dots.view(num_rows, -1, heads).transpose(1, 2).contiguous()
    if bucket.hidden_R1S is not None:
        logits.masked_fill_(bucket.hidden_R1S, float("-inf"))
    p = torch.softmax(logits, dim=-1)
    lse = logits.amax(dim=-1).sub_(p.amax(dim=-1).log_())
    o = torch.embedding_bag(table[block * kv_heads :], index.values, starts, False, 0, False, p.view(-1))[0]
    if bucket.chunks > 1:
        o = o.view(-1, bucket.chunks, size).sum(dim=1)
    return o.view(num_rows, heads, size), lse
