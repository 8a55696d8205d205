"""Token ids of named content: the same name gives the same ids on any machine, in any order of asking.

A prompt is pieces (source, start, length). Token i of a source is a hash of (seed, source, i), taken modulo the
vocabulary; the source `gen:r` is what request r has really generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from common.errors import ContractError
from common.types import Content

GENERATED = "gen:"
Reply = Callable[[int], Sequence[int]]


class TokenSource:
    """Expands contents over a vocabulary of `vocab_size` ids."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        assert vocab_size > 0, f"vocab_size {vocab_size}"
        self.vocab_size = vocab_size
        self.seed = seed

    def piece(self, source: str, start: int, length: int) -> NDArray[np.int64]:
        """Ids of tokens [start, start + length) of a source that is not a reply."""
        digest = blake2b(f"{self.seed}:{source}".encode(), digest_size=8).digest()
        base = np.uint64(int.from_bytes(digest, "little"))
        with np.errstate(over="ignore"):
            value = base + np.arange(start, start + length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
        return (value % np.uint64(self.vocab_size)).astype(np.int64)

    def expand(self, content: Content, reply: Reply) -> list[int]:
        """All ids of a content. `reply(r)` gives what request r has generated so far."""
        ids: list[int] = []
        for source, start, length in content:
            if not source.startswith(GENERATED):
                ids += self.piece(source, start, length).tolist()
                continue
            said = reply(int(source[len(GENERATED) :]))
            if start + length > len(said):
                raise ContractError(f"{source} has {len(said)} tokens; a prompt asks for {start} .. {start + length}")
            ids += said[start : start + length]
        return ids
