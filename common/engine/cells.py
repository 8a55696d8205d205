"""Which cells hold a request's blocks: ids of one tier of one instance, owned here and nowhere else.

The books of an executor say what a request holds (`claim`); this turns counts into ids. A block is a run of cells over
its layers where a run can be had, else scattered cells. Freed runs are re-cut without moving anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.engine.named import Cells, Named, NamedBlocks
from common.errors import ContractError
from common.kv.blocks import CellRange

Mask = NDArray[np.bool_]
Poison = Callable[[NDArray[np.int64]], None]


class RequestCells:
    """`table[l, b]`: the cell that layer l of block b is read from, -1 if nowhere. `run[l, b]`: the start of the held
    run that it belongs to, -1 where the request reads a named block that is not its own."""

    __slots__ = ("_checked", "lease", "run", "table", "version")

    def __init__(self, num_layers: int) -> None:
        self.table: Cells = np.full((num_layers, 0), -1, np.int32)
        self.run: Cells = np.full((num_layers, 0), -1, np.int32)
        self.lease: list[bytes] = []  # named blocks that this request pins
        self.version = 0  # how often blocks that were there have moved or gone
        self._checked: dict[tuple[int, int], int] = {}

    def reach(self, num_blocks: int) -> None:
        """Make room for that many blocks."""
        have = self.table.shape[1]
        if num_blocks > have:
            more = np.full((len(self.table), max(num_blocks, 2 * have) - have), -1, np.int32)
            self.table = np.concatenate([self.table, more], axis=1)
            self.run = np.concatenate([self.run, more], axis=1)

    def changed(self) -> None:
        """Blocks that were there before have moved or gone."""
        self.version += 1
        self._checked.clear()

    def uniform(self, low: int, high: int, num_blocks: int) -> bool:
        """Does layer l of each of these blocks lie at its first layer's cell + l? Checked once per block."""
        done = self._checked.get((low, high), 0)
        if done < num_blocks:
            part = self.table[low:high, done:num_blocks]
            if not np.array_equal(part, part[0] + np.arange(high - low, dtype=np.int32)[:, None]):
                return False
            self._checked[low, high] = num_blocks
        return True


