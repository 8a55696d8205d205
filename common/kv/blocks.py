"""Ids of blocks and cells, for executors that own real memory. Policies count; executors number.

`BlockPool` is vLLM's kind of pool: one size, ids with refcounts. `CellRange` is the layout of DESIGN section 6: one
flat range of cells (K and V of one block of one layer), where a block is a run of cells over its span's layers.
Runs of several lengths live side by side, so dropping layers re-cuts memory without moving a byte.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import ContractError


class BlockPool:
    """Block ids 0 .. num_blocks with refcounts. Last freed, first reused; fresh ids come in ascending order."""

    __slots__ = ("_free", "_refs")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0, f"num_blocks {num_blocks}"
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks with at least one holder."""
        return len(self._refs) - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` will succeed."""
        return 0 <= num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """That many ids, each with one holder; or ContractError and no trace."""
        if not self.can_allocate(num_blocks):
            raise ContractError(f"allocate {num_blocks} blocks, but {len(self._free)} are free")
        first = len(self._free) - num_blocks
        ids = self._free[first:][::-1]
        del self._free[first:]
        for block in ids:
            assert self._refs[block] == 0, f"block {block} is free and held"
            self._refs[block] = 1
        return ids

    def share(self, ids: Sequence[int]) -> None:
        """One more holder for each of these held blocks."""
        for block in ids:
            self._check_held(block)
        for block in ids:
            self._refs[block] += 1

    def free(self, ids: Sequence[int]) -> list[int]:
        """One holder less for each; returns the ids that nobody holds any more. A double free changes nothing."""
        refs = self._refs
        emptied: list[int] = []
        for done, block in enumerate(ids):
            try:
                self._check_held(block)
            except ContractError:
                for undone in ids[:done]:
                    refs[undone] += 1
                raise
            refs[block] -= 1
            if not refs[block]:
                emptied.append(block)
        self._free.extend(reversed(emptied))
        return emptied

    def _check_held(self, block: int) -> None:
        if not 0 <= block < len(self._refs) or not self._refs[block]:
            raise ContractError(f"block {block} is held by nobody")

    def check(self) -> None:
        """Assert that each block is either free, once, or held."""
        assert sorted(self._free) == [block for block, num in enumerate(self._refs) if num == 0], "lost blocks"
        assert min(self._refs, default=0) >= 0, "a negative refcount"


class Move(NamedTuple):
    """Copy `num_cells` cells from `src` to `dst`; where they overlap, as memmove does."""

    src: int
    dst: int
    num_cells: int


class CellRange:
    """A flat range of cells, cut in held runs and gaps. Lowest gap first; gaps that touch are one gap."""

    __slots__ = ("_gap_cells", "_gaps", "_held", "held_cells", "num_cells")

    def __init__(self, num_cells: int) -> None:
        assert num_cells >= 0, f"num_cells {num_cells}"
        self.num_cells = num_cells
        self.held_cells = 0
        self._held: dict[int, int] = {}  # start: cells
        self._gaps: list[int] = [0] if num_cells else []  # starts, ascending
        self._gap_cells: dict[int, int] = {0: num_cells} if num_cells else {}

    # ------------------------------------------------------------ queries

    @property
    def free_cells(self) -> int:
        """Cells in gaps, however small."""
        return self.num_cells - self.held_cells

    def free_runs(self, run_cells: int) -> int:
        """How many runs of this length the gaps hold."""
        assert run_cells > 0, f"run_cells {run_cells}"
        return sum(self._gap_cells[start] // run_cells for start in self._gaps)

    def wasted_cells(self, run_cells: int) -> int:
        """Free cells that no run of this length can use: what does not divide, gap by gap."""
        return self.free_cells - self.free_runs(run_cells) * run_cells

    def can_allocate(self, run_cells: int, num_runs: int) -> bool:
        """Whether `allocate` will succeed."""
        return 0 <= num_runs <= self.free_runs(run_cells)

    def length(self, start: int) -> int:
        """Cells of the held run that starts there."""
        return self._held[start]

    def runs(self) -> list[tuple[int, int]]:
        """(start, cells) of the held runs, ascending."""
        return sorted(self._held.items())

    # ------------------------------------------------------------ runs

    def allocate(self, run_cells: int, num_runs: int) -> list[int]:
        """Starts of `num_runs` new runs, ascending; or ContractError and no trace."""
        if not self.can_allocate(run_cells, num_runs):
            raise ContractError(f"allocate {num_runs} runs of {run_cells} cells, but {self.free_runs(run_cells)} fit")
        starts: list[int] = []
        at = 0
        while len(starts) < num_runs:
            gap = self._gaps[at]
            cells = self._gap_cells[gap]
            taken = min(cells // run_cells, num_runs - len(starts)) * run_cells
            if taken:
                starts.extend(range(gap, gap + taken, run_cells))
                del self._gap_cells[gap]
                if taken < cells:
                    self._gaps[at] = gap + taken
                    self._gap_cells[gap + taken] = cells - taken
                else:
                    del self._gaps[at]
                    continue
            at += 1
        for start in starts:
            self._held[start] = run_cells
        self.held_cells += num_runs * run_cells
        return starts

    def free(self, starts: Sequence[int]) -> None:
        """Give held runs back. One that is not held, or named twice, raises and changes nothing."""
        if len(dict.fromkeys(starts)) < len(starts) or any(start not in self._held for start in starts):
            raise ContractError(f"free {list(starts)}: some are named twice or begin no held run")
        for start in starts:
            cells = self._held.pop(start)
            self.held_cells -= cells
            self._open(start, cells)

    def split(self, start: int, lengths: Sequence[int]) -> list[int]:
        """Re-cut a held run into held runs of these lengths (so that layers can be freed apart): their starts."""
        cells = self._held.get(start)
        if cells is None or sum(lengths) != cells or min(lengths, default=0) <= 0:
            raise ContractError(f"split run {start} of {cells} cells into {list(lengths)}")
        starts: list[int] = []
        for num in lengths:
            starts.append(start)
            self._held[start] = num
            start += num
        return starts

    def _open(self, start: int, cells: int) -> None:
        """A new gap, made one with its neighbours."""
        at = bisect_left(self._gaps, start)
        if at < len(self._gaps) and self._gaps[at] == start + cells:
            cells += self._gap_cells.pop(self._gaps.pop(at))
        before = self._gaps[at - 1] if at else -1
        if at and before + self._gap_cells[before] == start:
            self._gap_cells[before] += cells
            return
        assert at == 0 or before + self._gap_cells[before] < start, "a gap opens inside a gap"
        self._gaps.insert(at, start)
        self._gap_cells[start] = cells

    # ------------------------------------------------------------ the tail

    def grow(self, num_cells: int) -> None:
        """The range gets its tail longer, to `num_cells` (parameters were dropped)."""
        if num_cells < self.num_cells:
            raise ContractError(f"grow from {self.num_cells} to {num_cells} cells")
        added, start = num_cells - self.num_cells, self.num_cells
        self.num_cells = num_cells
        if added:
            self._open(start, added)

    def plan_shrink(self, num_cells: int) -> list[Move]:
        """The moves, in the order to make them, that free the tail from `num_cells` on. Changes nothing.

        Tail runs go to gaps below, longest first into the lowest gap that holds them, and no move touches a run
        that stays. If the gaps are too ragged, every run slides down in order instead. Raises only when too full.
        """
        if not 0 <= num_cells <= self.num_cells or self.held_cells > num_cells:
            raise ContractError(f"shrink to {num_cells} of {self.num_cells} cells, but {self.held_cells} are held")
        tail = [(cells, start) for start, cells in self.runs() if start + cells > num_cells]
        gaps = [(start, min(self._gap_cells[start], num_cells - start)) for start in self._gaps]
        gaps = gaps[: bisect_right(gaps, (num_cells, 0))]
        moves: list[Move] = []
        for cells, start in sorted(tail, key=lambda run: (-run[0], run[1])):
            at = next((k for k, (_, room) in enumerate(gaps) if room >= cells), None)
            if at is None:
                return self._slide()
            gap, room = gaps[at]
            moves.append(Move(start, gap, cells))
            gaps[at] = (gap + cells, room - cells)
        return moves

    def _slide(self) -> list[Move]:
        moves: list[Move] = []
        end = 0
        for start, cells in self.runs():
            assert start >= end, "held runs overlap"
            if start > end:
                moves.append(Move(start, end, cells))
            end += cells
        return moves

    def shrink(self, num_cells: int) -> list[Move]:
        """Cut the tail off; returns the moves that the caller must have made by then. See `plan_shrink`."""
        moves = self.plan_shrink(num_cells)
        for src, dst, cells in moves:
            del self._held[src]
            self._held[dst] = cells
        self.num_cells = num_cells
        self._gaps, self._gap_cells = [], {}
        end = 0
        for start, cells in [*self.runs(), (num_cells, 0)]:
            if start > end:
                self._gaps.append(end)
                self._gap_cells[end] = start - end
            end = start + cells
        assert self.held_cells + sum(self._gap_cells.values()) == num_cells, "cells were lost"
        return moves

    def check(self) -> None:
        """Assert that runs and gaps tile the range exactly and that no two gaps touch."""
        end, was_gap = 0, False
        parts = [(start, cells, False) for start, cells in self._held.items()]
        parts += [(start, cells, True) for start, cells in self._gap_cells.items()]
        for start, cells, is_gap in sorted(parts):
            assert start == end and cells > 0, f"cell {end} is in no run and no gap, or in two"
            assert not (was_gap and is_gap), f"two gaps touch at cell {start}"
            end, was_gap = start + cells, is_gap
        assert end == self.num_cells and self._gaps == sorted(self._gap_cells), "the range ends elsewhere"
        assert self.held_cells == sum(self._held.values()), "held cells are miscounted"
