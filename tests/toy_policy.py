"""The worked example of docs/adding-a-system.md: each request goes where the fewest prompt tokens were sent so far."""

from __future__ import annotations

from collections.abc import Iterable

from common.policy import Gauge
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    Event,
    InstanceUp,
    RequestArrived,
    Stage,
    Status,
    StepDone,
)


class FewestTokens:
    """One lane per instance; lanes are numbered as their instances are. Instances are assumed to live."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig) -> None:
        self.cluster, self.engine = cluster, engine
        self.lanes: dict[int, LaneScheduler] = {}
        self.sent: dict[int, int] = {}  # instance -> prompt tokens sent there

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to instances that come up, requests that arrive and steps that end."""
        out: list[Command] = []
        if isinstance(event, InstanceUp) and event.status is Status.OK:
            layers = self.cluster.instances[event.instance].num_layers
            stages = (Stage(event.instance, (0, layers)),)
            self.lanes[event.instance] = LaneScheduler(event.instance, stages, event.kv_cells // layers, self.engine)
            self.sent[event.instance] = 0
        elif isinstance(event, RequestArrived):
            self._route(event, out)
        elif isinstance(event, StepDone):
            lane = self.lanes[event.lane]
            lane.step_done(event, out)
            lane.schedule(out)
        return out

    def _route(self, event: RequestArrived, out: list[Command]) -> None:
        seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
        instance = min(self.sent, key=lambda i: (self.sent[i], i))
        reason = self.lanes[instance].refusal(seq)
        if reason is not None:
            out.append(Abort(seq.request_id, reason))
            return
        self.sent[instance] += event.prompt_tokens
        self.lanes[instance].submit(seq, out)

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance."""
        for instance, lane in self.lanes.items():
            yield Gauge(instance, len(lane.running), len(lane.waiting), lane.used_blocks(), lane.num_blocks)
