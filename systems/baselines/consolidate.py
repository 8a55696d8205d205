"""What MELL is compared with: `best_fit`, `worst_fit` and `first_fit` (nothing moves), `load_balance` (worst fit and
Llumnix-like balancing by KV), `load_balance_drain` (and it empties the least loaded), `ffd_repack` (everything is
packed anew every epoch: near the limit of any migration). All open a GPU when none fits an incoming request.

Overflow rules, for what the paper leaves open: `preempt` (a GPU that is full forgets its last request, which is
dispatched again and computed anew; the balancing ones send its KV), `reserve_max` (prompt and `max_output_tokens` are
booked at arrival), `oracle` (the true final size is).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from common.errors import ConfigError
from common.sched.binpack import first_fit_decreasing
from common.sched.fleet import FleetPolicy
from common.sched.lane import EngineConfig, Seq
from common.sched.moving import Mode
from common.sched.plan import Candidate, FleetConfig
from common.sched.stock import Stock
from common.types import ClusterInfo

Fit = Literal["best", "worst", "first"]
Overflow = Literal["preempt", "reserve_max", "oracle"]


class FitPlanner:
    """Any-fit by what requests hold now (or are booked for); nothing moves."""

    def __init__(self, capacity: int, block_size: int, fit: Fit, overflow: Overflow) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.fit = fit
        self.overflow = overflow
        self.sizes: dict[int, int] = {}
        self.where: dict[int, int] = {}
        self.loads: dict[int, int] = {}
        self.members: dict[int, dict[int, None]] = {}
        self._next = 0

    def epoch(self, departed: Sequence[int], grown: Mapping[int, int], arrived: Mapping[int, int]) -> Collection[int]:
        """Departures, growth, then arrivals in order."""
        for request_id in departed:
            self._take(request_id)
            del self.sizes[request_id]
        for request_id, size in grown.items():
            self.loads[self.where[request_id]] += size - self.sizes[request_id]
            self.sizes[request_id] = size
        for request_id, size in arrived.items():
            self.sizes[request_id] = size
            self._put(request_id, self._choose(size))
        moved: dict[int, None] = {}
        for place in list(self.loads):
            self.relieve(place, moved)
        self.rearrange(moved)
        return moved

    def relieve(self, place: int, moved: dict[int, None]) -> None:
        """What has outgrown its GPU: the last to come is an incoming request again."""
        while self.loads[place] > self.capacity and len(self.members[place]) > 1:
            self._shift(next(reversed(self.members[place])), None, moved)

    def rearrange(self, moved: dict[int, None]) -> None:
        """Move more: nothing."""

    def _shift(self, request_id: int, place: int | None, moved: dict[int, None]) -> None:
        self._take(request_id)
        self._put(request_id, self._choose(self.sizes[request_id]) if place is None else place)
        moved[request_id] = None

    def _take(self, request_id: int) -> None:
        place = self.where.pop(request_id)
        self.loads[place] -= self.sizes[request_id]
        del self.members[place][request_id]
        if not self.members[place]:
            del self.members[place], self.loads[place]

    def _put(self, request_id: int, place: int) -> None:
        self.where[request_id] = place
        self.loads[place] = self.loads.get(place, 0) + self.sizes[request_id]
        self.members.setdefault(place, {})[request_id] = None

    def _choose(self, size: int) -> int:
        fitting = [place for place, load in self.loads.items() if load + size <= self.capacity]
        if not fitting:
            self._next += 1
            return self._next
        if self.fit == "first":
            return min(fitting)
        key = lambda place: (self.loads[place], -place)  # noqa: E731
        return max(fitting, key=key) if self.fit == "best" else min(fitting, key=key)

    def bin_of(self, request_id: int) -> int:
        """Its GPU."""
        return self.where[request_id]

    def bins(self) -> Collection[int]:
        """GPUs in use."""
        return self.loads.keys()

    def charge(self, seq: Seq, blocks: int, oracle_tokens: int | None) -> int:
        """By the overflow rule."""
        tokens = seq.max_output
        if self.overflow == "oracle":
            if oracle_tokens is None:
                raise ConfigError("overflow=oracle is for the systems named oracle_*: they are told true lengths")
            tokens = oracle_tokens
        if self.overflow != "preempt":
            blocks = max(blocks, -(-(seq.prompt + tokens) // self.block_size))
        return min(blocks, self.capacity)

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """Nothing moves but what is preempted: its KV is forgotten and computed anew."""
        return {move.request_id: "tokens" for move in moves}

    def detour(self, request_id: int, bin_id: int) -> bool:
        """It would stay there: only if it fits by now."""
        if self.loads.get(bin_id, self.capacity) + self.sizes[request_id] > self.capacity:
            return False
        self._take(request_id)
        self._put(request_id, bin_id)
        return True

    def hosted(self, bin_id: int, node: int) -> None:
        """Machines play no part."""


class BalancePlanner(FitPlanner):
    """Worst fit, and each epoch the most loaded GPUs give their shortest request to the least loaded ones where that
    narrows the gap. `drain`: the least loaded GPU is emptied if the others have room."""

    def __init__(self, capacity: int, block_size: int, overflow: Overflow, drain: bool, gap: float = 0.1) -> None:
        super().__init__(capacity, block_size, "worst", overflow)
        self.drain = drain
        self.gap = gap

    def detour(self, request_id: int, bin_id: int) -> bool:
        """Yes: it is migrated once its GPU is up."""
        return True

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """Always as KV, the shortest first, and one at a time into or out of an instance, as Llumnix by default."""
        taken = {instance for instance, tokens in busy.items() if tokens}
        modes: dict[int, Mode] = {}
        for move in sorted(moves, key=lambda move: (move.tokens, move.request_id)):
            if move.src not in taken and move.dst not in taken:
                modes[move.request_id] = "kv"
                taken |= {move.src, move.dst}
        return modes

    def rearrange(self, moved: dict[int, None]) -> None:
        """Pairs of high and low load, as Llumnix makes them."""
        order = sorted(self.loads, key=lambda place: (self.loads[place], place))
        for low, high in zip(order, reversed(order[len(order) // 2 :])):
            shortest = min(self.members[high], key=lambda one: (self.sizes[one], one))
            size, difference = self.sizes[shortest], self.loads[high] - self.loads[low]
            if difference > self.gap * self.capacity and size < difference:
                self._shift(shortest, low, moved)
        if self.drain and len(self.loads) > 1:
            self._drain(moved)

    def _drain(self, moved: dict[int, None]) -> None:
        least = min(self.loads, key=lambda place: (self.loads[place], place))
        room = {place: self.capacity - load for place, load in self.loads.items() if place != least}
        targets = {}
        for request_id in sorted(self.members[least], key=lambda one: (-self.sizes[one], one)):
            place = max(room, key=lambda place: (room[place], -place))
            if room[place] < self.sizes[request_id] + self.capacity // 20:
                return
            room[place] -= self.sizes[request_id]
            targets[request_id] = place
        for request_id, place in targets.items():
            self._shift(request_id, place, moved)


class RepackPlanner(FitPlanner):
    """First-fit-decreasing over everything, every epoch; new bins take the names of those they share most with."""

    def detour(self, request_id: int, bin_id: int) -> bool:
        """Yes: it is migrated once its GPU is up."""
        return True

    def rearrange(self, moved: dict[int, None]) -> None:
        """Whoever's bin has another name now moves."""
        ids = list(self.sizes)
        packed = first_fit_decreasing([self.sizes[one] for one in ids], self.capacity)
        shared = []
        for index, members in enumerate(packed):
            weights: dict[int, int] = {}
            for item in members:
                place = self.where[ids[item]]
                weights[place] = weights.get(place, 0) + self.sizes[ids[item]]
            shared += [(-weight, place, index) for place, weight in weights.items()]
        names: dict[int, int] = {}
        used: set[int] = set()
        for _, place, index in sorted(shared):
            if index not in names and place not in used:
                names[index] = place
                used.add(place)
        for index, members in enumerate(packed):
            if index not in names:
                self._next += 1
                names[index] = self._next
            for item in members:
                if self.where[ids[item]] != names[index]:
                    self._shift(ids[item], names[index], moved)

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """All at once: no limit but the links and the free blocks."""
        return {move.request_id: "kv" for move in moves}


KINDS = ("best_fit", "worst_fit", "first_fit", "load_balance", "load_balance_drain", "ffd_repack")


def make_consolidating(
    kind: str, cluster: ClusterInfo, engine: EngineConfig, fleet: FleetConfig, overflow: Overflow,
    stock: Stock | None = None,
) -> FleetPolicy:
    """One of `KINDS`."""
    if engine.prefix_caching:
        raise ConfigError(f"system={kind} needs engine.prefix_caching=false")
    info, size = cluster.instances[0], engine.block_size
    capacity = max(1, int(info.kv_cells // info.num_layers * (1.0 - fleet.watermark)))
    planner: FitPlanner
    if kind.startswith("load_balance"):
        planner = BalancePlanner(capacity, size, overflow, kind.endswith("drain"))
    elif kind == "ffd_repack":
        planner = RepackPlanner(capacity, size, "best", overflow)
    else:
        fits: dict[str, Fit] = {"best_fit": "best", "worst_fit": "worst", "first_fit": "first"}
        planner = FitPlanner(capacity, size, fits[kind], overflow)
    return FleetPolicy(cluster, engine, fleet, planner, stock)
