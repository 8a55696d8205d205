"""What comes after the iteration that a lane is in, where it cannot turn out otherwise."""

from __future__ import annotations

from common.executors.simlane import SimLane


def next_is_certain(lane: SimLane) -> bool:
    """Will the lane's next iteration be the same decodes, each one token further on and in the blocks that it has? So
    it is if the lane is alone on its one instance, with no prompt in it and no copy that goes by its iterations;
    nobody finishes at the boundary to come; the step goes on; and no request needs a new block. An interrupt can still
    end the step before."""
    foot = lane.feet[0]
    if not lane.simple or foot.active != 1 or foot.fifo or foot.remote_load or lane.spread:
        return False
    if not (lane.runs_decodes and lane.members) or lane.chunks or lane.targets or lane.paced or lane.followers:
        return False
    after = lane.iteration + 1
    goes_on = not lane.stop and lane.ran + 1 < lane.limit and lane.next_finish() > after
    return goes_on and not lane.phase.next_growth(after)
