"""Parameter slabs and the KV range of one instance over one budget of physical pages.

Dropped layers' pages become the tail of the KV range, in place: no KV byte moves and no address changes, so kernels
and captured graphs stay as they are. What the pages are is the implementation's business: `arena_cpu`, `arena_cuda`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.engine.pages import ArenaShape, PageBook
from common.errors import ConfigError, ContractError
from common.types import Layers

CLOSED = "the arena is closed"


class Remap(NamedTuple):
    """What one change moved: physical pages, their bytes (whole pages), and the wall time of the system calls
    (nanoseconds; waiting for the device to finish its work is not part of it)."""

    num_pages: int
    num_bytes: int
    elapsed_ns: int


class Arena(ABC):
    """Slabs and KV of one instance. The arena owns the memory; tensors that it hands out are views and own nothing.

    Not thread-safe: whoever runs the instance calls it between iterations. Misuse raises ContractError and changes
    nothing; after a failure of the platform itself (KVPlaneError) only `close` is of use.
    """

    def __init__(self, book: PageBook) -> None:
        self.book = book
        self._views: dict[int, Tensor] = {}  # layer -> its slab
        self._kv: Tensor | None = None
        self._unusable = ""  # why

    # ------------------------------------------------------------ what is there

    @property
    def resident(self) -> tuple[bool, ...]:
        """Per layer: does its slab have pages?"""
        return tuple(self.book.resident)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV range now."""
        return self.book.kv_bytes

    @property
    def num_cells(self) -> int:
        """Whole cells of the KV range now."""
        return self.book.kv_bytes // self.book.shape.cell_bytes

    @property
    def budget_bytes(self) -> int:
        """Bytes of physical pages that this arena may use, all told."""
        return self.book.budget_bytes

    @property
    def overhead_bytes(self) -> int:
        """Bytes of pages in use that hold neither parameters nor KV: rounding of the platform."""
        return self.book.overhead_bytes

    def layer(self, index: int) -> Tensor:
        """The slab of a resident layer: uint8 [layer_bytes]. ContractError if it is not resident."""
        self._check_usable()
        if not 0 <= index < self.book.shape.num_layers or not self.book.resident[index]:
            raise ContractError(f"layer {index} is not resident")
        if index not in self._views:
            offset = index * self.book.slab_bytes
            self._views[index] = self._view(offset, self.book.shape.layer_bytes)
        return self._views[index]

    @property
    def kv(self) -> Tensor:
        """The KV range: uint8 [kv_bytes]. Its base address is the same for the arena's whole life; take it anew after
        each change. `kv[: num_cells * cell_bytes]` is whole cells."""
        self._check_usable()
        if self._kv is None:
            self._kv = self._view(self.book.slabs_bytes, self.book.kv_bytes)
        return self._kv

    # ------------------------------------------------------------ changes

    def drop(self, layers: Layers) -> Remap:
        """Layers [lo, hi) leave; KV grows at its tail to start + dropped layers x layer_bytes (also what an earlier
        `shrink` left unused). The new tail's contents are undefined. Remap: the dropped slabs' pages."""
        self._check_usable()
        before = self.book.kv_pages_bytes
        self.book.drop(layers)
        for layer in range(*layers):
            self._views.pop(layer, None)
        return self._timed(partial(self._drop, layers, before), (layers[1] - layers[0]) * self.book.slab_bytes)

    def shrink(self, num_bytes: int) -> Remap:
        """KV becomes `num_bytes` long: a new length, as `CellRange.shrink` has it, not a difference. The caller has
        moved what lies beyond. Remap: the pages that are free now (the platform may free fewer than the difference)."""
        self._check_usable()
        before = self.book.kv_pages_bytes
        self.book.shrink(num_bytes)
        return self._timed(partial(self._shrink, before), before - self.book.kv_pages_bytes)

    def widen(self, num_bytes: int) -> Remap:
        """KV becomes `num_bytes` long again, out of what an earlier `shrink` gave up and no layer has taken. The new
        tail's contents are undefined. Remap: the pages that it takes."""
        self._check_usable()
        before = self.book.kv_pages_bytes
        self.book.widen(num_bytes)
        return self._timed(partial(self._drop, (0, 0), before), self.book.kv_pages_bytes - before)

    def restore(self, layers: Layers) -> Remap:
        """Layers [lo, hi) get pages again, with undefined contents: the caller fills them. ContractError while KV
        has those pages. Remap: the slabs' pages."""
        self._check_usable()
        self.book.restore(layers)
        return self._timed(partial(self._restore, layers), (layers[1] - layers[0]) * self.book.slab_bytes)

    def close(self) -> None:
        """Give all pages back. Closing twice is fine; anything else afterwards raises ContractError."""
        if self._unusable == CLOSED:
            return
        self._unusable = CLOSED
        self._views, self._kv = {}, None
        self._close()

    def _check_usable(self) -> None:
        if self._unusable:
            raise ContractError(self._unusable)

    def _timed(self, act: Callable[[], None], num_bytes: int) -> Remap:
        """Make the platform follow the books."""
        self._kv = None
        try:
            self._quiesce()
            start = time.perf_counter_ns()
            act()
            elapsed = time.perf_counter_ns() - start
        except Exception as error:
            self._unusable = f"the arena is unusable since: {error}"
            raise
        return Remap(num_bytes // self.book.page_bytes, num_bytes, elapsed)

    # ------------------------------------------------------------ the platform (the books have changed already)

    @abstractmethod
    def _view(self, offset: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] at an offset of the reserved addresses: slabs first, at multiples of `slab_bytes`, then
        the KV range."""

    @abstractmethod
    def _quiesce(self) -> None:
        """Wait until no kernel or copy uses pages that may move."""

    @abstractmethod
    def _drop(self, layers: Layers, before: int) -> None:
        """Slabs leave; KV's pages grow from `before` bytes to `book.kv_pages_bytes`."""

    @abstractmethod
    def _shrink(self, before: int) -> None:
        """KV's pages shrink from `before` bytes to `book.kv_pages_bytes`."""

    @abstractmethod
    def _restore(self, layers: Layers) -> None:
        """Slabs get pages."""

    @abstractmethod
    def _close(self) -> None:
        """Everything goes back."""


def make_arena(device: torch.device | str, num_layers: int, layer_bytes: int, kv_bytes: int, cell_bytes: int) -> Arena:
    """The arena of a device, all layers resident and nothing written. Sizes in bytes; `kv_bytes` is whole cells.

    KVPlaneError when the device has no arena, lacks memory, or its driver package is not installed.
    """
    shape = ArenaShape(num_layers, layer_bytes, kv_bytes, cell_bytes)
    where = torch.device(device)
    if where.type == "cpu":
        from common.engine.arena_cpu import CpuArena

        return CpuArena(shape)
    if where.type == "cuda":
        from common.engine.arena_cuda import CudaArena

        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return CudaArena(shape, current if where.index is None else where.index)
    raise ConfigError(f"device {where}: an arena lives on cpu or cuda")
