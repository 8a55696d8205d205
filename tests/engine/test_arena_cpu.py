"""The arena in host memory: pages really leave and come, and what is handed out stays safe to read."""

from functools import partial

import pytest
import torch

from common.engine.arena import make_arena
from common.engine.rss import current_rss, peak_rss
from common.errors import ConfigError, ContractError

MB = 1 << 20
TOLERANCE = 6 * MB  # torch and the interpreter move this much at most meanwhile


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.ones(4 * MB).sum()  # what torch allocates on first use is allocated


def is_all(tensor, value):
    """Without a temporary that would show in the resident set."""
    return int(tensor.min()) == value == int(tensor.max())


def test_drop_gives_pages_to_kv_and_restore_takes_them_back():
    layers, layer_bytes, kv_bytes, cell = 8, 8 * MB + 1000, 4 * MB, 3 * 4096
    kv_bytes -= kv_bytes % cell
    arena = make_arena("cpu", layers, layer_bytes, kv_bytes, cell)
    before = current_rss()
    for layer in range(layers):
        arena.layer(layer).fill_(layer + 1)
    arena.kv.fill_(99)
    full = current_rss()
    assert full - before >= layers * layer_bytes + kv_bytes - TOLERANCE  # so that a fall can be seen

    address = arena.kv.data_ptr()
    moved = arena.drop((4, 8))
    dropped = current_rss()
    assert 4 * layer_bytes <= moved.num_bytes == moved.num_pages * 4096 < 4 * (layer_bytes + 4096)
    assert abs(full - dropped - 4 * layer_bytes) < TOLERANCE
    assert arena.kv_bytes == kv_bytes + 4 * layer_bytes == arena.kv.numel()
    assert arena.num_cells == kv_bytes // cell + 4 * layer_bytes // cell

    arena.kv[kv_bytes:].fill_(7)
    assert arena.kv.data_ptr() == address
    assert abs(current_rss() - full) < TOLERANCE, "the KV range takes what the layers gave"
    assert is_all(arena.kv[:kv_bytes], 99) and is_all(arena.layer(3), 4)

    arena.shrink(kv_bytes)
    assert abs(current_rss() - dropped) < TOLERANCE
    arena.restore((4, 8))
    for layer in range(4, 8):
        arena.layer(layer).fill_(layer + 1)
    assert abs(current_rss() - full) < TOLERANCE and arena.kv_bytes == kv_bytes
    assert is_all(arena.kv, 99)
    arena.close()
    assert abs(current_rss() - before) < TOLERANCE
    assert peak_rss() >= full - (1 << 20)  # the kernel's two counters lag behind each other by some pages


def test_old_views_read_zeros_after_drop_and_after_close():
    arena = make_arena("cpu", 2, 5000, 8192, 4096)
    slab, kv = arena.layer(1), arena.kv
    slab.fill_(1)
    kv.fill_(2)
    arena.drop((1, 2))
    assert not slab.any() and is_all(kv, 2)
    arena.close()
    arena.close()
    assert not kv.any()


def test_misuse_is_refused_and_changes_nothing():
    arena = make_arena("cpu", 4, 5000, 8192, 4096)
    arena.drop((1, 3))
    state = arena.resident, arena.kv_bytes, arena.book.used_bytes
    bad_calls = [partial(arena.layer, index) for index in (1, 4, -1)]
    bad_calls += [partial(arena.drop, layers) for layers in ((0, 2), (3, 3), (3, 5), (2, 1), (-1, 1))]
    bad_calls += [partial(arena.restore, layers) for layers in ((1, 2), (0, 1), (2, 5))]
    bad_calls += [partial(arena.shrink, num_bytes) for num_bytes in (arena.kv_bytes + 1, -1)]
    for bad in bad_calls:
        with pytest.raises(ContractError):
            bad()
        assert state == (arena.resident, arena.kv_bytes, arena.book.used_bytes)
    arena.close()
    for late in (lambda: arena.layer(0), lambda: arena.kv, lambda: arena.drop((0, 1)), lambda: arena.shrink(0),
                 lambda: arena.restore((1, 2))):  # fmt: skip
        with pytest.raises(ContractError, match="closed"):
            late()


def test_sizes_and_devices_that_make_no_arena():
    for sizes in ((0, 1, 8, 4), (1, 0, 8, 4), (1, 1, 0, 4), (1, 1, 7, 4)):
        with pytest.raises(ContractError):
            make_arena("cpu", *sizes)
    with pytest.raises(ConfigError, match="meta"):
        make_arena("meta", 1, 1, 8, 4)
