"""Everything in the simulator that is neither a step nor a move: spread placements, memory commands, instances,
timers, messages and faults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from common.errors import ContractError
from common.executors.memory import Held, InstanceMemory, overlap
from common.executors.simlane import SimLane
from common.executors.simremote import creditor_load
from common.executors.simstate import LOST, MESSAGE, TIMER, UP, SimState
from common.types import (
    Entry,
    Event,
    FreeSpan,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    MessageArrived,
    Placement,
    Progress,
    Send,
    SetTimer,
    Span,
    Stage,
    StartInstance,
    Status,
    StopInstance,
    Tier,
    TimerFired,
    Watch,
)

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor


class MessageFaults(Protocol):
    """Decides a message's fate: extra delays in ns, one per copy delivered (empty: lost)."""

    def deliveries(self, now_ns: int, message: Send) -> list[int]: ...


class Control:
    """See the module docstring."""

    def __init__(self, state: SimState, executor: SimExecutor, message_faults: MessageFaults | None) -> None:
        self.state = state
        self.executor = executor
        self.faults = message_faults
        self.creditors: dict[int, tuple[int, ...]] = {}  # lane -> instances it loads
        self._watch: dict[int, tuple[int, str]] = {}
        self._up_since: dict[int, int] = {}

    def commands(self) -> dict[type, Any]:
        """Command type -> handler."""
        return {
            FreeSpan: self._free,
            StartInstance: self._start_instance,
            StopInstance: self._stop_instance,
            SetTimer: self._set_timer,
            Watch: self._set_watch,
            Send: self._send,
        }

    def start(self, faults: tuple[tuple[int, int], ...]) -> None:
        """Announce the instances that run from the start, and plan the losses (time ns, instance)."""
        for info in self.state.cluster.instances:
            if info.running:
                self._up_since[info.instance] = 0
                event = InstanceUp(-1, info.instance, Status.OK, info.kv_cells)
                self.state.push(0, UP, info.instance, self._announce, event)
        for time_ns, instance in faults:
            self.state.push(time_ns, LOST, instance, self._lose, instance)

    def _announce(self, event: InstanceUp, _: int) -> Event | None:
        return event if self.state.up[event.instance] else None  # lost before it could serve

    def close(self) -> None:
        """The run is over: close the intervals in which instances were up."""
        for instance, since in sorted(self._up_since.items()):
            self._note_up(instance, since)
        self._up_since.clear()

    def _note_up(self, instance: int, since: int) -> None:
        self.state.record.up_intervals.setdefault(instance, []).append((since, self.state.now))

    # ------------------------------------------------------------ memory

    def _free(self, command: FreeSpan) -> None:
        memory = self.state.memory[command.instance]
        layers = memory.info.num_layers
        if command.request_id is None:
            cells = command.cached_blocks * layers
            if cells > memory.cached:
                raise ContractError(f"instance {command.instance}: {cells} cached cells evicted of {memory.cached}")
            memory.cached -= cells
            memory.give(cells)
            return
        band = command.layers or (0, layers)
        tokens = command.tokens or (0, 1 << 60)
        self.state.carve(command.request_id, command.instance, command.tier, band, tokens)
        if command.retain:
            memory.take(command.retain * layers)
            memory.cached += command.retain * layers

    # ------------------------------------------------------------ spread requests

    def _home_cells(self, placement: Placement, stage: Stage, tokens: int) -> int:
        size, cells = self.state.block_size, 0
        for span in placement:
            band = overlap(span.layers, stage.layers)
            if span.instance != stage.instance or span.tier is not Tier.HBM or band is None:
                continue
            end = tokens if span.token_end is None else min(span.token_end, tokens)
            if end > span.token_start:
                cells += (-(-end // size) - span.token_start // size) * (band[1] - band[0])
        return cells

    def _absorb(self, request_id: int, placement: Placement, stage: Stage, stored: int, have: Placement) -> None:
        """KV held at the stage's instance becomes the lane's; what is elsewhere must be there and ready."""
        state = self.state
        for span in placement:
            band = overlap(span.layers, stage.layers)
            end = stored if span.token_end is None else min(span.token_end, stored)
            if band is None or end <= span.token_start:
                continue
            tokens = (span.token_start, end)
            need = (end - span.token_start) * (band[1] - band[0])
            if span.instance == stage.instance:
                found = state.carve(request_id, span.instance, span.tier, band, tokens)
                found += _area_at(have, stage, tokens, stored)
            else:
                found = state.area(request_id, span.instance, span.tier, band, tokens)
            if found < need:
                raise ContractError(f"request {request_id}: KV of tokens {tokens}, layers {band} is not on "
                                    f"instance {span.instance}")  # fmt: skip

    def adopt(self, lane: SimLane, entry: Entry) -> None:
        """A request joins with an explicit placement."""
        placement = entry.placement
        assert placement is not None
        for stage in lane.stages:
            self._absorb(entry.request_id, placement, stage, entry.computed, ())
            cells = self._home_cells(placement, stage, entry.computed if entry.decode else entry.target)
            self.state.memory[stage.instance].take(cells)
        lane.spread[entry.request_id] = placement

    def _default(self, lane: SimLane, entry: Entry) -> Placement:
        return tuple(Span(stage.instance, stage.layers, entry.shared, None) for stage in lane.stages)

    def replace(self, lane: SimLane, request_id: int, placement: Placement) -> None:
        """At a boundary attention ownership switches: KV counted at home before and elsewhere now is freed."""
        member = lane.members.get(request_id)
        if member is not None:
            entry, stored = member.entry, member.offset + lane.iteration
            charged = stored
        else:
            target = next((t for t in lane.targets if t.entry.request_id == request_id), None)
            if target is None:
                raise ContractError(f"request {request_id} is placed but not in lane {lane.id}")
            entry, stored, charged = target.entry, target.computed, target.target
        before = lane.spread.get(request_id) or self._default(lane, entry)
        for stage in lane.stages:
            self._absorb(request_id, placement, stage, stored, before)
            memory = self.state.memory[stage.instance]
            memory.give(self._home_cells(before, stage, charged))
            memory.take(self._home_cells(placement, stage, charged))
        lane.spread[request_id] = placement
        if placement == self._default(lane, entry):
            del lane.spread[request_id]

    def release(self, lane: SimLane, entry: Entry, charged: int, keep_tokens: int) -> None:
        """A spread request leaves its lane: free its home cells, or keep them held; elsewhere likewise."""
        state, request_id = self.state, entry.request_id
        placement = lane.spread.pop(request_id)
        for stage in lane.stages:
            state.memory[stage.instance].give(self._home_cells(placement, stage, charged))
            for span in placement if keep_tokens else ():
                band = overlap(span.layers, stage.layers)
                end = keep_tokens if span.token_end is None else min(span.token_end, keep_tokens)
                if span.instance == stage.instance and band and end > span.token_start:
                    state.hold(request_id, Held(span.instance, Tier.HBM, band, span.token_start, end))
        if not keep_tokens:
            state.free_all(request_id)

    def grow_spread(self, lane: SimLane) -> None:
        """One iteration grew the open spans; where those are not at home, move the charge to where they are."""
        state, size = self.state, self.state.block_size
        for request_id, placement in lane.spread.items():
            member = lane.members.get(request_id)
            if member is None:
                continue
            stored = member.offset + lane.iteration
            for span in placement:
                if span.token_end is not None:
                    continue
                for stage in lane.stages:
                    band = overlap(span.layers, stage.layers)
                    if band is None or span.instance == stage.instance:
                        continue
                    if stored % size == 0:
                        state.memory[stage.instance].give(band[1] - band[0])
                    state.carve(request_id, span.instance, Tier.HBM, band, (span.token_start, stored))
                    state.hold(request_id, Held(span.instance, Tier.HBM, band, span.token_start, stored + 1))

    def refresh_remote(self, lane: SimLane) -> None:
        """A batch or placement changed: creditors of this lane are slowed by its remote work."""
        load = creditor_load(self.executor, lane) if lane.spread else {}
        for instance in self.creditors.get(lane.id, ()):
            if instance not in load:
                self.executor.instances[instance].remote_load.pop(lane.id, None)
                self.executor.cut_all(instance)
        for instance, share in load.items():
            self.executor.instances[instance].remote_load[lane.id] = share
            self.executor.cut_all(instance)
        if load:
            self.creditors[lane.id] = tuple(load)
        else:
            self.creditors.pop(lane.id, None)

    # ------------------------------------------------------------ instances

    def _start_instance(self, command: StartInstance) -> None:
        state = self.state
        if state.up[command.instance] or command.instance in self._up_since:
            raise ContractError(f"instance {command.instance} started but already up or starting")
        self._up_since[command.instance] = state.now  # a starting GPU is paid for
        state.push(state.now + state.cluster.startup_ns, UP, command.instance, self._started, command)

    def _started(self, command: StartInstance, _: int) -> Event | None:
        state = self.state
        if command.instance not in self._up_since:
            return InstanceUp(command.command_id, command.instance, Status.FAILED, 0)
        info = state.cluster.instances[command.instance]
        state.memory[command.instance] = InstanceMemory(info)
        state.up[command.instance] = True
        return InstanceUp(command.command_id, command.instance, Status.OK, info.kv_cells)

    def _stop_instance(self, command: StopInstance) -> None:
        state = self.state
        if state.memory[command.instance].used and state.up[command.instance]:
            raise ContractError(f"instance {command.instance} stopped while it holds KV")
        ok = state.up[command.instance]
        state.up[command.instance] = False
        since = self._up_since.pop(command.instance, None)
        if since is not None:
            self._note_up(command.instance, since)
        status = Status.OK if ok else Status.FAILED
        state.ready.append(InstanceDown(command.command_id, command.instance, status))

    def _lose(self, instance: int, _: int) -> Event | None:
        state = self.state
        if not state.up[instance]:
            return None
        state.up[instance] = False
        self._note_up(instance, self._up_since.pop(instance))
        state.ready.append(InstanceLost(instance))  # before the failures it causes
        self.executor.lose(instance)
        self.executor.moves.lose(instance)
        for request_id in list(state.held):
            for held in list(state.held.get(request_id, ())):
                if held.instance == instance:
                    state.drop_held(request_id, held)
        memory = state.memory[instance]
        if memory.used != memory.cached:
            raise ContractError(f"instance {instance} was lost but {memory.used - memory.cached} cells stay charged")
        state.memory[instance] = InstanceMemory(memory.info)
        return state.ready.popleft()

    # ------------------------------------------------------------ timers and messages

    def _set_timer(self, command: SetTimer) -> None:
        event = TimerFired(command.command_id, command.to)
        self.state.push(max(command.at_ns, self.state.now), TIMER, 0, lambda argument, _: argument, event)

    def _set_watch(self, command: Watch) -> None:
        if command.period_ns:
            self._watch[command.instance] = (command.period_ns, command.to)
            self.state.push(self.state.now + command.period_ns, TIMER, 0, self._watched, command)
        else:
            self._watch.pop(command.instance, None)

    def _watched(self, command: Watch, _: int) -> Event | None:
        if self._watch.get(command.instance) != (command.period_ns, command.to) or not self.state.up[command.instance]:
            return None
        self.state.push(self.state.now + command.period_ns, TIMER, 0, self._watched, command)
        return Progress(command.instance, self.executor.lanes_of(command.instance), command.to)

    def _send(self, command: Send) -> None:
        event = MessageArrived(command.sender, command.to, command.payload)
        extra = self.faults.deliveries(self.state.now, command) if self.faults is not None else [0]
        for delay in extra:
            at_ns = self.state.now + self.state.cluster.control_ns + delay
            self.state.push(at_ns, MESSAGE, 0, lambda argument, _: argument, event)


def _area_at(placement: Placement, stage: Stage, tokens: tuple[int, int], stored: int) -> int:
    """Token-layers of a rectangle that a placement already has at a stage."""
    total = 0
    for span in placement:
        band = overlap(span.layers, stage.layers)
        if span.instance == stage.instance and band:
            end = stored if span.token_end is None else min(span.token_end, stored)
            total += max(0, min(end, tokens[1]) - max(span.token_start, tokens[0])) * (band[1] - band[0])
    return total
