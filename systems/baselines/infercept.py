"""InferCept's min-waste rule for preempted requests: preserve, swap to the host, or discard (`system=infercept`).

InferCept pauses requests that wait for a tool; here they are paused because memory ran out, which is how KunServe uses
it. Otherwise `vllm`: independent instances behind a dispatcher.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from common.errors import ConfigError
from common.options import Kind, refusal
from common.sched.dispatch import DISPATCH, Dispatch
from common.sched.lane import EngineConfig, LaneScheduler
from common.types import ClusterInfo, Command, Event, Stage, SwapDone
from systems.baselines.infercept_lane import InterceptLane
from systems.baselines.vllm import VllmPolicy
from systems.baselines.waste import Action, Rates


class Actions:
    """Some of the actions, `discard` among them: it always works."""

    def read(self, name: str, value: Any) -> tuple[Action, ...]:
        """As actions."""
        names = [action.value for action in Action]
        given = value if isinstance(value, list | tuple) else ()
        if "discard" not in given or not all(isinstance(one, str) and one in names for one in given):
            raise refusal(name, value, f"give a list of {', '.join(names)}; discard must be among them")
        return tuple(Action(one) for one in given)


OPTIONS: dict[str, Kind] = {"actions": Actions(), "dispatch": DISPATCH}


class InferCeptPolicy(VllmPolicy):
    """`vllm` with lanes that choose what becomes of a victim's KV."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, actions: Collection[Action] = tuple(Action),
                 dispatch: Dispatch = "least_outstanding") -> None:  # fmt: skip
        if engine.prefix_caching:
            raise ConfigError("system=infercept does not cache prefixes: use engine.prefix_caching=false")
        super().__init__(cluster, engine, dispatch)
        info = cluster.instances[0]
        self.actions = actions
        self.rates = Rates.of(cluster.extra, info.num_layers * info.cell_bytes / engine.block_size)

    def make_lane(self, lane_id: int, stages: tuple[Stage, ...], blocks: int) -> LaneScheduler:
        """A lane with host DRAM behind it."""
        info = self.cluster.instances[stages[0].instance]
        return InterceptLane(lane_id, stages, blocks, self.engine, info.host_cells // info.num_layers, self.rates,
                             self.actions)  # fmt: skip

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """As vllm; swaps end too."""
        for lane in (*self.lanes.values(), *self._dying.values()):
            assert isinstance(lane, InterceptLane)
            lane.now_ns = now_ns
        if not isinstance(event, SwapDone):
            return super().on_event(now_ns, event)
        out: list[Command] = []
        lane_id = event.command_id >> 32
        instance = lane_id % len(self.cluster.instances)
        owner = self.lanes.get(instance)
        if isinstance(owner, InterceptLane) and owner.lane == lane_id and event.command_id in owner.moving:
            owner.swap_done(event, out)
            self.dispatcher.note(instance, owner)
        return out
