"""The product of this package: one array per property, so that a million requests stay compact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.types import Content, Piece

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
__all__ = ["COUNTS", "Content", "Floats", "Ints", "Piece", "Workload"]

# What building may have done to the input; every workload carries all of these counts.
COUNTS = (
    "rejected_zero",  # requests with no prompt or no output, dropped
    "clipped_zero",  # the same, given one token
    "rejected_overlong",  # prompts over `max_prompt_tokens`, dropped
    "clipped_overlong",  # the same, cut at the end
    "clipped_output",  # true outputs over `max_output_tokens`, which the server stops there
    "dropped_failures",  # rows that their trace marks as failed requests
    "dropped_turns",  # turns that waited for a request that was dropped
    "sorted_rows",  # rows that came before their predecessor and were sorted
)


@dataclass(frozen=True)
class Workload:
    """`n` requests in index order. True output lengths are for the executor only (the oracle boundary)."""

    name: str
    arrival_ns: Ints  # sorted; -1: released by another request (`release_after`) or by the closed loop
    prompt_tokens: Ints
    output_tokens: Ints
    content: tuple[Content, ...] | None  # None: every prompt is unique
    session: Ints | None
    release_after: Ints | None  # index of the request whose finish releases this one; -1: by arrival time
    think_ns: Ints | None  # added to that finish; drawn by (session, turn)
    concurrency: int | None  # closed loop: this many outstanding, the next in index order at each finish
    counts: Mapping[str, int]
    max_output_tokens: int  # what policies are told
    provenance: str
    models: tuple[str, ...] = ()  # what requests may ask for; (): the cluster has one model
    model: Ints | None = None  # index into it

    @property
    def num_requests(self) -> int:
        return len(self.prompt_tokens)

    def __post_init__(self) -> None:
        num = len(self.prompt_tokens)
        per_request = (self.arrival_ns, self.output_tokens, self.session, self.release_after, self.think_ns, self.model)
        assert all(len(values) == num for values in per_request if values is not None)
        assert self.content is None or len(self.content) == num
        assert (self.release_after is None) == (self.think_ns is None)
        if self.release_after is not None:  # causality: only an earlier request can release a later one
            assert bool(np.all(self.release_after < np.arange(num)))


def no_counts() -> dict[str, int]:
    return dict.fromkeys(COUNTS, 0)


def add_counts(old: Mapping[str, int], **more: int) -> dict[str, int]:
    assert all(key in COUNTS for key in more)
    return {key: old.get(key, 0) + more.get(key, 0) for key in COUNTS}


def plain(name: str, arrival_ns: Ints, prompt: Ints, output: Ints, max_output: int, why: str) -> Workload:
    """An open-loop workload of unique prompts."""
    return Workload(name, arrival_ns, prompt, output, None, None, None, None, None, no_counts(), max_output, why)
