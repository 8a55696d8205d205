"""Parameters come back while the pipeline serves: give up the extension, pull layers from peers, serve locally."""

from __future__ import annotations

from typing import NamedTuple

from common.types import Command, Layers, LayersLoaded, LoadLayers, ShrinkDone, ShrinkKV, Stage, Status
from systems.kunserve.core import Core
from systems.kunserve.group import Group
from systems.kunserve.slices import overlap, without
from systems.kunserve.state import Happening, State

LOW_PRIORITY = -1
MAX_ATTEMPTS = 6  # loads of the same layers: from a peer, from another, then from the host


def begin(core: Core, group: Group, out: list[Command]) -> bool:
    """Give up the extension cells; False while more is in use than is left without them."""
    ledger = core.ledger
    if group.awaited:
        return False
    for instance in group.members():
        base = core.cluster.instances[instance].kv_cells
        if ledger.capacity[instance] - ledger.free[instance] > base:
            return False
    group.happen(Happening.CALM, core.now_ns)
    core.mark(out, group, "restore")
    shrink(core, group, out)
    return True


def shrink(core: Core, group: Group, out: list[Command]) -> None:
    """Ask every member for the pages of the layers that it wants."""
    for instance in group.members():
        cells = core.cells_with(group, instance)
        core.ledger.resize(instance, cells)
        core.ask(group, out, ShrinkKV, instance, cells, then=lambda event, out: _shrunk(core, group, event, out))
    for found in group.sets:
        for lane in found.lanes:
            lane.resized()


def _shrunk(core: Core, group: Group, event: ShrinkDone, out: list[Command]) -> None:
    if group.awaited or group.state is not State.SHRINKING:
        return
    assert event.status is Status.OK, "the ledger had seen to it that there was room"
    group.happen(Happening.SHRUNK, core.now_ns)
    for instance in group.members():
        want = group.wants.get(instance, (0, core.num_layers))
        for gap in [part for gap in core.missing[instance] if (part := overlap(gap, want)) is not None]:
            for source, part in _sources(core, group, instance, gap):
                _load(core, group, Wanted(instance, part), source, out)
    loaded(core, group, out)


def _sources(core: Core, group: Group, instance: int, gap: Layers) -> list[tuple[int | None, Layers]]:
    """Who has missing layers: the member that serves each, else any instance that is whole, else the host."""
    found: list[tuple[int | None, Layers]] = []
    left = [gap]
    for peer, layers in group.route:
        if peer != instance and peer not in group.dead:
            common = overlap(gap, layers)
            if common is not None:
                found.append((peer, common))
                left = [rest for part in left for rest in without(part, common)]
    return found + [(_whole_peer(core, instance, part), part) for part in left]


def _whole_peer(core: Core, instance: int, part: Layers, but: tuple[int | None, ...] = ()) -> int | None:
    """Another group's instance that has these layers and will not drop them meanwhile, nearest first."""
    node = core.cluster.instances[instance].node
    peers = [peer for peer, missing in core.missing.items()
             if peer not in (instance, *but) and core.group_of[peer].state in (State.SERVING, State.PIPELINE)
             and not any(overlap(gap, part) for gap in missing)]  # fmt: skip
    return min(peers, key=lambda peer: (core.cluster.instances[peer].node != node, peer), default=None)


class Wanted(NamedTuple):
    """Layers that an instance has asked for. `tried`: who did not deliver them, None is the host."""

    instance: int
    part: Layers
    tried: tuple[int | None, ...] = ()


def _load(core: Core, group: Group, wanted: Wanted, source: int | None, out: list[Command]) -> None:
    instance, part, _ = wanted
    if source is not None:
        core.lending[source] = core.lending.get(source, 0) + 1

    def then(event: LayersLoaded, out: list[Command]) -> None:
        if source is not None:
            core.lending[source] -= 1
        if instance not in core.missing:
            return  # it died
        if event.status is Status.OK:
            gaps = [rest for gap in core.missing[instance] for rest in without(gap, part)]
            core.missing[instance] = gaps
            core.ledger.resize(instance, event.kv_cells)
        elif group.state is State.LOADING:
            _failed(core, group, wanted._replace(tried=(*wanted.tried, source)), out)
            return
        loaded(core, group, out)

    core.ask(group, out, LoadLayers, instance, part, source, priority=LOW_PRIORITY,
             piece_bytes=core.options.piece_bytes or (1 << 24), then=then)  # fmt: skip


