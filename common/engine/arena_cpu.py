"""The arena in host memory: one reserved mapping. Dropped slabs' pages go back to the system; KV takes new ones as it
is written. On Linux the resident set follows; elsewhere `madvise` may return the pages later."""

from __future__ import annotations

import mmap

from torch import Tensor

from common.engine.arena import Arena
from common.engine.mapping import Reserved
from common.engine.pages import ArenaShape, PageBook
from common.types import Layers


class CpuArena(Arena):
    """Pages of the system, typically 4 KiB. Old views stay readable (zeros) after a drop; do not write through them:
    that takes pages which the books do not know."""

    def __init__(self, shape: ArenaShape) -> None:
        """CapacityError when the addresses (budget + all slabs) cannot be reserved."""
        super().__init__(PageBook(shape, mmap.PAGESIZE, whole_slabs=False))
        self._memory = Reserved(self.book.slabs_bytes + self.book.max_kv_bytes)

    def _view(self, offset: int, num_bytes: int) -> Tensor:
        return self._memory.data[offset : offset + num_bytes]

    def _quiesce(self) -> None:
        pass  # torch's CPU work is done when its call returns

    def _drop(self, layers: Layers, before: int) -> None:
        self._memory.give_back(layers[0] * self.book.slab_bytes, layers[1] * self.book.slab_bytes)

    def _shrink(self, before: int) -> None:
        base = self.book.slabs_bytes
        self._memory.give_back(base + self.book.kv_pages_bytes, base + before)

    def _restore(self, layers: Layers) -> None:
        pass  # pages come when the slabs are written

    def _close(self) -> None:
        self._memory.close()
