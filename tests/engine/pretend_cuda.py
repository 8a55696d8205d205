"""A CUDA device without a GPU: host tensors that say that they are on one, and calls that mind where theirs are.

Every torch call is watched: tensors of the device and of the host may not meet but where torch lets them (copies,
`.to`, a host index, numbers). The arena is the CUDA one over `fake_cuda`, Triton's launches are torch's own arithmetic
behind the same check. So what runs here asks nothing of a GPU that it would refuse; what it computes is the host's.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from common.engine import arena_cuda, graphs, host
from common.engine.cuda_driver import CudaDriver
from common.kernels import cache
from tests.engine.fake_cuda import FakeCuda

CUDA = torch.device("cuda:0")
MOVES = ("copy_", "to", "cpu", "pin_memory", "__get__")
INDEXES = ("__getitem__", "__setitem__")


class OnDevice(torch.Tensor):
    """Its data is the host's; nothing else of torch may know."""

    is_cuda = True
    device = CUDA

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __array__(self, *_):
        raise TypeError("can't convert a CUDA tensor to numpy")


def is_device(value):
    """Does it name the device?"""
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def flat(values):
    """Values, and those of the lists and tuples among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value


def plain(value):
    """As torch may have it: on the host."""
    if isinstance(value, (list, tuple)):
        return type(value)([plain(one) for one in value])
    if is_device(value):
        return torch.device("cpu")
    return value.as_subclass(torch.Tensor) if isinstance(value, OnDevice) else value


def placed(value):
    """What a call gave, on the device."""
    if isinstance(value, (list, tuple)) and any(isinstance(one, torch.Tensor) for one in value):
        return type(value)([placed(one) for one in value])
    return value.as_subclass(OnDevice) if type(value) is torch.Tensor else value


class Watch(TorchFunctionMode):
    """See the module docstring."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        leaves = list(flat((*args, *kwargs.values())))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [isinstance(tensor, OnDevice) for tensor in tensors]
        devices = [leaf for leaf in leaves if isinstance(leaf, (str, torch.device)) and
                   str(leaf).startswith(("cuda", "cpu"))]  # fmt: skip
        if func is torch.device or not (any(here) or any(map(is_device, devices))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "numpy":
            raise TypeError("can't convert a CUDA tensor to numpy")
        self._mind(name, tensors, here)
        out = func(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
        if name in ("to", "cpu") and out is plain(args[0]):
            out = out.clone()  # another device is never the same memory
        on_device = is_device(devices[0]) if devices else name != "cpu" and any(here)
        if name.endswith("_") and not name.endswith("__"):
            on_device = here[0]
        return placed(out) if on_device else out

    @staticmethod
    def _mind(name, tensors, here):
        """RuntimeError where torch would raise one."""
        if name in MOVES or not any(here) or (name in INDEXES and here[0]):
            return
        if any(tensor.ndim and not on for tensor, on in zip(tensors, here)):
            raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")


def all_there(*tensors):
    """As Triton: every pointer is the device's."""
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, OnDevice):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return [plain(tensor) for tensor in tensors]


def triton_write(kv, k, v, slots):
    cache.write_kv(*all_there(kv, k, v, slots))


def triton_copy(src, src_cells, dst, dst_cells):
    src, src_cells, dst, dst_cells = all_there(src, src_cells, dst, dst_cells)
    num = len(src if src_cells is None else src_cells)
    straight = torch.arange(num)
    cache.copy_cells(src, straight if src_cells is None else src_cells, dst,
                     straight if dst_cells is None else dst_cells)  # fmt: skip


class Event:
    """Of a device that is never late."""

    def record(self):
        pass

    def synchronize(self):
        pass


@contextmanager
def pretended(monkeypatch):
    """A process whose torch sees one CUDA device; yields its driver."""
    import common.kernels.triton_cache as triton_cache

    driver = FakeCuda()
    init = arena_cuda.CudaArena.__init__

    def open_arena(self, shape, device):
        view = lambda address, num_bytes: placed(driver.view(address, num_bytes))  # noqa: E731
        init(self, shape, device, CudaDriver(device, driver), driver.synchronize, view)

    cuda = SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 20)
    for name, value in {"is_available": lambda: True, "synchronize": lambda *_: driver.synchronize(),
                        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "pretended",
                        "get_device_properties": lambda *_: cuda, "current_device": lambda: 0,
                        "Event": Event, "mem_get_info": lambda *_: (1 << 40, 1 << 40)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(arena_cuda.CudaArena, "__init__", open_arena)
    monkeypatch.setattr(host, "CudaPinner", lambda: None)
    monkeypatch.setattr(graphs, "CudaCapture", graphs.Rerun)
    monkeypatch.setattr(triton_cache, "write_kv", triton_write)
    monkeypatch.setattr(triton_cache, "copy_cells", triton_copy)
    with Watch():
        yield driver
