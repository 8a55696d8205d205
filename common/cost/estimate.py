"""What policies may plan with: coefficients in their papers' form, fitted to samples of the cost model, as plain numbers.

Infinite-LLM: an iteration of a decoding batch takes W(batch)/f(batch) + attended tokens / g. `W/f` is sampled at a few
batch sizes at a short context, `1/g` is one slope by least squares over batches and contexts: on purpose no more than
the paper's model knows (no skew, no host time, one g for all lengths).
"""

from __future__ import annotations

from typing import Protocol

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 4096, 16384, 65536)


class DecodeCost(Protocol):
    """The part of the cost model that is sampled."""

    def decode_ns(self, batch: int, context: int) -> int: ...


def attend_ns(cost: DecodeCost) -> float:
    """1/g: ns of an iteration per attended token, by least squares through each batch's shortest context."""
    products = squares = 0.0
    for batch in BATCHES[2:6]:
        base = cost.decode_ns(batch, CONTEXTS[0])
        for context in CONTEXTS[1:]:
            tokens = batch * (context - CONTEXTS[0])
            products += tokens * (cost.decode_ns(batch, context) - base)
            squares += tokens * tokens
    return products / squares


def throughput_model(cost: DecodeCost) -> dict[str, float]:
    """Keys `dense_ns_<batch>` and `attend_ns`, for `ClusterInfo.extra`."""
    slope = attend_ns(cost)
    dense = {
        f"dense_ns_{batch}": max(1.0, cost.decode_ns(batch, CONTEXTS[0]) - slope * batch * CONTEXTS[0])
        for batch in BATCHES
    }
    return {**dense, "attend_ns": slope}
