"""Small random bursts for kunserve: what happens, and what must hold after every event."""

from __future__ import annotations

from dataclasses import dataclass

from common.executors.memory import overlap, union_cells
from common.executors.sim import SimExecutor
from common.kv.plane import first_flaw
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import InstanceLost, RequestStatus, StartInstance
from systems.kunserve.options import Options
from systems.kunserve.policy import KunServePolicy
from systems.kunserve.state import State
from tests.fakes import FakeWorkload, cluster

US = 1_000
FAST = {"poll_ms": 0.2, "min_pipeline_ms": 0.4, "min_serving_ms": 0.0, "calm_polls": 2, "min_tokens": 64}


@dataclass(frozen=True)
class Burst:
    """`requests`: (gap in us, prompt, output); `losses`: (us, instance); lost ones come back if `back`. `kill`: when a
    group first is in this state, the member of this place dies so many ns later."""

    requests: tuple[tuple[int, int, int], ...]
    instances: int = 2
    blocks: int = 24
    layers: int = 4
    block_size: int = 16
    losses: tuple[tuple[int, int], ...] = ()
    back: bool = False
    kill: tuple[State, int, int] | None = None
    options: tuple[tuple[str, object], ...] = ()
    budget: int = 256
    max_num_seqs: int = 64
    max_leap: int | None = None

    def workload(self) -> FakeWorkload:
        now, arrivals = 0, []
        for gap, _, _ in self.requests:
            now += gap * US
            arrivals.append(now)
        return FakeWorkload(arrivals, [one[1] for one in self.requests], [one[2] for one in self.requests])

    def model(self, **changes):
        return cluster(self.instances, self.blocks, self.layers, self.block_size, **changes)

    def engine(self) -> EngineConfig:
        return EngineConfig(self.block_size, self.budget, self.max_num_seqs, max_leap=self.max_leap,
                            max_model_len=1 << 20)  # fmt: skip

    def policy(self, info) -> KunServePolicy:
        return KunServePolicy(info, self.engine(), Options.of({**FAST, **dict(self.options)}))


