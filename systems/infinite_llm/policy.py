"""Infinite-LLM as a policy: a dispatcher, an rManager per instance, one gManager. This file only routes events."""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import ConfigError
from common.policy import Gauge
from common.sched.alike import need_alike
from common.sched.dispatch import Dispatcher
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import (
    Abort,
    AgentLost,
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceLost,
    InstanceUp,
    MessageArrived,
    Progress,
    RequestArrived,
    Stage,
    Status,
    StepDone,
    Watch,
)
from systems.infinite_llm.asks import COPY_IDS
from systems.infinite_llm.debt_gmanager import DebtGManager
from systems.infinite_llm.gmanager import GManager
from systems.infinite_llm.hostpool import where
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import GMANAGER
from systems.infinite_llm.planner import Planner
from systems.infinite_llm.rmanager import RManager
from systems.infinite_llm.settings import Settings
from systems.infinite_llm.throughput import Throughput


class InfiniteLlmPolicy:
    """Homes are chosen as `system=vllm` chooses instances. A request's home changes only when it dies."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, settings: Settings | None = None) -> None:
        self.cluster = cluster
        self.engine = engine
        self.settings = settings = settings or Settings()
        self.on = settings.mode != "off"
        if self.on and engine.prefix_caching:
            raise ConfigError("system=infinite_llm: engine.prefix_caching needs system.mode=off (a borrowed block "
                              "would have two owners)")  # fmt: skip
        if self.on:
            need_alike("infinite_llm", cluster)
        self._epoch = 0  # gManagers so far
        self.lanes: dict[int, LaneScheduler] = {}
        self.managers: dict[int, RManager] = {}
        self.gmanager: GManager | None = self._new_gmanager() if self.on else None
        self.dispatcher = Dispatcher(self.lanes, settings.dispatch)  # type: ignore[arg-type]
        self._orphans: list[Seq] = []  # arrived while no instance was up
        self._dying: dict[int, RManager] = {}  # by lane
        self._starts: dict[int, int] = {}  # instance -> times it came up
        self._counts: dict[int, int] = {}

    def _new_gmanager(self) -> GManager:
        settings = self.settings
        planner = Planner(Throughput.from_extra(self.cluster.extra), self.cluster.block_size, max(1, settings.pace),
                          settings.hysteresis, settings.horizon_iterations,
                          scattered=settings.creditor == "random")  # fmt: skip
        nodes = {info.instance: info.node for info in self.cluster.instances}
        self._epoch += 1
        kind = DebtGManager if settings.mode == "debt" else GManager
        return kind(tuple(self.managers), nodes, settings, planner, self._epoch)

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """Deliver an event to its agent."""
        out: list[Command] = []
        if isinstance(event, StepDone):
            self._step_done(now_ns, event, out)
        elif isinstance(event, RequestArrived):
            seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
            self._route(now_ns, seq, out)
        elif isinstance(event, MessageArrived):
            self._message(now_ns, event, out)
        elif isinstance(event, CopyDone):
            manager = self.managers.get((event.command_id - COPY_IDS) >> 32)
            if manager is not None:
                manager.copied(now_ns, event, out)
                self._note(manager)
        elif isinstance(event, Progress):
            if event.instance in self.managers:
                self.managers[event.instance].tick(now_ns, event, out)
                self._note(self.managers[event.instance])
        elif isinstance(event, InstanceUp):
            if event.status is Status.OK:
                self._up(now_ns, event, out)
        elif isinstance(event, InstanceLost):
            self._lost(now_ns, event, out)
        elif isinstance(event, AgentLost) and event.agent == GMANAGER and self.on:
            self.gmanager = self._new_gmanager() if event.restarted else None
            if self.gmanager is not None:
                self.gmanager.start(out)
        return out

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance."""
        infos = self.cluster.instances
        for instance, manager in self.managers.items():
            lane = manager.lane
            cached = lane.index.evictable_blocks if lane.index is not None else 0
            yield Gauge(instance, len(lane.running), len(lane.waiting) + lane.away, lane.used_blocks(), lane.num_blocks,
                        cached, lane.lent, lane.borrowed.total(),
                        infos[instance].num_layers * infos[instance].layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ routing

    def _route(self, now_ns: int, seq: Seq, out: list[Command]) -> None:
        if not self.managers:
            self._orphans.append(seq)
            return
        manager = self.managers[self.dispatcher.pick()]
        reason = manager.lane.refusal(seq)
        if reason is not None:
            out.append(Abort(seq.request_id, reason))
        else:
            manager.submit(now_ns, seq, out)
        self._note(manager, always=True)  # being picked changed its rank

    def _note(self, manager: RManager, always: bool = False) -> None:
        """Tell the dispatcher if the number of requests there has changed."""
        count = manager.lane.outstanding()
        if always or self._counts.get(manager.instance) != count:
            self._counts[manager.instance] = count
            self.dispatcher.note(manager.instance, manager.lane)

    def _message(self, now_ns: int, event: MessageArrived, out: list[Command]) -> None:
        if event.to == GMANAGER:
            if self.gmanager is not None:
                self.gmanager.message(now_ns, event, out)
            return
        manager = self.managers.get(where(int(event.to[2:]))[0])
        if manager is not None:
            manager.message(now_ns, event, out)
            self._note(manager)

    def _step_done(self, now_ns: int, event: StepDone, out: list[Command]) -> None:
        dying = self._dying.pop(event.lane, None)
        if dying is not None:
            self._rehome(now_ns, dying, event, out)
            return
        manager = self.managers[event.lane % len(self.cluster.instances)]
        manager.step_done(now_ns, event, out)
        self._note(manager)

    # ------------------------------------------------------------ membership

    def _up(self, now_ns: int, event: InstanceUp, out: list[Command]) -> None:
        instance, layers = event.instance, self.cluster.instances[event.instance].num_layers
        start = self._starts[instance] = self._starts.get(instance, -1) + 1
        lane_id = instance + start * len(self.cluster.instances)  # an instance that is back has a new lane
        lane = SpanLane(lane_id, Stage(instance, (0, layers)), event.kv_cells // layers, self.engine)
        host_blocks = int(self.settings.cpu_share * (self.cluster.instances[instance].host_cells // layers))
        manager = self.managers[instance] = RManager(instance, lane, self.settings, host_blocks)
        self.lanes[instance] = lane
        self.dispatcher.added(instance)
        if self.on:
            self._pool_changed()
            if self.gmanager is not None:
                self.gmanager.joined(instance)
            out.append(Watch(instance, self.settings.period_ns, manager.name))
            manager.heartbeat(out)
        orphans, self._orphans = self._orphans, []
        for seq in orphans:
            self._route(now_ns, seq, out)

    def _pool_changed(self) -> None:
        pool = sum(manager.creditor.cap for manager in self.managers.values())
        pool += sum(manager.host.cap for manager in self.managers.values() if manager.host is not None)
        for manager in self.managers.values():
            manager.lane.pool_blocks = pool - manager.creditor.cap + manager.lane.num_blocks

    def _lost(self, now_ns: int, event: InstanceLost, out: list[Command]) -> None:
        """Its requests are computed anew elsewhere, once the failed step has told how far they got."""
        manager = self.managers.pop(event.instance, None)
        if manager is None:
            return
        del self.lanes[event.instance]
        if self.on:
            self._pool_changed()
            if self.gmanager is not None:
                self.gmanager.left(event.instance)
            for other in self.managers.values():
                other.peer_lost(now_ns, event, out)
                self._note(other)
        if manager.lane.busy:
            self._dying[manager.lane.lane] = manager
        else:
            self._rehome(now_ns, manager, None, out)

    def _rehome(self, now_ns: int, manager: RManager, event: StepDone | None, out: list[Command]) -> None:
        orphans = manager.lane.lost(event)
        orphans += [loan.seq for loan in manager.debtor.loans.values() if loan.seq not in orphans]
        for seq in orphans:
            self._route(now_ns, seq, out)
