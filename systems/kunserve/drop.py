"""From whole copies (or shorter pipelines) to one pipeline: park, drop, and serve again (sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from common.errors import ContractError
from common.sched.laneset import LaneSet
from common.sched.shared import SharedLane
from common.types import Command, DropLayers, Interrupt, Layers, LayersDropped, Status, StepDone
from systems.kunserve.core import Core
from systems.kunserve.exchange import Exchange
from systems.kunserve.group import Group, Parked
from systems.kunserve.restore import drained
from systems.kunserve.slices import merge_slices, without
from systems.kunserve.state import Happening, State
from systems.kunserve.stay import stay


def merge(core: Core, groups: Sequence[Group], out: list[Command]) -> bool:
    """Begin to make one group of several; False where no contiguous slices exist."""
    route = groups[0].route
    for group in groups[1:]:
        merged = merge_slices(route, group.route)
        if merged is None:
            return False
        route = merged
    new = core.new_group(route, State.PARKING)
    new.parts = tuple(group.route for group in groups)
    core.mark(out, new, "overload")
    for group in groups:
        group.happen(Happening.MERGE, core.now_ns)
        del core.groups[group.id]
        for found in group.sets:
            _stop(core, new, found, out)
    _parked(core, new, out)
    return True


def drop_again(core: Core, group: Group, out: list[Command]) -> None:
    """Overloaded before the old pipeline has drained: back into it, by the same slices."""
    group.happen(Happening.OVERLOAD, core.now_ns)
    core.mark(out, group, "overload", "again")
    sets, group.sets = group.sets, []
    group.parts = tuple(found.stages for found in sets)
    for found in sets:
        _stop(core, group, found, out)
    _parked(core, group, out)


def _stop(core: Core, new: Group, found: LaneSet, out: list[Command]) -> None:
    """Let the lanes of a set come to their boundary and park what they have; the queue waits in the new group."""
    found.gone()
    for seq in found.waiting:
        if not seq.computed:
            new.queue.append(seq)
    new.parked += [Parked(seq, found.stages) for seq in found.waiting if seq.computed]
    found.waiting.clear()
    for lane in found.lanes:
        lane.feeder = None if not lane.pieces else lane.feeder
        core.lanes[lane.lane] = (new, found, lane)
        new.stopping[lane.lane] = lane
        if not lane.busy:
            _park(core, new, found, lane, out)
        elif not lane.stopping:
            lane.stopping = True
            out.append(Interrupt(lane.lane))


def lane_stopped(core: Core, group: Group, found: LaneSet, event: StepDone, out: list[Command]) -> None:
    """A lane on its way out has come to a boundary: park, or it has parked."""
    lane = group.stopping[event.lane]
    lane.step_done(event, out)
    _park(core, group, found, lane, out)
    _parked(core, group, out)


def _park(core: Core, group: Group, found: LaneSet, lane: SharedLane, out: list[Command]) -> None:
    for seq in lane.leave(out, park=True):
        if seq.computed:
            group.parked.append(Parked(seq, found.stages))
        else:
            group.queue.append(seq)
    if not lane.busy:
        del group.stopping[lane.lane]
        del core.lanes[lane.lane]


def _parked(core: Core, group: Group, out: list[Command]) -> None:
    if group.stopping or group.state is not State.PARKING:
        return
    group.happen(Happening.PARKED, core.now_ns)
    for instance, keep in group.route:
        for part in without((0, core.num_layers), keep):
            for layers in _held(core, instance, part):
                then = partial(_dropped, core, group, instance, layers)
                core.ask(group, out, DropLayers, instance, layers, then=then)


def _held(core: Core, instance: int, part: Layers) -> list[Layers]:
    """What an instance still has of some layers."""
    left = [part]
    for gap in core.missing[instance]:
        left = [rest for piece in left for rest in without(piece, gap)]
    return left


def _dropped(core: Core, group: Group, instance: int, layers: Layers, event: LayersDropped,
             out: list[Command]) -> None:  # fmt: skip
    if event.status is Status.OK and instance in core.ledger.free:
        core.missing[instance] = sorted([*core.missing[instance], layers])
        core.ledger.resize(instance, event.kv_cells)
    if group.awaited or group.state is not State.DROPPING:
        return
    if event.status is not Status.OK:
        raise ContractError(f"instance {instance}: layers {layers} were not dropped")
    group.happen(Happening.DROPPED, core.now_ns)
    blocks, spare = core.ledger.whole_blocks(group.route)
    moves = "stay" if core.options.mode == "remote_attention" else "to exchange"
    core.mark(out, group, "drop", f"{len(group.parked)} {moves}, {len(group.queue)} queued, "
              f"{blocks} blocks, {spare} cells wasted")  # fmt: skip
    pipe, group.old = group.old or core.lane_set(group, group.route), None
    group.sets = [pipe]
    for lane in pipe.lanes:
        lane.resized()
    if core.options.exchange == "recompute" and core.options.mode == "pipeline":
        for parked in group.parked:
            core.free_held(parked.seq, parked.route, out)
            group.queue.append(parked.seq)
        group.parked = []
    pipe.waiting.extend(sorted(group.queue, key=lambda seq: seq.request_id))
    group.queue = []
    if core.options.mode == "remote_attention":
        stay(core, group, pipe, out)
    else:
        group.exchange = Exchange(core, group, pipe)
        group.exchange.pump(out)
    core.settle(group, out)
    drained(core, group, out)
