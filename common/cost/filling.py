"""From measured rows to full lattices: merging versions, laying out, and filling holes of time / roofline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.cost.grids import Array
from common.cost.table import Table

OUTLIER = 1.5  # versions that disagree by more than this: one of them was disturbed
ENOUGH = 10  # known points from which a group of a blend has weights of its own
EXACT = 1e-3  # errors below this do not count


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


def between(values: Array, axis: int, knots: Array) -> Array:
    """What the nearest known neighbours along one axis say of every point, known or not; NaN at the ends."""
    moved = np.moveaxis(values, axis, -1)
    flat = moved.reshape(-1, moved.shape[-1])
    out = np.full_like(flat, np.nan)
    x = np.log(np.maximum(knots, 1.0))
    index = np.arange(len(x))
    for row, said in zip(flat, out):
        known = np.flatnonzero(~np.isnan(row))
        if len(known) < 2:
            continue
        first, last = np.searchsorted(known, index, side="left"), np.searchsorted(known, index, side="right")
        inner = (first > 0) & (last < len(known))
        low, high = known[first[inner] - 1], known[last[inner]]
        share = (x[inner] - x[low]) / (x[high] - x[low])
        said[inner] = row[low] + share * (row[high] - row[low])
    return np.moveaxis(out.reshape(moved.shape), -1, axis)


def blend(values: Array, guesses: Sequence[Array], group: Array) -> Array:
    """Fill holes with the mean of `guesses`, each weighted by how well it says the known points of the same group:
    inverse square of the third quartile of its errors there (of all its errors where the group has few)."""
    total, mass = np.zeros_like(values), np.zeros_like(values)
    for guess in guesses:
        error = np.abs(guess - values)
        said = ~np.isnan(error)
        if not said.any():
            continue
        scale = np.full_like(values, np.percentile(error[said], 75))
        for name in np.unique(group):
            here = said & (group == name)
            if here.sum() >= ENOUGH:
                scale[group == name] = np.percentile(error[here], 75)
        weight = np.where(np.isnan(guess), 0.0, np.maximum(scale, EXACT) ** -2.0)
        total += weight * np.nan_to_num(guess)
        mass += weight
    mean = np.divide(total, mass, out=np.full_like(values, np.nan), where=mass > 0)
    return np.where(np.isnan(values), mean, values)


def same_blocks(values: Array, axes: Sequence[Array], factor: float) -> Array:
    """Of a lattice over (batch, length, heads, KV heads): the point with `factor` times the batch and as many times
    fewer heads of both kinds, which launches the same thread blocks."""
    out = np.full_like(values, np.nan)
    found = [_positions(axes[0], factor), None, _positions(axes[2], 1 / factor), _positions(axes[3], 1 / factor)]
    to = [np.arange(len(axes[1])) if f is None else f[0] for f in found]
    of = [np.arange(len(axes[1])) if f is None else f[1] for f in found]
    out[np.ix_(*to)] = values[np.ix_(*of)]
    return out


def _positions(axis: Array, factor: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of the knots whose multiple by `factor` is a knot too, and of that multiple."""
    to, of = np.nonzero(axis[:, None] * factor == axis[None, :])
    return to, of


def pool_heads(times: Array, roof: Array, axes: Sequence[Array]) -> Array:
    """Fill holes of a lattice over (batch, length, heads, KV heads) from neighbours along all four axes and from the
    shapes with the same thread blocks; what has no neighbour stays a hole."""
    ideal = roof + np.nanmin(times)
    logs, scale = np.log(times / ideal), np.log(ideal)
    group = np.floor(scale / np.log(4.0))
    guesses = [between(logs, i, axis) for i, axis in enumerate(axes)]
    guesses += [same_blocks(logs + scale, axes, factor) - scale for factor in (2.0, 0.5)]
    return np.exp(blend(logs, guesses, group)) * ideal


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
