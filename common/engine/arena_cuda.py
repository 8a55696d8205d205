"""The arena in device memory, over the CUDA driver's virtual memory. This code has never run on a GPU: its tests drive
it with a fake driver that keeps the documented rules.

One reservation of addresses: slabs first, then the KV range at its longest. Physical memory is one allocation per slab
and one for the KV range as it starts, each rounded up to the driver's granule. A drop unmaps the slabs' allocations and
maps the very same ones at the tail of the KV range: per layer one unmap and one map, then one grant of access.
Why not an allocation per granule (2 MiB)? The driver charges per call, and KV comes and goes by whole layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.engine.arena import Arena
from common.engine.cuda_driver import CudaDriver
from common.engine.pages import ArenaShape, PageBook
from common.errors import KVPlaneError
from common.types import Layers

View = Callable[[int, int], Tensor]  # (address, bytes) -> uint8 [bytes]


class CudaArena(Arena):
    """Allocations of the driver, each mapped at one place or spare. A view of pages that have left since is invalid: a
    kernel that touches it faults. Contents that pages bring along are stale: parameters in new KV, KV in new slabs."""

    def __init__(
        self,
        shape: ArenaShape,
        device: int = 0,
        driver: CudaDriver | None = None,
        synchronize: Callable[[], None] | None = None,
        view: View | None = None,
    ) -> None:
        """`synchronize` waits for all work of the device (and makes its context current at first). KVPlaneError when
        the driver refuses or cuda-bindings is not installed; nothing stays allocated then."""
        self._driver = CudaDriver(device) if driver is None else driver
        self._synchronize = synchronize or (lambda: torch.cuda.synchronize(device))
        self._view_of = view or (lambda address, num_bytes: device_view(address, num_bytes, device))
        self._quiesce()
        super().__init__(PageBook(shape, self._driver.granule_bytes(), whole_slabs=True))
        self._mapped: dict[int, tuple[int, Any]] = {}  # offset -> (bytes, handle)
        self._spare: list[Any] = []  # handles of slab size, mapped nowhere
        self._handles: list[Any] = []  # all of them
        self._size = self.book.slabs_bytes + self.book.max_kv_bytes
        self._base = self._driver.reserve(self._size)
        try:
            self._fill()
        except KVPlaneError:
            self._release()
            raise

    def _fill(self) -> None:
        book = self.book
        for layer in range(book.shape.num_layers):
            self._map(layer * book.slab_bytes, book.slab_bytes, self._create(book.slab_bytes))
        self._map(book.slabs_bytes, book.kv_base, self._create(book.kv_base))
        self._driver.grant(self._base, book.slabs_bytes + book.kv_base)

    # ------------------------------------------------------------ the platform

    def _view(self, offset: int, num_bytes: int) -> Tensor:
        return self._view_of(self._base + offset, num_bytes)

    def _quiesce(self) -> None:
        try:
            self._synchronize()
        except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
            raise KVPlaneError(f"waiting for the CUDA device failed: {str(error).partition(chr(10))[0]}") from error

    def _drop(self, layers: Layers, before: int) -> None:
        book = self.book
        for layer in range(*layers):
            self._spare.append(self._unmap(layer * book.slab_bytes))
        self._map_spares(book.slabs_bytes + before, book.slabs_bytes + book.kv_pages_bytes)

    def _shrink(self, before: int) -> None:
        book = self.book
        for at in range(before, book.kv_pages_bytes, -book.slab_bytes):
            self._spare.append(self._unmap(book.slabs_bytes + at - book.slab_bytes))

    def _restore(self, layers: Layers) -> None:
        book = self.book
        self._map_spares(layers[0] * book.slab_bytes, layers[1] * book.slab_bytes)

    def _close(self) -> None:
        failed: list[KVPlaneError] = []
        try:
            self._quiesce()
        except KVPlaneError as error:
            failed.append(error)
        failed += self._release()
        if failed:
            raise failed[0]

    # ------------------------------------------------------------ allocations

    def _create(self, num_bytes: int) -> Any:
        handle = self._driver.create(num_bytes)
        self._handles.append(handle)
        return handle

    def _map(self, offset: int, num_bytes: int, handle: Any) -> None:
        self._driver.map(self._base + offset, num_bytes, handle)
        self._mapped[offset] = num_bytes, handle

    def _unmap(self, offset: int) -> Any:
        """The handle that was mapped there."""
        num_bytes, handle = self._mapped[offset]
        self._driver.unmap(self._base + offset, num_bytes)
        del self._mapped[offset]
        return handle

    def _map_spares(self, start: int, end: int) -> None:
        """Map one spare allocation after the other at [start, end), then grant access to all at once."""
        for offset in range(start, end, self.book.slab_bytes):
            self._map(offset, self.book.slab_bytes, self._spare[-1])
            self._spare.pop()
        if start < end:
            self._driver.grant(self._base + start, end - start)
        assert len(self._mapped) + len(self._spare) == len(self._handles), "an allocation was lost"

    def _release(self) -> list[KVPlaneError]:
        """Everything goes back, whatever fails on the way: the failures."""
        failed: list[KVPlaneError] = []

        def attempt(act: Callable[..., None], *args: Any) -> None:
            try:
                act(*args)
            except KVPlaneError as error:
                failed.append(error)

        for offset, (num_bytes, _) in self._mapped.items():
            attempt(self._driver.unmap, self._base + offset, num_bytes)
        for handle in self._handles:
            attempt(self._driver.release, handle)
        attempt(self._driver.free, self._base, self._size)
        self._mapped, self._spare, self._handles = {}, [], []
        return failed


class _DeviceBytes:
    """Bytes of device memory that somebody else owns, as the CUDA array interface describes them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2,
        }  # fmt: skip


def device_view(address: int, num_bytes: int, device: int) -> Tensor:
    """uint8 [num_bytes] on the device, no copy and no ownership."""
    if num_bytes == 0:  # the interface wants a null address then
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}")
    return torch.as_tensor(_DeviceBytes(address, num_bytes), device=f"cuda:{device}")
