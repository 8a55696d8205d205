"""Requests on GPUs: those of at most 1/8 of a GPU travel in multi-items, the others alone.

A multi-item holds more than 1/8 and at most 1/4, but for one, the open one, that fills up. Past 1/4 it expels its
smallest sufficient member (the split of the paper: what stays is still above 1/8); at 1/8 or below it becomes the
open one, or, where there is one already, the two merge (together they are at most 1/4).
"""

from __future__ import annotations

from systems.mell.bins import Bin, Item, Size, Weights
from systems.mell.packing import Move, Packing, Rules


class Groups:
    """The scheduler as the policy sees it: `allocate`, `depart` and `update` of requests; moves come back."""

    def __init__(self, capacity: int, rules: Rules = "repaired", weights: Weights | None = None) -> None:
        self.capacity = capacity
        self.packing = Packing(capacity, rules, weights)
        self.sizes: dict[int, int] = {}
        self.open_group: int | None = None
        self._item_of: dict[int, Item] = {}
        self._next_group = -1

    # ------------------------------------------------------------ queries

    @property
    def bins(self) -> dict[int, Bin]:
        """GPUs in use."""
        return self.packing.bins.all

    def bin_of(self, request_id: int) -> int:
        """Where a request is to be."""
        return self._item_of[request_id].bin

    def on(self, bin_id: int) -> list[int]:
        """Requests of a GPU."""
        return [one for item in self.bins[bin_id].items() for one in item.requests()]

    def _tiny(self, size: int) -> bool:
        return 8 * size <= self.capacity

    # ------------------------------------------------------------ operations

    def allocate(self, request_id: int, size: int) -> list[Move]:
        """A request arrives."""
        if not 0 < size <= self.capacity:
            raise ValueError(f"request {request_id}: {size} blocks on GPUs of {self.capacity}")
        self._begin()
        self.sizes[request_id] = size
        if self._tiny(size):
            self._join(request_id, size, -1)
        else:
            item = self._single(request_id, size)
            self.packing.allocate(item)
        return self._end()

    def depart(self, request_id: int) -> list[Move]:
        """A request is gone."""
        self._begin()
        item, size = self._item_of.pop(request_id), self.sizes.pop(request_id)
        if item.members is None:
            del self.packing.bins.items[item.id]
            self.packing.depart(item)
        else:
            self._leave(item, request_id, size)
        return self._end()

    def update(self, request_id: int, size: int) -> list[Move]:
        """A request has grown."""
        before = self.sizes[request_id]
        if not before <= size <= self.capacity:
            raise ValueError(f"request {request_id}: from {before} to {size} blocks on GPUs of {self.capacity}")
        self._begin()
        if size != before:
            self.sizes[request_id] = size
            item = self._item_of[request_id]
            if item.members is None:
                self.packing.update(item, size)
            elif self._tiny(size):
                self._grow_member(item, request_id, size)
            else:
                self._graduate(item, request_id, before, size)
        return self._end()

    def _begin(self) -> None:
        self.packing.group_moves = 0

    def _end(self) -> list[Move]:
        moves, self.packing.moves = self.packing.moves, []
        return moves

    # ------------------------------------------------------------ multi-items

    def _single(self, request_id: int, size: int) -> Item:
        bins = self.packing.bins
        item = bins.items[request_id] = self._item_of[request_id] = Item(request_id, size, bins.classify(size))
        return item

    def _join(self, request_id: int, size: int, came: int) -> None:
        """Into the open multi-item, or a new one. `came`: the GPU that it was on."""
        bins = self.packing.bins
        if self.open_group is None:
            group = Item(self._next_group, size, Size.T, {request_id: size})
            self._next_group -= 1
            bins.items[group.id] = self._item_of[request_id] = group
            group.came = came
            self.packing.allocate(group)
            self._note_size(group)
            return
        group = bins.items[self.open_group]
        members = group.members
        assert members is not None
        members[request_id] = size
        self._item_of[request_id] = group
        where = bins.all[group.bin]
        where.num_requests += 1
        if came not in (-1, where.id):
            self.packing.group_moves += 1
            self.packing.moves.append(Move(request_id, came, where.id))
        bins.resize(group, group.size + size)
        self._note_size(group)
        self.packing.relieve(where)

    def _note_size(self, group: Item) -> None:
        """Keep track of which multi-item is open."""
        if self._tiny(group.size):
            assert self.open_group in (None, group.id)
            self.open_group = group.id
        elif self.open_group == group.id:
            self.open_group = None

    def _take_out(self, group: Item, request_id: int) -> Bin:
        """A member leaves; the books of its GPU with it."""
        bins, members = self.packing.bins, group.members
        assert members is not None
        size = members.pop(request_id)
        where = bins.all[group.bin]
        where.num_requests -= 1
        bins.resize(group, group.size - size)
        return where

    def _leave(self, group: Item, request_id: int, size: int) -> None:
        where = self._take_out(group, request_id)
        if group.size:
            self._shrunk(group)
            if where.id in self.bins:
                self.packing.lost_t(where)
        else:
            if self.open_group == group.id:
                self.open_group = None
            del self.packing.bins.items[group.id]
            self.packing.depart(group)

    def _shrunk(self, group: Item) -> None:
        """[fix] At 1/8 or below it becomes the open one, or merges with it: the one of fewer requests moves."""
        if not self._tiny(group.size) or self.open_group == group.id:
            return
        bins = self.packing.bins
        if self.open_group is None:
            self.open_group = group.id
            return
        other = bins.items[self.open_group]
        few, many = sorted((group, other), key=lambda one: (len(one.members or ()), one.id))
        assert few.members is not None and many.members is not None
        del bins.items[few.id]
        source, target = bins.detach(few), bins.all[many.bin]
        if source is not target:
            self.packing.group_moves += 1
            self.packing.moves += [Move(one, source.id, target.id) for one in few.members]
        many.members.update(few.members)
        target.num_requests += len(few.members)
        for one in few.members:
            self._item_of[one] = many
        bins.resize(many, many.size + few.size)
        self.open_group = None
        self._note_size(many)
        self.packing.lost_t(source)
        if target.id in self.bins:
            self.packing.relieve(target)

    def _grow_member(self, group: Item, request_id: int, size: int) -> None:
        bins, members = self.packing.bins, group.members
        assert members is not None
        where = bins.all[group.bin]
        grown = group.size + size - members[request_id]
        members[request_id] = size
        bins.resize(group, grown)
        if 4 * grown > self.capacity:  # [fix] split
            fits = self.capacity // 4
            victim = min((one for one in members if grown - members[one] <= fits), key=lambda one: (members[one], one))
            out = members[victim]
            self._take_out(group, victim)
            self._join(victim, out, where.id)
            if where.id in self.bins:
                self.packing.lost_t(where)
        else:
            self._note_size(group)
        if where.id in self.bins:
            self.packing.relieve(where)

    def _graduate(self, group: Item, request_id: int, before: int, size: int) -> None:
        """A member has outgrown 1/8: a T item of its own, in place; larger ones are placed anew."""
        bins = self.packing.bins
        where = self._take_out(group, request_id)
        item = self._single(request_id, before)
        item.came = where.id
        bins.items[request_id] = item
        item.size_class = Size.T
        if bins.classify(size) is Size.T:
            item.size = size
            self.packing.put(item, where)
        if group.size:
            self._shrunk(group)
        else:
            if self.open_group == group.id:
                self.open_group = None
            del bins.items[group.id]
            bins.detach(group)
        if where.id in self.bins:
            self.packing.lost_t(where)
        if item.bin < 0:
            item.size, item.size_class = size, bins.classify(size)
            self.packing.allocate(item)
        elif item.bin in self.bins:
            self.packing.relieve(self.bins[item.bin])
