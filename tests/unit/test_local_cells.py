"""Ids of cells: who holds what, runs where they can be had and scattered cells where not, names, and compaction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engine.cells import CellStore
from common.engine.named import Named, NamedBlocks
from common.errors import ContractError
from tests.laws.strategies import law

LAYERS = 4


def mask(*parts, blocks=6):
    """(layers low, high, blocks first, last) parts of a claim."""
    wanted = np.zeros((LAYERS, blocks), bool)
    for low, high, first, last in parts:
        wanted[low:high, first:last] = True
    return wanted


def whole(blocks):
    return mask((0, LAYERS, 0, blocks))


def checkerboard(num_cells=16):
    """A store of 16 cells where every second cell is held."""
    store = CellStore(num_cells, LAYERS)
    for request in range(num_cells):
        store.claim(request, mask((0, 1, 0, 1)))
    for request in range(0, num_cells, 2):
        store.claim(request, whole(0))
    return store


class TestClaims:
    def test_a_block_is_a_run(self):
        store = CellStore(40, LAYERS)
        store.claim(1, whole(3))
        cells = store.of(1)
        assert cells.table[:, :3].T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert cells.uniform(0, 4, 3) and cells.uniform(1, 3, 3)
        store.check()

    def test_what_stays_stays_where_it_is(self):
        store = CellStore(40, LAYERS)
        store.claim(1, whole(3))
        before = store.of(1).table.copy()
        store.claim(1, mask((0, 2, 0, 3), (2, 4, 1, 2)))
        now, kept = store.of(1).table, store.of(1).run >= 0
        assert store.used == 8 and (now[kept] == before[kept]).all() and (now[~kept] == -1).all()
        store.check()
        store.claim(1, whole(0))
        assert store.used == 0 and 1 not in store.requests

    def test_the_middle_of_a_run_goes(self):
        store = CellStore(8, LAYERS)
        store.claim(1, whole(1))
        store.claim(1, mask((0, 1, 0, 1), (3, 4, 0, 1)))
        assert store.range.runs() == [(0, 1), (3, 1)]
        store.claim(2, mask((1, 3, 0, 1)))
        assert store.of(2).table[1:3, 0].tolist() == [1, 2]
        store.check()

    def test_scattered_where_no_run_is_free(self):
        store = checkerboard()
        store.claim(99, whole(2))
        cells = store.of(99)
        assert store.used == 16 and not cells.uniform(0, 4, 2) and cells.uniform(0, 1, 2)
        assert sorted(cells.table[:, :2].ravel().tolist()) == list(range(0, 16, 2))
        store.check()
        store.claim(99, mask((1, 3, 0, 2)))
        assert store.used == 12
        store.check()

    def test_more_than_there_is(self):
        store = checkerboard()
        with pytest.raises(ContractError, match="overbooked"):
            store.claim(99, whole(3))
        with pytest.raises(ContractError, match="overbooked"):
            CellStore(3, LAYERS).append(0, 0, 4, 0)

    def test_append_once(self):
        store = CellStore(40, LAYERS)
        store.append(1, 0, 4, 0)
        store.append(1, 0, 4, 0)
        store.append(1, 2, 4, 5)
        assert store.used == 6 and store.of(1).table[:, 5].tolist() == [-1, -1, 4, 5]
        store.check()

    def test_a_uniform_table_that_has_changed(self):
        """The answer for blocks that were checked before is not kept over a change of them."""
        store = CellStore(16, LAYERS)
        store.claim(1, whole(2))
        assert store.of(1).uniform(0, 4, 2)
        store.claim(1, mask((0, 4, 1, 2)))
        store.claim(2, mask((0, 1, 0, 1)))  # takes the first of the freed cells
        store.claim(3, mask((0, 2, 0, 4)))  # leaves no run of four
        store.claim(2, whole(0))
        store.claim(1, whole(2))
        assert not store.of(1).uniform(0, 4, 2)
        store.check()

    def test_who_is_told_of_free_cells(self):
        told = []
        store = CellStore(16, LAYERS, lambda cells: told.append(sorted(cells.tolist())))
        store.claim(1, whole(1))
        store.claim(1, mask((0, 2, 0, 1)))
        store.grow(18)
        assert told == [[0, 1, 2, 3], [2, 3], [16, 17]]


class TestShrink:
    def test_tables_follow(self):
        store = CellStore(24, LAYERS)
        store.claim(1, whole(2))
        store.claim(2, whole(2))
        store.name(2, 0, b"a", owned=False)
        store.claim(1, whole(0))
        content = np.arange(24)
        mine = content[store.of(2).table[:, 1]].tolist()
        named = content[store.named.blocks[b"a"].cells].tolist()
        for src, dst, num in store.shrink(8):
            content[dst : dst + num] = content[src : src + num].copy()
        store.check()
        assert store.range.num_cells == 8 and store.used == 8
        assert content[store.of(2).table[:, 1]].tolist() == mine
        assert content[store.of(2).table[:, 0]].tolist() == named  # it goes on reading what it named
        assert content[store.named.blocks[b"a"].cells].tolist() == named

    def test_too_full(self):
        store = CellStore(24, LAYERS)
        store.claim(1, whole(2))
        with pytest.raises(ContractError):
            store.shrink(7)
        store.check()


class TestNames:
    def stored(self, *names, store=None):
        store = store or CellStore(64, LAYERS)
        store.claim(1, whole(len(names)))
        for block, name in enumerate(names):
            store.name(1, block, name, owned=False)
        return store

    def test_evicted_in_order_of_release_tails_first(self):
        blocks = NamedBlocks()
        for name in (b"a", b"b", b"c", b"x"):
            blocks.store(name, Named(np.zeros(4, np.int32), np.zeros(4, np.int32), None))
        blocks.acquire([b"a", b"b", b"c"])
        blocks.acquire([b"x"])
        blocks.acquire([b"a"])
        blocks.release([b"a", b"b", b"c"])
        blocks.release([b"x"])
        blocks.release([b"a"])
        assert list(blocks._idle) == [b"c", b"b", b"x", b"a"]
        blocks.oldest(3)
        assert list(blocks.blocks) == [b"a"] and blocks.num_idle == 1

    def test_what_is_read_is_not_evicted(self):
        store = self.stored(b"a", b"b")
        store.named.acquire([b"a"])
        with pytest.raises(ContractError, match="read by nobody"):
            store.evict(2)
        store.evict(1)
        assert b"a" in store.named.blocks and store.used == 4
        with pytest.raises(ContractError, match="requests read"):
            store.named.remove(b"a")
        store.named.release([b"a"])
        store.evict(1)
        assert store.used == 0
        store.check()

    def test_owned_until_disowned(self):
        store = CellStore(16, LAYERS)
        store.claim(1, whole(2))
        store.name(1, 0, b"a", owned=True)
        store.named.acquire([b"a"])
        store.check()
        store.disown(1, 0, b"a")
        store.check()
        store.read(2, 0, b"a")
        assert store.of(2).table[:, 0].tolist() == store.of(1).table[:, 0].tolist()
        store.claim(1, whole(0))
        store.check()
        assert store.used == 4

    def test_another_tier_takes_the_same_layers(self):
        store, other = CellStore(16, LAYERS), CellStore(16, LAYERS)
        store.claim(1, mask((1, 3, 0, 1)))
        store.name(1, 0, b"a", owned=False)
        moved = other.adopt(b"a", store.named.blocks[b"a"])
        assert (moved.run >= 0).tolist() == [False, True, True, False] and other.used == 2
        other.check()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("claim", "claim", "claim", "append", "name", "evict", "shrink", "grow")),
              st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(0, 5), st.integers(1, 6)),
    min_size=5, max_size=40,
)  # fmt: skip


class Diary:
    """A store beside a model of it: `content` of every cell (0: nothing), and what each request `wrote` where."""

    def __init__(self):
        self.content = np.zeros(200, np.int64)
        self.store = CellStore(40, LAYERS, lambda cells: self.content.__setitem__(cells, 0))
        self.wrote = {}  # (request, layer, block) -> stamp
        self.stamp = 0

    def claim(self, request, low, high, first, last):
        wanted = mask((low, high, first, last)) if high - low < 3 else mask((0, LAYERS, 0, last))
        cells = self.store.requests.get(request)
        have = 0 if cells is None else int((cells.run >= 0).sum())
        if self.store.used - have + wanted.sum() <= self.store.range.num_cells:
            self.store.claim(request, wanted)

    def append(self, request, low, high, first, last):
        cells = self.store.requests.get(request)
        there = cells is not None and (cells.run[:, first : first + 1] >= 0).any()
        if self.store.range.free_cells >= LAYERS and not there:
            self.store.append(request, low, high, first)

    def name(self, request, low, high, first, last):
        cells = self.store.requests.get(request)
        if cells is not None and cells.run.shape[1] > first and (cells.run[:, first] >= 0).any():
            self.stamp += 1
            self.store.name(request, first, str(self.stamp).encode(), owned=False)
            cells.table[:, first] = -1  # it reads it no more
            cells.changed()

    def evict(self, request, low, high, first, last):
        self.store.evict(min(last - first, self.store.named.num_idle))

    def shrink(self, request, low, high, first, last):
        store = self.store
        for src, dst, num in store.shrink(max(store.used, store.range.num_cells - 4 * (last - first))):
            self.content[dst : dst + num] = self.content[src : src + num].copy()
        free = np.ones(len(self.content), bool)
        for start, num in store.range.runs():
            free[start : start + num] = False
        self.content[free] = 0

    def grow(self, request, low, high, first, last):
        self.store.grow(min(150, self.store.range.num_cells + 3 * (last - first)))

    def check(self):
        """Who held a cell before finds what it wrote, who is new finds nothing; then everybody writes anew."""
        self.store.check()
        held = {(request, layer, block): int(cells.table[layer, block])
                for request, cells in self.store.requests.items()
                for layer, block in np.argwhere(cells.run >= 0).tolist()}  # fmt: skip
        for key, cell in held.items():
            assert self.content[cell] == self.wrote.get(key, 0), key
        self.wrote = {}
        for key, cell in held.items():
            self.stamp += 1
            self.content[cell] = self.wrote[key] = self.stamp
        for cells in self.store.requests.values():
            there = [*(cells.run >= 0).all(axis=0).tolist(), False]
            if num := there.index(False):
                plain = cells.table[:, :num] == cells.table[0, :num] + np.arange(LAYERS)[:, None]
                assert cells.uniform(0, LAYERS, num) == plain.all()


@law(150)
@given(OPERATIONS)
def test_any_history_keeps_owners_and_contents(operations):
    """What a request wrote is there as long as it holds the cell, wherever that moves; freed and new cells hold
    nothing; the answer to `uniform` is that of the table as it is."""
    diary = Diary()
    for kind, request, low, height, first, width in operations:
        getattr(diary, kind)(request, low, min(low + height, LAYERS), first, min(first + width, 6))
        diary.check()
    store = diary.store
    for request in list(store.requests):
        store.claim(request, whole(0))
    store.evict(store.named.num_idle)
    assert store.used == 0
    store.check()
