"""KV between instances of different TP: which heads go from which rank to which, and tokens cut out of cells.

A cell of an instance is a cell of the same number in each of its ranks, with that rank's heads. So a copy is planned
once in cells, and heads are re-laid out at its ends: a rank that receives gets exactly the heads that it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.instance import put_blocks
from common.engine.shard import kv_heads_of
from common.kernels.cache import gather_cells

Cells = NDArray[np.int32]  # [layers, blocks]


class HeadSlice(NamedTuple):
    """KV heads [low, high) of rank `source`, counted from its own first, for rank `dest`."""

    source: int
    dest: int
    low: int
    high: int

    @property
    def num(self) -> int:
        """How many."""
        return self.high - self.low


def plan(tp_from: int, tp_to: int, kv_heads: int) -> tuple[HeadSlice, ...]:
    """What goes where, by destination; the slices of one destination, laid side by side, are its heads in order.

    A head that several source ranks hold comes from one of them, a different one for each destination in turn."""
    copies = max(1, tp_from // kv_heads)  # source ranks that hold the same head
    slices = []
    for dest in range(tp_to):
        head, end = kv_heads_of(kv_heads, tp_to, dest)
        while head < end:
            source = head * tp_from // kv_heads + dest % copies
            low, high = kv_heads_of(kv_heads, tp_from, source)
            stop = min(end, high)
            slices.append(HeadSlice(source, dest, head - low, stop - low))
            head = stop
    return tuple(slices)


def cut_tokens(kv: Tensor, cells: Cells, tokens: tuple[int, int], first_block: int) -> Tensor:
    """[layers, 2, tokens, kv heads, head size]: exactly these tokens of cells `[layers, blocks]`, the first of which is
    block `first_block` of the request."""
    layers, blocks = cells.shape
    whole = gather_cells(kv, torch.from_numpy(cells.ravel().astype(np.int64)).to(kv.device))
    size = kv.shape[2]
    rows = whole.view(layers, blocks, *kv.shape[1:]).transpose(1, 2).reshape(layers, 2, blocks * size, *kv.shape[3:])
    start, end = (token - first_block * size for token in tokens)
    return rows[:, :, start:end].contiguous()


def put_tokens(came: Tensor, kv: Tensor, cells: Cells, tokens: tuple[int, int], first_block: int) -> None:
    """The other way round: what `cut_tokens` gave, into cells that hold the same tokens here."""
    layers, blocks = cells.shape
    size = kv.shape[2]
    rows = came.new_zeros(layers, 2, blocks * size, *kv.shape[3:])
    start, end = (token - first_block * size for token in tokens)
    rows[:, :, start:end] = came
    whole = rows.view(layers, 2, blocks, size, *kv.shape[3:]).transpose(1, 2).reshape(-1, *kv.shape[1:])
    numbers = np.arange(cells.size, dtype=np.int32).reshape(cells.shape)
    put_blocks(whole, numbers, kv, cells, tokens, first_block, size)
