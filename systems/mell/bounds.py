"""How few GPUs could hold a snapshot: bounds below the optimum, and one above.

With free migration the optimum of a whole run decomposes by time, so the mean (and the maximum) over snapshots of a
bound below bounds the mean (the maximum) of the GPU count of any policy.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from common.sched.binpack import first_fit_decreasing


def volume(sizes: Sequence[int], capacity: int) -> int:
    """Everything, cut at will."""
    return -(-sum(sizes) // capacity)


def martello_toth(sizes: Sequence[int], capacity: int) -> int:
    """L2: for every alpha, items above capacity - alpha are alone; those of at least alpha fill what others leave."""
    ordered = sorted(sizes)
    sums = [0, *accumulate(ordered)]
    num, half = len(ordered), bisect_right(ordered, capacity // 2)
    best = 0
    for alpha in [0, *dict.fromkeys(ordered[:half])]:
        alone = bisect_right(ordered, capacity - alpha)
        first = bisect_left(ordered, alpha)
        shared = alone - half  # above a half, up to capacity - alpha
        left = shared * capacity - (sums[alone] - sums[half])
        small = sums[half] - sums[first]
        best = max(best, num - alone + shared + max(0, -((left - small) // capacity)))
    return best


def first_fit(sizes: Sequence[int], capacity: int) -> int:
    """An upper bound: first-fit-decreasing, at most 11/9 of the optimum and 6/9 of a GPU."""
    return len(first_fit_decreasing(sizes, capacity))
