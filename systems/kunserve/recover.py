"""A member died: its group dissolves into what still holds together, and only KV that is lost is computed anew.

Lost is the KV of every request that had some of it on the dead instance: without its layers' KV of the earlier tokens
later layers cannot be computed either (hidden states are not kept), so such a request begins anew. That is everyone
who runs in a pipeline of the dead member. Kept is who has all its KV on survivors: who was parked for a drop, also one
whose copies were under way (the source frees only after the last has arrived), and who runs on a restored survivor.

Whatever was under way is awaited first. Then the parts that merged (`Group.parts`) and are alive serve as before, once
they have loaded what they had dropped for the merge; other survivors become whole and serve alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.sched.lane import Seq
from common.sched.laneset import LaneSet
from common.sched.shared import SharedLane
from common.types import Command, FreeSpan, Stage, Status, StepDone
from systems.kunserve.core import Core
from systems.kunserve.group import Group, Parked
from systems.kunserve.restore import drained, loaded, shrink
from systems.kunserve.slices import overlap
from systems.kunserve.state import Happening, State


def lose(core: Core, instance: int, out: list[Command]) -> None:
    """The loss was told; the failures that it causes come after."""
    group = core.group_of.pop(instance, None)
    core.ledger.close(instance)
    core.missing.pop(instance, None)
    if group is None:
        return
    group.dead.add(instance)
    group.happen(Happening.LOST, core.now_ns)
    if len(group.route) > 1:
        core.mark(out, group, "lost", f"member {instance}")
    if group.exchange is not None:
        group.parked += group.exchange.call_off(out)
        group.exchange = None
    _sort_out(core, group, out)
    for found in group.all_sets():
        if _dead(group, found.stages):
            _fail(core, group, found, found.lanes, out)
    for lane_id, lane in list(group.stopping.items()):
        if _dead(group, lane.stages):
            del group.stopping[lane_id]
            _fail(core, group, core.lanes[lane_id][1], [lane], out)
    group.sets = [found for found in group.sets if not _dead(group, found.stages)]
    group.old = None
    cleared(core, group, out)


def _dead(group: Group, route: Iterable[Stage]) -> bool:
    return any(stage.instance in group.dead for stage in route)


def _sort_out(core: Core, group: Group, out: list[Command]) -> None:
    """Who is parked keeps its KV if all of it is on survivors that will serve its route again."""
    parked, group.parked = group.parked, []
    for one in parked:
        away = core.spread.instances(one.seq.request_id)
        if _dead(group, one.route) or away & group.dead or one.route not in group.parts:
            _forget(core, group, one.seq, out)
            group.queue.append(one.seq)
        else:
            group.parked.append(one)


def _forget(core: Core, group: Group, seq: Seq, out: list[Command]) -> None:
    """Free what survivors hold of a request; the ledger is counted anew when all is clear."""
    for survivor in group.members():
        out.append(FreeSpan(survivor, seq.request_id))
    core.spread.drop(seq.request_id)
    seq.computed = seq.shared = 0


def _fail(core: Core, group: Group, found: LaneSet, lanes: list[SharedLane], out: list[Command]) -> None:
    """Lanes of a route with a dead stage: the failed step tells how far a busy one got."""
    found.gone()
    held = [seq for seq in found.waiting if seq.computed]
    for lane in lanes:
        held += lane.joining
    for seq in held:
        _forget(core, group, seq, out)
    group.clearing += lanes
    for lane in lanes:
        if not lane.busy:
            _empty(core, group, lane, lane.lost(None))


def lane_stopped(core: Core, group: Group, lane: SharedLane, event: StepDone, out: list[Command]) -> None:
    """A lane over the dead member failed, or (its step ended at this very instant) is empty."""
    if event.status is not Status.OK:
        _empty(core, group, lane, lane.lost(event))
    else:
        lane.step_done(event, out)
        gone = lane.leave(out, park=False)
        gone += lane.waiting
        lane.waiting.clear()
        if lane.busy:
            group.queue += gone  # removed at this step's answer
        else:
            _empty(core, group, lane, gone)
    cleared(core, group, out)


def _empty(core: Core, group: Group, lane: SharedLane, gone: list[Seq]) -> None:
    group.clearing.remove(lane)
    del core.lanes[lane.lane]
    group.queue += gone


def cleared(core: Core, group: Group, out: list[Command]) -> None:
    """Nothing is under way any more: survivors serve again or load what they lack, the queue finds its places."""
    if group.awaited or group.clearing or group.stopping or group.state is not State.CLEARING:
        return
    group.happen(Happening.CLEARED, core.now_ns)
    del core.groups[group.id]
    _count_anew(core, group)
    parts = [found.stages for found in group.sets]
    parts += [part for part in group.parts if not _dead(group, part) and part not in parts]
    inside = {stage.instance for part in parts for stage in part}
    layers = {stage.instance: stage.layers for stage in group.route}
    parts += [(Stage(instance, layers[instance]),) for instance in group.members() if instance not in inside]
    serving = {found.stages: found for found in group.sets}
    for part in parts:
        _serve_part(core, part, serving.get(part), [one for one in group.parked if one.route == part], out)
    queue, group.queue = group.queue, []
    for seq in queue:
        core.route(seq, out)
    core.flush(out)


def _count_anew(core: Core, group: Group) -> None:
    """The survivors' ledger, from what is kept: KV of the parked, and lanes that run on."""
    for instance in group.members():
        core.ledger.open(instance, core.ledger.capacity[instance])
    for seq, route in group.parked:
        for piece_route, blocks in core.spread.pieces.get(seq.request_id, ()):
            core.ledger.take(piece_route, blocks)
        blocks = -(-seq.computed // core.engine.block_size) - core.spread.blocks(seq.request_id)
        core.ledger.take(route, max(0, blocks))
    for found in group.sets:
        for lane in found.lanes:
            core.ledger.take(found.stages, lane.held_blocks() + lane.free)
            held = sum(-(-seq.computed // core.engine.block_size) for seq in (*lane.joining, *found.waiting))
            core.ledger.take(found.stages, held)


def _serve_part(core: Core, part: tuple[Stage, ...], found: LaneSet | None, kept: list[Parked],
                out: list[Command]) -> None:  # fmt: skip
    """A part of what merged serves as it did before: at once, or when it has what it lacks."""
    if found is not None:
        group = core.new_group(part, State.DRAINING)
        group.sets = [found]
        for lane in found.lanes:
            core.lanes[lane.lane] = (group, found, lane)
        drained(core, group, out)
        return
    wants = {instance: layers if len(part) > 1 else (0, core.num_layers) for instance, layers in part}
    lacks = any(overlap(gap, wants[instance]) for instance in wants for gap in core.missing[instance])
    group = core.new_group(part, State.SHRINKING if lacks else State.LOADING)
    group.parts, group.parked, group.wants = (part,), kept, wants
    if lacks:
        shrink(core, group, out)
    else:
        loaded(core, group, out)
