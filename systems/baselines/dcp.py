"""`system=dcp`: static decode-context parallelism. Instances form fixed groups; every member computes requests of its
own, and each request's KV lies evenly over all members of the group, so queries and partials travel in every step.

Against Infinite-LLM: the cut is even, static and inside one group, whoever needs memory. A group is one engine: when
a member is lost, all requests of the group are computed anew, and the survivors form a smaller group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import ConfigError
from common.policy import Gauge
from common.sched.alike import need_alike
from common.sched.dispatch import Dispatch, Dispatcher
from common.sched.lane import EngineConfig, Seq
from common.sched.ledger import CellLedger
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    InstanceUp,
    Rule,
    Status,
    StepDone,
)
from systems.baselines.dcp_lane import DcpLane
from systems.baselines.events import ServingEvents


@dataclass(slots=True)
class Group:
    """Instances that share their memory evenly. `lanes`: by home, while the group is whole."""

    members: tuple[int, ...]
    ledger: CellLedger = field(default_factory=CellLedger)
    lanes: dict[int, DcpLane] = field(default_factory=dict)
    cells: dict[int, int] = field(default_factory=dict)  # of members that are up
    dying: dict[int, DcpLane] = field(default_factory=dict)  # lanes whose step fails with a member
    orphans: list[Seq] = field(default_factory=list)


def groups_of(cluster: ClusterInfo, size: int | None) -> list[tuple[int, ...]]:
    """Running instances in groups of `size`, in order; None: those of a node."""
    running = [info for info in cluster.instances if info.running]
    if size is None:
        nodes: dict[int, list[int]] = {}
        for info in running:
            nodes.setdefault(info.node, []).append(info.instance)
        return [tuple(members) for members in nodes.values()]
    if len(running) % size:
        raise ConfigError(f"system.group={size}: {len(running)} instances do not divide into such groups")
    ids = [info.instance for info in running]
    return [tuple(ids[at : at + size]) for at in range(0, len(ids), size)]


class DcpPolicy(ServingEvents):
    """One lane per instance; a group's lanes draw on one account."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, group: int | None = None,
                 dispatch: Dispatch = "least_outstanding") -> None:  # fmt: skip
        if engine.prefix_caching or engine.rule is not Rule.CHUNKED:
            raise ConfigError("system=dcp: use engine.prefix_caching=false and engine.scheduler=chunked")
        need_alike("dcp", cluster)
        self.cluster = cluster
        self.engine = engine
        self.groups = [Group(members) for members in groups_of(cluster, group)]
        self.home = {member: group for group in self.groups for member in group.members}
        self.lanes: dict[int, DcpLane] = {}  # by home
        self.by_id: dict[int, DcpLane] = {}
        self.dispatcher = Dispatcher(self.lanes, dispatch)  # type: ignore[arg-type]
        self._orphans: list[Seq] = []  # arrived while no group was whole
        self._starts: dict[int, int] = {}

    def gauges(self) -> Iterable[Gauge]:
        """One row per member."""
        for home, lane in self.lanes.items():
            info, group = self.cluster.instances[home], self.home[home]
            granted = sum(other.free for other in group.lanes.values())
            blocks = group.cells[home] // info.num_layers
            used = blocks - group.ledger.free[home] // info.num_layers - granted
            yield Gauge(home, len(lane.running), len(lane.waiting), used, blocks,
                        param_bytes=info.num_layers * info.layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ requests

    def _route(self, seq: Seq, out: list[Command]) -> None:
        if not self.lanes:
            self._orphans.append(seq)
            return
        home = self.dispatcher.pick()
        lane = self.lanes[home]
        if reason := lane.refusal(seq):
            out.append(Abort(seq.request_id, reason))
        else:
            lane.submit(seq, out)
            self._settle(self.home[home], out)
        self.dispatcher.note(home, lane)

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        lane = self.by_id[event.lane]
        home = lane.home.instance
        group = self.home[home]
        if event.status is not Status.OK:
            del group.dying[event.lane]
            group.orphans += lane.lost(event)
            self._regroup(group, out)
            return
        lane.step_done(event, out)
        lane.schedule(out)
        self._settle(group, out)
        for member in group.lanes:
            self.dispatcher.note(member, group.lanes[member])

    def _settle(self, group: Group, out: list[Command]) -> None:
        """Whoever idles and waits may start with what has come free; if all idle, the head has outgrown the group."""
        while True:
            for lane in group.lanes.values():
                if not lane.busy and lane.waiting:
                    lane.schedule(out)
            stuck = next((lane for lane in group.lanes.values() if lane.waiting), None)
            if stuck is None or any(lane.busy for lane in group.lanes.values()):
                return
            reason = f"output outgrew the KV cache of {stuck.num_blocks} rows of {len(group.members)} blocks"
            out.append(Abort(stuck.waiting.popleft().request_id, reason))

    # ------------------------------------------------------------ membership

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        group = self.home[event.instance]
        group.cells[event.instance] = event.kv_cells
        if len(group.cells) == len(group.members):
            self._form(group, out)

    def _form(self, group: Group, out: list[Command]) -> None:
        """All members are there: an account and a lane for each."""
        group.ledger = CellLedger()
        for member in group.members:
            group.ledger.open(member, group.cells[member])
        for member in group.members:
            start = self._starts[member] = self._starts.get(member, -1) + 1
            layers = (0, self.cluster.instances[member].num_layers)
            lane = DcpLane(member + start * len(self.cluster.instances), member, group.members, layers, self.engine,
                           group.ledger)  # fmt: skip
            group.lanes[member] = self.lanes[member] = self.by_id[lane.lane] = lane
            self.dispatcher.added(member)
        orphans, self._orphans = self._orphans, []
        for seq in orphans:
            self._route(seq, out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        group = self.home.get(instance)
        if group is None or instance not in group.members:
            return
        group.members = tuple(member for member in group.members if member != instance)
        group.cells.pop(instance, None)
        for home, lane in group.lanes.items():
            del self.lanes[home]
            if lane.busy:  # it fails: every request has KV at every member
                group.dying[lane.lane] = lane
            else:
                group.orphans += lane.lost(None)
        group.lanes = {}
        self._regroup(group, out)

    def _regroup(self, group: Group, out: list[Command]) -> None:
        """Once every step has failed, the survivors begin anew, empty."""
        if group.dying:
            return
        orphans, group.orphans = group.orphans, []
        group.ledger = CellLedger()  # nobody's, where no member is left
        if group.members and len(group.cells) == len(group.members):
            self._form(group, out)
        for seq in orphans:
            self._route(seq, out)
