"""Lookahead micro-batches (section 4.3): what is queued is halved by cost until the pieces are small.

cost(chunk of c tokens behind a prefix of p) = alpha (p c + (c^2 + c) / 2) + beta c + gamma, and a batch saves lambda
for each chunk after its first, because weights are loaded once. A cut may fall inside a request: the second part then
has the first as its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Costs(NamedTuple):
    """Coefficients in ns; only their ratios matter for cutting."""

    alpha: float
    beta: float
    gamma: float
    lam: float

    @staticmethod
    def of(extra: Mapping[str, float]) -> Costs:
        """What the cluster's fit says (`common.cost.estimate`); without one, tokens alone count."""
        return Costs(extra.get("cost_alpha", 0.0), extra.get("cost_beta", 1.0),
                     extra.get("cost_gamma", 0.0), extra.get("cost_lambda", 0.0))  # fmt: skip

    def chunk(self, prefix: int, tokens: int) -> float:
        """Cost of one chunk."""
        return self.alpha * (prefix * tokens + (tokens * tokens + tokens) / 2) + self.beta * tokens + self.gamma

    def batch(self, chunks: Sequence[Chunk]) -> float:
        """Cost of a batch."""
        return sum(self.chunk(one.start, one.tokens) for one in chunks) - max(0, len(chunks) - 1) * self.lam


class Chunk(NamedTuple):
    """Tokens start .. start + tokens of a queued request."""

    request_id: int
    start: int
    tokens: int


def split(costs: Costs, batch: Sequence[Chunk], block: int) -> tuple[list[Chunk], list[Chunk]] | None:
    """Two parts of the same cost, or as near as a cut at a block border comes. None: there is nowhere to cut."""
    half, spent = costs.batch(batch) / 2, 0.0
    for index, one in enumerate(batch):
        whole = costs.chunk(one.start, one.tokens) - (costs.lam if index else 0.0)
        if spent + whole < half:
            spent += whole
            continue
        cut = _cut(costs, one, half - spent - (costs.gamma - (costs.lam if index else 0.0)), block)
        first, second = list(batch[:index]), list(batch[index + 1 :])
        border = block - one.start % block
        if not cut and not first:
            cut = border  # neither part may be empty
        elif cut >= one.tokens and not second and one.tokens > border:
            cut = border + (one.tokens - border - 1) // block * block
        if 0 < cut < one.tokens:
            first.append(Chunk(one.request_id, one.start, cut))
            second.insert(0, Chunk(one.request_id, one.start + cut, one.tokens - cut))
        elif cut >= one.tokens or not first:
            first.append(one)
        else:
            second.insert(0, one)
        return (first, second) if first and second else None
    return None


def _cut(costs: Costs, one: Chunk, goal: float, block: int) -> int:
    """Tokens of a chunk whose variable cost comes nearest to `goal`, ending at a block border (or at its end)."""

    def spent(tokens: int) -> float:
        return costs.chunk(one.start, tokens) - costs.gamma

    first = block - one.start % block
    borders = max(0, -(-(one.tokens - first) // block))  # how many there are inside the chunk
    low, high = 0, borders
    while low < high:
        middle = (low + high + 1) // 2
        if spent(first + (middle - 1) * block) <= goal:
            low = middle
        else:
            high = middle - 1
    below = first + (low - 1) * block if low else 0
    above = first + low * block if low < borders else one.tokens
    return below if goal - spent(below) <= spent(above) - goal else above


def micro_batches(costs: Costs, batch: Sequence[Chunk], min_tokens: int, block: int) -> list[list[Chunk]]:
    """Halve by cost until a batch has at most `min_tokens` tokens; order is kept."""
    if sum(one.tokens for one in batch) <= min_tokens:
        return [list(batch)] if batch else []
    parts = split(costs, batch, block)
    if parts is None:
        return [list(batch)]
    return [leaf for part in parts for leaf in micro_batches(costs, part, min_tokens, block)]
