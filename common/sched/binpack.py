"""First-fit-decreasing, for repacking everything and as an upper bound on the optimum."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices. Free room is kept in a tournament tree, so that each item costs log(bins)."""
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    leaves = 1
    while leaves < max(1, len(sizes)):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for index in order:
        size = sizes[index]
        if size > capacity:
            raise ValueError(f"an item of {size} in bins of {capacity}")
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < size)
        room[node] -= size
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
