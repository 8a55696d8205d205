"""The runtimes that walk: each builds a walk's world, drives its policy to the end, and tells what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.driver import drive
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.types import Command, Event, Mark, Tier
from tests.contract.script import Script
from tests.fakes import cluster

Trace = list[tuple[int, Event | Command]]  # events as delivered and commands as submitted, in order


@dataclass
class Outcome:
    """What any runtime can say after a walk: cells still in use and cached, by instance; host cells likewise."""

    policy: Script
    record: RunRecord
    trace: Trace = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    host_used: dict[int, int] = field(default_factory=dict)
    host_cached: dict[int, int] = field(default_factory=dict)
    graphs: Any = None

    def events(self, kind: type) -> list[tuple[int, Any]]:
        """(time, event or command) of one kind."""
        return [(now, item) for now, item in self.trace if isinstance(item, kind)]

    def marks(self) -> list[str]:
        """Milestones, in order."""
        return [kind for _, _, kind, _ in self.record.marks]


class Recorder:
    """An executor that notes all that passes; a `Mark` of kind "kill" makes the runtime lose that instance."""

    def __init__(self, executor: SimExecutor, trace: Trace) -> None:
        self.executor = executor
        self.trace = trace
        self.now = 0

    def submit(self, command: Command) -> None:
        """As the executor's."""
        self.trace.append((self.now, command))
        self.executor.submit(command)
        if isinstance(command, Mark) and command.kind == "kill":
            self.executor.control.lose_at(self.now + 1, command.instance)

    def poll(self) -> tuple[int, Event] | None:
        """As the executor's."""
        item = self.executor.poll()
        if item is not None:
            self.now = item[0]
            self.trace.append(item)
        return item


def walk_sim(walk: type[Script], leap: int | None) -> Outcome:
    """In the simulator, with the made-up costs of `tests.fakes`."""
    world = walk.world
    model = cluster(world.instances, world.blocks, world.layers, world.block_size, world.running, world.host_blocks)
    record = RunRecord(RequestColumns.empty(len(walk.workload.prompt_tokens)))
    executor = SimExecutor(model, walk.workload, record)
    outcome = Outcome(walk(model.info(), leap), record)
    drive(outcome.policy, Recorder(executor, outcome.trace), record)
    for info, memory in zip(model.instances, executor.state.memory):
        outcome.used[info.instance], outcome.cached[info.instance] = memory.used, memory.cached
        outcome.host_used[info.instance], outcome.host_cached[info.instance] = memory.host_used, memory.host_cached
    return outcome


def walk_local(walk: type[Script], leap: int | None, **options: Any) -> Outcome:
    """With real tensors on this process's CPU. `options` are the world's."""
    from common.executors.local import LocalExecutor
    from tests.engine.worlds import tiny_world

    return _walk_really(walk, leap, lambda model: tiny_world(model, **options), LocalExecutor)


def walk_dist(walk: type[Script], leap: int | None) -> Outcome:
    """With real tensors of a worker process per instance."""
    from common.executors.dist import DistExecutor
    from tests.dist.pool import dist_world

    return _walk_really(walk, leap, dist_world, DistExecutor)


def _walk_really(walk: type[Script], leap: int | None, make_world: Callable[[Any], Any], kind: Any) -> Outcome:
    """Free cells hold NaN, and every reply is that of an undisturbed run."""
    from tests.engine.worlds import check_tokens

    world = walk.world
    model = cluster(world.instances, world.blocks, world.layers, world.block_size, world.running, world.host_blocks)
    record = RunRecord(RequestColumns.empty(len(walk.workload.prompt_tokens)))
    engine = make_world(model)
    executor = kind(model, walk.workload, record, world=engine)
    outcome = Outcome(walk(model.info(), leap), record)
    drive(outcome.policy, Recorder(executor, outcome.trace), record)
    for instance, live in engine.instances.items():
        for store in live.stores.values():
            store.check()
        assert live.stores[Tier.HBM].used == executor.state.memory[instance].used
        assert live.stores[Tier.DRAM].used == executor.state.memory[instance].host_used
    for info, memory in zip(model.instances, executor.state.memory):
        outcome.used[info.instance], outcome.cached[info.instance] = memory.used, memory.cached
        outcome.host_used[info.instance], outcome.host_cached[info.instance] = memory.host_used, memory.host_cached
    check_tokens(executor)
    outcome.graphs = engine.runner.graphs.counts if engine.runner.graphs else None
    engine.close()
    return outcome


RUNTIMES: dict[str, Callable[[type[Script], int | None], Outcome]] = {
    "sim": walk_sim,
    "local": walk_local,
    "dist": walk_dist,
}