class Run:
    """Drives a burst through any executor and checks the laws on the way."""

    def __init__(self, burst: Burst, make=SimExecutor, model=None, **options) -> None:
        self.burst = burst
        self.model = model or burst.model()
        self.record = RunRecord(RequestColumns.empty(len(burst.requests)))
        losses = tuple((us * US, instance) for us, instance in burst.losses)
        self.executor = make(self.model, burst.workload(), self.record, faults=losses, **options)
        self.policy = burst.policy(self.model.info())
        self.trace = []
        self.seen: dict[str, dict[int, set[int]]] = {}  # what happened to whom: kind -> request -> groups

    def drive(self) -> Run:
        poll, submit = self.executor.poll, self.executor.submit
        self._restarts = 1 << 40
        self._struck = False
        while (item := poll()) is not None:
            now, event = item
            assert len(self.trace) < 60_000, "events without end"
            if isinstance(event, InstanceLost):
                self.note_loss(event.instance)  # before the policy moves on
            commands = list(self.policy.on_event(now, event))
            if self.burst.back and isinstance(event, InstanceLost):
                commands.append(StartInstance(self._restarts, event.instance))
                self._restarts += 1
            self.trace.append((now, event, commands))
            for command in commands:
                submit(command)
            self.strike(now)
            self.check()
            self.note()
            list(self.policy.gauges())
        self.record.segments.flush()
        self.ended()
        return self

    def strike(self, now: int) -> None:
        kill = self.burst.kill
        if kill is None or self._struck:
            return
        for group in self.policy.core.groups.values():
            if group.state is kill[0] and len(group.route) > 1:
                self._struck = True
                self.executor.control.lose_at(now + kill[2], group.route[kill[1] % len(group.route)].instance)
                return

    # ------------------------------------------------------------ what happened to whom

    def saw(self, kind: str, request_id: int, group: int) -> None:
        self.seen.setdefault(kind, {}).setdefault(request_id, set()).add(group)

    def note(self) -> None:
        for group in self.policy.core.groups.values():
            if group.exchange is not None:
                for parked in group.exchange.waiting():
                    self.saw("straddles a drop", parked.seq.request_id, group.id)
            for found in group.all_sets():
                for lane in found.lanes:
                    self.note_lane(group, lane, found is group.old)

    def note_lane(self, group, lane, old: bool) -> None:
        for request_id, seq in lane.running.items():
            if seq.shared:
                self.saw("straddles a drop", request_id, group.id)
            if old and group.state is State.DRAINING:
                self.saw("straddles a restore", request_id, group.id)
            begun = self.record.requests.first_token_ns[request_id] >= 0
            if group.state in (State.EXCHANGING, State.PIPELINE) and not begun:
                self.saw("starts after a drop", request_id, group.id)

    def note_loss(self, instance: int) -> None:
        group = self.policy.core.group_of.get(instance)
        if group is None:
            return
        middle = group.state in (State.PARKING, State.DROPPING, State.EXCHANGING)
        kind = "loses a member mid-drop" if middle else f"loses a member {group.state}"
        self.saw(f"{kind} at all", -1, group.id)
        for found in group.all_sets():
            for lane in found.lanes:
                for request_id in lane.running:
                    self.saw(kind, request_id, group.id)
        for parked in group.parked if group.exchange is None else group.exchange.waiting():
            self.saw(kind, parked.seq.request_id, group.id)

    def situations(self) -> dict[str, int]:
        """How many requests met each situation."""
        found = {kind: len(who) for kind, who in self.seen.items()}
        twice = [who for who in self.seen.get("straddles a drop", {}).values() if len(who) > 1]
        return {**found, "lives through two merges": len(twice)}

    # ------------------------------------------------------------ laws

    def check(self) -> None:
        if self.executor.state.ready:
            return  # something is owed at this very instant
        self.check_planes()
        core = self.policy.core
        state = self.executor.state
        spare: dict[int, int] = {}
        for _, _, lane in core.lanes.values():
            assert lane.free >= 0
            for instance, layers in lane.stages:
                spare[instance] = spare.get(instance, 0) + lane.free * (layers[1] - layers[0])
        for instance, capacity in core.ledger.capacity.items():
            if core.group_of[instance].state is State.CLEARING:
                continue
            used, taken = state.memory[instance].used, capacity - core.ledger.free[instance]
            assert used <= taken, f"instance {instance}: the executor has {used} cells in use, the ledger {taken}"
            assert taken - spare.get(instance, 0) <= used, f"instance {instance}: {taken} taken of {used} in use"
            assert state.memory[instance].capacity >= capacity or core.group_of[instance].awaited
        for group in core.groups.values():
            lanes = [lane for found in group.all_sets() for lane in found.lanes] + list(group.stopping.values())
            if group.state is State.CLEARING or not any(lane.running or lane.pieces for lane in lanes):
                continue  # dissolving, or nobody runs in it
            resident = [any(state.memory[i].resident[layer] for i in group.members())
                        for layer in range(self.model.num_layers)]  # fmt: skip
            assert all(resident), f"group {group.id} ({group.state}) lacks a layer"
        live = list(self.record.requests.status).count(RequestStatus.LIVE)
        assert self.outstanding() == live, f"{self.outstanding()} requests in the books of {live}"

    def check_planes(self) -> None:
        """Every stored token's KV is there once per layer: in the lane, or held where its placement says; and what an
        instance has in use are the blocks of lanes and of held KV, no more and no less."""
        executor, state, layers = self.executor, self.executor.state, self.model.num_layers
        size = state.block_size
        cells = [0] * len(state.memory)
        for lane in executor.lanes.values():
            for member in lane.members.values():
                stored, request_id = member.offset + executor.completed(lane), member.entry.request_id
                placement = lane.spread.get(request_id) or executor.control.default(lane, member.entry)
                assert first_flaw(placement, layers, 1 << 40) is None
                assert self.area(lane, request_id, placement, stored) == stored * layers, f"request {request_id}"
                charged = member.offset + lane.iteration + lane.settled
                for stage in lane.stages:
                    cells[stage.instance] += executor.control._home_cells(placement, stage, charged)
            for target in lane.targets:
                placement = lane.spread.get(target.entry.request_id) or executor.control.default(lane, target.entry)
                for stage in lane.stages:
                    cells[stage.instance] += executor.control._home_cells(placement, stage, target.target)
        for held in state.held.values():
            for instance in {one.instance for one in held}:
                cells[instance] += union_cells([one for one in held if one.instance == instance], size)
        for instance, memory in enumerate(state.memory):
            assert cells[instance] == memory.used, f"instance {instance}: {memory.used} cells used of {cells[instance]}"

    def area(self, lane, request_id: int, placement, stored: int) -> int:
        """Token-layers of a running request: the lane's at its stages, and what is held of it elsewhere."""
        total = 0
        for stage in lane.stages:
            for span in placement:
                band = overlap(span.layers, stage.layers)
                end = stored if span.token_end is None else min(span.token_end, stored)
                if band is None or end <= span.token_start:
                    continue
                if span.instance == stage.instance:
                    total += (end - span.token_start) * (band[1] - band[0])
        return total + sum((min(one.end, stored) - one.start) * (one.layers[1] - one.layers[0])
                           for one in self.executor.state.held.get(request_id, ()))  # fmt: skip

    def outstanding(self) -> int:
        core = self.policy.core
        ids = {seq.request_id for seq in core.orphans}
        for group in core.groups.values():
            ids |= {seq.request_id for seq in group.queue}
            ids |= {parked.seq.request_id for parked in group.parked}
            if group.exchange is not None:
                ids |= {parked.seq.request_id for parked in group.exchange.waiting()}
        for _, _, lane in core.lanes.values():
            ids |= set(lane.running) | {seq.request_id for seq in (*lane.joining, *lane.waiting)}
        return len(ids)

    def ended(self) -> None:
        columns = self.record.requests
        for index, (_, prompt, output) in enumerate(self.burst.requests):
            status = columns.status[index]
            assert status in (RequestStatus.FINISHED, RequestStatus.REJECTED), f"request {index} never ended"
            if status == RequestStatus.REJECTED:
                tokens, room = prompt + output, self.burst.blocks * self.burst.block_size
                assert tokens > room, f"request {index} was refused, but any instance alone holds its {tokens} tokens"
            if status == RequestStatus.FINISHED:
                assert columns.output_tokens[index] == output
                assert columns.arrival_ns[index] < columns.first_token_ns[index] <= columns.finish_ns[index]
        state = self.executor.state
        assert not self.executor.stalls.open, "who ended has had every token"
        assert all(begin < end for begin, end in zip(self.record.stalls.begin_ns, self.record.stalls.end_ns))
        stages = self.record.stages
        for start, end, busy in zip(stages.start_ns, stages.end_ns, stages.busy_ns):
            assert 0 <= busy <= end - start > 0
        assert not state.held
        assert all(memory.used == 0 for memory in state.memory)

    def kinds(self) -> list[str]:
        return [kind for _, _, kind, _ in self.record.marks]
