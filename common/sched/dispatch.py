"""Which of several lanes a new request joins: in turn, or the one with the fewest requests waiting and running."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Literal, get_args

from common.options import Choice
from common.sched.lane import LaneScheduler

Dispatch = Literal["round_robin", "least_outstanding"]
DISPATCH = Choice(get_args(Dispatch))  # `system.dispatch`
SCANNED = 16  # up to so many instances are looked at one by one: faster than a heap


class Dispatcher:
    """Picks among `lanes` (by instance; the owner adds and removes). Call `added` for a new lane, `note` after a lane's
    count may have changed."""

    def __init__(self, lanes: Mapping[int, LaneScheduler], dispatch: Dispatch) -> None:
        self.lanes = lanes
        self.dispatch = dispatch
        self._next = 0
        # (outstanding, last dispatch, instance), stale entries dropped lazily: ties go to the longest not chosen
        self._least: list[tuple[int, int, int]] = []
        self._chosen: dict[int, int] = {}

    def pick(self) -> int:
        """The instance for the next request; there must be one."""
        self._next += 1
        if self.dispatch == "round_robin":
            order = list(self.lanes)
            return order[(self._next - 1) % len(order)]
        lanes, chosen = self.lanes, self._chosen
        if len(lanes) <= SCANNED:
            ranks = [(lane.outstanding(), chosen[index], index) for index, lane in lanes.items()]
            instance = min(ranks)[2]
        else:
            instance = self._least_in_heap()
        chosen[instance] = self._next
        return instance

    def added(self, instance: int) -> None:
        """A lane is new in `lanes`."""
        self._chosen[instance] = 0  # also one that is back: it is as new
        if len(self.lanes) == SCANNED + 1:
            self._rank()
        self.note(instance, self.lanes[instance])

    def note(self, instance: int, lane: LaneScheduler) -> None:
        """The lane's count may have changed."""
        if len(self.lanes) <= SCANNED or self.dispatch != "least_outstanding":
            return
        if len(self._least) > 64 + 8 * len(self.lanes):
            self._rank()
        heapq.heappush(self._least, (lane.outstanding(), self._chosen[instance], instance))

    def _least_in_heap(self) -> int:
        least, chosen = self._least, self._chosen
        while True:
            count, since, instance = least[0]
            lane = self.lanes.get(instance)
            if lane is not None and lane.outstanding() == count and chosen[instance] == since:
                return instance
            heapq.heappop(least)

    def _rank(self) -> None:
        chosen = self._chosen
        self._least[:] = [(lane.outstanding(), chosen[index], index) for index, lane in self.lanes.items()]
        heapq.heapify(self._least)
