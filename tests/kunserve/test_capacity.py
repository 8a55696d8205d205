"""A group of g holds g P + E blocks: in the simulator's books and in the arena that has the real pages."""

from __future__ import annotations

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from common.engine.arena import make_arena
from common.executors.memory import InstanceMemory
from common.sched.ledger import CellLedger
from common.types import InstanceInfo, Stage
from systems.kunserve.slices import merge_slices, without
from tests.laws.strategies import law

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40_000),
                   st.sampled_from((512, 4096, 5000)))  # fmt: skip


@law(100)
@given(shapes, st.integers(0, 3))
def test_a_group_holds_g_times_p_blocks_and_the_extension(shape, odd):
    """With even slices (`odd` = 0) exactly: E is what the dropped layers' bytes give per layer kept. Else the scarcest
    stage decides. Whatever is in no block is counted as wasted."""
    size, share, blocks, layer_bytes, cell_bytes = shape
    layers = size * share + odd
    routes = [(Stage(instance, (0, layers)),) for instance in range(size)]
    route = reduce(lambda first, second: merge_slices(first, second) or first, routes)
    if len(route) < size:
        return  # no such slices
    ledger = CellLedger()
    for instance, keep in route:
        info = InstanceInfo(instance, layers, blocks * layers, cell_bytes, layer_bytes, 0, True, 0)
        memory = InstanceMemory(info)
        arena = make_arena("cpu", layers, layer_bytes, blocks * layers * cell_bytes, cell_bytes)
        for low, high in without((0, layers), keep):
            memory.resident[low:high] = [False] * (high - low)
            arena.drop((low, high))
        memory.capacity = memory.full_capacity()
        assert arena.num_cells == memory.capacity, "books and pages agree"
        assert arena.kv_bytes - arena.num_cells * cell_bytes == memory.spare_bytes()
        arena.close()
        ledger.open(instance, memory.capacity)
    found, wasted = ledger.whole_blocks(route)
    cells = sum(ledger.capacity.values())
    assert found * layers + wasted == cells and wasted >= 0
    if not odd and len({high - low for _, (low, high) in route}) == 1:
        extension = (layers - share) * layer_bytes // cell_bytes
        assert found == size * blocks + extension // share
        assert wasted == size * (extension % share)
