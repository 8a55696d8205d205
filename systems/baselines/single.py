"""The vLLM-single of Infinite-LLM: every GPU in one instance, tensor parallel inside a node, pipelined across nodes.

As many lanes as stages share one queue and one account of KV, so that a micro-batch is at every stage (what vLLM does
with a pipeline). Chunked iterations; preemption by recompute of the last admitted of the lane that runs out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from common.errors import ConfigError
from common.policy import Gauge
from common.sched.lane import EngineConfig, Seq
from common.sched.ledger import CellLedger
from common.sched.shared import SharedLane
from common.sched.stages import stage_layers
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    InstanceUp,
    Rule,
    Stage,
    Status,
    StepDone,
)
from systems.baselines.events import ServingEvents


class SinglePolicy(ServingEvents):
    """Instances of the cluster are its stages, with even shares of the layers, in order."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig) -> None:
        if engine.prefix_caching or engine.rule is not Rule.CHUNKED:
            raise ConfigError("system=vllm_single: use engine.prefix_caching=false and engine.scheduler=chunked")
        self.cluster = cluster
        num, layers = len(cluster.instances), cluster.instances[0].num_layers
        self.stages = tuple(Stage(index, share) for index, share in enumerate(stage_layers(layers, num)))
        self.ledger = CellLedger()
        self.waiting: deque[Seq] = deque()
        self.engine = engine
        self.lanes: list[SharedLane] = []
        self.up = 0
        self.dead = False

    def gauges(self) -> Iterable[Gauge]:
        """One row per node."""
        infos = self.cluster.instances
        running = sum(len(lane.running) for lane in self.lanes)
        for stage in self.stages:
            layers = stage.layers[1] - stage.layers[0]
            cells = self.ledger.capacity.get(stage.instance, 0)
            used = cells - self.ledger.free.get(stage.instance, 0)
            yield Gauge(stage.instance, running, len(self.waiting), used // layers, cells // layers, 0,
                        param_bytes=layers * infos[stage.instance].layer_param_bytes)  # fmt: skip

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        lane = self.lanes[event.lane]
        if event.status is not Status.OK:
            self._abort(lane.lost(event), out)
            return
        lane.step_done(event, out)
        self._schedule(lane, out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        """A lost node ends the instance."""
        self.dead = True
        for lane in self.lanes:
            if not lane.busy:
                self._abort(lane.lost(None), out)

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        self.ledger.open(event.instance, event.kv_cells)
        self.up += 1
        if self.up == len(self.stages):
            pipeline = len(self.stages) > 1
            self.lanes = [SharedLane(index, self.stages, self.engine, self.ledger, not pipeline, self.waiting)
                          for index in range(len(self.stages))]  # fmt: skip
            early, self.waiting = list(self.waiting), self.lanes[0].waiting
            self.waiting.clear()
            for seq in early:
                self._route(seq, out)

    def _route(self, seq: Seq, out: list[Command]) -> None:
        if self.dead:
            self._abort([seq], out)
        elif not self.lanes:
            self.waiting.append(seq)
        elif reason := self.lanes[0].refusal(seq):
            out.append(Abort(seq.request_id, reason))
        elif len(self.lanes) == 1:
            self.lanes[0].submit(seq, out)
        else:
            self.waiting.append(seq)
            self._schedule(None, out)

    def _schedule(self, first: SharedLane | None, out: list[Command]) -> None:
        """The lane at its boundary, then whoever idles; with all idle, the queue's head has outgrown the instance."""
        if first is not None:
            first.schedule(out)
        while True:
            for lane in self.lanes:
                if not lane.busy and self.waiting:
                    lane.schedule(out)
            if not self.waiting or any(lane.busy for lane in self.lanes):
                return
            blocks = self.lanes[0].num_blocks
            out.append(Abort(self.waiting.popleft().request_id, f"output outgrew the KV cache of {blocks} blocks"))

    def _abort(self, seqs: list[Seq], out: list[Command]) -> None:
        """Its only instance has lost a node (cluster.lost is refused; this is for completeness)."""
        out += [Abort(seq.request_id, "the one instance has lost a node") for seq in seqs]
