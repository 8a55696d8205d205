"""The drop plan (Fig. 6): merge the smallest groups until the freed parameters cover what the queues need.

Every group holds one full copy of the model, so each merge frees exactly one copy: the number of merges is
ceil(needed / copy), and the heap decides only who merges, which keeps pipelines as short as can be.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

Item = tuple[int, bool, int, int, tuple[int, ...]]  # size, not urgent, node, id, groups


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


def plan_drop(candidates: Sequence[Candidate], needed_bytes: int, copy_bytes: int, max_size: int) -> Plan:
    """Groups to merge so that `needed_bytes` are freed, or all that can be.

    Ties between groups of one size are ours: the overloaded first, then neighbours on a node, then the lower id.
    `max_size`: a pipeline has at most one stage per layer.
    """
    heap: list[Item] = [(one.size, not one.urgent, one.node, one.group, (one.group,)) for one in candidates]
    heapq.heapify(heap)
    freed = 0
    while len(heap) >= 2 and freed < needed_bytes:
        first = heapq.heappop(heap)
        if first[0] + heap[0][0] > max_size:
            heapq.heappush(heap, first)
            break
        second = heapq.heappop(heap)
        size = first[0] + second[0]
        heapq.heappush(heap, (size, first[1] and second[1], *first[2:4], first[4] + second[4]))
        freed += copy_bytes
    merged = sorted(item[4] for item in heap if len(item[4]) > 1)
    return Plan(tuple(merged), freed, freed >= needed_bytes)
