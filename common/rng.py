"""Named random streams: one per concern, so that changing arrivals leaves lengths unchanged."""

import hashlib

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """An independent generator for `name`; equal (seed, name) gives equal draws on any machine."""
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))
