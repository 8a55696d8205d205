"""Data-parallel vLLM: independent instances behind a dispatcher; nothing moves; preempt = forget and recompute.

`system=vllm`, also the `vllm_multi` of Infinite-LLM. Schedulers: `chunked` (V1), `prefill_first` (0.4-0.6),
`prefill_first_legacy` (0.2). Dispatch: `round_robin` or `least_outstanding` (waiting *and* running requests).
"""

from __future__ import annotations

from collections.abc import Iterable

from common.policy import Gauge
from common.sched.dispatch import Dispatch, Dispatcher
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    InstanceUp,
    Stage,
    Status,
    StepDone,
)
from systems.baselines.events import ServingEvents


class VllmPolicy(ServingEvents):
    """One lane per instance; a request stays where it was dispatched unless the instance dies."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, dispatch: Dispatch = "least_outstanding") -> None:
        self.cluster = cluster
        self.num_instances = len(cluster.instances)
        self.engine = engine
        self.lanes: dict[int, LaneScheduler] = {}
        self.dispatcher = Dispatcher(self.lanes, dispatch)
        self._orphans: list[Seq] = []  # arrived while no instance was up
        self._dying: dict[int, LaneScheduler] = {}  # by lane
        self._starts: dict[int, int] = {}  # instance -> times it came up

    # ------------------------------------------------------------ contract

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance."""
        infos = self.cluster.instances
        for instance, lane in self.lanes.items():
            cached = lane.index.evictable_blocks if lane.index is not None else 0
            yield Gauge(instance, len(lane.running), len(lane.waiting), lane.used_blocks(), lane.num_blocks, cached,
                        0, 0, infos[instance].num_layers * infos[instance].layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ routing

    def _route(self, seq: Seq, out: list[Command]) -> None:
        if not self.lanes:
            self._orphans.append(seq)
            return
        instance = self.dispatcher.pick()
        lane = self.lanes[instance]
        reason = lane.refusal(seq)
        if reason is not None:
            out.append(Abort(seq.request_id, reason))
            self.dispatcher.note(instance, lane)
            return
        lane.submit(seq, out)
        self.dispatcher.note(instance, lane)

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        if event.status is not Status.OK:
            for seq in self._dying.pop(event.lane).lost(event):
                self._route(seq, out)
            return
        instance = event.lane % self.num_instances
        lane = self.lanes[instance]
        lane.step_done(event, out)
        lane.schedule(out)
        self.dispatcher.note(instance, lane)

    # ------------------------------------------------------------ membership

    def make_lane(self, lane_id: int, stages: tuple[Stage, ...], blocks: int) -> LaneScheduler:
        """The scheduler of an instance that came up."""
        return LaneScheduler(lane_id, stages, blocks, self.engine)

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        layers = self.cluster.instances[event.instance].num_layers
        stages = (Stage(event.instance, (0, layers)),)
        start = self._starts[event.instance] = self._starts.get(event.instance, -1) + 1
        lane_id = event.instance + start * self.num_instances  # an instance that is back has a new lane
        lane = self.make_lane(lane_id, stages, event.kv_cells // layers)
        self.lanes[event.instance] = lane
        self.dispatcher.added(event.instance)
        orphans, self._orphans = self._orphans, []
        for seq in orphans:
            self._route(seq, out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        """Its requests are computed anew elsewhere, once the failed step has told how far they got."""
        lane = self.lanes.pop(instance, None)
        if lane is None:
            return
        if lane.busy:
            self._dying[lane.lane] = lane
            return
        for seq in lane.lost(None):
            self._route(seq, out)
