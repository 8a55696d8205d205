"""Adaptive migration: each request as KV or as tokens, within what links and idle compute can take in one epoch.

The paper gives no formula. [fix] Ours: sort by tokens, longest first (ties by id); put each into the feasible side
that is filled less; what fits neither waits, unless its source is about to overflow: then it goes the faster way.
The division is a pure function of all migrations in the system, so every instance that computes it gets the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.sched.moving import Mode
from common.sched.plan import Candidate

Migration = Literal["hybrid", "kv", "tokens", "off"]
TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Profiled once per cluster: what a port and an instance may give to migrations in one epoch."""

    link_bytes: int  # of an instance's port, each way
    prefill_tokens: int  # hidden in an instance's idle compute
    kv_bytes: int  # of one token
    link_bytes_per_s: float
    prefill_tokens_per_s: float

    def faster(self, tokens: int) -> Mode:
        """Which way takes less time on an idle system."""
        kv_s = tokens * self.kv_bytes / self.link_bytes_per_s
        return "kv" if kv_s <= tokens / self.prefill_tokens_per_s else "tokens"


def divide(
    moves: Sequence[Candidate], busy: Mapping[int, int], boundaries: Boundaries, migration: Migration
) -> dict[int, Mode]:
    """Request -> how it goes now; who is missing waits. `busy`: KV tokens in flight by instance."""
    modes: dict[int, Mode] = {}
    if migration == "off":
        return modes
    link = {instance: tokens * boundaries.kv_bytes for instance, tokens in busy.items()}
    compute: dict[int, int] = {}
    for move in sorted(moves, key=lambda move: (-move.tokens, move.request_id)):
        num_bytes = move.tokens * boundaries.kv_bytes
        wire = max(link.get(move.src, 0), link.get(move.dst, 0))
        by_kv = (wire + num_bytes) / boundaries.link_bytes
        by_tokens = (compute.get(move.dst, 0) + move.tokens) / max(1, boundaries.prefill_tokens)
        mode = _choose(by_kv, by_tokens, migration, wire == 0)
        if mode is None and move.urgent:
            mode = migration if migration != "hybrid" else boundaries.faster(move.tokens)
        if mode is None:
            continue
        modes[move.request_id] = mode
        sent = num_bytes if mode == "kv" else move.tokens * TOKEN_BYTES
        link[move.src] = link.get(move.src, 0) + sent
        link[move.dst] = link.get(move.dst, 0) + sent
        if mode == "tokens":
            compute[move.dst] = compute.get(move.dst, 0) + move.tokens
    return modes


def _choose(by_kv: float, by_tokens: float, migration: Migration, idle: bool) -> Mode | None:
    """The feasible side that is filled less. One copy may always go over an idle link: it would never fit else."""
    kv, tokens = by_kv <= 1 or idle, by_tokens <= 1
    if migration == "kv" or not tokens:
        return "kv" if kv and migration != "tokens" else None
    if migration == "tokens" or not kv:
        return "tokens"
    return "kv" if by_kv <= by_tokens else "tokens"
