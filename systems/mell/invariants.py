"""What holds after every operation (Theorem 1), with at most one open GPU per class as the exception."""

from __future__ import annotations

from collections.abc import Iterator

from systems.mell.bins import MIDS, PER_BIN, Bin, Size
from systems.mell.groups import Groups


def violations(groups: Groups) -> list[str]:
    """Every breach of the books or of invariants 1 to 5; empty when all is well."""
    return [*_books(groups), *_full(groups), *_paired(groups), *_t_gpus(groups)]


def _books(groups: Groups) -> Iterator[str]:
    seen: set[int] = set()
    undersized = 0
    for some in groups.bins.values():
        items = list(some.items())
        if not items or some.fill != sum(item.size for item in items) or some.fill > groups.capacity:
            yield f"GPU {some.id}: filled by {some.fill} of {groups.capacity}, or its books are wrong"
        if some.num_requests != len(groups.on(some.id)):
            yield f"GPU {some.id}: counts {some.num_requests} requests"
        if some.kind is not max(item.size_class for item in items):
            yield f"GPU {some.id}: is not the kind of its largest item"
        for item in items:
            if item.bin != some.id or groups.packing.bins.classify(item.size) is not item.size_class:
                yield f"item {item.id}: misfiled"
            if item.members is not None:
                undersized += 8 * item.size <= groups.capacity
                if 4 * item.size > groups.capacity or sum(item.members.values()) != item.size:
                    yield f"multi-item {item.id}: {item.size} blocks of {item.members}"
            seen.update(item.requests())
    if seen != set(groups.sizes):
        yield "requests lost or invented"
    if undersized > 1:
        yield f"{undersized} multi-items of at most 1/8"


def _open(groups: Groups, some: Bin) -> bool:
    return groups.packing.bins.newest(some.kind) is some


def _full(groups: Groups) -> Iterator[str]:
    """1 and 2: an M-GPU has two M, an S-GPU three S. The paper has at most one T on an M-GPU; where a member outgrows
    its multi-item in place, or the open one grows up beside a T, there are two (its last third holds no more). The
    bound does not need this part: T items weigh nothing in its proof."""
    for kind in MIDS:
        for some in groups.packing.bins.kinds[kind].values():
            tees = sum(8 * item.size > groups.capacity for item in some.tees.values())
            if (len(some.mids) != PER_BIN[kind] and not _open(groups, some)) or tees > 2 * (kind is Size.M):
                yield f"invariant {1 if kind is Size.M else 2}: {kind.name}-GPU {some.id}: {len(some.mids)}, {tees} T"


def _paired(groups: Groups) -> Iterator[str]:
    """4: an L-GPU lacks an S/M only if no S/M on an S/M-GPU fits it."""
    kinds = groups.packing.bins.kinds
    smallest = min((item.size for kind in MIDS for some in kinds[kind].values() for item in some.mids.values()),
                   default=groups.capacity + 1)  # fmt: skip
    for some in kinds[Size.L].values():
        if some.big is not None and not some.mids and some.big.size + smallest <= groups.capacity:
            yield f"invariant 4: L-GPU {some.id} of {some.big.size} lacks an S/M of {smallest}"


def _t_gpus(groups: Groups) -> Iterator[str]:
    """3: T-GPUs are 3/4 full; 5: there are T-GPUs only if all L- and M-GPUs are 3/4 full."""
    kinds = groups.packing.bins.kinds
    for some in kinds[Size.T].values():
        if 4 * some.fill < 3 * groups.capacity and not _open(groups, some):
            yield f"invariant 3: T-GPU {some.id} holds {some.fill} of {groups.capacity}"
    if kinds[Size.T]:
        for kind in (Size.L, Size.M):
            for some in kinds[kind].values():
                if 4 * some.fill < 3 * groups.capacity and not (kind is Size.M and _open(groups, some)):
                    yield f"invariant 5: T-GPUs beside {kind.name}-GPU {some.id} of {some.fill}"
