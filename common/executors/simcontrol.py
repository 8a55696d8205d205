"""Everything in the simulator that is neither a step nor a move: spread placements, memory commands, instances,
timers, messages and faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.errors import ContractError
from common.executors.memory import Held, InstanceMemory, overlap
from common.executors.simfaults import Agents, MessageFaults
from common.executors.simlane import SimLane
from common.executors.simremote import creditor_load
from common.executors.simstate import LOST, MESSAGE, TIMER, UP, SimState
from common.kv.plane import first_flaw
from common.types import (
    Entry,
    Event,
    FreeSpan,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    Layers,
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


class Control:
    """See the module docstring."""

    def __init__(self, state: SimState, executor: SimExecutor, message_faults: MessageFaults | None) -> None:
        self.state = state
        self.executor = executor
        self.faults = message_faults
        self.agents = Agents(state)
        self.creditors: dict[int, tuple[int, ...]] = {}  # lane -> instances it loads
        self._watch: dict[tuple[int, str], int] = {}  # (instance, agent) -> sequence number of the next report
        self._spread: dict[int, SimLane] = {}  # requests in a lane with a placement of their own
        self._starting: dict[int, StartInstance] = {}
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

    def start(self, faults: tuple[tuple[int, int], ...], agent_faults: tuple[tuple[int, str, int], ...]) -> None:
        """Announce the instances that run from the start, and plan the losses: (time ns, instance) and
        (time ns, agent, ns until it is back)."""
        for info in self.state.cluster.instances:
            if info.running:
                self._up_since[info.instance] = 0
                event = InstanceUp(-1, info.instance, Status.OK, info.kv_cells)
                self.state.push(0, UP, info.instance, self._announce, event)
        for time_ns, instance in faults:
            self.lose_at(time_ns, instance)
        for time_ns, agent, restart_ns in agent_faults:
            self.agents.plan(time_ns, agent, restart_ns)

    def lose_at(self, time_ns: int, instance: int) -> None:
        """Plan a loss."""
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
        """Free cached blocks, or a request's KV outside lanes; what of it is retained becomes cached."""
        state, instance, tier = self.state, command.instance, command.tier
        if not state.up[instance]:
            return  # it died on the way: nothing is left to free
        memory = state.memory[instance]
        layers = command.layers or (0, memory.info.num_layers)
        if command.request_id is None:
            self._evict_cached(memory, command.cached_blocks * (layers[1] - layers[0]), tier)
            return
        tokens = command.tokens or (0, 1 << 60)
        lane = self._spread.get(command.request_id)
        for span in lane.spread[command.request_id] if lane is not None else ():
            if span.instance == instance and tier is span.tier and _common(span, layers, tokens):
                raise ContractError(f"request {command.request_id}: KV on instance {instance} freed while in use")
        self.executor.moves.freed(command.request_id, instance, tier, layers, tokens)
        before = memory.used, memory.host_used
        state.carve(command.request_id, instance, tier, layers, tokens)
        cells = command.retain * (layers[1] - layers[0])
        if tier is Tier.HBM:
            freed = before[0] - memory.used
            memory.take(cells)
            memory.cached += cells
        else:
            freed = before[1] - memory.host_used
            memory.host_used += cells
            memory.host_cached += cells
        if cells > freed:
            raise ContractError(f"instance {instance}: {cells} cells retained of {freed} freed ones")

    @staticmethod
    def _evict_cached(memory: InstanceMemory, cells: int, tier: Tier) -> None:
        have = memory.cached if tier is Tier.HBM else memory.host_cached
        if cells > have:
            raise ContractError(f"instance {memory.info.instance}: {cells} cached cells evicted of {have}")
        if tier is Tier.HBM:
            memory.cached -= cells
            memory.give(cells)
        else:
            memory.host_cached -= cells
            memory.host_used -= cells

    # ------------------------------------------------------------ spread requests

    def default(self, lane: SimLane, entry: Entry) -> Placement:
        """One open span per stage at that stage's instance."""
        return tuple(Span(stage.instance, stage.layers, entry.shared, None) for stage in lane.stages)

    def _check(self, lane: SimLane, entry: Entry, placement: Placement) -> None:
        """A placement tiles the tokens from `shared` on, cut at block borders; new KV goes where its position falls."""
        size = self.state.block_size
        layers = self.state.cluster.of(lane.stages[0].instance).num_layers
        if any(span.token_start % size or (span.token_end or 0) % size for span in placement):
            raise ContractError(f"request {entry.request_id}: {placement} is not cut at block borders")
        first = (Span(lane.stages[0].instance, (0, layers), 0, entry.shared),) if entry.shared else ()
        flaw = first_flaw(first + placement, layers, 1 << 40)
        if flaw is not None:
            raise ContractError(f"request {entry.request_id}: {flaw}")
        for span in placement:
            open_there = span.tier is not Tier.HBM and span.token_end is None
            if open_there or not self.state.up[span.instance]:
                raise ContractError(f"request {entry.request_id}: {span} cannot be read by attention")

    def _home_cells(self, placement: Placement, stage: Stage, tokens: int) -> int:
        size, cells = self.state.block_size, 0
        for span in placement:
            band = overlap(span.layers, stage.layers)
            if _at_home(span, stage) and band is not None:
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
            if _at_home(span, stage):
                found = state.carve(request_id, span.instance, Tier.HBM, band, tokens)
                found += _area_at(have, stage, band, tokens, stored)
            else:
                found = state.area(request_id, span.instance, span.tier, band, tokens)
            if found < need:
                raise ContractError(f"request {request_id}: KV of tokens {tokens}, layers {band} is not (yet) on "
                                    f"instance {span.instance}")  # fmt: skip

    def _away(self, placement: Placement, stage: Stage, start: int, end: int) -> Iterator[Held]:
        """Rectangles of tokens [start, end) that a stage's placement puts on other instances, or in host memory."""
        for span in placement:
            last = span.token_end
            if (last is not None and last <= start) or span.token_start >= end or _at_home(span, stage):
                continue  # most spans, when it is the newest token that is looked for
            band = overlap(span.layers, stage.layers)
            low, high = max(start, span.token_start), end if last is None else min(end, last)
            if band is not None and low < high:
                yield Held(span.instance, span.tier, band, low, high)

    def adopt(self, lane: SimLane, entry: Entry) -> None:
        """A request joins with a placement of its own; what its prefill will append elsewhere is booked there."""
        placement = entry.placement
        assert placement is not None
        self._check(lane, entry, placement)
        charged = entry.computed if entry.decode else entry.target
        for stage in lane.stages:
            self._absorb(entry.request_id, placement, stage, entry.computed, ())
            self.state.memory[stage.instance].take(self._home_cells(placement, stage, charged))
            for held in self._away(placement, stage, entry.computed, charged):
                self.state.hold(entry.request_id, held)
        lane.spread[entry.request_id] = placement
        self._spread[entry.request_id] = lane

    def replace(self, lane: SimLane, request_id: int, placement: Placement) -> None:
        """At a boundary attention ownership switches: KV counted at home before and elsewhere now is freed."""
        entry, stored, charged = self._standing(lane, request_id)
        self._check(lane, entry, placement)
        before = lane.spread.get(request_id) or self.default(lane, entry)
        for stage in lane.stages:
            for held in self._away(before, stage, stored, charged):
                self.state.carve(request_id, held.instance, held.tier, held.layers, (held.start, held.end))
            self._absorb(request_id, placement, stage, stored, before)
            memory = self.state.memory[stage.instance]
            memory.give(self._home_cells(before, stage, charged))
            memory.take(self._home_cells(placement, stage, charged))
            for held in self._away(placement, stage, stored, charged):
                self.state.hold(request_id, held)
        lane.spread[request_id] = placement
        self._spread[request_id] = lane
        if placement == self.default(lane, entry):
            del lane.spread[request_id], self._spread[request_id]

    def _standing(self, lane: SimLane, request_id: int) -> tuple[Entry, int, int]:
        """Entry, stored tokens and charged tokens of a request in a lane."""
        member = lane.members.get(request_id)
        if member is not None:
            stored = member.offset + self.executor.completed(lane)
            return member.entry, stored, stored
        for target in lane.targets:
            if target.entry.request_id == request_id:
                return target.entry, target.computed, target.target
        raise ContractError(f"request {request_id} is placed but not in lane {lane.id}")

    def area_in_lanes(self, request_id: int, instance: int, layers: Layers, tokens: tuple[int, int]) -> int:
        """Token-layers of a request's KV inside a rectangle that lanes own or share at an instance, as of now."""
        total = 0
        for lane in self.executor.lanes.values():
            if request_id not in lane.members and all(t.entry.request_id != request_id for t in lane.targets):
                continue
            entry, stored, _ = self._standing(lane, request_id)
            placement = lane.spread.get(request_id) or self.default(lane, entry)
            for stage in lane.stages:
                if stage.instance == instance:
                    total += _area_at(placement, stage, layers, tokens, stored)
                    total += _area_at((Span(instance, stage.layers, 0, None),), stage, layers, tokens, entry.shared)
        return total

    def release(self, lane: SimLane, entry: Entry, charged: int, keep_tokens: int) -> None:
        """A spread request leaves its lane: free its home cells, or keep them held; elsewhere likewise."""
        state, request_id = self.state, entry.request_id
        placement = lane.spread.pop(request_id)
        del self._spread[request_id]
        for stage in lane.stages:
            state.memory[stage.instance].give(self._home_cells(placement, stage, charged))
            if not keep_tokens:
                continue
            for span in placement:
                band = overlap(span.layers, stage.layers)
                end = keep_tokens if span.token_end is None else min(span.token_end, keep_tokens)
                if _at_home(span, stage) and band and end > span.token_start:
                    state.hold(request_id, Held(span.instance, Tier.HBM, band, span.token_start, end))
            for held in self._away(placement, stage, keep_tokens, charged):
                state.carve(request_id, held.instance, held.tier, held.layers, (held.start, held.end))
        if not keep_tokens:
            state.free_all(request_id)

    def grow_spread(self, lane: SimLane) -> list[int]:
        """An iteration appends a token to every decoding request: where its position is placed elsewhere, it is held
        there. Returns the cells of new blocks that are not at home, by stage."""
        size = self.state.block_size
        elsewhere = [0] * len(lane.stages)
        for request_id, placement in lane.spread.items():
            member = lane.members.get(request_id)
            if member is None:
                continue
            position = member.offset + lane.iteration
            for index, stage in enumerate(lane.stages):
                for held in self._away(placement, stage, position, position + 1):
                    self._append(request_id, held)
                    if position % size == 0:
                        elsewhere[index] += held.layers[1] - held.layers[0]
        return elsewhere

    def _append(self, request_id: int, token: Held) -> None:
        """Lengthen what is held up to a token by that token."""
        for held in self.state.held.get(request_id, ()):
            same = (held.instance, held.tier, held.layers) == (token.instance, token.tier, token.layers)
            if same and held.end == token.start and held.ready and token.tier is Tier.HBM:
                if token.start % self.state.block_size == 0:
                    self.state.memory[token.instance].take(token.layers[1] - token.layers[0])
                held.end += 1
                return
        self.state.hold(request_id, token)

    def check_behind(self, lane: SimLane, entry: Entry) -> None:
        """An entry may follow a lane of the same route whose iteration in flight reaches the entry's first token."""
        front = self.executor.lanes.get(entry.behind if entry.behind is not None else -1)
        if front is not None and front is not lane and front.command_id is not None and front.stages == lane.stages:
            for chunk, target in zip(front.chunks, front.targets):
                if (target.entry.request_id == entry.request_id and not target.entry.sample
                        and target.computed + chunk == target.target == entry.computed
                        and entry.computed % self.state.block_size == 0
                        and not (entry.decode or entry.placement or target.entry.placement)):  # fmt: skip
                    return
        raise ContractError(f"request {entry.request_id}: lane {entry.behind} is not about to compute its tokens up "
                            f"to {entry.computed} in front of lane {lane.id}")  # fmt: skip

    def refresh_remote(self, lane: SimLane) -> None:
        """The lane's next iteration is priced: its creditors are slowed by its remote work until the next one."""
        self.load_creditors(lane, creditor_load(lane))

    def load_creditors(self, lane: SimLane, load: dict[int, float]) -> None:
        """These instances give these shares of their time to the lane, and no others do."""
        for instance in self.creditors.get(lane.id, ()):
            if instance not in load:
                self.executor.instances[instance].remote_load.pop(lane.id, None)
        for instance, share in load.items():
            self.executor.instances[instance].remote_load[lane.id] = share
            self.executor.cut_all(instance)
        if load:
            self.creditors[lane.id] = tuple(load)
        else:
            self.creditors.pop(lane.id, None)

    def unload(self, lane: SimLane) -> None:
        """The lane's step is over: its creditors are free of it."""
        for instance in self.creditors.pop(lane.id, ()):
            self.executor.instances[instance].remote_load.pop(lane.id, None)

    # ------------------------------------------------------------ instances

    def _start_instance(self, command: StartInstance) -> None:
        state, instance = self.state, command.instance
        if state.up[instance] or instance in self._starting:
            raise ContractError(f"instance {instance} started but already up or starting")
        for other in state.cluster.rivals(instance) if state.cluster.pools else ():
            if state.up[other] or other in self._starting:
                raise ContractError(f"instance {instance} started on a GPU where instance {other} is up or starting")
        self._up_since[instance] = state.now  # a starting GPU is paid for
        self._starting[instance] = command
        state.push(state.now + state.cluster.of(instance).startup_ns, UP, instance, self._started, command)

    def _started(self, command: StartInstance, _: int) -> Event | None:
        state, instance = self.state, command.instance
        if self._starting.get(instance) is not command:
            return None  # stopped or lost before it was up, and answered then
        del self._starting[instance]
        info = state.cluster.instances[instance]
        state.memory[instance] = InstanceMemory(info)
        state.up[instance] = True
        self.executor.came_up(instance)
        return InstanceUp(command.command_id, instance, Status.OK, info.kv_cells)

    def _stop_instance(self, command: StopInstance) -> None:
        state, instance = self.state, command.instance
        memory = state.memory[instance]
        if state.up[instance]:
            if memory.used != memory.cached or memory.host_used != memory.host_cached:
                raise ContractError(f"instance {instance} stopped while it holds KV")
            if self.executor.moves.params.reads(instance):
                raise ContractError(f"instance {instance} stopped while a peer loads parameters from it")
            self.executor.died(instance)
        self._fail_start(instance, Status.CANCELLED)
        ok = self._down(instance)
        state.ready.append(InstanceDown(command.command_id, instance, Status.OK if ok else Status.FAILED))

    def _fail_start(self, instance: int, status: Status) -> None:
        starting = self._starting.pop(instance, None)
        if starting is not None:
            self.state.ready.append(InstanceUp(starting.command_id, instance, status, 0))

    def _down(self, instance: int) -> bool:
        """Close its books; False if it was neither up nor starting."""
        self.state.up[instance] = False
        since = self._up_since.pop(instance, None)
        if since is not None:
            self._note_up(instance, since)
        return since is not None

    def _lose(self, instance: int, _: int) -> Event | None:
        """It dies with everything on it: first the loss is told, then what failed with it."""
        state = self.state
        was_up = state.up[instance]
        if not self._down(instance):
            return None
        state.ready.append(InstanceLost(instance))
        self._fail_start(instance, Status.FAILED)
        if was_up:
            self.executor.moves.lose(instance)
            self.executor.losses.lose(instance)
            for request_id in list(state.held):
                for held in list(state.held.get(request_id, ())):
                    if held.instance == instance:
                        state.drop_held(request_id, held)
            memory = state.memory[instance]
            if memory.used != memory.cached:
                raise ContractError(f"instance {instance} was lost but {memory.used - memory.cached} cells stay")
            state.memory[instance] = InstanceMemory(memory.info)
            self.executor.died(instance)
        return state.ready.popleft()

    # ------------------------------------------------------------ timers and messages

    def _set_timer(self, command: SetTimer) -> None:
        if not self.agents.alive(command.to):
            return
        timer = (TimerFired(command.command_id, command.to), self.agents.life(command.to))
        self.state.push(max(command.at_ns, self.state.now), TIMER, 0, self._fired, timer)

    def _fired(self, timer: tuple[TimerFired, int], _: int) -> Event | None:
        event, life = timer
        return event if self._hears(event.to, life) else None

    def _hears(self, agent: str, life: int) -> bool:
        return self.agents.alive(agent) and self.agents.life(agent) == life

    def _set_watch(self, command: Watch) -> None:
        """One watch per instance and agent: a new one takes the place of the old."""
        if not self.agents.alive(command.to):
            return
        if command.period_ns:
            self._report_in(command, self.agents.life(command.to))
        else:
            self._watch.pop((command.instance, command.to), None)

    def _report_in(self, command: Watch, life: int) -> None:
        at_ns = self.state.now + command.period_ns
        key = command.instance, command.to
        self._watch[key] = self.state.push(at_ns, TIMER, 0, self._watched, (command, life))

    def _watched(self, watch: tuple[Watch, int], sequence: int) -> Event | None:
        command, life = watch
        if self._watch.get((command.instance, command.to)) != sequence:
            return None  # ended or replaced
        if not self.state.up[command.instance] or not self._hears(command.to, life):
            del self._watch[command.instance, command.to]
            return None
        self._report_in(command, life)
        return Progress(command.instance, self.executor.lanes_of(command.instance), command.to)

    def _send(self, command: Send) -> None:
        """Control messages are small: latency, and their bytes at the bandwidth of a NIC."""
        if not self.agents.alive(command.sender):
            return
        cluster = self.state.cluster
        event = MessageArrived(command.sender, command.to, command.payload)
        extra = self.faults.deliveries(self.state.now, command) if self.faults is not None else [0]
        wire = int(command.num_bytes * 1e9 / cluster.nic.bandwidth)
        for delay in extra:
            at_ns = self.state.now + cluster.control_ns + wire + delay
            self.state.push(at_ns, MESSAGE, 0, self._delivered, event)

    def _delivered(self, event: MessageArrived, _: int) -> Event | None:
        return event if self.agents.alive(event.to) else None


def _at_home(span: Span, stage: Stage) -> bool:
    """Is it part of what a lane owns at a stage? KV in host memory is not: like KV elsewhere, it is held."""
    return span.instance == stage.instance and span.tier is Tier.HBM


def _common(span: Span, layers: Layers, tokens: tuple[int, int]) -> bool:
    end = 1 << 60 if span.token_end is None else span.token_end
    return overlap(span.layers, layers) is not None and span.token_start < tokens[1] and tokens[0] < end


def _area_at(placement: Placement, stage: Stage, layers: Layers, tokens: tuple[int, int], stored: int) -> int:
    """Token-layers of a rectangle that a placement already has at a stage."""
    total = 0
    for span in placement:
        band = overlap(span.layers, stage.layers)
        band = overlap(band, layers) if band else None
        if _at_home(span, stage) and band:
            end = stored if span.token_end is None else min(span.token_end, stored)
            total += max(0, min(end, tokens[1]) - max(span.token_start, tokens[0])) * (band[1] - band[0])
    return total
