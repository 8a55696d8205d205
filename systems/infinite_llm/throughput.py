"""The planner's model of an instance, in the paper's form: T_lyr(beta, S) = W(beta)/f(beta) + S/g.

`W/f` is a table over batch sizes and `1/g` a time per attended token, both fitted by `common.cost.throughput` and
handed over in `ClusterInfo.extra`. Times are of all layers, so an iteration's, in ns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

DENSE = "dense_ns_"  # + batch size
ATTEND = "attend_ns"


@dataclass(frozen=True, slots=True)
class Throughput:
    """`dense`: (batch size, ns), ascending; linear in between and beyond."""

    dense: tuple[tuple[int, float], ...]
    attend_ns: float

    @staticmethod
    def from_extra(extra: Mapping[str, float]) -> Throughput:
        """From what the cluster was fitted with; round numbers of no machine where it was not."""
        dense = sorted((int(key[len(DENSE) :]), value) for key, value in extra.items() if key.startswith(DENSE))
        if not dense or ATTEND not in extra:
            return Throughput(((1, 1e7), (256, 1.5e7)), 200.0)
        return Throughput(tuple(dense), extra[ATTEND])

    def dense_ns(self, batch: int) -> float:
        """W(beta)/f(beta)."""
        points = self.dense
        at = min(max(1, bisect_left(points, (batch, 0.0))), len(points) - 1)
        (low, first), (high, second) = points[at - 1], points[at]
        return first + (second - first) * (batch - low) / (high - low)

    def iteration_ns(self, batch: int, attended_tokens: float) -> float:
        """T for a batch whose attention reads so many tokens."""
        return self.dense_ns(batch) + attended_tokens * self.attend_ns

    def tokens_per_s(self, batch: int, attended_tokens: float) -> float:
        """TPS of an instance; 0 for an empty batch."""
        return batch * 1e9 / self.iteration_ns(batch, attended_tokens) if batch else 0.0
