"""The host tier: grows by chunks to its budget, keeps its addresses, gives chunks back, pins what it has."""

import pytest
import torch

from common.engine.host import HostPool, make_host_pool
from common.engine.rss import current_rss
from common.errors import ContractError

SHAPE = (2, 16, 2, 8)  # 512 elements
PAGE = 4096


class Pins:
    """Remembers what is pinned; whole pages, once."""

    def __init__(self):
        self.ranges = {}

    def pin(self, address, num_bytes):
        assert address % PAGE == 0 == num_bytes % PAGE and num_bytes > 0
        assert all(address + num_bytes <= at or at + num <= address for at, num in self.ranges.items())
        self.ranges[address] = num_bytes

    def unpin(self, address):
        del self.ranges[address]


def test_grows_on_demand_and_keeps_what_it_holds():
    pins = Pins()
    pool = HostPool(SHAPE, torch.float16, 100 * 1024 + 5, chunk_bytes=30_000, pinner=pins)
    assert (pool.cell_bytes, pool.max_cells, pool.chunk_cells) == (1024, 100, 32)
    assert pool.tensor.shape == (0, *SHAPE) and not pins.ranges
    pool.ensure(1)
    assert pool.num_cells == 32
    address = pool.tensor.data_ptr()
    pool.tensor.copy_(torch.arange(32).view(-1, 1, 1, 1, 1).expand(32, *SHAPE))
    pool.ensure(100)  # the last chunk is a short one
    assert pool.tensor.shape == (100, *SHAPE) and pool.tensor.data_ptr() == address and pool.tensor.is_contiguous()
    assert pool.num_bytes == 100 * 1024 and sorted(pins.ranges.values()) == [PAGE, *[32 * 1024] * 3]
    assert pool.tensor[[31, 3, 64], 1, 15, 1, 7].tolist() == [31, 3, 0]
    pool.tensor.index_copy_(0, torch.tensor([99, 40]), pool.tensor[[7, 8]])
    assert pool.tensor[[99, 40], 0, 0, 0, 0].tolist() == [7, 8]
    with pytest.raises(ContractError, match="overbooked"):
        pool.ensure(101)

    assert pool.release(33) == 36 * 1024 and pool.num_cells == 64 and len(pins.ranges) == 2
    assert pool.release(33) == 0
    pool.ensure(96)
    assert pool.tensor[[7, 40, 64], 0, 0, 0, 0].tolist() == [7, 8, 0]
    pool.close()
    pool.close()
    assert not pins.ranges
    with pytest.raises(ContractError, match="closed"):
        pool.ensure(1)
    with pytest.raises(ContractError, match="closed"):
        _ = pool.tensor


def test_pieces_do_not_cross_chunks():
    pool = HostPool(SHAPE, torch.float16, 1 << 20, chunk_bytes=32 * 1024)
    assert list(pool.pieces(30, 40)) == [(30, 2), (32, 32), (64, 6)]
    assert list(pool.pieces(32, 32)) == [(32, 32)] and list(pool.pieces(5, 0)) == []


def test_odd_cells_still_have_chunks_on_page_borders():
    pool = HostPool((2, 3, 1, 5), torch.float32, 10 << 20, chunk_bytes=1, pinner=Pins())
    assert pool.cell_bytes == 120 and pool.chunk_cells * 120 % PAGE == 0
    pool.ensure(pool.max_cells)
    pool.tensor.fill_(1)
    assert pool.num_cells == pool.max_cells
    pool.close()


def test_chunks_given_back_leave_the_resident_set():
    torch.set_num_threads(1)
    pool = make_host_pool("cpu", (2, 16, 8, 64), torch.float32, 256 << 20)
    before = current_rss()
    pool.ensure(pool.max_cells // 2)
    pool.tensor.fill_(1)
    held = current_rss()
    assert held - before > 120 << 20
    assert pool.release(pool.chunk_cells) == 64 << 20
    assert 60 << 20 < held - current_rss() < 70 << 20
    pool.close()
    assert current_rss() - before < 6 << 20


def test_a_budget_below_one_cell_is_an_empty_pool():
    pool = HostPool(SHAPE, torch.float16, 1000)
    pool.ensure(0)
    assert pool.tensor.shape == (0, *SHAPE)
    with pytest.raises(ContractError):
        pool.ensure(1)
