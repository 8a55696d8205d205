"""Cells of rectangles, shared blocks, and what the pages of parameters hold."""

from __future__ import annotations

import pytest

from common.errors import ContractError
from common.executors.memory import Held, InstanceMemory, overlap, subtract, union_cells
from common.executors.simstate import SimState
from common.record import RequestColumns, RunRecord
from common.types import InstanceInfo, Tier
from tests.fakes import cluster


def held(start, end, layers=(0, 4), tier=Tier.HBM):
    return Held(0, tier, layers, start, end)


def rows(pieces):
    return sorted((piece.layers, piece.start, piece.end) for piece in pieces)


def state(blocks=8, host_blocks=2) -> SimState:
    return SimState(cluster(1, blocks, host_blocks=host_blocks), RunRecord(RequestColumns.empty(1)))


def test_partly_filled_blocks_count_whole():
    assert held(0, 16).cells(16) == 4 and held(0, 17).cells(16) == 8 and held(15, 17).cells(16) == 8


def test_union_counts_a_cut_block_once():
    assert union_cells([held(0, 20), held(20, 40)], 16) == 12
    assert union_cells([held(0, 20, (0, 2)), held(20, 40, (2, 4))], 16) == 4 + 4  # other layers: nothing shared
    assert union_cells([held(0, 3), held(3, 7), held(7, 16)], 16) == 4
    assert union_cells([held(0, 32, (0, 3)), held(16, 48, (1, 4))], 16) == 2 + 2 * 3 + 2


def test_overlap():
    assert overlap((0, 2), (1, 4)) == (1, 2) and overlap((0, 2), (2, 4)) is None


def test_subtract_leaves_up_to_four_rectangles():
    whole = held(0, 64)
    assert subtract(whole, (1, 3), (16, 32)) != [whole]
    assert rows(subtract(whole, (1, 3), (16, 32))) == [
        ((0, 1), 0, 64), ((1, 3), 0, 16), ((1, 3), 32, 64), ((3, 4), 0, 64)]  # fmt: skip
    assert subtract(whole, (0, 4), (0, 64)) == []
    assert subtract(whole, (0, 4), (64, 80)) == [whole]


def test_a_ledger_never_overbooks():
    memory = InstanceMemory(InstanceInfo(0, 4, 32, 4096, 8 * 4096))
    memory.take(32)
    assert memory.room() == 0
    with pytest.raises(ContractError, match="overbooked"):
        memory.take(1)
    memory.used = 0
    with pytest.raises(ContractError, match="more KV cells freed"):
        memory.give(1)


def test_dropped_layers_lend_their_pages_and_loading_ones_take_them_back():
    memory = InstanceMemory(InstanceInfo(0, 4, 32, 4096, 8 * 4096))
    memory.resident[2:4] = [False, False]
    assert memory.full_capacity() == 32 + 2 * 8
    memory.loading = {2}
    assert memory.full_capacity() == 32 + 8 and memory.full_capacity(returning=1) == 32
    assert memory.param_bytes() == 2 * 8 * 4096 and memory.has((0, 2)) and not memory.has((1, 3))


def test_pieces_in_one_block_are_charged_once_in_any_order():
    world = state()
    first, second = held(0, 20), held(20, 40)
    world.hold(0, first)
    assert world.memory[0].used == 8
    assert world.cells_for(0, second) == 4
    world.hold(0, second)
    assert world.memory[0].used == 12
    world.drop_held(0, first)
    assert world.memory[0].used == 8
    world.drop_held(0, second)
    assert world.memory[0].used == 0 and not world.held


def test_carve_leaves_what_is_not_ready():
    world = state()
    world.hold(0, held(0, 32))
    world.hold(0, Held(0, Tier.HBM, (0, 4), 32, 48, ready=False))
    assert world.area(0, 0, Tier.HBM, (0, 4), (0, 48)) == 32 * 4
    assert world.carve(0, 0, Tier.HBM, (2, 4), (16, 48)) == 16 * 2
    assert world.memory[0].used == 4 * 1 + 2 * 1 + 4 * 1
    world.free_all(0)
    assert world.memory[0].used == 0


def test_the_host_tier_has_its_own_room():
    world = state(host_blocks=2)
    world.hold(0, held(0, 32, tier=Tier.DRAM))
    assert world.memory[0].used == 0 and world.memory[0].host_room() == 0
    assert not world.fits(0, held(32, 33, tier=Tier.DRAM)) and world.fits(0, held(0, 128))
    with pytest.raises(ContractError, match="host tier"):
        world.hold(0, held(32, 33, tier=Tier.DRAM))
