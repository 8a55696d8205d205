"""Which of several lanes a new request joins: in turn, or the one with the fewest requests waiting and running."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Literal

from common.sched.lane import LaneScheduler

Dispatch = Literal["round_robin", "least_outstanding"]


class Dispatcher:
    """Picks among `lanes` (by instance; the owner adds and removes). Call `note` after a lane's count changed."""

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
        least, lanes = self._least, self.lanes
        while True:
            count, chosen, instance = least[0]
            lane = lanes.get(instance)
            if lane is not None and lane.outstanding() == count and self._chosen[instance] == chosen:
                self._chosen[instance] = self._next
                return instance
            heapq.heappop(least)

    def note(self, instance: int, lane: LaneScheduler) -> None:
        """The lane's count has changed (or it is new)."""
        if self.dispatch != "least_outstanding":
            return
        least, chosen = self._least, self._chosen
        if len(least) > 64 + 8 * len(self.lanes):
            least[:] = [(lane.outstanding(), chosen[index], index) for index, lane in self.lanes.items()]
            heapq.heapify(least)
        heapq.heappush(least, (lane.outstanding(), chosen.setdefault(instance, 0), instance))
