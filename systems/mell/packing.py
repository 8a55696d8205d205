"""The online scheduler: Allocate, Depart and Update of items on bins (the paper's Figure 10), repaired.

Pure state without a clock. Sizes are blocks. What the paper leaves open or gets wrong is marked [fix] and explained
in README.md; `rules="paper"` leaves the repairs out that change where items go, so that their need can be shown.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from systems.mell.bins import MIDS, PER_BIN, Bin, Bins, Item, Size, Weights

Rules = Literal["repaired", "paper"]


class Move(NamedTuple):
    """A request changed its GPU."""

    request_id: int
    src: int
    dst: int


class Packing:
    """Items on GPUs. Requests of at most 1/8 enter through `Groups`."""

    def __init__(self, capacity: int, rules: Rules = "repaired", weights: Weights | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity of {capacity} blocks")
        self.capacity = capacity
        self.rules = rules
        self.bins = Bins(capacity, weights or Weights())
        self.moves: list[Move] = []  # of requests, in order; the caller takes them away
        self.group_moves = 0  # of items in the current operation: what Theorem 3 counts

    # ------------------------------------------------------------ moves

    def put(self, item: Item, where: Bin) -> None:
        """Attach, and note a move if the item was elsewhere before."""
        came, item.came = item.came, -1
        self.bins.attach(item, where)
        if came not in (-1, where.id):
            self.group_moves += 1
            self.moves += [Move(request_id, came, where.id) for request_id in item.requests()]

    def _node(self, item: Item) -> int:
        """The machine that a moving item comes from; -1 for an arrival (its priority looks at load only)."""
        source = self.bins.all.get(item.came)
        return -1 if source is None else source.node

    # ------------------------------------------------------------ allocate

    def allocate(self, item: Item) -> None:
        """Find a place for an item that has none."""
        if item.size_class is Size.T:
            self._allocate_t(item)
        elif item.size_class is Size.L:
            self._allocate_l(item)
        else:
            self._allocate_mid(item)

    def _allocate_t(self, item: Item) -> None:
        bins, node = self.bins, self._node(item)
        where = None
        if self.rules == "repaired":  # [fix] invariants 1 and 5 want M-GPUs below 3/4 as targets too, and first
            where = bins.hungry_for(node)
        where = where or bins.big_with_room(item.size, node)
        if where is None:
            where = bins.newest(Size.T)
            if where is None or where.fill + item.size > self.capacity:
                where = bins.open(Size.T)
        self.put(item, where)

    def _allocate_mid(self, item: Item) -> None:
        where = self.bins.single_for(item.size, self._node(item))
        if where is not None:
            self._make_room(item, where)
            return
        kind = item.size_class
        newest = self.bins.newest(kind)
        if newest is None or len(newest.mids) == PER_BIN[kind]:  # [fix] the newest is full: activate another
            newest = self.bins.open(kind)
        self.put(item, newest)
        self._feed(newest)

    def _allocate_l(self, item: Item) -> None:
        where = self.bins.open(Size.L)
        self.put(item, where)
        self._fill_l(where)

    def _make_room(self, item: Item, where: Bin) -> None:
        """Put a mid beside an L: T items that are in its way go elsewhere."""
        loose = []
        while where.fill + item.size > self.capacity:
            loose.append(self._evict_t(where, where.fill + item.size - self.capacity))
        self.put(item, where)
        for other in loose:
            self.allocate(other)

    def _evict_t(self, where: Bin, excess: int) -> Item:
        """Take off the smallest T that suffices, or the largest there is."""
        tees = where.tees.values()
        enough = [item for item in tees if item.size >= excess]
        victim = min(enough, key=lambda item: item.size) if enough else max(tees, key=lambda item: item.size)
        self.bins.detach(victim)
        return victim

    # ------------------------------------------------------------ holes

    def _fill_l(self, where: Bin) -> None:
        """An L-GPU has no S/M: pull one that fits, or else T items."""
        if where.mids or where.big is None:
            return
        item = self.bins.mid_for(self.capacity - where.big.size, where.node)
        if item is None:
            self._feed(where)
            return
        donor = self.bins.detach(item)
        self._make_room(item, where)
        self._refill(donor, item.size_class)

    def _refill(self, where: Bin, kind: Size) -> None:
        """An S- or M-GPU has lost one of its items: take one from the newest of its kind, unless it is that."""
        bins = self.bins
        newest = bins.newest(kind)
        loose: list[Item] = []
        if newest is not None and newest is not where and where.id in bins.all:
            item = next(reversed(newest.mids.values()))
            bins.detach(item)
            while where.fill + item.size > self.capacity:
                loose.append(self._evict_t(where, where.fill + item.size - self.capacity))
            self.put(item, where)
        if newest is not None:
            loose += self._strip(newest)
        for item in loose:
            self.allocate(item)
        if where.id in bins.all:
            self._feed(where)

    def _strip(self, newest: Bin) -> list[Item]:
        """The newest M-GPU keeps no T items while it waits for its second M; an empty GPU closes."""
        loose = []
        if len(newest.mids) < PER_BIN[newest.kind]:
            loose = list(newest.tees.values())
            for item in loose:
                self.bins.detach(item)
            if not newest.mids:
                self.bins.close(newest)
        return loose

    def _feed(self, where: Bin) -> None:
        """[fix] An L- or M-GPU below 3/4 takes T items from the newest T-GPU (any fits): without this, T-GPUs stay
        open beside half-empty L-GPUs, which breaks invariant 5 and the bound."""
        if self.rules == "repaired":
            self._take_tees(where)

    def _take_tees(self, where: Bin) -> None:
        bins = self.bins
        while bins.hungry(where) or (where.kind is Size.T and 4 * where.fill < 3 * self.capacity):
            newest = bins.newest(Size.T)
            if newest is None or newest is where:
                return
            item = max(newest.tees.values(), key=lambda item: item.size)
            bins.detach(item)
            self.put(item, where)
            if not newest.tees:
                bins.close(newest)

    # ------------------------------------------------------------ depart

    def depart(self, item: Item) -> None:
        """Take an item off its GPU and mend what it leaves behind."""
        where = self.bins.detach(item)
        if item.size_class is Size.T:
            self.lost_t(where)
        elif item.size_class is Size.L:
            self._dissolve(where)
        elif where.kind is Size.L:
            self._fill_l(where)
        else:
            self._refill(where, where.kind)

    def lost_t(self, where: Bin) -> None:
        """A GPU has lost a T item, or one of its T items shrank."""
        if where.kind is Size.T and not where.tees:
            self.bins.close(where)
        else:
            self._take_tees(where)

    def _dissolve(self, where: Bin) -> None:
        """An L is gone: the rest of its GPU finds other places. Whoever needs a new GPU keeps this one."""
        bins = self.bins
        rest = list(where.items())
        for item in rest:
            bins.detach(item)
        bins.close(where)
        bins.spare = where.id
        for item in rest:
            self.allocate(item)
        bins.spare = None

    # ------------------------------------------------------------ update

    def update(self, item: Item, size: int) -> None:
        """An item has grown."""
        bins, before, after = self.bins, item.size_class, self.bins.classify(size)
        where = bins.all[item.bin]
        in_place = before is after or (where.kind is Size.L and after in MIDS and before in MIDS)
        if in_place:
            bins.resize(item, size, after)
            self.relieve(where)
        elif before is Size.M and after is Size.L and where.kind is Size.M:
            self._promote(item, size, where)
        else:
            self.depart(item)
            item.size, item.size_class = size, after
            self.allocate(item)

    def _promote(self, item: Item, size: int, where: Bin) -> None:
        """An M on an M-GPU becomes an L: it stays; the other M goes if it fits no more."""
        bins = self.bins
        others = [other for other in where.mids.values() if other is not item]
        leaves = [other for other in others if other.size + size > self.capacity]
        for other in leaves:
            bins.detach(other)
        bins.resize(item, size, Size.L)
        bins.rekind(where, Size.L)
        self.relieve(where)
        for other in leaves:
            self.allocate(other)
        self._fill_l(where)

    def relieve(self, where: Bin) -> None:
        """[fix] Overload without a change of class: before the step that would overflow, the smallest class goes
        first (T before S/M; an L never must), until the rest fits."""
        loose = []
        while where.fill > self.capacity and where.tees:
            loose.append(self._evict_t(where, where.fill - self.capacity))
        mid = None
        if where.fill > self.capacity:
            mid = next(iter(where.mids.values()))
            self.bins.detach(mid)
            loose.append(mid)
        for item in sorted(loose, key=lambda item: -item.size_class):
            self.allocate(item)
        if mid is not None:
            self._fill_l(where)
