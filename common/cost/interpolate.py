"""Interpolation between measured points: shapes of linear layers, head configurations, and two-axis lattices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.cost.grids import Array

Rows = npt.NDArray[np.intp]
NEAREST = 4  # scattered shapes that share in an interpolation
FAR_CONTEXT = 1 << 22  # last context knot of every lattice: beyond any request


@dataclass(frozen=True, slots=True)
class Lattice:
    """Times over two axes; linear between knots."""

    x: Array
    y: Array
    time_ns: Array

    def at(self, x: Array, y: Array) -> Array:
        """Times on another lattice."""
        along = np.array([np.interp(y, self.y, row) for row in self.time_ns])
        return np.array([np.interp(x, self.x, column) for column in along.T]).T


def shape_weights(shapes: Array, n: float, k: float) -> tuple[Rows, Array]:
    """Rows of `shapes` and weights for (n, k): exact, bilinear in a full cell, else inverse square distance."""
    logs = np.log(shapes)
    x, y = math.log(n), math.log(k)
    distance = np.hypot(logs[:, 0] - x, logs[:, 1] - y)
    if distance.min() < 1e-9:
        return np.array([int(distance.argmin())], dtype=np.intp), np.ones(1)
    cell = _cell(shapes, n, k)
    if cell is not None:
        return cell
    rows = np.argsort(distance, kind="stable")[:NEAREST]
    weights = 1.0 / distance[rows] ** 2
    return rows, weights / weights.sum()


def _bracket(axis: Array, value: float) -> tuple[float, float, float]:
    """Neighbouring knots of `value` (clamped) and the log-linear weight of the upper one."""
    i = int(np.clip(np.searchsorted(axis, value, side="right") - 1, 0, len(axis) - 1))
    j = min(i + 1, len(axis) - 1)
    if i == j or value <= axis[i]:
        return axis[i], axis[i], 0.0
    return axis[i], axis[j], math.log(value / axis[i]) / math.log(axis[j] / axis[i])


def _cell(shapes: Array, n: float, k: float) -> tuple[Rows, Array] | None:
    lookup = {(a, b): i for i, (a, b) in enumerate(shapes.tolist())}
    ns, ks = np.unique(shapes[:, 0]), np.unique(shapes[:, 1])
    if len(lookup) < 0.7 * len(ns) * len(ks):
        return None  # scattered shapes, no lattice
    n0, n1, u = _bracket(ns, n)
    k0, k1, v = _bracket(ks, k)
    corners = [
        ((n0, k0), (1 - u) * (1 - v)),
        ((n1, k0), u * (1 - v)),
        ((n0, k1), (1 - u) * v),
        ((n1, k1), u * v),
    ]
    used = [(lookup.get(corner), weight) for corner, weight in corners if weight > 0]
    if any(row is None for row, _ in used):
        return None
    return np.array([row for row, _ in used], dtype=np.intp), np.array([weight for _, weight in used])


def never_less(times: Array, *axes: int) -> Array:
    """Of what grows along these axes the smaller never takes longer: a single slow measurement gives way."""
    for axis in axes:
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis=axis), axis)
    return times


def nearest_heads(table: Array, heads: int, kv_heads: int) -> tuple[int, tuple[int, int]]:
    """The measured head configuration closest in group size, then in head count."""
    group = np.abs(np.log((table[:, 0] / table[:, 1]) / (heads / kv_heads)))
    size = np.abs(np.log(table[:, 0] / heads))
    row = int(np.argmin(2.0 * group + size))
    return row, (int(table[row, 0]), int(table[row, 1]))


def head_weights(table: Array, heads: int, kv_heads: int) -> tuple[Rows, Array]:
    """Rows of measured head configurations and their weights: the configuration itself, else log-linear between
    those with the same KV heads and fewer and more heads, else the nearest."""
    same = np.flatnonzero(table[:, 1] == kv_heads)
    below, above = same[table[same, 0] <= heads], same[table[same, 0] >= heads]
    if not len(below) or not len(above):
        return np.array([nearest_heads(table, heads, kv_heads)[0]], dtype=np.intp), np.ones(1)
    low, high = below[np.argmax(table[below, 0])], above[np.argmin(table[above, 0])]
    if low == high:
        return np.array([low], dtype=np.intp), np.ones(1)
    share = math.log(heads / table[low, 0]) / math.log(table[high, 0] / table[low, 0])
    return np.array([low, high], dtype=np.intp), np.array([1.0 - share, share])


def longer_chunks(lattice: Lattice) -> Lattice:
    """Double the longest chunk three times: it costs its halves, one behind the other."""
    x, y, rows = list(lattice.x), lattice.y, list(lattice.time_ns)
    for _ in range(3):
        half = rows[-1]
        slope = (half[-1] - half[-2]) / (y[-1] - y[-2])
        behind = np.where(y + x[-1] > y[-1], half[-1] + slope * (y + x[-1] - y[-1]), np.interp(y + x[-1], y, half))
        rows.append(half + behind)
        x.append(2 * x[-1])
    return Lattice(np.array(x), y, np.array(rows))


def far(lattice: Lattice) -> Lattice:
    """Continue the last segment of contexts to `FAR_CONTEXT`."""
    y, t = lattice.y, lattice.time_ns
    slope = np.maximum((t[:, -1] - t[:, -2]) / (y[-1] - y[-2]), 0.0)
    last = t[:, -1] + slope * (FAR_CONTEXT - y[-1])
    return Lattice(lattice.x, np.append(y, FAR_CONTEXT), np.column_stack([t, last]))
