"""What a lost instance takes with it in the simulator: steps fail, lanes empty, and completed iterations stay done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.executors.simlane import SimLane
from common.types import Status, StepDone

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor


class Losses:
    """See the module docstring."""

    def __init__(self, executor: SimExecutor) -> None:
        self.executor = executor

    def fail_lane(self, lane: SimLane) -> None:
        """A stage's instance is gone: the step fails, the lane empties, its requests' KV is freed everywhere."""
        for request_id in [*lane.members, *(target.entry.request_id for target in lane.targets)]:
            self._drop_from_dead(lane, request_id)
        self._answer_failed(lane)

    def _drop_from_dead(self, lane: SimLane, request_id: int) -> None:
        """As a preemption, but the instance's doing: it is not counted as one."""
        self.executor.members.evict(lane, request_id, keep=False, cause="lost")
        self.executor.record.requests.num_preemptions[request_id] -= 1

    def lose(self, instance: int) -> None:
        """An instance died: fail its lanes; its memory is void (`Control` empties it).

        A lane elsewhere whose requests have KV here fails its step at its last boundary and loses those requests;
        the others stay in it.
        """
        for lane in list(self.executor.lanes.values()):
            if any(stage.instance == instance for stage in lane.stages):
                self.halt(lane)
                self.fail_lane(lane)
                continue
            hit = [
                request_id
                for request_id, placement in lane.spread.items()
                if any(span.instance == instance for span in placement)
            ]
            if hit:
                self.halt(lane)
                for request_id in hit:
                    self._drop_from_dead(lane, request_id)
                self._answer_failed(lane)
        for other in self.executor.instances:
            other.remote_load = {} if other.id == instance else other.remote_load
            if other.serving is None:
                self.executor.next_in_line(other, self.executor.state.now)

    def halt(self, lane: SimLane) -> None:
        """Forget the lane's item in progress; what a leap had completed by now stays done."""
        lane.due = -1
        done = self.executor.completed(lane) - lane.iteration
        if done > 0:
            self.executor.grow(lane, lane.phase.growth(lane.iteration + lane.settled, done - lane.settled))
            lane.settled = 0
            if lane.resumed:
                self.executor.stalls.iterated(lane, self.executor.state.now)
            prefix, context = lane.leap_prefix, lane.leap_context
            self.executor.note_segment(lane, lane.item_start + prefix[context + done] - prefix[context], done)
            lane.iteration += done
            lane.ran += done
        if lane.command_id is None:
            return
        for foot in lane.feet:
            foot.active -= 1
            if foot.serving is lane:
                if foot.piped:
                    self.executor.pipes.served(foot, lane.item_start, self.executor.state.now)
                foot.serving = None
            if lane in foot.fifo:
                foot.fifo.remove(lane)
        if not lane.simple:
            self.executor.pipes.ended(lane, self.executor.state.now)

    def _answer_failed(self, lane: SimLane) -> None:
        if lane.command_id is not None:
            event = StepDone(lane.command_id, lane.id, Status.FAILED, lane.ran - lane.step_from, lane.iteration,
                             (), tuple(lane.prefilled))  # fmt: skip
            self.executor.record.num_iterations += event.iterations
            self.executor.state.ready.append(event)
        command_id, lane.command_id = lane.command_id, None
        lane.prefilled.clear()
        self.executor.moves.step_ended(lane, command_id)
        if lane.id in self.executor.control.creditors:
            self.executor.control.unload(lane)