def _failed(core: Core, group: Group, wanted: Wanted, out: list[Command]) -> None:
    """The source died, or does not deliver: another whole peer at once, then the host after 1, 2, 4 ... polls. In the
    end a pipeline that serves gives up and goes on as one; who serves nothing meanwhile sends its requests away, and
    tries on from time to time."""
    instance, part, tried = wanted
    what = f"instance {instance} layers {part[0]}-{part[1]}"
    if len(tried) == MAX_ATTEMPTS:
        core.mark(out, group, "load_given_up", f"{what} after {len(tried)} attempts")
        if group.sets:
            group.gave_up = True
            loaded(core, group, out)
            return
        _send_away(core, group, out)
    group.owed += 1

    def again(out: list[Command]) -> None:
        if group.state is not State.LOADING or instance not in core.missing:
            return  # a member died meanwhile: survivors begin anew
        group.owed -= 1
        if group.gave_up:
            loaded(core, group, out)
            return
        source = _whole_peer(core, instance, part, tried) if len(tried) == 1 else None
        core.mark(out, group, "load_again", f"{what} from {'the host' if source is None else f'instance {source}'}")
        _load(core, group, wanted, source, out)

    if len(tried) == 1:
        again(out)
    else:
        wait = core.options.limits.poll_ns << min(len(tried) - 2, MAX_ATTEMPTS)
        core.later.append((core.now_ns + wait, again))


def _send_away(core: Core, group: Group, out: list[Command]) -> None:
    """Requests that waited for these survivors are computed anew by others."""
    parked, group.parked = group.parked, []
    for seq, route in parked:
        core.free_held(seq, route, out)
        core.route(seq, out)


def loaded(core: Core, group: Group, out: list[Command]) -> None:
    """Members have what they want. All whole: new requests run locally, old ones finish in the pipeline. Their slices,
    or less than hoped for: the pipeline goes on."""
    if group.awaited or group.owed or group.state is not State.LOADING:
        return
    if group.gave_up or len(group.wants) > 1:
        _resume(core, group, out)
        return
    group.happen(Happening.LOADED, core.now_ns)
    core.mark(out, group, "restored")
    if group.sets:
        [group.old] = group.sets
    whole = (0, core.num_layers)
    group.sets = [core.lane_set(group, (Stage(instance, whole),)) for instance in group.members()]
    _rejoin(core, group, out)
    core.flush(out)
    drained(core, group, out)


def _resume(core: Core, group: Group, out: list[Command]) -> None:
    """Pages that no load has taken are the KV range's again; who was parked goes on."""
    group.happen(Happening.RESUMED, core.now_ns)
    core.mark(out, group, "resumed")
    group.gave_up, group.wants = False, {}
    if not group.sets:
        group.sets = [core.lane_set(group, group.route)]
    for instance in group.members():
        cells = core.cells_without(instance)

        def then(event: ShrinkDone, out: list[Command], instance: int = instance, cells: int = cells) -> None:
            if event.status is Status.OK and instance in core.ledger.free:
                core.ledger.resize(instance, cells)
                for lane in [lane for found in group.all_sets() for lane in found.lanes]:
                    lane.resized()

        if cells > core.ledger.capacity[instance]:
            core.ask(group, out, ShrinkKV, instance, cells, then=then)
    _rejoin(core, group, out)
    core.flush(out)


def _rejoin(core: Core, group: Group, out: list[Command]) -> None:
    """Requests that kept their KV through a loss go on where it is."""
    parked, group.parked, group.parts = group.parked, [], ()
    for seq, route in parked:
        found = next(found for found in group.sets if found.stages == route)
        seq.shared = core.spread.blocks(seq.request_id)
        found.join(seq, out)


def drained(core: Core, group: Group, out: list[Command]) -> None:
    """Queued requests of the old pipeline run locally; when it is empty every member is on its own."""
    if group.state is not State.DRAINING:
        return
    old = group.old
    if old is not None:
        fresh = [seq for seq in old.waiting if not seq.computed]
        if fresh:
            kept = [seq for seq in old.waiting if seq.computed]
            old.waiting.clear()
            old.waiting.extend(kept)
            if old.feeder is not None:
                old.feeder.stop()
            for seq in fresh:
                core.route(seq, out)
        if old.outstanding() or any(lane.busy for lane in old.lanes):
            return
    if any(seq.computed for found in group.sets for seq in (*found.waiting, *found.lanes[0].joining)):
        return  # they have KV that no lane owns yet
    if old is not None:
        for lane in old.lanes:
            lane.hand_back()
            del core.lanes[lane.lane]
    group.happen(Happening.DRAINED, core.now_ns)
    core.mark(out, group, "drained")
    del core.groups[group.id]
    for found in group.sets:
        single = core.new_group(found.stages, State.SERVING)
        single.sets = [found]
        for lane in found.lanes:
            core.lanes[lane.lane] = (single, found, lane)
            lane.own_all(core.engine)
            if not lane.busy and lane.waiting:
                lane.schedule(out)
