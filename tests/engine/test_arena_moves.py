"""Random drops, shrinks and restores of both arenas against a model that is a few integers and bytes."""

import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.engine.arena import make_arena
from common.engine.arena_cuda import CudaArena
from common.engine.cuda_driver import CudaDriver
from common.engine.pages import ArenaShape
from common.errors import ContractError
from tests.engine.fake_cuda import GRANULE, FakeCuda

EXAMPLES = 200 if os.environ.get("KVPLANE_NIGHTLY") else 25


class ArenaMoves(RuleBasedStateMachine):
    """Writes a byte of its own to each slab and each KV cell, and looks for it after every step."""

    arena = None

    def make(self, shape):
        raise NotImplementedError

    def settle(self):
        """After each change."""

    @initialize(
        layers=st.integers(1, 6),
        layer_bytes=st.integers(1, 60_000),
        cells=st.integers(1, 20),
        cell=st.integers(1, 6000),
    )
    def begin(self, layers, layer_bytes, cells, cell):
        torch.set_num_threads(1)
        self.shape = ArenaShape(layers, layer_bytes, cells * cell, cell)
        self.arena = self.make(self.shape)
        self.stamp = 0
        self.slabs = {layer: self.write(self.arena.layer(layer)) for layer in range(layers)}  # layer -> byte
        self.cells = []  # byte of each cell, up to the last whole one
        self.write_cells()
        self.address = self.arena.kv.data_ptr()
        self.slab_address = [self.arena.layer(layer).data_ptr() for layer in range(layers)]
        self.length = self.shape.kv_bytes

    def write(self, tensor):
        self.stamp = self.stamp % 251 + 1
        tensor.fill_(self.stamp)
        return self.stamp

    def write_cells(self):
        kv, cell = self.arena.kv, self.shape.cell_bytes
        for index in range(len(self.cells), self.arena.num_cells):
            self.cells.append(self.write(kv[index * cell : (index + 1) * cell]))

    @rule(data=st.data())
    def drop(self, data):
        low, high = self.draw_layers(data)
        if not all(layer in self.slabs for layer in range(low, high)):
            with pytest.raises(ContractError):
                self.arena.drop((low, high))
            return
        moved = self.arena.drop((low, high))
        self.settle()
        assert moved.num_bytes >= (high - low) * self.shape.layer_bytes and moved.elapsed_ns >= 0
        for layer in range(low, high):
            del self.slabs[layer]
        dropped = self.shape.num_layers - len(self.slabs)
        self.length = self.shape.kv_bytes + dropped * self.shape.layer_bytes
        kv_cells = self.shape.kv_bytes // self.shape.cell_bytes
        assert self.arena.num_cells == kv_cells + dropped * self.shape.layer_bytes // self.shape.cell_bytes
        self.write_cells()

    @rule(data=st.data())
    def shrink(self, data):
        num_bytes = data.draw(st.integers(0, self.length))
        used = self.arena.book.used_bytes
        moved = self.arena.shrink(num_bytes)
        self.settle()
        assert moved.num_bytes == used - self.arena.book.used_bytes
        self.length = num_bytes
        del self.cells[self.arena.num_cells :]

    @rule(data=st.data())
    def widen(self, data):
        most = self.shape.kv_bytes + (self.shape.num_layers - len(self.slabs)) * self.shape.layer_bytes
        for wrong in (self.length - 1, most + 1):
            with pytest.raises(ContractError):
                self.arena.widen(wrong)
        num_bytes = data.draw(st.integers(self.length, most))
        used = self.arena.book.used_bytes
        moved = self.arena.widen(num_bytes)
        self.settle()
        assert moved.num_bytes == self.arena.book.used_bytes - used
        self.length = num_bytes
        self.write_cells()

    @rule(data=st.data(), make_room=st.booleans())
    def restore(self, data, make_room):
        low, high = self.draw_layers(data)
        room = self.shape.num_layers - len(self.slabs) - (high - low)
        limit = self.shape.kv_bytes + room * self.shape.layer_bytes
        missing = not any(layer in self.slabs for layer in range(low, high))
        if missing and make_room and self.length > limit:
            self.arena.shrink(limit)
            self.length = limit
            del self.cells[self.arena.num_cells :]
        if not missing or self.length > limit:
            with pytest.raises(ContractError):
                self.arena.restore((low, high))
            return
        self.arena.restore((low, high))
        self.settle()
        for layer in range(low, high):
            self.slabs[layer] = self.write(self.arena.layer(layer))

    def draw_layers(self, data):
        low = data.draw(st.integers(0, self.shape.num_layers - 1))
        return low, data.draw(st.integers(low + 1, self.shape.num_layers))

    @invariant()
    def all_is_where_it_was(self):
        arena = self.arena
        if arena is None:
            return
        assert arena.kv_bytes == self.length == arena.kv.numel()
        assert self.length == 0 or arena.kv.data_ptr() == self.address
        assert arena.resident == tuple(layer in self.slabs for layer in range(self.shape.num_layers))
        for layer, byte in self.slabs.items():
            slab = arena.layer(layer)
            assert slab.data_ptr() == self.slab_address[layer] and slab.numel() == self.shape.layer_bytes
            assert slab.dtype == torch.uint8 and bool((slab == byte).all())
        cells = arena.kv[: arena.num_cells * self.shape.cell_bytes].view(-1, self.shape.cell_bytes)
        assert cells.amin(1).tolist() == self.cells == cells.amax(1).tolist() if len(cells) else not self.cells

    @invariant()
    def the_budget_holds(self):
        if self.arena is None:
            return
        logical = len(self.slabs) * self.shape.layer_bytes + self.length
        assert logical + self.arena.overhead_bytes == self.arena.book.used_bytes <= self.arena.budget_bytes
        assert self.arena.overhead_bytes >= 0

    def teardown(self):
        if self.arena is not None:
            self.arena.close()


class CpuMoves(ArenaMoves):
    def make(self, shape):
        return make_arena("cpu", *shape)


class CudaMoves(ArenaMoves):
    def make(self, shape):
        self.cuda = FakeCuda()
        return CudaArena(shape, 0, CudaDriver(0, self.cuda), self.cuda.synchronize, self.cuda.view)

    def settle(self):
        """The driver's view of it: pages are never made anew, and what is mapped is what the books say."""
        book = self.arena.book
        assert self.cuda.allocated == book.budget_bytes
        assert sum(num_bytes for num_bytes, _ in self.cuda.mapped.values()) == book.used_bytes
        assert book.used_bytes % GRANULE == 0 and self.cuda.open == set(self.cuda.mapped)
        self.cuda.busy = True  # until somebody synchronizes

    def teardown(self):
        super().teardown()
        if self.arena is not None:
            self.cuda.assert_nothing_left()


TestCpuMoves, TestCudaMoves = CpuMoves.TestCase, CudaMoves.TestCase
TestCpuMoves.settings = TestCudaMoves.settings = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None)
