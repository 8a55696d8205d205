"""The driver calls that an arena needs, each error one line. Never run on a GPU yet: see `arena_cuda`."""

from __future__ import annotations

import importlib
from typing import Any

from common.errors import CapacityError, KVPlaneError


class CudaDriver:
    """Virtual memory of one device through `cuda.bindings.driver` (versions 12.8 to 13), or what stands in for it.

    Addresses, sizes and handles are ints or the driver's own opaque handles; sizes are multiples of the granule.
    """

    def __init__(self, device: int, module: Any = None) -> None:
        """KVPlaneError when cuda-bindings is not installed."""
        self._cu = _bindings() if module is None else module
        cu = self._cu
        self._prop = cu.CUmemAllocationProp()
        self._prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = cu.CUmemAccessDesc()
        self._access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for described in (self._prop, self._access):
            described.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            described.location.id = device

    def granule_bytes(self) -> int:
        """The unit of allocations and mappings: 2 MiB on the GPUs of today."""
        flag = self._cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._prop, flag))

    def reserve(self, num_bytes: int) -> int:
        """The first of that many addresses."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def create(self, num_bytes: int) -> Any:
        """Physical memory, mapped nowhere: its handle."""
        return self._call("cuMemCreate", num_bytes, self._prop, 0)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Put all of an allocation at an address. Not accessible before `grant`."""
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def grant(self, address: int, num_bytes: int) -> None:
        """Let the device read and write a range that is mapped throughout."""
        self._call("cuMemSetAccess", address, num_bytes, [self._access], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one `map`, exactly."""
        self._call("cuMemUnmap", address, num_bytes)

    def release(self, handle: Any) -> None:
        """Give physical memory back (at once if it is mapped nowhere)."""
        self._call("cuMemRelease", handle)

    def free(self, address: int, num_bytes: int) -> None:
        """Give reserved addresses back, exactly as reserved."""
        self._call("cuMemAddressFree", address, num_bytes)

    def _call(self, name: str, *args: Any) -> Any:
        """The call's value. KVPlaneError that names the call; CapacityError when memory is what lacks."""
        try:
            status, *values = getattr(self._cu, name)(*args)
        except (RuntimeError, OSError, AttributeError, TypeError) as error:  # no driver, or not one that has the call
            raise KVPlaneError(f"{name} could not be called: {str(error).partition(chr(10))[0]}") from error
        if int(status) != 0:
            kind = CapacityError if status.name == "CUDA_ERROR_OUT_OF_MEMORY" else KVPlaneError
            sizes = [arg for arg in args if isinstance(arg, int) and arg > 0]
            raise kind(f"{name} failed with {status.name} (arguments {sizes})")
        return values[0] if values else None


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise KVPlaneError("the CUDA arena needs cuda-bindings: pip install 'kvplane[cuda]'") from error
