"""What one iteration of a lane computes, and where it reads and writes KV: from placements to attention rows.

The executor says it in `Work`; `plan_band` turns it into rows of cells for one band of layers of one stage. A request
whose KV lies in several spans has a row in each; rows of one pass never share a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.cells import CellStore, RequestCells
from common.errors import ContractError
from common.kernels.plan import Rows
from common.types import Layers, Span, Tier


class Work(NamedTuple):
    """Tokens at positions [first, first + num) of a request. `spans` tile its KV from token 0 on, for every layer
    of the route; new KV goes where its position falls. `sample`: the last of them gives the next token."""

    request_id: int
    first: int
    num: int
    sample: bool
    spans: tuple[Span, ...]


class Piece(NamedTuple):
    """A span of one work's KV on one instance: keys [start, end)."""

    work: int
    start: int
    end: int


class Pass(NamedTuple):
    """Rows that may run together. `queries`: that of each output row; None: all queries, in order."""

    rows: Rows
    queries: NDArray[np.int64] | None


class Write(NamedTuple):
    """New KV for one instance. `tokens`: which (None: all); `slots`: `[n]` of the band's first layer (layer l
    adds l blocks), or `[L, n]`."""

    tokens: NDArray[np.int64] | None
    slots: NDArray[np.int64]


@dataclass(slots=True)
class PlacePlan:
    """What one instance does for a band of layers."""

    instance: int
    tier: Tier = Tier.HBM
    writes: list[Write] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """The works of one iteration, laid end to end: token t of work w is query `start[w] + t`."""

    works: tuple[Work, ...]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, works: Sequence[Work]) -> Batch:
        """Lay works end to end."""
        first = np.fromiter((work.first for work in works), np.int64, len(works))
        count = np.fromiter((work.num for work in works), np.int64, len(works))
        return cls(tuple(works), first, count, np.cumsum(count) - count)

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return int(self.count.sum())

    def positions(self) -> NDArray[np.int64]:
        """Position of each token in its request."""
        return np.repeat(self.first - self.start, self.count) + np.arange(self.num_tokens)

    def sampled_rows(self) -> NDArray[np.int64]:
        """Rows whose hidden state gives a next token."""
        sample = np.fromiter((work.sample for work in self.works), bool, len(self.works))
        rows: NDArray[np.int64] = (self.start + self.count - 1)[sample]
        return rows

    def bands(self, layers: Layers) -> list[Layers]:
        """A stage's layers, cut where any placement is cut."""
        inside = {border for work in self.works if len(work.spans) > 1 for span in work.spans for border in span.layers}
        borders = [layers[0], *sorted(border for border in inside if layers[0] < border < layers[1]), layers[1]]
        return list(pairwise(borders))


Stores = Callable[[int, Tier], CellStore]


def plan_band(batch: Batch, home: int, band: Layers, block_size: int, stores: Stores) -> list[PlacePlan]:
    """Who writes and attends what for a band of layers of a stage at `home`. The first plan is home's: its first
    pass covers every query, some perhaps with nothing to see."""
    at_home = home, Tier.HBM
    places: dict[tuple[int, Tier], list[list[Piece]]] = {at_home: [[]]}
    for index, work in enumerate(batch.works):
        end = work.first + work.num
        seen: dict[tuple[int, Tier], int] = {}
        for span in sorted(work.spans, key=lambda span: span.token_start) if len(work.spans) > 1 else work.spans:
            if not span.layers[0] <= band[0] < span.layers[1]:
                continue
            stop = end if span.token_end is None else min(span.token_end, end)
            if stop > span.token_start:
                place = span.instance, span.tier
                number = seen.get(place, 0)
                passes = places.setdefault(place, [])
                if number == len(passes):
                    passes.append([])
                passes[number].append(Piece(index, span.token_start, stop))
                seen[place] = number + 1
        if at_home not in seen:
            places[at_home][0].append(Piece(index, 0, 0))  # an empty row: all of its KV is elsewhere
    return [_place(batch, place, pieces, band, block_size, stores(*place)) for place, pieces in places.items()]


