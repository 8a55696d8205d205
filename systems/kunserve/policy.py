"""`system=kunserve`: as vllm until memory runs out; then parameters drop, and come back when it is calm."""

from __future__ import annotations

from collections.abc import Iterable

from common.policy import Gauge
from common.sched.alike import need_alike
from common.sched.lane import EngineConfig, Seq
from common.types import (
    ClusterInfo,
    Command,
    Event,
    InstanceLost,
    InstanceUp,
    Interrupt,
    Mark,
    RequestArrived,
    SetTimer,
    Status,
    StepDone,
    TimerFired,
)
from systems.kunserve import drop, recover, restore
from systems.kunserve.core import Core
from systems.kunserve.group import Group
from systems.kunserve.monitor import Load, Monitor
from systems.kunserve.options import Options
from systems.kunserve.planner import Candidate, plan_drop
from systems.kunserve.state import State


class KunServePolicy:
    """Dispatcher, monitor and global memory manager; the parts decide, `Core` keeps the books."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, options: Options) -> None:
        need_alike("kunserve", cluster)
        self.core = Core(cluster, engine, options)
        self.monitor = Monitor(options.limits)
        self._ticking = False
        self._gave_up = False
        self._asked: dict[int, None] = {}  # lanes that are to tell at their boundary what is used

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event."""
        out: list[Command] = []
        core = self.core
        core.now_ns = now_ns
        if isinstance(event, StepDone):
            group = core.lanes[event.lane][0]
            self._step_done(event, out)
            if event.lane in self._asked:
                del self._asked[event.lane]
                self._told(group, out)
        elif isinstance(event, RequestArrived):
            seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
            core.route(seq, out)
        elif isinstance(event, TimerFired):
            self._poll(out)
        elif isinstance(event, InstanceUp):
            if event.status is Status.OK:
                core.serve_alone(event.instance, event.kv_cells, out)
                self._tick(out)
        elif isinstance(event, InstanceLost):
            recover.lose(core, event.instance, out)
        else:
            heard = core.answered(getattr(event, "command_id", -1), event, out)
            if heard is not None:
                self._after(heard, out)
        return out

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance; blocks of all layers, so that a group's sum is what it can hold."""
        core = self.core
        spare: dict[int, int] = {}
        running: dict[int, int] = {}
        waiting: dict[int, int] = {}
        for group in core.groups.values():
            home = group.members()
            lanes = [lane for found in group.all_sets() for lane in found.lanes] + list(group.stopping.values())
            for place, lane in enumerate(lanes):
                at = lane.stages[place % len(lane.stages)].instance
                running[at] = running.get(at, 0) + len(lane.running) + len(lane.joining)
                for instance, layers in lane.stages:
                    spare[instance] = spare.get(instance, 0) + lane.free * (layers[1] - layers[0])
            for found in group.all_sets():
                at = found.stages[0].instance
                waiting[at] = waiting.get(at, 0) + len(found.waiting)
            outside = len(group.queue) + len(group.parked)
            outside += 0 if group.exchange is None else len(group.exchange.waiting())
            if home and outside:
                waiting[home[0]] = waiting.get(home[0], 0) + outside
        for instance, capacity in core.ledger.capacity.items():
            used = capacity - core.ledger.free[instance] - spare.get(instance, 0)
            info = core.cluster.instances[instance]
            gone = sum(high - low for low, high in core.missing[instance])
            yield Gauge(instance, running.get(instance, 0), waiting.get(instance, 0), used // core.num_layers,
                        capacity // core.num_layers,
                        param_bytes=(info.num_layers - gone) * info.layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ steps

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        core = self.core
        group, found, lane = core.lanes[event.lane]
        if lane in group.clearing:
            recover.lane_stopped(core, group, lane, event, out)
            return
        if group.stopping and event.lane in group.stopping:
            drop.lane_stopped(core, group, found, event, out)
            recover.cleared(core, group, out)
            return
        lane.step_done(event, out)
        if group.exchange is not None:
            group.exchange.pump(out)
        lane.schedule(out)
        if not lane.greedy:
            self._after(group, out)

    def _after(self, group: Group, out: list[Command]) -> None:
        """Something of a group that shares memory has ended."""
        core = self.core
        if group.state is State.CLEARING:
            recover.cleared(core, group, out)
            return
        if group.id not in core.groups:
            return
        if group.exchange is not None:
            group.exchange.pump(out)
        core.settle(group, out)
        restore.drained(core, group, out)

    # ------------------------------------------------------------ monitor and plans

    def _tick(self, out: list[Command]) -> None:
        if not self._ticking:
            self._ticking = True
            core = self.core
            out.append(SetTimer(core.timer_id(), core.now_ns + core.options.limits.poll_ns))

    def _poll(self, out: list[Command]) -> None:
        """Sample every group; where a leap hides what is used beside a queue, at its next boundary. Then decide."""
        core = self.core
        self._ticking = False
        self._tick(out)
        core.do_later(out)
        if self._asked:
            return  # an iteration longer than a period
        for group in core.groups.values():
            lane = group.sets[0].lanes[0] if group.state is State.SERVING else None
            if lane is None or not (lane.busy and lane.waiting):
                self.monitor.sample(group.id, self._load(group))
                continue
            self._asked[lane.lane] = None
            if not lane.stopping:
                lane.stopping = True
                out.append(Interrupt(lane.lane))
        if not self._asked:
            self._decide(out)

    def _told(self, group: Group, out: list[Command]) -> None:
        """A lane that was asked at the last poll has come to its boundary."""
        if group.state is State.SERVING:
            self.monitor.sample(group.id, self._load(group))
        if not self._asked:
            self._decide(out)

    def _decide(self, out: list[Command]) -> None:
        core, limits = self.core, self.core.options.limits
        self._overload(out)
        if core.options.restore == "on":
            for group in list(core.groups.values()):
                if (group.state is State.PIPELINE and self.monitor.is_calm(group.id)
                        and core.now_ns - group.since_ns >= limits.min_pipeline_ns):  # fmt: skip
                    restore.begin(core, group, out)

    def _load(self, group: Group) -> Load:
        """Blocks of all layers that a group has and needs."""
        core = self.core
        size = core.engine.block_size
        capacity = core.ledger.capacity_blocks(group.route)
        lanes = [lane for found in group.all_sets() for lane in found.lanes]
        free = max(0, core.ledger.blocks(group.route))
        if len(lanes) == 1:
            free += lanes[0].free
        queue = [seq for found in group.sets for seq in found.waiting]
        pending = sum(-(-seq.known // size) for seq in queue)
        head = -(-queue[0].known // size) if queue else 0
        base = sum(core.cluster.instances[i].kv_cells for i in group.members()) // core.num_layers
        if group.state is State.DRAINING:
            capacity = base
            free = sum(core.ledger.free[i] for i in group.members()) // core.num_layers
        return Load(capacity - free, capacity, base, pending, head)

    def _overload(self, out: list[Command]) -> None:
        """Plan over the groups that can merge now (Fig. 6), if any of them is overloaded."""
        core, limits = self.core, self.core.options.limits
        settled = [group for group in core.groups.values() if core.now_ns - group.since_ns >= limits.min_serving_ns
                   or (group.state is State.SERVING and group.since_ns == 0)]  # fmt: skip
        for group in list(settled):
            drains = group.state is State.DRAINING and group.old is not None
            if drains and self.monitor.is_hot(group.id) and not self._lends(group):
                drop.drop_again(core, group, out)
        able = [group for group in settled if group.state in (State.SERVING, State.PIPELINE)
                and not group.awaited and not self._lends(group)]  # fmt: skip
        hot = [group for group in able if self.monitor.is_hot(group.id)]
        if not hot:
            return
        infos = core.cluster.instances
        needed = sum(self._load(group).pending for group in hot) * core.num_layers * infos[0].cell_bytes
        copy_bytes = core.num_layers * infos[0].layer_param_bytes
        candidates = [Candidate(group.id, len(group.route), infos[group.route[0].instance].node, group in hot)
                      for group in able]  # fmt: skip
        plan = plan_drop(candidates, needed, copy_bytes, core.options.max_group or core.num_layers)
        if not plan.enough:
            self._fall_back(hot[0], "nothing is left to drop", out)
        merged = plan.enough
        for chosen in plan.merged:
            groups = [core.groups[ident] for ident in chosen]
            if drop.merge(core, groups, out):
                for group in groups:
                    self.monitor.forget(group.id)
            else:
                merged = False
                self._fall_back(groups[0], "no slices that its members hold make one pipeline", out)
        self._gave_up = not merged

    def _fall_back(self, group: Group, why: str, out: list[Command]) -> None:
        """Note once, not at every poll, that memory stays short: lanes preempt as vllm does."""
        if not self._gave_up:
            self._gave_up = True
            out.append(Mark(group.route[0].instance, "fallback", f"preemption by recompute: {why}"))

    def _lends(self, group: Group) -> bool:
        """Does a load elsewhere read its parameters?"""
        return any(self.core.lending.get(instance) for instance in group.members())
