"""Bubbles in the simulator: how long each instance of a pipeline idles while the pipeline has work.

An instance is *in work* while a lane of several stages that has a stage on it runs a step, wherever in the pipeline
that step is; it is busy while it serves an item of any lane. Idle = in work, not busy. Rows are pieces of such time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.executors.simlane import SimLane
from common.record import StageColumns

if TYPE_CHECKING:
    from common.executors.sim import SimInstance

PIECE_NS = 1_000_000_000  # longer times in work are cut into rows of about so long


class Pipes:
    """Counts time in work and busy time per instance, in ns."""

    def __init__(self, columns: StageColumns) -> None:
        self.columns = columns
        self._begin: dict[int, int] = {}  # instance -> start of the row under way
        self._end: dict[int, int] = {}  # instance -> where it was last in work
        self._busy: dict[int, int] = {}
        self._counted: dict[int, int] = {}  # instance -> busy time is counted up to here

    def started(self, lane: SimLane, now: int) -> None:
        """A lane of several stages runs a step from now on."""
        for foot in lane.feet:
            foot.piped += 1
            if foot.piped == 1 and self._end.get(foot.id) != now:
                self._write(foot.id)
                self._begin[foot.id] = self._counted[foot.id] = now
                self._busy[foot.id] = 0

    def served(self, instance: SimInstance, start: int, now: int) -> None:
        """The instance, in work, was busy from `start` to now."""
        ident = instance.id
        self._busy[ident] += now - max(start, self._counted[ident])
        self._counted[ident] = now
        if now - self._begin[ident] >= PIECE_NS:
            self._end[ident] = now
            self._write(ident)
            self._begin[ident], self._busy[ident] = now, 0

    def ended(self, lane: SimLane, now: int) -> None:
        """The lane's step is over."""
        for foot in lane.feet:
            foot.piped -= 1
            if not foot.piped:
                if foot.serving is not None:
                    self.served(foot, foot.serving.item_start, now)
                self._end[foot.id] = self._counted[foot.id] = now

    def close(self, instances: list[SimInstance], now: int) -> None:
        """Write what is not yet written."""
        for instance in instances:
            if instance.piped:
                self._end[instance.id] = now
            self._write(instance.id)
        self._begin.clear()

    def _write(self, ident: int) -> None:
        begin, end = self._begin.get(ident), self._end.get(ident, 0)
        if begin is not None and end > begin:
            columns = self.columns
            columns.start_ns.append(begin)
            columns.end_ns.append(end)
            columns.instance.append(ident)
            columns.busy_ns.append(self._busy[ident])
