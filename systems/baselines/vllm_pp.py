"""Static pipelines: `system.stages` instances hold one copy of the model, each 1/stages of its layers, for good.

`system=vllm_pp`, vLLM's pipeline parallelism as KunServe compares with it. As many micro-batches as stages are in
flight, cut by chunked prefill; they share one queue and one pool of KV, as in vLLM V1. What the smaller share of
parameters leaves extends the KV range: an instance drops the other layers when it comes up, empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from common.errors import ConfigError
from common.policy import Gauge
from common.sched.dispatch import Dispatch
from common.sched.lane import EngineConfig, Seq
from common.sched.laneset import LaneSet
from common.sched.ledger import CellLedger
from common.sched.shared import SharedLane
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    DropLayers,
    Event,
    InstanceUp,
    Layers,
    LayersDropped,
    Stage,
    Status,
    StepDone,
)
from systems.baselines.events import ServingEvents

OWN_IDS = 1 << 62  # command ids that no lane uses


def slices(num_layers: int, stages: int) -> list[Layers]:
    """Contiguous slices of the layers, as even as can be."""
    return [(rank * num_layers // stages, (rank + 1) * num_layers // stages) for rank in range(stages)]


class Seats:
    """Which instance has which slice. Those of a place without a pipeline wait there for the others."""

    def __init__(self, stages: int) -> None:
        self.place: dict[int, int] = {}  # instance -> its slice
        self.awaited: dict[int, int] = {}  # instance -> drops under way
        self.idle: list[list[int]] = [[] for _ in range(stages)]

    def sit(self, instance: int) -> int:
        """Where most are lacking; ties to the earlier slice."""
        place = min(range(len(self.idle)), key=lambda index: (len(self.idle[index]), index))
        self.place[instance] = place
        self.idle[place].append(instance)
        return place

    def leave(self, instance: int) -> None:
        """It is gone."""
        self.awaited.pop(instance, None)
        place = self.place.pop(instance, None)
        if place is not None and instance in self.idle[place]:
            self.idle[place].remove(instance)

    def complete(self) -> list[int] | None:
        """One ready instance for each slice, if there are."""
        ready = [[one for one in row if not self.awaited.get(one)] for row in self.idle]
        if not all(ready):
            return None
        chosen = [row[0] for row in ready]
        for row, instance in zip(self.idle, chosen):
            row.remove(instance)
        return chosen


class Pipeline:
    """Instances that serve together: their lanes, and after a loss the lanes that still owe an answer."""

    def __init__(self, lanes: LaneSet) -> None:
        self.set = lanes
        self.dead: set[int] = set()
        self.dying: set[int] = set()
        self.orphans: list[Seq] = []


class VllmPpPolicy(ServingEvents):
    """Dispatches over pipelines; a request stays in its pipeline unless a member dies."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, stages: int = 2,
                 dispatch: Dispatch = "least_outstanding") -> None:  # fmt: skip
        num, layers = len(cluster.instances), cluster.instances[0].num_layers
        if num % stages or stages > layers:
            raise ConfigError(f"system.stages={stages}: must divide the {num} instances of the cluster "
                              f"and not exceed the model's {layers} layers")  # fmt: skip
        if engine.prefix_caching:
            raise ConfigError("system=vllm_pp does not cache prefixes: use engine.prefix_caching=false")
        self.cluster = cluster
        self.engine = engine
        self.slices = slices(layers, stages)
        self.dispatch = dispatch
        self.ledger = CellLedger()
        self.seats = Seats(stages)
        self.pipelines: list[Pipeline] = []
        self.lanes: dict[int, tuple[Pipeline, SharedLane]] = {}
        self._drops: dict[int, int] = {}  # command -> instance
        self._orphans: list[Seq] = []  # while no pipeline is complete
        self._next_lane = 0
        self._next_id = OWN_IDS
        self._picks = 0

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """As any that serves; layers are dropped when the cluster comes up, too."""
        if not isinstance(event, LayersDropped):
            return super().on_event(now_ns, event)
        out: list[Command] = []
        self._dropped(event, out)
        return out

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance; blocks of all layers, so that a pipeline's sum is what it can hold."""
        layers = self.cluster.instances[0].num_layers
        spare: dict[int, int] = {}
        running: dict[int, int] = {}
        waiting: dict[int, int] = {}
        for pipeline in self.pipelines:
            stages = pipeline.set.stages
            waiting[stages[0].instance] = len(pipeline.set.waiting)
            for place, lane in enumerate(pipeline.set.lanes):
                at = stages[place % len(stages)].instance
                running[at] = running.get(at, 0) + len(lane.running)
                for instance, part in stages:
                    spare[instance] = spare.get(instance, 0) + lane.free * (part[1] - part[0])
        for instance, capacity in self.ledger.capacity.items():
            used = capacity - self.ledger.free[instance] - spare.get(instance, 0)
            low, high = self.slices[self.seats.place[instance]]
            yield Gauge(instance, running.get(instance, 0), waiting.get(instance, 0), used // layers,
                        capacity // layers,
                        param_bytes=(high - low) * self.cluster.instances[instance].layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ routing

    def _route(self, seq: Seq, out: list[Command]) -> None:
        if not self.pipelines:
            self._orphans.append(seq)
            return
        if self.dispatch == "round_robin":
            best = self.pipelines[self._picks % len(self.pipelines)].set
        else:
            best = min((one.set for one in self.pipelines), key=lambda lanes: (lanes.outstanding(), lanes.chosen))
        self._picks += 1
        best.chosen = self._picks
        best.take(seq, out)

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        pipeline, lane = self.lanes[event.lane]
        if pipeline.dead:
            pipeline.orphans += lane.lost(event)
            pipeline.dying.discard(event.lane)
            self._dissolve(pipeline, out)
            return
        lane.step_done(event, out)
        lane.schedule(out)
        if len(self.slices) > 1:
            self._settle(pipeline.set, out)

    def _settle(self, lanes: LaneSet, out: list[Command]) -> None:
        """Memory may have come free: idle lanes look again. What does not fit into an empty pipeline never will."""
        lanes.wake(out)
        while lanes.waiting and not any(lane.busy for lane in lanes.lanes):
            seq = lanes.waiting.popleft()
            blocks = lanes.lanes[0].num_blocks
            out.append(Abort(seq.request_id, f"output outgrew the KV cache of {blocks} blocks"))
            lanes.wake(out)

    # ------------------------------------------------------------ membership

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        """It takes the slice that is lacking, and drops the other layers."""
        instance = event.instance
        low, high = self.slices[self.seats.sit(instance)]
        layers = self.cluster.instances[instance].num_layers
        self.ledger.open(instance, event.kv_cells)
        rest = [part for part in ((0, low), (high, layers)) if part[0] < part[1]]
        self.seats.awaited[instance] = len(rest)
        for part in rest:
            self._next_id += 1
            self._drops[self._next_id] = instance
            out.append(DropLayers(self._next_id, instance, part))
        self._form(out)

    def _dropped(self, event: LayersDropped, out: list[Command]) -> None:
        instance = self._drops.pop(event.command_id)
        if event.status is not Status.OK:
            return  # it died
        self.ledger.resize(instance, max(event.kv_cells, self.ledger.capacity[instance]))
        self.seats.awaited[instance] -= 1
        self._form(out)

    def _form(self, out: list[Command]) -> None:
        """Make pipelines of whoever is ready."""
        formed = False
        while (members := self.seats.complete()) is not None:
            stages = tuple(Stage(instance, part) for instance, part in zip(members, self.slices))
            waiting: deque[Seq] = deque()
            pipeline = Pipeline(LaneSet(stages, [], waiting, None))
            greedy = len(stages) == 1
            for _ in stages:
                lane = SharedLane(self._next_lane, stages, self.engine, self.ledger, greedy, waiting)
                lane.short_steps = True  # its scheduler decides at every iteration, so leaps cannot matter
                self.lanes[self._next_lane] = (pipeline, lane)
                pipeline.set.lanes.append(lane)
                self._next_lane += 1
            self.pipelines.append(pipeline)
            formed = True
        if formed:
            orphans, self._orphans = self._orphans, []
            for seq in orphans:
                self._route(seq, out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        """Its pipeline ends; requests are computed anew elsewhere once the failed steps have told how far they got."""
        self.ledger.close(instance)
        self.seats.leave(instance)
        pipeline = next((one for one, _ in self.lanes.values()
                         if instance in [stage.instance for stage in one.set.stages]), None)  # fmt: skip
        if pipeline is None:
            return
        first = not pipeline.dead
        pipeline.dead.add(instance)
        if not first:
            return
        self.pipelines.remove(pipeline)
        for lane in pipeline.set.lanes:
            if lane.busy:
                pipeline.dying.add(lane.lane)
            else:
                pipeline.orphans += lane.lost(None)
        self._dissolve(pipeline, out)

    def _dissolve(self, pipeline: Pipeline, out: list[Command]) -> None:
        """All its lanes are empty: survivors wait, with their slices, for others."""
        if pipeline.dying:
            return
        for lane in pipeline.set.lanes:
            del self.lanes[lane.lane]
        for stage in pipeline.set.stages:
            instance = stage.instance
            if instance not in pipeline.dead:
                self.ledger.open(instance, self.ledger.capacity[instance])
                self.seats.idle[self.seats.place[instance]].append(instance)
        orphans, pipeline.orphans = pipeline.orphans, []
        self._orphans += orphans
        self._form(out)
        if self.pipelines:
            orphans, self._orphans = self._orphans, []
            for seq in orphans:
                self._route(seq, out)
