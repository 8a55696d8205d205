"""A group of instances that hold one copy of the model together, and the sets of lanes that serve on it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from common.sched.lane import Seq
from common.sched.shared import SharedLane
from common.types import Command, Interrupt, Stage
from systems.kunserve.feeder import LookaheadFeeder
from systems.kunserve.state import Happening, State, advance

if TYPE_CHECKING:
    from systems.kunserve.exchange import Exchange


class LaneSet:
    """Lanes of one route that share a queue: one on a whole instance, one per stage in a pipeline."""

    def __init__(self, stages: tuple[Stage, ...], lanes: list[SharedLane], waiting: deque[Seq],
                 feeder: LookaheadFeeder | None) -> None:  # fmt: skip
        self.stages = stages
        self.lanes = lanes
        self.waiting = waiting
        self.feeder = feeder
        self.chosen = 0  # when the dispatcher last chose it

    def outstanding(self) -> int:
        """Requests waiting, joining and running."""
        total = len(self.waiting)
        for lane in self.lanes:
            total += len(lane.running) + len(lane.joining)
        return total

    def submit(self, seq: Seq, out: list[Command]) -> None:
        """Queue a request; start an idle lane, or end the step of the emptiest, if it could run there."""
        if len(self.lanes) == 1:
            self.lanes[0].submit(seq, out)
            return
        self.waiting.append(seq)
        self.wake(out)
        if seq in self.waiting and not any(lane.stopping for lane in self.lanes):
            emptiest = min(self.lanes, key=lambda lane: len(lane.running))
            if emptiest.busy and not emptiest.closed and emptiest._may_start(seq):
                emptiest.stopping = True
                out.append(Interrupt(emptiest.lane))

    def wake(self, out: list[Command]) -> None:
        """Lanes that idle may have something to do now."""
        for lane in self.lanes:
            if not lane.busy and (lane.waiting or lane.joining):
                lane.schedule(out)

    def join(self, seq: Seq, out: list[Command]) -> None:
        """A request whose KV is at the stages goes on: decoding in the emptiest lane, or at the head of the queue."""
        if seq.computed < seq.known - 1 or seq.known <= seq.prompt:
            self.waiting.appendleft(seq)
            if self.feeder is not None:
                self.feeder.stop()
            self.wake(out)
            return
        lane = min(self.lanes, key=lambda one: len(one.running) + len(one.joining))
        lane.joining.append(seq)
        if not lane.busy:
            lane.schedule(out)
        elif not lane.stopping:
            lane.stopping = True
            out.append(Interrupt(lane.lane))

    def close(self, closed: bool) -> None:
        """Stop or start admitting what waits."""
        for lane in self.lanes:
            lane.closed = closed

    def gone(self) -> None:
        """Forget the cut of the queue."""
        if self.feeder is not None:
            self.feeder.stop()
            self.feeder.front.clear()


class Parked(NamedTuple):
    """A request outside lanes with its KV of `seq.computed` tokens along a route."""

    seq: Seq
    route: tuple[Stage, ...]


class Group:
    """`route`: who keeps which layers; of an instance on its own, all of them. `sets` take requests in; `old` is the
    pipeline that drains after a restore."""

    def __init__(self, ident: int, route: tuple[Stage, ...], state: State, now_ns: int) -> None:
        self.id = ident
        self.route = route
        self.state = state
        self.since_ns = now_ns
        self.sets: list[LaneSet] = []
        self.old: LaneSet | None = None
        self.stopping: dict[int, SharedLane] = {}  # lanes on their way to their last boundary
        self.parked: list[Parked] = []
        self.queue: list[Seq] = []  # waits while the group can admit nothing
        self.awaited: set[int] = set()  # commands under way
        self.exchange: Exchange | None = None
        self.clearing: list[SharedLane] = []  # lanes that a loss stops
        self.dead: set[int] = set()
        self.owed = 0  # loads that failed: to be tried again, or given up

    def members(self) -> list[int]:
        """Instances that are alive."""
        return [stage.instance for stage in self.route if stage.instance not in self.dead]

    def all_sets(self) -> list[LaneSet]:
        """Those that take requests in, and the one that drains."""
        return self.sets if self.old is None else [*self.sets, self.old]

    def happen(self, happening: Happening, now_ns: int) -> None:
        """Follow an arrow of the table; an illegal one raises and changes nothing."""
        self.state = advance(self.state, happening)
        self.since_ns = now_ns
