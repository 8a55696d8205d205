"""The drop plan (Fig. 6): merge the smallest groups until the freed parameters cover what the queues need.

Every group holds one full copy of the model, so each merge frees exactly one copy: the number of merges is
ceil(needed / copy), and all that is left to choose is who merges. The paper's heap merges the two smallest again and
again, which makes pipelines up to twice as deep as others; here the number of groups that remain is known beforehand,
and the largest are dealt to the smallest pipelines, so depths of single instances differ by one at most.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from heapq import heapify, heappush, heapreplace
from itertools import chain, islice
from typing import NamedTuple


class Candidate(NamedTuple):
    """A group that may merge. `urgent`: it is overloaded; `node`: of its first member."""

    group: int
    size: int
    node: int = 0
    urgent: bool = False


class Plan(NamedTuple):
    """`merged`: each inner tuple are groups that become one. `enough`: the freed bytes cover the need."""

    merged: tuple[tuple[int, ...], ...]
    freed_bytes: int
    enough: bool


Shape = tuple[int, ...]  # sizes of the groups that become one, largest first
Pools = dict[int, dict[int, list[int]]]  # size -> node -> groups that are to merge


def plan_drop(candidates: Sequence[Candidate], needed_bytes: int, copy_bytes: int, max_size: int) -> Plan:
    """Groups to merge so that `needed_bytes` are freed, or all that can be. O(N log N).

    Who merges with whom is ours: the overloaded first, neighbours on a node as far as there are any, then the lower id.
    `max_size`: a pipeline has at most one stage per layer.
    """
    merges = min(-(-needed_bytes // copy_bytes), len(candidates) - 1)
    if merges <= 0:
        return Plan((), 0, needed_bytes <= 0)
    shapes = _shapes(sorted([one.size for one in candidates], reverse=True), len(candidates) - merges, max_size)
    merged = sorted(_filled(shapes, _chosen(candidates, shapes)))
    freed = copy_bytes * sum([(len(shape) - 1) * count for shape, count in shapes.items()])
    return Plan(tuple(merged), freed, freed >= needed_bytes)


def _shapes(sizes: list[int], num_groups: int, max_size: int) -> dict[Shape, int]:
    """How many pipelines of which make: deal sizes, largest first, to the smallest of so many pipelines; more pipelines
    where one would be too deep."""
    depth, longer = divmod(len(sizes), num_groups)
    if sizes[0] == sizes[-1] and sizes[0] * (depth + 1) <= max_size:
        even = {(sizes[0],) * (depth + 1): longer, (sizes[0],) * depth: num_groups - longer}
        return {shape: count for shape, count in even.items() if count and len(shape) > 1}
    dealt: list[Shape] = [(size,) for size in sizes[:num_groups]]
    heap = [(size, index) for index, size in enumerate(sizes[:num_groups])]
    heapify(heap)
    for size in sizes[num_groups:]:
        total, index = heap[0]
        if total + size > max_size:
            heappush(heap, (size, len(dealt)))
            dealt.append((size,))
        else:
            heapreplace(heap, (total + size, index))
            dealt[index] += (size,)
    return Counter([shape for shape in dealt if len(shape) > 1])


def _chosen(candidates: Sequence[Candidate], shapes: dict[Shape, int]) -> Pools:
    """Of each size as many as the shapes take: the overloaded, then who shares a node with them, then whole teams of
    neighbours before who has too few."""
    wanted: dict[int, int] = {}
    width: dict[int, int] = {}
    for shape, count in shapes.items():
        for size in set(shape):
            times = shape.count(size)
            wanted[size] = wanted.get(size, 0) + times * count
            width[size] = max(width.get(size, 1), times)
    hot: dict[tuple[int, int], list[int]] = defaultdict(list)  # by size and node
    calm: dict[tuple[int, int], list[int]] = defaultdict(list)
    for group, size, node, urgent in candidates:
        (hot if urgent else calm)[size, node].append(group)
    hot_nodes = {node for _, node in hot}
    ranks: list[list[tuple[int, int, list[int]]]] = [[] for _ in range(6)]
    for base, neighbours in ((0, hot), (2, calm)):
        for size, node in sorted(neighbours):
            if size not in wanted:
                continue
            found = sorted(neighbours[size, node])
            rank = base if not base or node in hot_nodes else 4
            over = len(found) % width[size]
            ranks[rank].append((size, node, found[: len(found) - over]))
            if over:
                ranks[rank + 1].append((size, node, found[-over:]))
    pools: Pools = {size: {} for size in wanted}
    for size, node, found in chain.from_iterable(ranks):
        if wanted[size] and found:
            taken = found[: wanted[size]]
            wanted[size] -= len(taken)
            pools[size].setdefault(node, []).extend(taken)
    return pools


def _filled(shapes: dict[Shape, int], pools: Pools) -> list[tuple[int, ...]]:
    """Teams of neighbours first; what is left goes together in the order of nodes."""
    found: list[tuple[int, ...]] = []
    left = {size: {node: len(groups) for node, groups in nodes.items()} for size, nodes in pools.items()}
    queues = {size: {node: iter(groups) for node, groups in nodes.items()} for size, nodes in pools.items()}
    short: list[tuple[Shape, int]] = []
    for shape, count in sorted(shapes.items(), reverse=True):
        need = [(size, shape.count(size)) for size in sorted(set(shape))]
        for node in sorted(pools[shape[0]]):
            have = min(count, *[left[size].get(node, 0) // times for size, times in need])
            if have:
                found += islice(
                    zip(*[queues[size][node] for size in shape]), have
                )  # one queue gives one after the other
                count -= have
                for size, times in need:
                    left[size][node] -= have * times
        if count:
            short.append((shape, count))
    rest = {size: chain.from_iterable([nodes[node] for node in sorted(nodes)]) for size, nodes in queues.items()}
    for shape, count in short:
        found += islice(zip(*[rest[size] for size in shape]), count)
    return found
