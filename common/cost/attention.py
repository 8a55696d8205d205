"""Attention of one layer on one rank, as fast scalar functions of a batch. All times are ns (floats).

A batch of chunks is one equivalent chunk: the same new tokens over the same number of query-key pairs. Several short
prompts have fewer pairs than one long prompt of all their tokens; their "cached context" comes out negative.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from common.cost.curves import DecodeRow, MixTable
from common.cost.operators import Operators

MEMO_LIMIT = 1 << 16


class AttentionCost:
    """Attention with `heads` query and `kv_heads` KV heads per rank."""

    def __init__(self, operators: Operators, heads: int, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> None:
        roof = operators.roof
        self.pair_ns = 4.0 * heads * head_dim / roof.flops_per_ns  # speed of light per query-key pair
        self.read_ns = 2.0 * kv_heads * head_dim * dtype_bytes / roof.bytes_per_ns  # and per token of KV read
        decode = operators.decode(heads, kv_heads, head_dim)
        self._batch, self._context, self._decode = decode.x, decode.y, decode.time_ns
        chunk = operators.prefill(heads, kv_heads, head_dim)
        self._x: list[float] = chunk.x.tolist()
        self._y: list[float] = chunk.y.tolist()
        self._t: list[list[float]] = chunk.time_ns.tolist()
        j, v = _knot(self._y, 0.0)  # most prompts have nothing cached: one curve
        self._alone: list[float] = [row[j] + v * (row[j + 1] - row[j]) for row in self._t]
        self._floor = float(chunk.time_ns.min())
        several = operators.several(heads, kv_heads, head_dim)
        self._several = None if several is None else (several.x.tolist(), several.y.tolist(), several.time_ns.tolist())
        mixing = operators.mixing(heads, kv_heads, head_dim)
        self._mix = None if mixing is None else MixTable(mixing)
        self._memo: dict[tuple[int, float], float] = {}
        self._rows: dict[int, DecodeRow] = {}

    def decode_row(self, batch: int, layers: int, device_ns: int, host_ns: int) -> DecodeRow:
        """Decode of `batch` requests over `layers` layers, on top of `device_ns` of everything else."""
        if batch == 0:
            return DecodeRow([0.0, 1.0], [0.0, 0.0], 0, 0)
        x, t = self._batch, self._decode
        i = int(np.clip(np.searchsorted(x, batch, side="right") - 1, 0, len(x) - 2))
        u = max(0.0, (batch - x[i]) / (x[i + 1] - x[i]))
        line = (t[i] + u * (t[i + 1] - t[i])) * layers
        return DecodeRow(self._context.tolist(), line.tolist(), device_ns, host_ns)

    def decode_ns(self, batch: int, context: int) -> float:
        """`batch` decodes of `context` tokens each, alone."""
        row = self._rows.get(batch)
        if row is None:
            row = self._rows[batch] = self.decode_row(batch, 1, 0, 0)
        return float(row.attention_ns(context))

    def batch_ns(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int, decode_ns: float) -> float:
        """Chunks of (new, cached) tokens beside `decodes` of `context` tokens that alone would take `decode_ns`."""
        if len(chunks) == 1:
            new, cached = chunks[0]
            equal: float = cached
            pairs = new * (cached + (new + 1) * 0.5)
        else:
            new = sum([c for c, _ in chunks])
            pairs = sum([c * (p + (c + 1) * 0.5) for c, p in chunks])
            equal = pairs / new - (new + 1) * 0.5
        time = self.chunk_ns(new, equal)
        flops, reads = pairs * self.pair_ns, (equal if equal > 0 else 0) * self.read_ns
        if decodes:
            time += decode_ns
            if self._mix is not None:
                time *= self._mix.at(new, equal, decodes, context)
            flops += decodes * context * self.pair_ns
            reads += decodes * context * self.read_ns
        floor = flops if flops > reads else reads
        return time if time > floor else floor

    def chunk_ns(self, new: int, cached: float) -> float:
        """`new` tokens behind `cached` ones, alone; negative `cached` means several prompts."""
        known = self._memo.get((new, cached))
        if known is not None:
            return known
        if len(self._memo) > MEMO_LIMIT:
            self._memo.clear()
        value = self._at(new, cached) if cached >= 0 else self._prompts(new, cached)
        self._memo[new, cached] = value
        return value

    def _at(self, new: float, cached: float) -> float:
        if cached:
            return _bilinear(self._x, self._y, self._t, new, cached)
        i, u = _knot(self._x, new)
        low, high = self._alone[i : i + 2]
        return low + u * (high - low)

    def _prompts(self, new: int, cached: float) -> float:
        """Several prompts without a cache: measured by (count, length), else pairs above the floor."""
        whole, half = self._at(new, 0.0), (new + 1) * 0.5
        share = max(0.0, (half + cached) / half)
        if self._several is not None:
            length = max(1.0, 2.0 * share * half - 1.0)
            return _bilinear(*self._several, new / length, length)
        return self._floor + max(0.0, whole - self._floor) * share


def _knot(axis: list[float], value: float) -> tuple[int, float]:
    """The knot that a segment starts at, and how far along it: beyond 1 behind the last knot, 0 before the first."""
    i = bisect_right(axis, value, 1, len(axis) - 1) - 1
    share = (value - axis[i]) / (axis[i + 1] - axis[i])
    return i, share if share > 0.0 else 0.0


def _bilinear(xs: list[float], ys: list[float], t: list[list[float]], x: float, y: float) -> float:
    """Linear in both axes; continued beyond the last knots, held below the first."""
    i, u = _knot(xs, x)
    j, v = _knot(ys, y)
    low, high = t[i], t[i + 1]
    a = low[j] + v * (low[j + 1] - low[j])
    b = high[j] + v * (high[j + 1] - high[j])
    return a + u * (b - a)
