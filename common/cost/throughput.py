"""What policies may plan with: coefficients in their papers' form, fitted to the cost model, as plain numbers.

Infinite-LLM: an iteration of a decoding batch takes W(batch)/f(batch) + attended tokens / g. `W/f` is sampled at a few
batch sizes at a short context, `1/g` is one slope, the median over batches and contexts: on purpose no more than
the paper's model knows (no skew, no host time, one g for all lengths).
"""

from __future__ import annotations

from statistics import median
from typing import Protocol

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192, 16384)


class DecodeCost(Protocol):
    """The part of the cost model that is sampled."""

    def decode_ns(self, batch: int, context: int) -> int: ...


def attend_ns(cost: DecodeCost) -> float:
    """1/g: ns of an iteration per attended token, the median over batches and contexts."""
    slopes = []
    for batch in BATCHES[2:7]:
        base = cost.decode_ns(batch, CONTEXTS[0])
        for context in CONTEXTS[1:]:
            slopes.append((cost.decode_ns(batch, context) - base) / (batch * (context - CONTEXTS[0])))
    return median(slopes)


def throughput_model(cost: DecodeCost) -> dict[str, float]:
    """Keys `dense_ns_<batch>` and `attend_ns`, for `ClusterInfo.extra`. W/f never falls with the batch."""
    slope, least = attend_ns(cost), 1.0
    found: dict[str, float] = {"attend_ns": slope}
    for batch in BATCHES:
        least = max(least, cost.decode_ns(batch, CONTEXTS[0]) - slope * batch * CONTEXTS[0])
        found[f"dense_ns_{batch}"] = least
    return found
