"""A member died: its group dissolves. Survivors become whole again and serve alone; nobody's request is lost.

Whatever was under way is awaited first. Requests that had KV in the group are computed anew, wherever there is room.
"""

from __future__ import annotations

from common.sched.lane import Seq
from common.sched.shared import SharedLane
from common.types import Command, FreeSpan, Interrupt, Stage, Status, StepDone
from systems.kunserve.core import Core
from systems.kunserve.group import Group
from systems.kunserve.restore import shrink
from systems.kunserve.state import Happening, State


def lose(core: Core, instance: int, out: list[Command]) -> None:
    """The loss was told; the failures that it causes come after."""
    group = core.group_of.pop(instance, None)
    core.ledger.close(instance)
    core.missing.pop(instance, None)
    if group is None:
        return
    group.dead.add(instance)
    first = group.state is not State.CLEARING
    group.happen(Happening.LOST, core.now_ns)
    if len(group.route) > 1:
        core.mark(out, group, "lost", f"member {instance}")
    if not first:
        return
    held = [parked.seq for parked in group.parked]
    if group.exchange is not None:
        held += [parked.seq for parked in group.exchange.give_up()]
        group.exchange = None
    group.parked = []
    group.clearing = [*_lanes(group)]
    for found in group.all_sets():
        found.gone()
        held += [seq for seq in found.waiting if seq.computed]
        for lane in found.lanes:
            held += lane.joining
    for seq in held:
        for survivor in group.members():
            out.append(FreeSpan(survivor, seq.request_id))
        core.spread.drop(seq.request_id)
        seq.computed = seq.shared = 0
    queued = {seq.request_id for lane in group.clearing for seq in lane.waiting}
    queued |= {seq.request_id for lane in group.clearing for seq in lane.joining}
    group.queue += [seq for seq in held if seq.request_id not in queued]
    for lane in list(group.clearing):
        if not lane.busy:
            _empty(core, group, lane, lane.lost(None), out)
        elif instance not in [stage.instance for stage in lane.stages] and not lane.stopping:
            lane.stopping = True
            out.append(Interrupt(lane.lane))
    group.sets, group.old = [], None
    cleared(core, group, out)


def _lanes(group: Group) -> list[SharedLane]:
    lanes = list(group.stopping.values())
    group.stopping = {}
    return lanes + [lane for found in group.all_sets() for lane in found.lanes]


def lane_stopped(core: Core, group: Group, lane: SharedLane, event: StepDone, out: list[Command]) -> None:
    """A lane of a dissolving group failed, came to its boundary, or is empty."""
    if event.status is not Status.OK:
        _empty(core, group, lane, lane.lost(event), out)
    else:
        lane.step_done(event, out)
        gone = lane.leave(out, park=False)
        gone += lane.waiting
        lane.waiting.clear()
        if lane.busy:
            group.queue += gone  # removed at this step's answer
        else:
            _empty(core, group, lane, gone, out)
    cleared(core, group, out)


def _empty(core: Core, group: Group, lane: SharedLane, gone: list[Seq], out: list[Command]) -> None:
    group.clearing.remove(lane)
    del core.lanes[lane.lane]
    group.queue += gone


def cleared(core: Core, group: Group, out: list[Command]) -> None:
    """Nothing is under way any more: survivors start anew, the queue finds its places."""
    if group.awaited or group.clearing or group.state is not State.CLEARING:
        return
    group.happen(Happening.CLEARED, core.now_ns)
    del core.groups[group.id]
    for instance in group.members():
        base = core.cluster.instances[instance].kv_cells
        layers = next(stage.layers for stage in group.route if stage.instance == instance)
        del core.group_of[instance]
        core.ledger.open(instance, base)
        if not core.missing[instance]:
            core.serve_alone(instance, base, out)
            continue
        single = core.new_group((Stage(instance, layers),), State.SHRINKING)
        shrink(core, single, out)
    queue, group.queue = group.queue, []
    for seq in queue:
        core.route(seq, out)
    core.flush(out)
