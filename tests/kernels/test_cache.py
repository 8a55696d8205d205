"""Writing KV and moving cells."""

from __future__ import annotations

import pytest
import torch

from common.errors import ContractError
from common.kernels.cache import copy_cells, gather_cells, scatter_cells, write_kv

CELLS, BLOCK, HEADS, SIZE = 6, 4, 2, 8


@pytest.fixture
def kv():
    return torch.randn(CELLS, 2, BLOCK, HEADS, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("slots", [[9, 0, 23], [9, -1, 23], [-1, -1, -1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_writes_reach_their_slots_and_no_others(kv, slots, dtype):
    kv, before = kv.to(dtype), kv.to(dtype, copy=True)
    fused = torch.randn(3, 3 * HEADS, SIZE)
    k, v = fused[:, :HEADS], fused[:, HEADS : 2 * HEADS]
    write_kv(kv, k, v, torch.tensor(slots))
    for token, slot in enumerate(slots):
        if slot >= 0:
            before[slot // BLOCK, 0, slot % BLOCK] = k[token].to(dtype)
            before[slot // BLOCK, 1, slot % BLOCK] = v[token].to(dtype)
    assert torch.equal(kv, before)


def test_gather_and_scatter_are_inverse(kv):
    before, cells = kv.clone(), torch.tensor([4, 0, 5])
    buffer = gather_cells(kv, cells)
    assert buffer.shape == (3, 2, BLOCK, HEADS, SIZE) and torch.equal(buffer, kv[cells])
    kv[cells] = float("nan")
    assert torch.equal(buffer, before[cells])  # a copy
    scatter_cells(kv, cells, buffer)
    assert torch.equal(kv, before)


def test_copies_between_ranges_and_within_one(kv):
    other = torch.zeros(9, *kv.shape[1:])
    copy_cells(kv, torch.tensor([1, 2]), other, torch.tensor([8, 3]))
    assert torch.equal(other[[8, 3]], kv[[1, 2]]) and not other[:3].any()
    copy_cells(kv, torch.tensor([1]), kv, torch.tensor([0]))
    assert torch.equal(kv[0], kv[1])


def test_no_cells_and_no_tokens(kv):
    before, none = kv.clone(), torch.zeros(0, dtype=torch.long)
    scatter_cells(kv, none, gather_cells(kv, none))
    copy_cells(kv, none, kv, none)
    write_kv(kv, torch.zeros(0, HEADS, SIZE), torch.zeros(0, HEADS, SIZE), none)
    assert torch.equal(kv, before)


def test_shapes_that_do_not_fit_are_refused(kv):
    with pytest.raises(ContractError):
        write_kv(kv, torch.zeros(2, HEADS, SIZE), torch.zeros(2, HEADS, SIZE), torch.tensor([1]))
    with pytest.raises(ContractError):
        scatter_cells(kv, torch.tensor([1]), torch.zeros(2, *kv.shape[1:]))
    with pytest.raises(ContractError):
        copy_cells(kv, torch.tensor([1, 2]), kv, torch.tensor([3]))
