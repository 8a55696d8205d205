"""From logits to tokens: greedy, or sampled with temperature, top-k and top-p.

A request's draws depend on (seed, request, position) only: one uniform number each, by a hash. Rows are computed apart,
so equal logits give equal tokens however requests are batched, moved or recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.errors import ConfigError

_MASK = (1 << 64) - 1
_COLUMNS = 128  # of the blocks in which the greatest logit is sought on a CPU


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request samples; the default is greedy."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"sampling: temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"sampling: top_k must be at least 0 (0: all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p must lie in (0, 1], not {self.top_p}")

    @property
    def filtered(self) -> bool:
        """Some tokens are cut off, so probabilities have to be sorted."""
        return self.top_k > 0 or self.top_p < 1


class Draw(NamedTuple):
    """One row of logits: whose it is, and the position of the token to be drawn."""

    params: SamplingParams
    request: int
    position: int


def uniform(seed: int, request: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only (SplitMix64, chained)."""
    state = 0
    for word in (seed, request, position):
        state = _mix((state ^ word) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def greedy(logits_NV: torch.Tensor) -> torch.Tensor:
    """Most likely token of each row, int64 [N]; the lowest id of equals on the CPU.

    There it looks first for the block of columns that holds the maximum: maxima vectorise, their places do not."""
    rows, vocab = logits_NV.shape
    if logits_NV.is_cuda or vocab < 8 * _COLUMNS:
        return logits_NV.argmax(dim=-1)
    whole = vocab - vocab % _COLUMNS
    blocks = torch.unflatten(logits_NV[:, :whole], 1, (-1, _COLUMNS))
    maxima = blocks.amax(dim=-1)
    best = maxima.argmax(dim=-1)
    tokens = best * _COLUMNS + blocks[torch.arange(rows), best].argmax(dim=-1)
    if whole == vocab:
        return tokens
    top, place = logits_NV[:, whole:].max(dim=-1)
    return torch.where(top > maxima.amax(dim=-1), place + whole, tokens)


def sample(logits_NV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token for each row, int64 [N] on the device of the logits. `draws` is in row order."""
    assert len(draws) == logits_NV.shape[0]
    sampled = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if len(sampled) == 0:
        return greedy(logits_NV)
    tokens_N = greedy(logits_NV)
    for filtered in (False, True):
        rows = [row for row in sampled if draws[row].params.filtered is filtered]
        if rows:
            index = torch.tensor(rows, device=logits_NV.device)
            tokens_N[index] = _sample_rows(logits_NV[index], [draws[row] for row in rows], filtered)
    return tokens_N


def _sample_rows(logits_NV: torch.Tensor, draws: Sequence[Draw], filtered: bool) -> torch.Tensor:
    """Inverse of the cumulative distribution, per row, over ids or (if filtered) over falling probability."""
    device = logits_NV.device
    heat = torch.tensor([[draw.params.temperature] for draw in draws], device=device)
    probs = torch.softmax(logits_NV.float() / heat, dim=-1)
    order = None
    if filtered:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = _kept(probs, cumulative, draws) if filtered else cumulative[:, -1:]
    luck = [[uniform(draw.params.seed, draw.request, draw.position)] for draw in draws]
    target = total * torch.tensor(luck, dtype=torch.float64, device=device)
    choice = torch.searchsorted(cumulative, target, right=True).clamp_(max=probs.shape[-1] - 1)
    return (choice if order is None else order.gather(1, choice)).squeeze(1)


def _kept(probs: torch.Tensor, cumulative: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Probability mass [N, 1] of the tokens that top-k and top-p keep, always the likeliest one; `probs` falls.

    top-p counts within what top-k keeps, and keeps the token that reaches the mass."""
    vocab, device = probs.shape[-1], probs.device
    top_k = torch.tensor([[min(draw.params.top_k or vocab, vocab)] for draw in draws], device=device)
    top_p = torch.tensor([[draw.params.top_p] for draw in draws], dtype=torch.float64, device=device)
    mass_k = cumulative.gather(1, top_k - 1)
    return cumulative.gather(1, torch.searchsorted(cumulative, mass_k * top_p))  # at most top_k - 1
