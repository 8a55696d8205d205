"""Reserved addresses of host memory: pages come when written and go back on demand."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from common.errors import CapacityError

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Reserved:
    """An anonymous private mapping, without swap reservation and without huge pages, so that what is resident is what
    was written. `data`: uint8 [bytes], whole pages. Views of it keep the addresses alive, also after `close`: reading
    a page that was given back gives zeros (Linux), writing one takes a new page."""

    def __init__(self, num_bytes: int) -> None:
        """CapacityError when the system has not that many addresses."""
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except (OSError, OverflowError) as error:
            raise CapacityError(f"cannot reserve {size} bytes of addresses: {error}") from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def give_back(self, start: int, end: int) -> None:
        """Return the pages of bytes [start, end); both at page borders."""
        assert start % mmap.PAGESIZE == 0 == end % mmap.PAGESIZE, f"[{start}, {end}) is not whole pages"
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Return all pages. The addresses go when the last view does."""
        self.give_back(0, len(self._map))
        self.data = torch.empty(0, dtype=torch.uint8)
