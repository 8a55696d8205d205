"""Rows: what one iteration's attention is about, and what every backend derives from them on the host.

A row is one request's queries against one span of its KV that lives on this instance. Query i of a row sees the
keys at positions `kv_start .. min(kv_start + kv_len, q_pos + i + 1)`: a span before the queries is seen whole, one
that holds the queries' own keys is seen causally, one behind them not at all. The partial results of several spans
are combined by `merge` (KunServe and Infinite-LLM both rest on this; the algebra is flash-decoding's).

Dimension letters: T tokens of a batch, N queries of all rows, R rows, H query heads, G KV heads, D head size,
B block size, C cells, L layers of the band, W blocks in a table row, S keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ContractError

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Host arrays (int32), one entry per (request, span on this instance)."""

    q_start: Ints
    """[R] first query of the row in q_THD."""
    q_len: Ints
    """[R] queries."""
    q_pos: Ints
    """[R] position of the first query in its request."""
    kv_start: Ints
    """[R] position of the first key in the row's table (a block border)."""
    kv_len: Ints
    """[R] keys that the table holds (0: empty span)."""
    tables: Ints
    """[R, W] cells of the band's first layer (layer l adds l), or [L, R, W] cells of each layer.
    Entries past the last key's block are never read."""


class Backend(Protocol):
    """One implementation of attention. `plan` runs on the host once an iteration, `run` once a layer."""

    name: str
    reason: str

    def plan(self, rows: Rows, device: torch.device | str) -> Any:
        """Check the rows and put on `device` what every layer needs (ContractError on impossible rows)."""
        ...

    def run(
        self, plan: Any, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o_NHD in the queries' type, lse_NH in fp32, fp64 for fp64), N queries in row order; lse natural log.

        `layer` counts within the band of the tables. A query that sees no key gets o = 0 and lse = -inf.
        """
        ...


class Sight(NamedTuple):
    """What follows from the rows alone: where each row's output goes and which keys its queries see."""

    out_start: Longs
    """[R] first query of the row in o_NHD."""
    first: Longs
    """[R] keys that the row's first query would see of an endless span; negative before the span."""
    seen: Longs
    """[R] keys that the row's last query sees, so the keys that the row reads at all."""
    num_queries: int
    """N, of all rows."""


def look(rows: Rows) -> Sight:
    """Which keys the queries of each row see."""
    q_len = rows.q_len.astype(np.int64)
    first = rows.q_pos.astype(np.int64) + 1 - rows.kv_start
    seen = np.clip(np.minimum(rows.kv_len, first + q_len - 1), 0, None)
    ends = np.cumsum(q_len)
    return Sight(ends - q_len, first, np.where(q_len > 0, seen, 0), int(ends[-1]) if len(ends) else 0)


def check_rows(rows: Rows, block_size: int) -> Sight:
    """Refuse rows that no tensor could serve (ContractError names the first bad row); return what they see."""
    num_rows = len(rows.q_start)
    _check_shapes(rows, num_rows)
    sight = look(rows)
    num_blocks = -(-sight.seen // block_size)
    read = np.arange(rows.tables.shape[-1]) < num_blocks[:, None]
    bad_cell = ((rows.tables < 0) & read).any(axis=-1)
    problems = (
        (np.minimum.reduce([rows.q_start, rows.q_len, rows.q_pos, rows.kv_start, rows.kv_len]) < 0, "is negative"),
        (rows.kv_start % block_size != 0, f"starts its keys inside a block of {block_size}"),
        (-(-rows.kv_len.astype(np.int64) // block_size) > rows.tables.shape[-1], "has more keys than its table"),
        (bad_cell.any(axis=0) if bad_cell.ndim == 2 else bad_cell, "has no cell for a key that it sees"),
    )
    for bad, what in problems:
        if bad.any():
            raise ContractError(f"attention row {int(np.argmax(bad))} {what}")
    return sight


def check_tensors(q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, block_size: int) -> None:
    """Refuse tensors whose shapes do not belong together (ContractError)."""
    if kv_C2BGD.ndim != 5 or kv_C2BGD.shape[1] != 2 or kv_C2BGD.shape[2] != block_size:
        raise ContractError(f"KV must be [cells, 2, {block_size}, kv heads, head size], not {tuple(kv_C2BGD.shape)}")
    if q_THD.ndim != 3 or q_THD.shape[1] % kv_C2BGD.shape[3] or q_THD.shape[2] != kv_C2BGD.shape[4]:
        raise ContractError(f"queries {tuple(q_THD.shape)} do not fit KV {tuple(kv_C2BGD.shape)}")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and log-sum-exp are kept in fp32; in fp64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shapes(rows: Rows, num_rows: int) -> None:
    if any(field.shape != (num_rows,) for field in rows[:5]):
        raise ContractError(f"attention rows of unequal lengths: {[field.shape for field in rows[:5]]}")
    if rows.tables.ndim not in (2, 3) or rows.tables.shape[-2] != num_rows:
        raise ContractError(f"tables must be [R, W] or [L, R, W] with R = {num_rows}, not {rows.tables.shape}")
    for name, field in zip(Rows._fields, rows):
        if field.dtype != np.int32:
            raise ContractError(f"attention rows: {name} must be int32, not {field.dtype}")
