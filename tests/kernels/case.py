"""Random attention cases: rows, queries and a KV range whose cells hold NaN wherever no row may look."""

from __future__ import annotations

import numpy as np
import torch

from common.kernels.plan import Rows


def make_rows(rng, spec, block, layers=None, num_layers=1, width=None):
    """Rows from (q_len, q_pos, kv_start, kv_len) each, over a random permutation of cells; also the number of cells.

    layers=None: [R, W] tables of runs over `num_layers`; an int: [L, R, W] tables of scattered cells.
    Entries past the last key's block are -1, or a wild valid cell.
    """
    spec = np.array(spec, np.int64).reshape(-1, 4)
    q_len, q_pos, kv_start, kv_len = spec.T
    blocks = -(-kv_len // block)
    width = max(int(blocks.max(initial=0)), 1) if width is None else width
    per_block = 1 if layers else num_layers
    total = int(blocks.sum()) * (layers or 1) + 3
    cells = rng.permutation(total) * per_block
    tables = np.full((layers or 1, len(spec), width), -1, np.int32)
    past = rng.random(tables.shape) < 0.5
    tables[past] = cells[-1]
    used = 0
    for layer in range(layers or 1):
        for row, count in enumerate(blocks):
            tables[layer, row, :count] = cells[used : used + count]
            used += count
    q_start = np.cumsum(q_len) - q_len
    fields = [x.astype(np.int32) for x in (q_start, q_len, q_pos, kv_start, kv_len)]
    return Rows(*fields, tables if layers else tables[0]), total * per_block


def make_tensors(rng, rows, num_cells, block, heads, kv_heads, size, num_layers=1, dtype=torch.float32, spread=1.0):
    """Random q_THD and kv_C2BGD; every token of every cell that no row's span holds is NaN."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    num_tokens = int((rows.q_start + rows.q_len).max(initial=0))
    q = torch.randn(num_tokens, heads, size, generator=generator, dtype=torch.float64) * spread
    kv = torch.full((num_cells, 2, block, kv_heads, size), float("nan"), dtype=torch.float64)
    for layer in range(num_layers):
        for row in range(len(rows.q_start)):
            length = int(rows.kv_len[row])
            for first in range(0, length, block):
                entry = rows.tables[row, first // block] + layer if rows.tables.ndim == 2 else \
                    rows.tables[layer, row, first // block]  # fmt: skip
                count = min(block, length - first)
                kv[int(entry), :, :count] = torch.randn(2, count, kv_heads, size, generator=generator).double()
    return q.to(dtype), kv.to(dtype)
