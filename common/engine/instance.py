"""One engine instance: parameter slabs and KV cells in an arena of its own, host cells beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.arena import Arena, Remap, make_arena
from common.engine.cells import CellStore
from common.engine.host import make_host_pool
from common.engine.layout import LayerLayout, LayerWeights
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource
from common.errors import ConfigError
from common.kernels.cache import copy_cells
from common.types import InstanceInfo, Layers, Tier

Moves = list[tuple[int, int, int]]  # (from, to, cells)


@dataclass(slots=True)
class RemapLog:
    """What remapping really did: bytes and pages that changed hands, and how long the system calls took."""

    drops: list[Remap] = field(default_factory=list)
    restores: list[Remap] = field(default_factory=list)
    compacted_cells: int = 0


def cell_shape(spec: DecoderSpec, block_size: int) -> tuple[int, int, int, int]:
    """[2, block, kv heads, head size]: K and V of one block of one layer."""
    return (2, block_size, spec.num_kv_heads, spec.head_dim)


def cell_bytes(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one cell."""
    return math.prod(cell_shape(spec, block_size)) * dtype.itemsize


class InstanceBytes:
    """Parameter slabs and cells by number. Which cell is whose is told elsewhere."""

    def __init__(
        self,
        info: InstanceInfo,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        source: ParameterSource,
        poison: bool = False,
    ) -> None:
        self.info = info
        self.layout = LayerLayout(spec, dtype)
        if self.layout.num_bytes > info.layer_param_bytes:
            raise ConfigError(
                f"model {spec.name}: a layer takes {self.layout.num_bytes:,} bytes in {dtype}, the cluster counts "
                f"{info.layer_param_bytes:,}"
            )
        self.dtype = dtype
        self._shape = cell_shape(spec, block_size)
        assert cell_bytes(spec, block_size, dtype) == info.cell_bytes, "cells of another size than the cluster's"
        self.source = source
        self.poisoned = poison
        self.arena: Arena = make_arena(
            device, info.num_layers, info.layer_param_bytes, info.kv_cells * info.cell_bytes, info.cell_bytes
        )
        self._weights: dict[int, LayerWeights] = {}
        for index in range(info.num_layers):
            source.layer_into(index, self.arena.layer(index)[: self.layout.num_bytes])
        self.host = make_host_pool(device, self._shape, dtype, info.host_cells * info.cell_bytes)
        self.kv = self._view()
        if poison:
            self.kv.fill_(math.nan)

    def _view(self) -> Tensor:
        cells = self.arena.num_cells
        return self.arena.kv[: cells * self.info.cell_bytes].view(self.dtype).view(cells, *self._shape)

    # ------------------------------------------------------------ parameters

    def layer(self, index: int) -> LayerWeights:
        """A resident layer's tensors, views of its slab. ContractError if it is not resident."""
        weights = self._weights.get(index)
        if weights is None:
            weights = self._weights[index] = self.layout.views(self.arena.layer(index)[: self.layout.num_bytes])
        return weights

    def drop_pages(self, layers: Layers) -> tuple[Remap, int]:
        """These layers' pages become the tail of the KV range, which has so many cells then."""
        for index in range(*layers):
            self._weights.pop(index, None)
        remap = self.arena.drop(layers)
        self.kv = self._view()
        return remap, self.arena.num_cells

    def widen(self, num_cells: int) -> None:
        """Let the KV range have back what an earlier `compact` gave up."""
        self.arena.widen(num_cells * self.info.cell_bytes)
        self.kv = self._view()

    def compact(self, num_cells: int, moves: Moves, free: NDArray[np.int64]) -> None:
        """Make these moves in this order and keep the first `num_cells`, of which `free` are nobody's."""
        for src, dst, num in moves:
            self.kv[dst : dst + num] = self.kv[src : src + num].clone()  # they may overlap
        self.arena.shrink(num_cells * self.info.cell_bytes)
        self.kv = self._view()
        if self.poisoned:
            self.poison(Tier.HBM, free)

    def restore(self, index: int) -> tuple[Remap, Tensor]:
        """Pages for a layer that was dropped, and its slab, whose contents are undefined."""
        return self.arena.restore((index, index + 1)), self.slab(index)

    def slab(self, index: int) -> Tensor:
        """Bytes of a resident layer."""
        return self.arena.layer(index)[: self.layout.num_bytes]

    # ------------------------------------------------------------ cells

    def cells(self, tier: Tier, highest: int = -1) -> Tensor:
        """The cells of a tier; in DRAM with room up to `highest`."""
        if tier is Tier.HBM:
            return self.kv
        self.host.ensure(highest + 1)
        return self.host.tensor

    def move_cells(self, source: Tier, cells: NDArray[np.int64], goal: Tier, others: NDArray[np.int64]) -> None:
        """Copy whole cells from tier to tier."""
        here, there = self.cells(source, int(cells.max())), self.cells(goal, int(others.max()))
        copy_cells(here, torch.from_numpy(cells), there, torch.from_numpy(others))

    def poison(self, tier: Tier, cells: NDArray[np.int64]) -> None:
        """Nobody may read these before they are written."""
        if len(cells):
            self.cells(tier, int(cells.max()))[torch.from_numpy(cells)] = math.nan

    def close(self) -> None:
        """Give everything back (it was stopped, or lost)."""
        self._weights.clear()
        self.kv = torch.empty((0, *self._shape), dtype=self.dtype)
        self.arena.close()
        self.host.close()