class CellStore:
    """Ids of one tier. `poison`, if given, is told of cells that were freed or are newly handed out."""

    def __init__(self, num_cells: int, num_layers: int, poison: Poison | None = None) -> None:
        self.range = CellRange(num_cells)
        self.num_layers = num_layers
        self.requests: dict[int, RequestCells] = {}
        self.named = NamedBlocks()
        self.poison = poison

    @property
    def used(self) -> int:
        """Cells that somebody holds."""
        return self.range.held_cells

    def of(self, request_id: int) -> RequestCells:
        """A request's cells here, made at its first use."""
        cells = self.requests.get(request_id)
        if cells is None:
            cells = self.requests[request_id] = RequestCells(self.num_layers)
        return cells

    # ------------------------------------------------------------ claims

    def claim(self, request_id: int, wanted: Mask, reads: bool = False) -> None:
        """Hold exactly `wanted[l, b]` for a request: free what is too much, then allocate what is missing. One that
        holds nothing is forgotten, unless it `reads` named blocks."""
        cells = self.of(request_id)
        cells.reach(wanted.shape[1])
        width = cells.run.shape[1]
        if wanted.shape[1] < width:
            full = np.zeros((self.num_layers, width), bool)
            full[:, : wanted.shape[1]] = wanted
            wanted = full
        own = cells.run >= 0
        surplus = own & ~wanted
        if surplus.any():
            self._free(cells, surplus)
        missing = wanted & ~own
        if missing.any():
            self._allocate(request_id, cells, missing)
        if not wanted.any() and not reads:
            self.drop(request_id)

    def drop(self, request_id: int) -> None:
        """A request is nowhere here any more: end its pins."""
        cells = self.requests.pop(request_id, None)
        if cells is not None:
            assert not (cells.run >= 0).any(), "a request is forgotten with cells of its own"
            self.named.release(cells.lease)

    def append(self, request_id: int, low: int, high: int, block: int) -> None:
        """One more block for layers [low, high), if it is not there (a decoding request grows)."""
        cells = self.of(request_id)
        cells.reach(block + 1)
        if cells.run[low, block] < 0 or (cells.run[low:high, block] < 0).any():
            self._fill(request_id, cells, low, high, np.array([block]))

    def _allocate(self, request_id: int, cells: RequestCells, missing: Mask) -> None:
        columns = np.flatnonzero(missing.any(axis=0))
        patterns: dict[bytes, list[int]] = {}
        for column in columns.tolist():
            patterns.setdefault(missing[:, column].tobytes(), []).append(column)
        for members in patterns.values():
            edges = np.flatnonzero(np.diff(np.concatenate([[0], missing[:, members[0]].astype(np.int8), [0]])))
            for low, high in zip(edges[::2].tolist(), edges[1::2].tolist()):
                self._fill(request_id, cells, low, high, np.array(members))

    def _fill(self, request_id: int, cells: RequestCells, low: int, high: int, columns: NDArray[np.int64]) -> None:
        """Runs where they can be had, halves of them where not."""
        length, num = high - low, len(columns)
        if length * num > self.range.free_cells:
            raise ContractError(
                f"request {request_id} needs {length * num} cells but {self.range.free_cells} of "
                f"{self.range.num_cells} are free: the ledger overbooked"
            )
        whole = min(self.range.free_runs(length), num)
        if whole:
            starts = np.array(self.range.allocate(length, whole), np.int32)
            new = starts + np.arange(length, dtype=np.int32)[:, None]
            cells.table[low:high, columns[:whole]] = new
            cells.run[low:high, columns[:whole]] = starts
            if self.poison is not None:
                self.poison(new.ravel().astype(np.int64))
        if whole < num:
            middle = (low + high) // 2
            self._fill(request_id, cells, low, middle, columns[whole:])
            self._fill(request_id, cells, middle, high, columns[whole:])

    def _free(self, cells: RequestCells, surplus: Mask) -> None:
        gone = cells.table[surplus].astype(np.int64)
        starts, counts = np.unique(cells.run[surplus], return_counts=True)
        whole = [start for start, num in zip(starts.tolist(), counts.tolist()) if self.range.length(start) == num]
        self.range.free(whole)
        for start in sorted(set(starts.tolist()) - set(whole)):
            self._free_part(cells, surplus, start)
        cells.table[surplus] = -1
        cells.run[surplus] = -1
        cells.changed()
        if self.poison is not None:
            self.poison(gone)

    def _free_part(self, cells: RequestCells, surplus: Mask, start: int) -> None:
        """Some layers of a run go: re-cut it in parts that stay and parts that go."""
        layers, columns = np.nonzero(cells.run == start)
        assert len(set(columns.tolist())) == 1, "a run lies over two blocks"
        column = columns[0]
        order = np.argsort(cells.table[layers, column])
        layers = layers[order]
        goes = surplus[layers, column]
        cuts = np.flatnonzero(np.diff(goes.astype(np.int8))) + 1
        parts = np.split(layers, cuts)
        new = self.range.split(start, [len(part) for part in parts])
        for part, first in zip(parts, new):
            cells.run[part, column] = first
            if surplus[part[0], column]:
                self.range.free([first])

    # ------------------------------------------------------------ names

    def name(self, request_id: int, block: int, digest: bytes, owned: bool) -> None:
        """Store a request's own block under a name. `owned`: the request still pays for it and may go on using it."""
        cells = self.requests[request_id]
        run = cells.run[:, block].copy()
        self.named.store(digest, Named(np.where(run >= 0, cells.table[:, block], -1), run, None))
        if owned:
            self.named.blocks[digest].owner = request_id
        else:
            cells.run[:, block] = -1

    def disown(self, request_id: int, block: int, digest: bytes) -> None:
        """The cache takes over a named block that its request paid for so far."""
        named = self.named.blocks[digest]
        assert named.owner == request_id, "a block is handed to the cache by somebody else"
        named.owner = None
        self.requests[request_id].run[:, block] = -1

    def read(self, request_id: int, block: int, digest: bytes) -> None:
        """A request reads a named block from now on (its pin is the caller's)."""
        cells = self.of(request_id)
        cells.reach(block + 1)
        cells.table[:, block] = self.named.blocks[digest].cells
        cells.changed()

    def evict(self, num_blocks: int) -> None:
        """Free cached blocks in the order of eviction."""
        for named in self.named.oldest(num_blocks):
            self.free_named(named)

    def free_named(self, named: Named) -> None:
        """Free the cells of a block that has no name any more."""
        assert named.owner is None, "a cached block is freed while a request owns it"
        own = named.run >= 0
        self.range.free(np.unique(named.run[own]).tolist())
        if self.poison is not None:
            self.poison(named.cells[own].astype(np.int64))

    def adopt(self, digest: bytes, like: Named) -> Named:
        """Cells for a cached block that comes from another tier: those layers, under that name."""
        scratch = RequestCells(self.num_layers)
        scratch.reach(1)
        self._allocate(-1, scratch, (like.run >= 0)[:, None])
        named = Named(scratch.table[:, 0].copy(), scratch.run[:, 0].copy(), None)
        self.named.store(digest, named)
        return named

    # ------------------------------------------------------------ the range

    def grow(self, num_cells: int) -> None:
        """The range has got a longer tail."""
        before = self.range.num_cells
        self.range.grow(num_cells)
        if self.poison is not None:
            self.poison(np.arange(before, num_cells))

    def shrink(self, num_cells: int) -> list[tuple[int, int, int]]:
        """Compact; every table follows. Returns moves (from, to, cells) that the caller makes in this order."""
        size = self.range.num_cells
        moves = [(move.src, move.dst, move.num_cells) for move in self.range.shrink(num_cells)]
        if moves:
            place = np.arange(size, dtype=np.int32)
            for src, dst, num in moves:
                place[src : src + num] = np.arange(dst, dst + num, dtype=np.int32)
            for cells in self.requests.values():
                for array in (cells.table, cells.run):
                    array[array >= 0] = place[array[array >= 0]]
                cells.changed()
            for named in self.named:
                for array in (named.cells, named.run):
                    array[array >= 0] = place[array[array >= 0]]
        return moves

    def clear(self) -> None:
        """Everything is gone (the instance died)."""
        self.requests.clear()
        self.named.clear()
        self.range = CellRange(self.range.num_cells)

    def check(self) -> None:
        """Assert that every held cell has exactly one owner, and that readers read held cells."""
        self.range.check()
        owned = [cells.table[cells.run >= 0] for cells in self.requests.values()]
        owned += [named.cells[named.run >= 0] for named in self.named if named.owner is None]
        flat = np.concatenate(owned) if owned else np.empty(0, np.int32)
        assert len(np.unique(flat)) == len(flat) == self.used, "a cell has two owners, or none"
