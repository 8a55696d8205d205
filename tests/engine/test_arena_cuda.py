"""The CUDA arena over the fake driver: how many calls, what a failure leaves, and what the errors say."""

import sys

import pytest
import torch

from common.engine.arena import make_arena
from common.engine.arena_cuda import CudaArena, device_view
from common.engine.cuda_driver import CudaDriver
from common.engine.pages import ArenaShape
from common.errors import CapacityError, ContractError, KVPlaneError
from tests.engine.fake_cuda import GRANULE, FakeCuda

SHAPE = ArenaShape(num_layers=6, layer_bytes=3 * GRANULE - 100, kv_bytes=2 * GRANULE + 4000, cell_bytes=24)
SHAPE = SHAPE._replace(kv_bytes=SHAPE.kv_bytes // 24 * 24)


def make(cuda):
    return CudaArena(SHAPE, 0, CudaDriver(0, cuda), cuda.synchronize, cuda.view)


def test_the_very_pages_of_dropped_layers_become_the_tail_of_kv():
    cuda = FakeCuda()
    arena = make(cuda)
    for layer in range(6):
        arena.layer(layer).fill_(layer + 1)
    arena.kv.fill_(77)
    arena.drop((2, 4))
    tail = arena.kv[3 * GRANULE :]  # what the KV range started with takes three granules
    assert bool((arena.kv[: SHAPE.kv_bytes] == 77).all())
    assert set(tail.unique().tolist()) <= {0, 3, 4} and {3, 4} <= set(tail.unique().tolist())
    arena.close()
    cuda.assert_nothing_left()


def test_calls_are_few():
    cuda = FakeCuda()
    arena = make(cuda)
    assert [cuda.calls.count(name) for name in ("reserve", "create", "map", "access")] == [1, 7, 7, 1]
    for change, expected in (
        (lambda: arena.drop((1, 5)), ["unmap"] * 4 + ["map"] * 4 + ["access"]),
        (lambda: arena.shrink(SHAPE.kv_bytes + 2 * SHAPE.layer_bytes), ["unmap"] * 2),
        (lambda: arena.restore((3, 5)), ["map"] * 2 + ["access"]),
    ):
        cuda.calls.clear()
        cuda.busy = True  # a kernel is running: it must be waited for
        moved = change()
        assert cuda.calls == expected
        count = expected.count("unmap") or expected.count("map")
        assert (moved.num_pages, moved.num_bytes) == (3 * count, 3 * count * GRANULE)
    arena.close()
    cuda.assert_nothing_left()


def test_what_shrink_left_unused_comes_back_with_the_next_drop():
    cuda = FakeCuda()
    arena = make(cuda)
    arena.drop((0, 3))
    arena.shrink(100)
    assert arena.book.used_bytes == 3 * 3 * GRANULE + 3 * GRANULE  # the KV range keeps what it started with
    arena.drop((5, 6))
    assert arena.kv_bytes == SHAPE.kv_bytes + 4 * SHAPE.layer_bytes
    arena.close()
    cuda.assert_nothing_left()


@pytest.mark.parametrize("name, after", [("create", 0), ("create", 6), ("map", 3), ("map", 6), ("access", 0)])
def test_an_arena_that_cannot_be_made_leaves_nothing(name, after):
    cuda = FakeCuda()
    cuda.fail[name] = after
    with pytest.raises(KVPlaneError, match="failed with CUDA_ERROR"):
        make(cuda)
    cuda.assert_nothing_left()


@pytest.mark.parametrize("name, after", [("unmap", 0), ("unmap", 2), ("map", 0), ("map", 2), ("access", 0)])
def test_after_a_failed_change_only_close_is_of_use(name, after):
    cuda = FakeCuda()
    arena = make(cuda)
    cuda.fail[name] = after
    with pytest.raises(KVPlaneError, match=r"cuMem\w+ failed with CUDA_ERROR_INVALID_VALUE"):
        arena.drop((0, 3))
    with pytest.raises(ContractError, match=r"unusable since: cuMem\w+ failed"):
        arena.layer(5)
    arena.close()
    cuda.assert_nothing_left()


def test_close_goes_on_after_a_failure_and_reports_it():
    cuda = FakeCuda()
    arena = make(cuda)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    arena._synchronize = broken
    with pytest.raises(KVPlaneError, match=r"illegal memory access$"):
        arena.close()
    cuda.assert_nothing_left()


def test_too_little_memory_is_a_capacity_error_of_one_line():
    cuda = FakeCuda(memory_bytes=10 * GRANULE)
    with pytest.raises(CapacityError, match=r"^cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY") as caught:
        make(cuda)
    assert "\n" not in str(caught.value)
    cuda.assert_nothing_left()


def test_without_cuda_bindings_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(KVPlaneError, match=r"needs cuda-bindings: pip install 'kvplane\[cuda\]'$"):
        make_arena("cuda", *SHAPE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(KVPlaneError) as caught:
        make_arena("cuda", *SHAPE)
    assert "\n" not in str(caught.value)


def test_the_real_bindings_have_every_name_and_field():
    """Their structures are made without a driver; a call then fails in one line, or works where there is a GPU."""
    pytest.importorskip("cuda.bindings.driver")
    driver = CudaDriver(3)
    assert driver._prop.location.id == 3 == driver._access.location.id
    names = ("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess",
             "cuMemUnmap", "cuMemRelease", "cuMemAddressFree")  # fmt: skip
    assert all(callable(getattr(driver._cu, name)) and callable(getattr(FakeCuda(), name)) for name in names)
    if not torch.cuda.is_available():
        with pytest.raises(KVPlaneError, match="cuMemAddressReserve could not be called"):
            driver.reserve(1 << 21)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pages_move_and_what_stays_is_preserved():
    pytest.importorskip("cuda.bindings.driver")
    arena = make_arena("cuda", 4, 5 << 20, 3 << 20, 1 << 16)
    for layer in range(4):
        arena.layer(layer).fill_(layer + 1)
    arena.kv.fill_(77)
    address, kv_bytes = arena.kv.data_ptr(), arena.kv_bytes
    free = torch.cuda.mem_get_info()[0]
    arena.drop((2, 4))
    assert arena.kv.data_ptr() == address and arena.kv_bytes == kv_bytes + (10 << 20)
    assert bool((arena.kv[:kv_bytes] == 77).all()) and bool((arena.layer(1) == 2).all())
    arena.kv[kv_bytes:].fill_(5)
    arena.shrink(kv_bytes)
    arena.restore((2, 4))
    arena.layer(3).fill_(9)
    assert bool((arena.kv == 77).all()) and torch.cuda.mem_get_info()[0] == free
    assert device_view(address, 4, 0).tolist() == [77] * 4
    arena.close()
    assert torch.cuda.mem_get_info()[0] > free
