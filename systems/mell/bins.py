"""GPUs as bins of items, and the indexes by which the scheduler finds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

from systems.mell.buckets import Buckets

PROBES = 8  # candidates that a priority is computed for


class Size(IntEnum):
    """Class of an item, by its share of a GPU's KV capacity. Also the kind of a GPU: that of its largest item."""

    T = 0  # (1/8, 1/4], and multi-items
    S = 1  # (1/4, 1/3]
    M = 2  # (1/3, 1/2]
    L = 3  # (1/2, 1]


MIDS = (Size.S, Size.M)
PER_BIN = {Size.S: 3, Size.M: 2}


class Weights(NamedTuple):
    """Priority of a GPU = free share * `free` - requests / 64 * `requests` + `node` if a move stays in its machine.
    The paper names the three terms and leaves the weights to the provider."""

    free: float = 1.0
    requests: float = 1.0
    node: float = 1.0


class Item:
    """A request, or a multi-item (`members`: request -> blocks) of requests of at most 1/8."""

    __slots__ = ("bin", "came", "id", "members", "size", "size_class")

    def __init__(self, ident: int, size: int, size_class: Size, members: dict[int, int] | None = None) -> None:
        self.id = ident
        self.size = size
        self.size_class = size_class
        self.members = members
        self.bin = -1
        self.came = -1  # the bin that it was taken from and not yet put anywhere else

    def requests(self) -> Iterable[int]:
        """Who is in it."""
        return (self.id,) if self.members is None else self.members


class Bin:
    """A GPU: at most one L, S or M items, and T items."""

    __slots__ = ("big", "fill", "id", "keys", "kind", "mids", "node", "num_requests", "tees")

    def __init__(self, ident: int, kind: Size) -> None:
        self.id = ident
        self.kind = kind
        self.fill = 0
        self.big: Item | None = None
        self.mids: dict[int, Item] = {}
        self.tees: dict[int, Item] = {}
        self.num_requests = 0
        self.node = -1
        self.keys: tuple[tuple[Buckets, int, int], ...] = ()

    def items(self) -> Iterator[Item]:
        """All of them, the largest class first."""
        if self.big is not None:
            yield self.big
        yield from self.mids.values()
        yield from self.tees.values()


