"""The host-DRAM tier of one instance: KV cells in ordinary memory, pinned where a GPU copies from and to them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from common.engine.mapping import Reserved
from common.errors import ContractError, KVPlaneError


class Pinner(Protocol):
    """Locks host pages for the copies of a device."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Whole pages, pinned nowhere yet. KVPlaneError when the system refuses."""

    def unpin(self, address: int) -> None:
        """Undo one `pin`."""


class CudaPinner:
    """`cudaHostRegister`. Never run on a GPU yet."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Register, for all contexts."""
        self._call("cudaHostRegister", address, num_bytes, 1)

    def unpin(self, address: int) -> None:
        """Unregister; copies under way must have ended."""
        self._call("cudaHostUnregister", address)

    def _call(self, name: str, *args: int) -> None:
        cuda: Any = torch.cuda  # its `cudart` has no types
        status = int(getattr(cuda.cudart(), name)(*args))
        if status:
            raise KVPlaneError(f"{name} failed with CUDA error {status} (arguments {args[1:]})")


class HostPool:
    """Cells `[cells, 2, block, kv heads, head size]`, as on the device, in one range of addresses that grows and
    shrinks at its tail by whole chunks. The pool owns the memory; a view of chunks that were given back reads zeros.

    A pinned copy may not cross from one pinned chunk into the next: cut it with `pieces`.
    """

    def __init__(
        self,
        cell_shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        budget_bytes: int,
        chunk_bytes: int = 64 << 20,
        pinner: Pinner | None = None,
    ) -> None:
        """`cell_shape`: (2, block, kv heads, head size). At most `budget_bytes` of cells. Chunks are about
        `chunk_bytes`: whole cells on page borders. CapacityError when the addresses cannot be reserved."""
        self.cell_shape, self.dtype = cell_shape, dtype
        self.cell_bytes = math.prod(cell_shape) * dtype.itemsize
        self.max_cells = budget_bytes // self.cell_bytes
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self.cell_bytes)  # cells between page borders
        self.chunk_cells = -(-chunk_bytes // (self.cell_bytes * step)) * step
        self.num_cells = 0
        self._pinner = pinner
        self._memory = Reserved(max(1, self.max_cells * self.cell_bytes))
        self._cells = self._memory.data[: self.max_cells * self.cell_bytes].view(dtype).view(-1, *cell_shape)
        self._closed = False

    @property
    def tensor(self) -> Tensor:
        """[num_cells, 2, block, kv heads, head size], contiguous; the same address each time. New cells are zeros."""
        self._check_open()
        return self._cells[: self.num_cells]

    @property
    def num_bytes(self) -> int:
        """Bytes of cells now; what the system has given is what was written, or all of it when pinned."""
        return self.num_cells * self.cell_bytes

    def ensure(self, num_cells: int) -> None:
        """Have at least that many cells. ContractError beyond the budget: the ledger overbooked."""
        self._check_open()
        if num_cells > self.max_cells:
            raise ContractError(f"{num_cells} host cells wanted of {self.max_cells}: the ledger overbooked")
        while self.num_cells < num_cells:
            start, end = self._chunk(self.num_cells // self.chunk_cells)
            if self._pinner is not None:
                self._pinner.pin(self._address(start), self._pages(end) - start * self.cell_bytes)
            self.num_cells = end

    def release(self, num_cells: int) -> int:
        """Give back the chunks at the end that hold none of the first `num_cells` cells: how many bytes of cells."""
        self._check_open()
        before = self.num_cells
        while self.num_cells > max(0, num_cells):
            start, end = self._chunk((self.num_cells - 1) // self.chunk_cells)
            if start < num_cells:
                break
            if self._pinner is not None:
                self._pinner.unpin(self._address(start))
            self._memory.give_back(start * self.cell_bytes, self._pages(end))
            self.num_cells = start
        return (before - self.num_cells) * self.cell_bytes

    def pieces(self, first: int, num_cells: int) -> Iterator[tuple[int, int]]:
        """(first, cells) of a run, cut where chunks meet."""
        end = first + num_cells
        while first < end:
            border = min(end, (first // self.chunk_cells + 1) * self.chunk_cells)
            yield first, border - first
            first = border

    def close(self) -> None:
        """Give everything back; anything else afterwards raises ContractError. Twice is fine."""
        if not self._closed:
            self.release(0)
            self._closed = True
            self._cells = torch.empty(0)
            self._memory.close()

    def _chunk(self, index: int) -> tuple[int, int]:
        """Its cells [start, end)."""
        return index * self.chunk_cells, min((index + 1) * self.chunk_cells, self.max_cells)

    def _address(self, cell: int) -> int:
        return self._memory.data.data_ptr() + cell * self.cell_bytes

    def _pages(self, cell: int) -> int:
        """The offset of a cell, rounded up to a page: only the last chunk needs that."""
        return -(-cell * self.cell_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def _check_open(self) -> None:
        if self._closed:
            raise ContractError("the host pool is closed")


def make_host_pool(
    device: torch.device | str, cell_shape: tuple[int, int, int, int], dtype: torch.dtype, budget_bytes: int
) -> HostPool:
    """The host tier of an instance on a device: pinned if that is a GPU."""
    pinner = CudaPinner() if torch.device(device).type == "cuda" else None
    return HostPool(cell_shape, dtype, budget_bytes, pinner=pinner)
