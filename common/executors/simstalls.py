"""Stalls in the simulator: how long a request that was taken out of its lane went without its next token.

A stall begins at the boundary at which the request leaves its lane and ends at its next token, wherever that is made.
Its cause is how it left: `parked` (its KV stays or moves: exchange, remap, migration, swap), `removed` (preempted: its
KV is computed again), or `lost` (an instance died). Leaving by `sample=False` or `leave` is no stall but a plan.
"""

from __future__ import annotations

from common.executors.simlane import SimLane
from common.record import StallColumns


class Stalls:
    """Owns the stalls that have not ended. All times in ns; rows are written when the next token is there."""

    def __init__(self, columns: StallColumns) -> None:
        self.columns = columns
        self.open: dict[int, tuple[int, str]] = {}  # request -> (begin, cause)

    def left(self, lane: SimLane, request_id: int, now: int, cause: str) -> None:
        """Out of its lane; a request that stalls already goes on doing so."""
        self.open.setdefault(request_id, (now, cause))
        if request_id in lane.resumed:
            lane.resumed.remove(request_id)

    def rejoined(self, lane: SimLane, request_id: int) -> None:
        """Decodes again: its stall ends with the lane's next iteration."""
        if request_id in self.open:
            lane.resumed.append(request_id)

    def iterated(self, lane: SimLane, now: int) -> None:
        """The lane's item has made tokens; before the lane's clock moves on. The first iteration of a leap counts."""
        if lane.item_iterations > 1:
            prefix, context = lane.leap_prefix, lane.leap_context
            now = lane.item_start + prefix[context + 1] - prefix[context]
        for request_id in lane.resumed:
            self.token(request_id, now)
        lane.resumed.clear()

    def token(self, request_id: int, now: int) -> None:
        """A request has a new token."""
        found = self.open.pop(request_id, None)
        if found is not None:
            columns = self.columns
            columns.request_id.append(request_id)
            columns.begin_ns.append(found[0])
            columns.end_ns.append(now)
            columns.cause.append(found[1])
