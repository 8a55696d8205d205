"""Which layers each member of a merged group keeps: contiguous slices, as even as what the members hold allows."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import Layers, Stage


def overlap(first: Layers, second: Layers) -> Layers | None:
    """The common layers of two ranges."""
    low, high = max(first[0], second[0]), min(first[1], second[1])
    return (low, high) if low < high else None


def without(layers: Layers, keep: Layers) -> list[Layers]:
    """What is left of a range once another is taken out of it: at most two ranges."""
    common = overlap(layers, keep)
    if common is None:
        return [layers]
    return [part for part in ((layers[0], common[0]), (common[1], layers[1])) if part[0] < part[1]]


def merge_slices(first: Sequence[Stage], second: Sequence[Stage]) -> tuple[Stage, ...] | None:
    """Slices of the union of two groups, each within what its member holds now, so that nothing has to be loaded.

    Both groups tile the layers in order; the union's route is an interleaving of theirs. Dynamic programming over
    (members used of each, layers covered) minimises the sum of squared lengths: even slices wherever they are possible
    (two whole copies: halves; two pairs: quarters; one and two: thirds). None: no route gives everyone a layer.
    """
    num_layers, size = first[-1].layers[1], len(first) + len(second)
    slack = 2 if num_layers >= 2 * size else 1
    best: dict[tuple[int, int, int], tuple[int, tuple[Stage, ...]]] = {(0, 0, 0): (0, ())}
    for used in range(size):
        reached: dict[tuple[int, int, int], tuple[int, tuple[Stage, ...]]] = {}
        ideal = (used + 1) * num_layers // size
        for (i, j, at), (cost, route) in best.items():
            for di, dj, pool in ((1, 0, first), (0, 1, second)):
                index = i if di else j
                if index == len(pool):
                    continue
                instance, (low, high) = pool[index]
                if low > at:
                    continue
                ends = {min(high, ideal + off) for off in range(-slack, slack + 1)} | {high, at + 1}
                for end in sorted(ends):
                    if not at < end <= high:
                        continue
                    key = (i + di, j + dj, end)
                    value = (cost + (end - at) ** 2, (*route, Stage(instance, (at, end))))
                    if key not in reached or value[0] < reached[key][0]:
                        reached[key] = value
        best = reached
    found = best.get((len(first), len(second), num_layers))
    return None if found is None else found[1]
