"""Attention as fast scalar functions: decode rows in integers with exact prefix sums, and the mixing ratio."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from common.cost.operators import Mixing

SHIFT = 16  # fixed point of context slopes


class DecodeRow:
    """Pure decode of one batch size: attention piecewise linear in context, in integers."""

    __slots__ = ("device_ns", "host_ns", "knots", "levels", "prefix", "slopes")

    def __init__(self, knots: list[float], times: list[float], device_ns: int, host_ns: int) -> None:
        self.knots = [int(k) for k in knots]
        self.levels = [int(t) + 1 for t in times]
        pairs = zip(self.levels, self.levels[1:], self.knots, self.knots[1:])
        self.slopes = [-((-(b - a) << SHIFT) // (v - u)) for a, b, u, v in pairs]  # rounded up: never below the line
        self.slopes.append(self.slopes[-1])
        self.device_ns, self.host_ns = device_ns, host_ns
        self.prefix: list[int] = [0]

    def attention_ns(self, context: int) -> int:
        """Attention of all layers."""
        i = bisect_right(self.knots, context) - 1
        if i < 0:
            return self.levels[0]
        return self.levels[i] + (self.slopes[i] * (context - self.knots[i]) >> SHIFT)

    def grow(self, needed: int) -> None:
        """Extend the prefix sums to at least `needed` + 1 entries, at least doubling them."""
        size = max(needed, 2 * (len(self.prefix) - 1), 1024)
        context = np.arange(len(self.prefix) - 1, size, dtype=np.int64)
        knots = np.array(self.knots, dtype=np.int64)
        i = np.searchsorted(knots, context, side="right") - 1
        low = i < 0
        i = np.maximum(i, 0)
        levels, slopes = np.array(self.levels, dtype=np.int64), np.array(self.slopes, dtype=np.int64)
        beyond = np.where(low, 0, context - knots[i])
        times: npt.NDArray[np.int64] = self.device_ns + levels[i] + (slopes[i] * beyond >> SHIFT)
        times = np.maximum(times, self.host_ns)
        self.prefix.extend((np.cumsum(times) + self.prefix[-1]).tolist())


class MixTable:
    """The mixing ratio as nested lists: 4-D linear interpolation, clamped at the edges."""

    __slots__ = ("axes", "ratio")

    def __init__(self, mixing: Mixing) -> None:
        self.axes: list[list[float]] = [axis.tolist() for axis in mixing.axes]
        self.ratio: list[list[list[list[float]]]] = mixing.ratio.tolist()

    def at(self, new: int, cached: float, decodes: int, context: int) -> float:
        """Ratio of the mixed batch's attention to the sum of its parts."""
        xs, ys, zs, ws = self.axes
        i, a = _place(xs, new)
        j, b = _place(ys, cached)
        k, c = _place(zs, decodes)
        m, d = _place(ws, context)
        low, high = self.ratio[i], self.ratio[i + 1]
        first = _bilinear(low[j], k, m, c, d)
        second = _bilinear(high[j], k, m, c, d)
        if b:
            first += b * (_bilinear(low[j + 1], k, m, c, d) - first)
            second += b * (_bilinear(high[j + 1], k, m, c, d) - second)
        return first + a * (second - first)


def _place(axis: list[float], value: float) -> tuple[int, float]:
    """Index of the knot below (so that the next exists) and the weight of the upper one, clamped to [0, 1]."""
    i = bisect_right(axis, value) - 1
    if i < 0:
        return 0, 0.0
    if i >= len(axis) - 1:
        return len(axis) - 2, 1.0
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


def _bilinear(plane: list[list[float]], k: int, m: int, c: float, d: float) -> float:
    low, high = plane[k], plane[k + 1]
    a = low[m] + d * (low[m + 1] - low[m])
    b = high[m] + d * (high[m + 1] - high[m])
    return a + c * (b - a)
