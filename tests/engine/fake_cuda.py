"""A CUDA driver without a GPU that keeps the documented rules of virtual memory, over real pages.

An allocation is an anonymous file; mapping it is `mmap` of that file at a fixed address; a range that is not mapped, or
without access, is PROT_NONE. So pages that move carry their bytes, and a test that touches what it must not dies.
Each rule that the caller breaks is an AssertionError here, not a status: the code under test is wrong then.
"""

import ctypes
import enum
import os
from types import SimpleNamespace

import torch

GRANULE = 16384
PROT_NONE, PROT_READ_WRITE = 0, 3
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 16, 32, 0x4000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


class FakeCuda:
    """Stands in for `cuda.bindings.driver`. `fail[name] = n`: the n-th next call of that name fails (0: the next)."""

    CUmemAllocationProp = CUmemAccessDesc = staticmethod(lambda: SimpleNamespace(location=SimpleNamespace()))
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, memory_bytes=1 << 40):
        self.memory_bytes = memory_bytes
        self.calls = []  # names
        self.fail = {}  # name -> calls to go
        self.busy = False  # work in flight: unmapping now is a bug
        self.reserved = {}  # address -> bytes
        self.files = {}  # handle -> (file, bytes), not released
        self.mapped = {}  # address -> (bytes, handle)
        self.open = set()  # addresses of mappings with access

    def synchronize(self):
        self.busy = False

    def view(self, address, num_bytes):
        """uint8 tensor of a range that must be mapped with access."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        assert self._covering(address, num_bytes, exact=False) <= self.open, "a view of what is not accessible"
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)

    def assert_nothing_left(self):
        assert not self.reserved and not self.files and not self.mapped and not self.open

    @property
    def allocated(self):
        return sum(num_bytes for _, num_bytes in self.files.values())

    def _refuses(self, name):
        self.calls.append(name)
        left = self.fail.get(name)
        if left is None:
            return False
        self.fail[name] = left - 1
        return left == 0

    def _covering(self, address, num_bytes, exact):
        """Addresses of the mappings that cover a range without a hole; `exact`: and do not reach beyond it."""
        found, at = set(), address
        for start in sorted(self.mapped):
            end = start + self.mapped[start][0]
            if start <= at < end and at < address + num_bytes:
                assert not exact or (start == at and end <= address + num_bytes), "part of a mapping"
                found.add(start)
                at = end
        assert at >= address + num_bytes, "a hole in a mapped range"
        return found

    # ------------------------------------------------------------ the driver's calls

    def cuMemGetAllocationGranularity(self, prop, option):
        assert (prop.type, prop.location.type, option) == (1, 1, 0)
        return (Status.CUDA_ERROR_INVALID_VALUE,) if self._refuses("granularity") else (Status.CUDA_SUCCESS, GRANULE)

    def cuMemAddressReserve(self, size, alignment, addr, flags):
        assert size > 0 and size % GRANULE == 0 and (alignment, addr, flags) == (0, 0, 0)
        if self._refuses("reserve"):
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, None)
        whole = size + GRANULE  # so that a granule's border is in it
        address = libc.mmap(None, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        above = -address % GRANULE
        libc.munmap(address, above)
        libc.munmap(address + above + size, GRANULE - above)
        address += above
        self.reserved[address] = size
        return Status.CUDA_SUCCESS, address

    def cuMemCreate(self, size, prop, flags):
        assert size > 0 and size % GRANULE == 0 and flags == 0 and prop.location.id == 0
        if self._refuses("create") or self.allocated + size > self.memory_bytes:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, None)
        file = os.memfd_create("page")
        os.ftruncate(file, size)
        handle = object()  # opaque, as the driver's
        self.files[handle] = file, size
        return Status.CUDA_SUCCESS, handle

    def cuMemMap(self, ptr, size, offset, handle, flags):
        assert ptr % GRANULE == 0 == size % GRANULE and (offset, flags) == (0, 0)
        assert any(start <= ptr and ptr + size <= start + num for start, num in self.reserved.items()), "not reserved"
        assert all(ptr + size <= at or at + num <= ptr for at, (num, _) in self.mapped.items()), "mapped already"
        file, whole = self.files[handle]
        assert size == whole, "part of an allocation"
        assert handle not in [other for _, other in self.mapped.values()], "mapped twice"
        if self._refuses("map"):
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        assert libc.mmap(ptr, size, PROT_NONE, MAP_SHARED | MAP_FIXED, file, 0) == ptr
        self.mapped[ptr] = size, handle
        return (Status.CUDA_SUCCESS,)

    def cuMemSetAccess(self, ptr, size, desc, count):
        assert count == len(desc) == 1 and (desc[0].flags, desc[0].location.type, desc[0].location.id) == (3, 1, 0)
        inside = self._covering(ptr, size, exact=True)
        if self._refuses("access"):
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        for address in inside:
            assert libc.mprotect(address, self.mapped[address][0], PROT_READ_WRITE) == 0
        self.open |= inside
        return (Status.CUDA_SUCCESS,)

    def cuMemUnmap(self, ptr, size):
        assert not self.busy, "unmapped while work is in flight"
        assert ptr in self.mapped and self.mapped[ptr][0] == size, "not exactly what was mapped"
        if self._refuses("unmap"):
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
        assert libc.mmap(ptr, size, PROT_NONE, flags, -1, 0) == ptr
        del self.mapped[ptr]
        self.open.discard(ptr)
        return (Status.CUDA_SUCCESS,)

    def cuMemRelease(self, handle):
        file, _ = self.files.pop(handle)  # KeyError: released twice
        self.calls.append("release")
        os.close(file)
        return (Status.CUDA_SUCCESS,)

    def cuMemAddressFree(self, ptr, size):
        assert self.reserved.pop(ptr) == size, "not exactly what was reserved"
        assert not any(ptr <= at < ptr + size for at in self.mapped), "freed while mapped"
        self.calls.append("free")
        assert libc.munmap(ptr, size) == 0
        return (Status.CUDA_SUCCESS,)
