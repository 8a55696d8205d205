"""A planner that moves everybody: what migrations do to replies is measured and tested with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from common.sched.lane import Seq
from common.sched.moving import Mode
from common.sched.plan import Candidate


class Restless:
    """Asks every decoding request (or each one only once) to be on the next instance, every epoch. `mode`: how they go,
    in turn; None: nobody moves."""

    def __init__(self, instances: int, mode: Iterator[Mode] | None, once: bool = False) -> None:
        self.instances = instances
        self.mode = mode
        self.once = once
        self.goal: dict[int, int] = {}
        self.moved: set[int] = set()

    def epoch(self, departed: Sequence[int], grown: Mapping[int, int], arrived: Mapping[int, int]) -> Collection[int]:
        """Everybody who was there before is to be elsewhere."""
        for request_id in departed:
            del self.goal[request_id]
        for request_id in arrived:
            self.goal[request_id] = request_id % self.instances
        changed = []
        for request_id in self.goal:
            if request_id not in arrived and not (self.once and request_id in self.moved):
                self.goal[request_id] = (self.goal[request_id] + 1) % self.instances
                self.moved.add(request_id)
                changed.append(request_id)
        return changed

    def bin_of(self, request_id: int) -> int:
        """Where it is to be."""
        return self.goal[request_id]

    def bins(self) -> Collection[int]:
        """All of them."""
        return range(self.instances)

    def charge(self, seq: Seq, blocks: int, oracle_tokens: int | None) -> int:
        """What it holds."""
        return blocks

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """As asked for."""
        return {} if self.mode is None else {move.request_id: next(self.mode) for move in moves}

    def hosted(self, bin_id: int, node: int) -> None:
        """Machines play no part."""

    def detour(self, request_id: int, bin_id: int) -> bool:
        """Anywhere."""
        return True
