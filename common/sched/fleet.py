"""A policy that keeps requests where a plan wants them, on as few instances as the plan has bins.

A `Planner` puts requests into bins once an epoch; the fleet maps bins to instances, starts and stops these, sends new
requests to their bin and migrates those that are elsewhere. What a planner believes is only where things should be:
what runs where, and what is free, is the lanes' ledger.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.policy import Gauge
from common.sched.hosts import Hosts
from common.sched.lane import EngineConfig, Seq
from common.sched.migrating import MigratingLane
from common.sched.moving import Mover
from common.sched.plan import Candidate, FleetConfig, FleetStats, Planner
from common.sched.stock import Stock
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    Progress,
    RequestArrived,
    SetTimer,
    Stage,
    StartInstance,
    Status,
    StepDone,
    StopInstance,
    TimerFired,
    Watch,
)

OWN_IDS = 1 << 60  # lanes number their commands from lane << 32
POOL_IDS = 1 << 40  # of these for each pool


class FleetPolicy:
    """See the module docstring."""

    def __init__(
        self, cluster: ClusterInfo, engine: EngineConfig, config: FleetConfig, planner: Planner,
        stock: Stock | None = None,
    ) -> None:  # fmt: skip
        self.cluster = cluster  # of one model
        self.infos = {info.instance: info for info in cluster.instances}
        self.pool = cluster.instances[0].model
        self.stock = stock or Stock(cluster.instances)
        self.engine = engine
        self.config = config
        self.planner = planner
        self.lanes: dict[int, MigratingLane] = {}  # by instance, those that are up
        self.hosts = Hosts(cluster, self.stock)
        self.seqs: dict[int, Seq] = {}
        self.at: dict[int, int] = {}  # request -> instance
        self.unsent: dict[int, None] = {}  # planned, and at no instance
        self.astray: dict[int, None] = {}  # perhaps not where they should be
        self.stats = FleetStats()
        self.mover = Mover(cluster.instances[0].num_layers, self.at, self._command_id, self._submit)
        self.now_ns = 0
        self._next_id = OWN_IDS + self.pool * POOL_IDS
        self._arrived: dict[int, int] = {}
        self._departed: dict[int, None] = {}
        self._oracle: dict[int, int | None] = {}
        self._charged: dict[int, int] = {}  # what the planner was told
        self._dying: dict[int, MigratingLane] = {}
        self._timer_set = False

    def _command_id(self) -> int:
        self._next_id += 1
        return self._next_id

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React; every answer leads to the same few steps."""
        out: list[Command] = []
        self.now_ns = now_ns
        if isinstance(event, StepDone):
            self._step_done(event, out)
        elif isinstance(event, Progress):
            for lane_id, iterations in event.lanes:
                lane = self.lanes.get(event.instance)
                if lane is not None and lane.lane == lane_id:
                    lane.seen = max(lane.seen, iterations)
        elif isinstance(event, RequestArrived):
            self._arrive(event, out)
        elif isinstance(event, CopyDone):
            self.mover.copied(event, now_ns, out)
        elif isinstance(event, TimerFired):
            self._timer_set = False
            self._epoch(out)
        elif isinstance(event, InstanceUp):
            self._up(event, out)
        elif isinstance(event, InstanceDown):
            self.hosts[event.instance].waits_for_down = False
            self.stock.give(event.instance)
        elif isinstance(event, InstanceLost):
            self._lost(event.instance, out)
        self.mover.wake(now_ns, out)
        for command in out:
            if isinstance(command, Abort):
                self._gone(command.request_id, out)
        return out

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance that is up."""
        infos = self.infos
        for instance, lane in self.lanes.items():
            yield Gauge(instance, len(lane.running), len(lane.waiting), lane.used_blocks(), lane.num_blocks,
                        param_bytes=infos[instance].num_layers * infos[instance].layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ requests

    def _arrive(self, event: RequestArrived, out: list[Command]) -> None:
        seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
        info = self.cluster.instances[0]
        judge = MigratingLane(0, (), info.kv_cells // info.num_layers, self.engine)
        reason = judge.refusal(seq)
        if reason is not None:
            out.append(Abort(event.request_id, reason))
            return
        self.seqs[event.request_id] = seq
        self._oracle[event.request_id] = event.oracle_output_tokens
        self._arrived[event.request_id] = self.planner.charge(seq, judge.blocks_of(seq), event.oracle_output_tokens)
        self._arm(out)

    def _gone(self, request_id: int, out: list[Command]) -> None:
        """Finished or refused."""
        if self.seqs.pop(request_id, None) is None:
            return
        self.mover.drop(request_id, out)
        self.at.pop(request_id, None)
        self.unsent.pop(request_id, None)
        self.astray.pop(request_id, None)
        self._charged.pop(request_id, None)
        self._oracle.pop(request_id, None)
        if self._arrived.pop(request_id, None) is None:
            self._departed[request_id] = None

    def _submit(self, seq: Seq, instance: int, out: list[Command]) -> None:
        """A request without KV goes to an instance, or waits until there is one."""
        lane = self.lanes.get(instance)
        if lane is None:
            self.at.pop(seq.request_id, None)
            self.unsent[seq.request_id] = None
            return
        self.at[seq.request_id] = instance
        lane.submit(seq, out)
        self.mover.settle(lane, self.now_ns, out)

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        if event.status is not Status.OK:
            self._orphan(self._dying.pop(event.lane).lost(event), out)
            return
        lane = self.lanes[event.lane % self.stock.num_instances]
        for request_id, _ in event.prefilled:
            self.mover.prefilled(request_id, self.now_ns)
        for seq in lane.step_done(event, out):
            self._gone(seq.request_id, out)
        self.mover.boundary(lane, self.now_ns, out)

    # ------------------------------------------------------------ membership

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        host = self.hosts[event.instance]
        if event.status is not Status.OK:
            self.hosts.vacate(event.instance)
            self.stock.give(event.instance)
            host.state = "down"
            return
        host.state = "up"
        host.idle_since = self.now_ns
        layers = self.infos[event.instance].num_layers
        lane_id = event.instance + host.starts * self.stock.num_instances  # an instance that is back has a new lane
        host.starts += 1
        route = (Stage(event.instance, (0, layers)),)
        self.lanes[event.instance] = MigratingLane(lane_id, route, event.kv_cells // layers, self.engine)
        out.append(Watch(event.instance, self.config.epoch_ns))
        self._dispatch(out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        self.hosts.vacate(instance)
        self.stock.give(instance)
        self.hosts[instance].state = "down"
        lane = self.lanes.pop(instance, None)
        if lane is None:
            return
        orphans = self.mover.lost(lane, self.now_ns, out)
        if lane.busy:
            self._dying[lane.lane] = lane
        else:
            orphans += lane.lost(None)
        self._orphan(orphans, out)

    def _orphan(self, seqs: list[Seq], out: list[Command]) -> None:
        """Their KV is lost: they are computed anew where the plan wants them."""
        for seq in seqs:
            if seq.request_id in self.seqs:
                self.at.pop(seq.request_id, None)
                self.unsent[seq.request_id] = None
        self._dispatch(out)
        self._arm(out)

    # ------------------------------------------------------------ epochs

    def _arm(self, out: list[Command]) -> None:
        if not self._timer_set:
            self._timer_set = True
            period = self.config.epoch_ns
            out.append(SetTimer(self._command_id(), (self.now_ns // period + 1) * period))

    def _epoch(self, out: list[Command]) -> None:
        self.stats.epochs += 1
        grown = {}
        for lane in self.lanes.values():
            if lane.targets and lane.busy and not lane.stopping:
                self.mover.touch(lane, self.now_ns, out)  # only a step's end tells that a prompt decodes by now
            for seq in lane.running.values():
                charge = self.planner.charge(seq, lane.blocks_of(seq), self._oracle[seq.request_id])
                if charge > self._charged.get(seq.request_id, charge):
                    grown[seq.request_id] = self._charged[seq.request_id] = charge
        arrived, self._arrived = self._arrived, {}
        departed, self._departed = self._departed, {}
        changed = self.planner.epoch(list(departed), grown, arrived)
        self._charged.update(arrived)
        self.astray.update(dict.fromkeys(request_id for request_id in changed if request_id in self.seqs))
        self.unsent.update(dict.fromkeys(arrived))
        self._host(out)
        self._dispatch(out)
        self._redirect(out)
        self._shrink(out)
        if self.seqs or len(self.lanes) > self.config.min_instances or self._departed:
            self._arm(out)

    def _host(self, out: list[Command]) -> None:
        """Every bin gets an instance, as far as there are any."""
        for bin_id, instance in self.hosts.assign(self.planner.bins()):
            self.planner.hosted(bin_id, self.infos[instance].node)
            if self.hosts[instance].state == "down":
                self.hosts[instance].state = "starting"
                self.stock.take(instance)
                self.stats.starts += 1
                out.append(StartInstance(self._command_id(), instance))
        self.stock.lacks(self.pool, len(self.planner.bins()) - len(self.hosts.of_bin))

    def _home(self, request_id: int) -> int | None:
        """The instance where a request should be, if it is up."""
        instance = self.hosts.of_bin.get(self.planner.bin_of(request_id))
        return instance if instance in self.lanes else None

    def _dispatch(self, out: list[Command]) -> None:
        """Send those that are nowhere; while their instance starts, to where there is most room."""
        for request_id in list(self.unsent):
            if request_id in self._arrived:
                continue
            seq = self.seqs[request_id]
            instance = self._home(request_id)
            if instance is None:
                roomy = max(self.lanes.values(), key=lambda lane: (lane.free, -lane.instance), default=None)
                if roomy is None or roomy.waiting or roomy.free < roomy.blocks_of(seq) + roomy.num_blocks // 16:
                    continue
                bin_id = self.hosts[roomy.instance].bin
                if bin_id is None or not self.planner.detour(request_id, bin_id):
                    continue
                instance = roomy.instance
                self.stats.fallbacks += 1
                self.astray[request_id] = None
            del self.unsent[request_id]
            self._submit(seq, instance, out)

    def _redirect(self, out: list[Command]) -> None:
        """Those that are not where they should be: without KV they go at once, decoding ones migrate."""
        moves: list[Candidate] = []
        for request_id in list(self.astray):
            here, home = self.at.get(request_id), self._home(request_id)
            if here is None or here == home:
                del self.astray[request_id]
                continue
            if home is None or here not in self.lanes or request_id in self.mover.by_request:
                continue
            lane, seq = self.lanes[here], self.seqs[request_id]
            if request_id in lane.promised:
                continue  # its blocks are here: it starts here, and migrates then
            if seq in lane.waiting:
                lane.waiting.remove(seq)
                self._submit(seq, home, out)
            elif request_id in lane.running and seq.decoding and self.lanes[home].free >= lane.blocks_of(seq):
                moves.append(Candidate(request_id, here, home, lane.stored(seq), lane.free < len(lane.running)))
        modes = self.planner.modes(moves, self.mover.in_flight(self.seqs)) if moves else {}
        for move in moves:
            src, dst = self.lanes[move.src], self.lanes[move.dst]
            if move.request_id in modes and move.request_id in src.running:
                self.mover.start(self.seqs[move.request_id], src, dst, modes[move.request_id], self.now_ns, out)

    def _shrink(self, out: list[Command]) -> None:
        """Stop instances that have been empty for the cooldown."""
        config, num = self.config, len(self.lanes)
        cooldown_ns = 0 if self.stock.pressed(self.pool) else config.cooldown_ns
        awaited = {move.dst.instance for move in self.mover.by_request.values()}
        for instance, lane in list(self.lanes.items()):
            host = self.hosts[instance]
            if host.bin is not None or not lane.empty or instance in awaited:
                host.idle_since = self.now_ns
            elif self.now_ns - host.idle_since >= cooldown_ns and num > config.min_instances:
                num -= 1
                del self.lanes[instance]
                host.state, host.waits_for_down = "down", True
                self.stats.stops += 1
                out.append(StopInstance(self._command_id(), instance))
