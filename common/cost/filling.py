"""From measured rows to full lattices: merging versions, laying out, and filling holes of time / roofline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.cost.grids import Array
from common.cost.table import Table

OUTLIER = 1.5  # versions that disagree by more than this: one of them was disturbed


def lattice(table: Table, axes: Sequence[Array]) -> Array:
    """Times on the full lattice of `axes` (in the order of the table's columns), NaN where not measured."""
    out = np.full([len(axis) for axis in axes], np.nan)
    where = tuple(np.searchsorted(axis, table.keys[:, i]) for i, axis in enumerate(axes))
    out[where] = table.time_ns
    return out


def fill(values: Array, axes: Sequence[Array], axes_used: Sequence[int] | None = None, diagonal: bool = False) -> Array:
    """Fill holes of log-ratios: mean of the interpolations along each axis, then the nearest value along an axis."""
    out = values.copy()
    used = range(len(axes)) if axes_used is None else axes_used
    for _ in range(4):
        if not np.isnan(out).any():
            break
        guesses = np.stack([_along(out, i, axes[i]) for i in used] + ([_diagonal(out)] if diagonal else []))
        known = ~np.isnan(guesses)
        count = known.sum(axis=0)
        mean = np.where(count > 0, np.where(known, guesses, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
        out = np.where(np.isnan(out), mean, out)
    for i in range(out.ndim - 1, -1, -1):
        out = _edge(out, i)
    return out


def _diagonal(values: Array) -> Array:
    """Mean of the two neighbours with the same product of coordinates, on a lattice of doublings."""
    wide = np.pad(values, 1, constant_values=np.nan)
    return (wide[2:, :-2] + wide[:-2, 2:]) / 2


def _along(values: Array, axis: int, knots: Array) -> Array:
    """Linear interpolation between the nearest known neighbours along one axis; NaN outside them."""
    moved = np.moveaxis(values, axis, -1)
    flat = moved.reshape(-1, moved.shape[-1])
    out = np.full_like(flat, np.nan)
    x = np.log(np.maximum(knots, 1.0))
    for row, filled in zip(flat, out):
        known = ~np.isnan(row)
        if known.sum() >= 2 and not known.all():
            filled[:] = np.interp(x, x[known], row[known], left=np.nan, right=np.nan)
    return np.moveaxis(out.reshape(moved.shape), -1, axis)


def _edge(values: Array, axis: int) -> Array:
    """Continue the last known value outward along one axis."""
    moved = np.moveaxis(values, axis, -1).copy()
    for i in range(1, moved.shape[-1]):
        moved[..., i] = np.where(np.isnan(moved[..., i]), moved[..., i - 1], moved[..., i])
    for i in range(moved.shape[-1] - 2, -1, -1):
        moved[..., i] = np.where(np.isnan(moved[..., i]), moved[..., i + 1], moved[..., i])
    return np.moveaxis(moved, -1, axis)


def fill_times(times: Array, roof: Array, axes: Sequence[Array], diagonal: bool = False) -> Array:
    """Fill holes of times by their ratio to the roofline plus the launch floor."""
    ideal = roof + np.nanmin(times)
    return np.exp(fill(np.log(times / ideal), axes, diagonal=diagonal)) * ideal


def concat(tables: Sequence[Table]) -> Table | None:
    """Rows of several tables with the same columns. A shape measured more than once (versions of an engine) takes
    the geometric mean, or the fastest where they disagree by more than `OUTLIER`: disturbances only slow things."""
    if not tables:
        return None
    keys = np.concatenate([t.keys for t in tables])
    logs = np.log(np.concatenate([t.time_ns for t in tables]))
    unique, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.reshape(-1)
    low, high, total = np.full(len(unique), np.inf), np.full(len(unique), -np.inf), np.zeros(len(unique))
    np.minimum.at(low, which, logs)
    np.maximum.at(high, which, logs)
    np.add.at(total, which, logs)
    mean = total / np.bincount(which)
    times = np.exp(np.where(high - low > np.log(OUTLIER), low, mean))
    return Table(tables[-1].family, tables[-1].columns, unique, times)


def fastest(tables: Sequence[Table]) -> Table:
    """Rows of several kernels for one operation: an engine picks the fastest at each shape."""
    keys = np.concatenate([t.keys for t in tables])
    times = np.concatenate([t.time_ns for t in tables])
    order = np.argsort(times, kind="stable")
    unique, first = np.unique(keys[order], axis=0, return_index=True)
    return Table(tables[-1].family, tables[-1].columns, unique, times[order][first])


def axis_of(table: Table, name: str) -> Array:
    """Sorted distinct values of one column."""
    return np.unique(table.column(name)).astype(np.float64)