class InstanceBooks:
    """Whose each cell is, and what follows from changes of that for the bytes, wherever they are."""

    info: InstanceInfo
    poisoned: bool

    def open_books(self) -> None:
        """All cells free."""
        self.remaps = RemapLog()
        poison = self.poison if self.poisoned else None
        sizes = {Tier.HBM: self.info.kv_cells, Tier.DRAM: self.info.host_cells}
        self.stores = {
            tier: CellStore(num, self.info.num_layers, partial(poison, tier) if poison is not None else None)
            for tier, num in sizes.items()
        }

    def poison(self, tier: Tier, cells: NDArray[np.int64]) -> None:
        """As `InstanceBytes`, like the next four."""
        raise NotImplementedError

    def drop_pages(self, layers: Layers) -> tuple[Remap, int]:
        raise NotImplementedError

    def widen(self, num_cells: int) -> None:
        raise NotImplementedError

    def compact(self, num_cells: int, moves: Moves, free: NDArray[np.int64]) -> None:
        raise NotImplementedError

    def move_cells(self, source: Tier, cells: NDArray[np.int64], goal: Tier, others: NDArray[np.int64]) -> None:
        raise NotImplementedError

    def drop(self, layers: Layers) -> Remap:
        """These layers' pages become the tail of the KV range."""
        remap, num_cells = self.drop_pages(layers)
        self.remaps.drops.append(remap)
        self.stores[Tier.HBM].grow(num_cells)
        return remap

    def resize(self, num_cells: int) -> None:
        """Compact the KV range to `num_cells`, or let it have back what an earlier call gave up."""
        store = self.stores[Tier.HBM]
        if num_cells > store.range.num_cells:
            self.widen(num_cells)
            store.grow(num_cells)
            return
        moves = store.shrink(num_cells)
        self.remaps.compacted_cells += sum(num for _, _, num in moves)
        free = np.ones(num_cells, bool)
        for start, num in store.range.runs():
            free[start : start + num] = False
        self.compact(num_cells, moves, np.flatnonzero(free))

    def move_named(self, digests: list[bytes], source: Tier, goal: Tier) -> None:
        """Cached blocks that nobody reads change their tier; they are the last to be evicted there, tails first."""
        for digest in digests:
            named = self.stores[source].named.remove(digest)
            moved = self.stores[goal].adopt(digest, named)
            layers = named.run >= 0
            self.move_cells(source, named.cells[layers].astype(np.int64), goal, moved.cells[layers].astype(np.int64))
            self.stores[source].free_named(named)
        self.stores[goal].named.acquire(digests)
        self.stores[goal].named.release(digests)


class EngineInstance(InstanceBytes, InstanceBooks):
    """Owns the bytes, and `stores` which say whose they are; what may be done when is the executor's business."""

    def __init__(
        self, info: InstanceInfo, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, block_size: int,
        source: ParameterSource, poison: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(info, spec, dtype, device, block_size, source, poison)
        self.open_books()

    def load(self, layers: list[int], peer: EngineInstance | None) -> None:
        """Bring layers back, from a peer's slabs or from the parameter source."""
        for index in layers:
            remap, slab = self.restore(index)
            self.remaps.restores.append(remap)
            if peer is not None:
                slab.copy_(peer.slab(index))
            else:
                self.source.layer_into(index, slab)


def move_blocks(
    src: EngineInstance, src_tier: Tier, src_cells: NDArray[np.int32],
    dst: EngineInstance, dst_tier: Tier, dst_cells: NDArray[np.int32],
    tokens: tuple[int, int], first_block: int, block_size: int,
) -> None:  # fmt: skip
    """`put_blocks` between instances and tiers of this process."""
    source, goal = src.cells(src_tier, int(src_cells.max())), dst.cells(dst_tier, int(dst_cells.max()))
    put_blocks(source, src_cells, goal, dst_cells, tokens, first_block, block_size)


def put_blocks(
    source: Tensor, src_cells: NDArray[np.int32], goal: Tensor, dst_cells: NDArray[np.int32],
    tokens: tuple[int, int], first_block: int, block_size: int,
) -> None:  # fmt: skip
    """Copy tokens [start, end) of cells `[layers, blocks]`, the first of which is block `first_block` of the request.

    Whole blocks go in one gather; of the first and last block only the tokens named, as others may own the rest.
    """
    start, end = tokens
    low, high = -(-start // block_size) - first_block, end // block_size - first_block
    if low < high:
        ids = (torch.from_numpy(part[:, low:high].ravel().astype(np.int64)) for part in (src_cells, dst_cells))
        copy_cells(source, next(ids), goal, next(ids))
    for block in sorted({start // block_size, (end - 1) // block_size}):
        if low <= block - first_block < high:
            continue
        inside = slice(max(start - block * block_size, 0), min(end - block * block_size, block_size))
        for layer in range(len(src_cells)):
            at, to = int(src_cells[layer, block - first_block]), int(dst_cells[layer, block - first_block])
            goal[to, :, inside] = source[at, :, inside].to(goal.device)