def _place(
    batch: Batch, place: tuple[int, Tier], passes: list[list[Piece]], band: Layers, block_size: int, store: CellStore
) -> PlacePlan:
    plan = PlacePlan(*place)
    for pieces in passes:
        work = np.array([piece.work for piece in pieces], np.int64)
        start = np.array([piece.start for piece in pieces], np.int64)
        end = np.array([piece.end for piece in pieces], np.int64)
        cells = [store.requests.get(batch.works[piece.work].request_id) for piece in pieces]
        tables = _tables(cells, start, end, band, block_size, batch, work)
        first, count = batch.first[work], batch.count[work]
        numbers = (batch.start[work], count, first, start, end - start)
        q_start, q_len, q_pos, kv_start, kv_len = (values.astype(np.int32) for values in numbers)
        whole = len(work) == len(batch.works)
        rows = Rows(q_start, q_len, q_pos, kv_start, kv_len, tables)
        plan.passes.append(Pass(rows, None if whole else _tokens(batch.start[work], count)))
        low = np.maximum(start, first)
        new = np.maximum(end - low, 0)
        if new.any():
            plan.writes.append(_write(batch, work, start, low, new, tables, block_size))
    return plan


def _tokens(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """start .. start + count of each, one after the other."""
    ends = np.cumsum(count)
    return np.repeat(start - (ends - count), count) + np.arange(int(ends[-1]) if len(ends) else 0)


def _write(
    batch: Batch, work: NDArray[np.int64], start: NDArray[np.int64], low: NDArray[np.int64], new: NDArray[np.int64],
    tables: NDArray[np.int32], block_size: int,
) -> Write:  # fmt: skip
    """Slots of the tokens at positions [low, low + new) of each piece."""
    position = _tokens(low - start, new)
    row = np.repeat(np.arange(len(work)), new)
    blocks, offset = np.divmod(position, block_size)
    slots = tables[..., row, blocks].astype(np.int64) * block_size + offset
    index = _tokens(batch.start[work] + low - batch.first[work], new)
    whole = len(index) == batch.num_tokens and bool((index == np.arange(len(index))).all())
    return Write(None if whole else index, slots)


def _tables(
    cells: Sequence[RequestCells | None], start: NDArray[np.int64], end: NDArray[np.int64], band: Layers,
    block_size: int, batch: Batch, work: NDArray[np.int64],
) -> NDArray[np.int32]:  # fmt: skip
    low, high = band
    first = (start // block_size).tolist()
    last = (-(-end // block_size)).tolist()
    width = max((b - a for a, b in zip(first, last)), default=0)
    uniform = all(own is None or b == a or own.uniform(low, high, b) for own, a, b in zip(cells, first, last))
    shape = (len(cells), max(width, 1)) if uniform else (high - low, len(cells), max(width, 1))
    tables = np.full(shape, -1, np.int32)
    parts = [_read(own, low, high, a, b) for own, a, b in zip(cells, first, last)]
    named = np.arange(shape[-1]) < np.array([part.shape[1] for part in parts])[:, None]
    flat = np.concatenate(parts, axis=1)
    if flat.size and flat.min() < 0:
        row = next(row for row, part in enumerate(parts) if part.size and part.min() < 0)
        request = batch.works[int(work[row])].request_id
        raise ContractError(f"request {request}: KV of tokens {start[row]} .. {end[row]}, layers {band} is read "
                            "where no cell holds it")  # fmt: skip
    tables[..., named] = flat[0] if uniform else flat
    return tables


def _read(own: RequestCells | None, low: int, high: int, first: int, last: int) -> NDArray[np.int32]:
    """`[layers, blocks]` of a request's cells; -1 where it has none."""
    part = np.empty((high - low, 0), np.int32) if own is None else own.table[low:high, first:last]
    if part.shape[1] == last - first:
        return part
    return np.concatenate([part, np.full((high - low, last - first - part.shape[1]), -1, np.int32)], axis=1)


@overload
def to_device(array: NDArray[np.int64], device: torch.device) -> torch.Tensor: ...
@overload
def to_device(array: None, device: torch.device) -> None: ...
def to_device(array: NDArray[np.int64] | None, device: torch.device) -> torch.Tensor | None:
    """An index for a tensor there."""
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
