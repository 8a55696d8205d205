"""FLOPs and compulsory bytes of each operator on one rank, and the time that no card can beat.

Bytes are only what must cross HBM: weights once, the KV that is read. Activations may live in L2, so elementwise
operators have no lower bound here. Works on numbers and on numpy arrays alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DTYPE_BYTES = 2
LAUNCH_NS = 2_500.0  # the shortest kernels of all tables: what any ratio of times is taken above


@dataclass(frozen=True, slots=True)
class Roof:
    """Peak rates of one card in work per ns."""

    flops_per_ns: float
    bytes_per_ns: float
    dtype_bytes: int = DTYPE_BYTES  # of weights, KV and activations

    @classmethod
    def of(cls, peak_flops: float, mem_bandwidth: float, dtype_bytes: int = DTYPE_BYTES) -> Roof:
        """From FLOP/s and bytes/s."""
        return cls(peak_flops / 1e9, mem_bandwidth / 1e9, dtype_bytes)

    def time(self, flops: Any, num_bytes: Any) -> Any:
        """The larger of both times, ns."""
        return np.maximum(flops / self.flops_per_ns, num_bytes / self.bytes_per_ns)

    def linear(self, m: Any, n: Any, k: Any) -> Any:
        """(m, k) x (k, n)."""
        return self.time(2.0 * m * n * k, float(self.dtype_bytes) * n * k)

    def prefill(self, tokens: Any, pairs: Any, heads: Any, kv_heads: Any, head_dim: int) -> Any:
        """`tokens` new queries over `pairs` query-key pairs; the mean context of a query bounds the KV read."""
        kv_bytes = 2.0 * self.dtype_bytes * kv_heads * head_dim * pairs / np.maximum(tokens, 1)
        return self.time(4.0 * heads * head_dim * pairs, kv_bytes)

    def prefill_work(self, tokens: Any, pairs: Any, heads: Any, kv_heads: Any, head_dim: int) -> Any:
        """What prefill time follows when nothing hides: the roofline plus queries, keys, values and outputs once."""
        moved = 2.0 * self.dtype_bytes * (heads + kv_heads) * head_dim * tokens
        return self.prefill(tokens, pairs, heads, kv_heads, head_dim) + moved / self.bytes_per_ns

    def decode(self, batch: Any, context: Any, heads: Any, kv_heads: Any, head_dim: int) -> Any:
        """`batch` single queries, each over `context` tokens of its own KV."""
        tokens = 1.0 * batch * context
        return self.time(4.0 * heads * head_dim * tokens, 2.0 * self.dtype_bytes * kv_heads * head_dim * tokens)