class Bins:
    """All GPUs in use."""

    def __init__(self, capacity: int, weights: Weights) -> None:
        self.capacity = capacity
        self.weights = weights
        self.all: dict[int, Bin] = {}
        self.kinds: dict[Size, dict[int, Bin]] = {kind: {} for kind in Size}  # in order of entry: the last is newest
        self.items: dict[int, Item] = {}
        self.spare: int | None = None  # a GPU that is being emptied and may be opened again at once
        self._next = 0
        self._single = Buckets()  # L-GPUs without S/M, by the size of L
        self._free = Buckets()  # L-GPUs, by free blocks
        self._hungry = Buckets()  # L-GPUs and full M-GPUs below 3/4, by free blocks
        self._loose = Buckets()  # S/M items on S/M-GPUs, by size

    # ------------------------------------------------------------ bins

    def classify(self, size: int) -> Size:
        """Class of an item of this many blocks (at most 1/8 counts as T: it is, or is in, a multi-item)."""
        if 2 * size > self.capacity:
            return Size.L
        if 3 * size > self.capacity:
            return Size.M
        return Size.S if 4 * size > self.capacity else Size.T

    def newest(self, kind: Size) -> Bin | None:
        """The GPU that entered this kind last."""
        bins = self.kinds[kind]
        return bins[next(reversed(bins))] if bins else None

    def open(self, kind: Size) -> Bin:
        """Activate a GPU."""
        if self.spare is not None:
            ident, self.spare = self.spare, None
        else:
            ident, self._next = self._next, self._next + 1
        made = Bin(ident, kind)
        self.all[ident] = self.kinds[kind][ident] = made
        return made

    def close(self, gone: Bin) -> None:
        """Forget an empty GPU."""
        self._unindex(gone)
        del self.all[gone.id], self.kinds[gone.kind][gone.id]

    def rekind(self, changed: Bin, kind: Size) -> None:
        """Its largest item is of another class now."""
        del self.kinds[changed.kind][changed.id]
        changed.kind = kind
        self.kinds[kind][changed.id] = changed
        self.reindex(changed)

    # ------------------------------------------------------------ items

    def attach(self, item: Item, where: Bin) -> None:
        """Put an item on a GPU."""
        if item.size_class is Size.L:
            where.big = item
        elif item.size_class in MIDS:
            where.mids[item.id] = item
        else:
            where.tees[item.id] = item
        item.bin = where.id
        where.fill += item.size
        where.num_requests += 1 if item.members is None else len(item.members)
        self.reindex(where)

    def detach(self, item: Item) -> Bin:
        """Take an item off its GPU."""
        where = self.all[item.bin]
        if item.size_class is Size.L:
            where.big = None
        else:
            del (where.mids if item.size_class in MIDS else where.tees)[item.id]
        item.came, item.bin = where.id, -1
        where.fill -= item.size
        where.num_requests -= 1 if item.members is None else len(item.members)
        self.reindex(where)
        return where

    def resize(self, item: Item, size: int, size_class: Size | None = None) -> None:
        """An item on a GPU changes; its class with it, if one is given."""
        where = self.all[item.bin]
        where.fill += size - item.size
        if size_class is not None and size_class is not item.size_class:
            if item.size_class in MIDS:
                del where.mids[item.id]
            else:
                del where.tees[item.id]
            if size_class is Size.L:
                where.big = item
            else:
                where.mids[item.id] = item
            item.size_class = size_class
        item.size = size
        self.reindex(where)

    # ------------------------------------------------------------ indexes

    def hungry(self, some: Bin) -> bool:
        """Must it take T items before any T-GPU may be?"""
        settled = some.kind is Size.L or (some.kind is Size.M and len(some.mids) == 2)
        return settled and 4 * some.fill < 3 * self.capacity

    def _unindex(self, some: Bin) -> None:
        for buckets, key, ident in some.keys:
            buckets.remove(key, ident)
        some.keys = ()

    def reindex(self, some: Bin) -> None:
        """Bring the indexes up to date with a GPU."""
        self._unindex(some)
        keys: list[tuple[Buckets, int, int]] = []
        free = self.capacity - some.fill
        if some.kind is Size.L:
            if free > 0:
                keys.append((self._free, free, some.id))
            if some.big is not None and not some.mids:
                keys.append((self._single, some.big.size, some.id))
        elif some.kind in MIDS:
            keys += [(self._loose, item.size, item.id) for item in some.mids.values()]
        if self.hungry(some):
            keys.append((self._hungry, free, some.id))
        for buckets, key, ident in keys:
            buckets.add(key, ident)
        some.keys = tuple(keys)

    # ------------------------------------------------------------ searches

    def _best(self, idents: Iterator[int], node: int) -> Bin | None:
        """The highest priority among the first few."""
        weights, best, score = self.weights, None, 0.0
        for ident in islice(idents, PROBES):
            some = self.all[ident]
            value = weights.free * (self.capacity - some.fill) / self.capacity
            value += weights.node * (node >= 0 and some.node == node) - weights.requests * some.num_requests / 64
            if best is None or value > score:
                best, score = some, value
        return best

    def hungry_for(self, node: int) -> Bin | None:
        """An L- or M-GPU below 3/4 (any T fits)."""
        return self._best(self._hungry.descending(self.capacity), node) if self._hungry else None

    def big_with_room(self, size: int, node: int) -> Bin | None:
        """An L-GPU with this many free blocks."""
        return self._best(self._free.descending(self.capacity, size), node)

    def single_for(self, size: int, node: int) -> Bin | None:
        """An L-GPU without S/M whose L leaves this many blocks (its T items do not count)."""
        return self._best(self._single.ascending(self.capacity - size), node)

    def mid_for(self, room: int, node: int) -> Item | None:
        """The largest S/M item on an S/M-GPU that fits; of the largest few, one in the same machine."""
        found = list(islice(self._loose.descending(room), PROBES))
        if not found:
            return None
        for ident in found:
            if node >= 0 and self.all[self.items[ident].bin].node == node:
                return self.items[ident]
        return self.items[found[0]]
