"""Attention as fast scalar functions: decode rows in integers with exact prefix sums, and the mixing ratio."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from common.cost.operators import Mixing

SHIFT = 16  # fixed point of context slopes
TABLED, TABLED_BATCH = 4096, 512  # chunks and contexts, and batches, below these are looked up


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

    __slots__ = ("_batches", "_chunks", "_contexts", "_uncached", "axes", "ratio")

    def __init__(self, mixing: Mixing) -> None:
        self.axes: list[list[float]] = [axis.tolist() for axis in mixing.axes]
        chunks, _, batches, contexts = mixing.axes
        self._chunks, self._contexts = _places(chunks, TABLED), _places(contexts, TABLED)
        self._batches, self._uncached = _places(batches, TABLED_BATCH), _place(self.axes[1], 0.0)
        self.ratio: list[list[list[list[float]]]] = mixing.ratio.tolist()

    def at(self, new: int, cached: float, decodes: int, context: int) -> float:
        """Ratio of the mixed batch's attention to the sum of its parts."""
        i, a = self._chunks[new] if new < TABLED else _place(self.axes[0], new)
        j, b = self._uncached if cached == 0 else _place(self.axes[1], cached)
        k, c = self._batches[decodes] if decodes < TABLED_BATCH else _place(self.axes[2], decodes)
        m, d = self._contexts[context] if context < TABLED else _place(self.axes[3], context)
        n = m + 1
        low, high = self.ratio[i], self.ratio[i + 1]
        p, q = low[j][k], low[j][k + 1]
        u = p[m] + d * (p[n] - p[m])
        first = u + c * (q[m] + d * (q[n] - q[m]) - u)
        p, q = high[j][k], high[j][k + 1]
        u = p[m] + d * (p[n] - p[m])
        second = u + c * (q[m] + d * (q[n] - q[m]) - u)
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


def _places(axis: npt.NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """`_place` of 0, 1, .. count - 1."""
    value = np.arange(count, dtype=np.float64)
    i = np.clip(np.searchsorted(axis, value, side="right") - 1, 0, len(axis) - 2)
    share = np.clip((value - axis[i]) / (axis[i + 1] - axis[i]), 0.0, 1.0)
    return list(zip(i.tolist(), share.tolist()))


def _bilinear(plane: list[list[float]], k: int, m: int, c: float, d: float) -> float:
    low, high = plane[k], plane[k + 1]
    a = low[m] + d * (low[m + 1] - low[m])
    b = high[m] + d * (high[m + 1] - high[m])
    return a + c * (b - a)
