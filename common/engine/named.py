"""Cached blocks by name: what a content's chained digest is stored under, and in which order it goes.

The order of eviction is that of `common.kv.index`: least recently released first, each path from its tail. An executor
keeps it by the same rules from what it sees (joins, ends, retained blocks), so a policy only has to say how many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import ContractError

Cells = NDArray[np.int32]


class Named:
    """One named block. `cells`, `run`: by layer, -1 where it has none. `owner`: the request that still pays for it."""

    __slots__ = ("cells", "owner", "pins", "run")

    def __init__(self, cells: Cells, run: Cells, owner: int | None) -> None:
        self.cells = cells
        self.run = run
        self.owner = owner
        self.pins = 0


class NamedBlocks:
    """Of one instance and tier. A lease is a list of digests, in the order of the path."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Named] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()

    def __iter__(self) -> Iterator[Named]:
        return iter(self.blocks.values())

    def get(self, digest: bytes) -> Named | None:
        """The block of that name, if it is here."""
        return self.blocks.get(digest)

    def acquire(self, digests: Sequence[bytes]) -> None:
        """Pin these blocks, one holder more for each."""
        for digest in digests:
            block = self.blocks[digest]
            if not block.pins:
                self._idle.pop(digest, None)
            block.pins += 1

    def release(self, digests: Sequence[bytes]) -> None:
        """One holder less for each; what nobody holds may go, tails first."""
        for digest in reversed(digests):
            block = self.blocks[digest]
            block.pins -= 1
            assert block.pins >= 0, "a named block was released more often than acquired"
            if not block.pins:
                self._idle[digest] = None

    def store(self, digest: bytes, block: Named) -> None:
        """A new name, held by nobody yet."""
        assert digest not in self.blocks, "a block is stored twice under one name"
        self.blocks[digest] = block
        self._idle[digest] = None

    def remove(self, digest: bytes) -> Named:
        """Forget one block that nobody holds."""
        block = self.blocks[digest]
        if block.pins:
            raise ContractError(f"a cached block that {block.pins} requests read is taken away")
        del self.blocks[digest], self._idle[digest]
        return block

    def oldest(self, num_blocks: int) -> list[Named]:
        """Forget the next blocks in the order of eviction."""
        if num_blocks > len(self._idle):
            raise ContractError(f"evict {num_blocks} cached blocks, but {len(self._idle)} are read by nobody")
        return [self.remove(next(iter(self._idle))) for _ in range(num_blocks)]

    @property
    def num_idle(self) -> int:
        """Blocks that may be evicted."""
        return len(self._idle)

    def clear(self) -> None:
        """Everything is gone (the instance died)."""
        self.blocks.clear()
        self._idle.clear()
