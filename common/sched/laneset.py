"""Lanes of one route that share a queue: what a pipeline's micro-batches in flight are."""

from __future__ import annotations

from collections import deque

from common.sched.lane import Seq
from common.sched.shared import Feeder, SharedLane
from common.types import Abort, Command, Interrupt, Stage


class LaneSet:
    """Lanes of one route that share a queue: one on a whole instance, one per stage in a pipeline."""

    def __init__(self, stages: tuple[Stage, ...], lanes: list[SharedLane], waiting: deque[Seq],
                 feeder: Feeder | None) -> None:  # fmt: skip
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

    def take(self, seq: Seq, out: list[Command]) -> None:
        """Queue a request, or abort it with the reason why no lane could ever serve it."""
        reason = self.lanes[0].refusal(seq)
        if reason is not None:
            out.append(Abort(seq.request_id, reason))
        else:
            self.submit(seq, out)

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
        """A request whose KV is at the stages goes on: decoding in the emptiest lane, or at the head of the queue. One
        with pieces of it elsewhere joins the emptiest lane, whatever it computes."""
        if not seq.shared and (seq.computed < seq.known - 1 or seq.known <= seq.prompt):
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
            self.feeder.clear()
