"""`runtime=dist`: a worker process per instance. The policy process keeps the books and the event clock of
`runtime=local`, so that times and tokens are the same; bytes and arithmetic are the workers', side by side.

An iteration is ordered when it is served and waited for at its boundary. A worker that dies becomes `InstanceLost` at
the instant at which that is noticed: before any later event, and before whatever it failed to do counts."""

from __future__ import annotations

from heapq import heappush
from typing import Any

from common.comm.peers import KINDS
from common.comm.world import RemoteItem, RemoteWorld
from common.errors import KVPlaneError
from common.executors.local import LocalExecutor
from common.executors.localbooks import LocalLosses
from common.executors.simlane import SimLane
from common.executors.simstate import DONE
from common.types import CopySpan, Event


class DistLosses(LocalLosses):
    """As in local; and nobody waits any more for the iteration that was cut short."""

    executor: DistExecutor

    def halt(self, lane: SimLane) -> None:
        super().halt(lane)
        item = self.executor._items.pop(lane.id, None)
        if item is not None:
            self.executor.world.runner.drop(item)


class DistExecutor(LocalExecutor):
    """See the module docstring. `world.hub` is the caller's; `close` ends instances and, with `own_hub`, workers."""

    world: RemoteWorld
    losses_type = DistLosses

    def __init__(self, *args: Any, own_hub: bool = True, **options: Any) -> None:
        self._own_hub = own_hub
        self._noticed: set[int] = set()  # instances whose worker's loss has been planned
        super().__init__(*args, **options)

    def poll(self) -> tuple[int, Event] | None:
        """As the simulator's; first, who is gone."""
        self.world.hub.drain()
        self._tell_losses()
        return super().poll()

    def _tell_losses(self) -> bool:
        """Plan `InstanceLost`, now, for workers found gone since the last look. Were there any?"""
        gone = [info.instance for info in self.cluster.instances if not self._alive(info.instance)]
        fresh = [instance for instance in gone if instance not in self._noticed]
        for instance in fresh:
            self._noticed.add(instance)
            self.control.lose_at(self.state.now, instance)
        if fresh:  # cells may change hands now that somebody's unfinished work still writes to
            self.world.settle()
        return bool(fresh)

    def _alive(self, instance: int) -> bool:
        """Are all of its workers there, as far as is known?"""
        return self.world.hub.alive(*self.world.hub.teams[instance])

    def came_up(self, instance: int) -> None:
        """As in local. Workers do not come back: without one the instance is lost again at once."""
        super().came_up(instance)
        if not self._alive(instance):
            self.control.lose_at(self.state.now, instance)

    def died(self, instance: int) -> None:
        """As in local; first, what attention others still do for it ends: their cells may change hands."""
        self.world.settle()
        super().died(instance)

    def copied(self, command: CopySpan) -> bool | None:
        """Move a copy's bytes, and wait until they are there."""
        if super().copied(command):
            return True
        self._tell_losses()
        return False

    def _compose(self, lane: SimLane) -> RemoteItem:
        item = super()._compose(lane)
        return RemoteItem(item.batch, item.ids, lane.id)

    def _item_end(self, lane: SimLane, sequence: int) -> Event | None:
        if sequence == lane.due and lane.stage + 1 == len(lane.stages):
            item = self._items[lane.id]
            assert isinstance(item, RemoteItem)
            if not self.world.runner.finish(item):
                self._again(lane, sequence)
                return None
        return super()._item_end(lane, sequence)

    def _again(self, lane: SimLane, sequence: int) -> None:
        """A boundary whose result is missing: first the loss that explains it, which voids it."""
        self.world.hub.drain(1.0)
        if not self._tell_losses() and all(self._alive(place) for place in self._places(lane)):
            raise KVPlaneError(f"lane {lane.id}: an iteration failed, but no worker of it is gone: a connection broke")
        heappush(self.state.heap, (self.state.now, DONE, lane.id, sequence, self._item_end, lane))

    def _places(self, lane: SimLane) -> set[int]:
        """Instances that an iteration of a lane needs."""
        spread = {span.instance for placement in lane.spread.values() for span in placement}
        return spread | {stage.instance for stage in lane.stages}

    def report(self) -> dict[str, Any]:
        """As in local, and what the workers sent each other: as planned, and as counted on the wire."""
        self.world.close()
        hub, lost = self.world.hub, dict[str, str]()
        for rank, how in hub.lost.items():
            lost.setdefault(str(hub.instance_of[rank]), how)
        sent, received = self.world.wire()
        counts = {"ordered": self.world.ordered, "acknowledged": self.world.acknowledged, "sent": sent,
                  "received": received}  # fmt: skip
        wire = {f"{name}_bytes": {kind: found[kind] for kind in KINDS} for name, found in counts.items()}
        num, cpu_s, wall_s = self.world.stages()
        stages = {"stages": num, "stage_cpu_ms": 1e3 * cpu_s / max(1, num), "stage_wall_ms": 1e3 * wall_s / max(1, num)}
        return {**super().report(), **wire, **stages, "lost_workers": lost}

    def close(self) -> None:
        """Give everything back, whatever workers still have to say."""
        try:
            self.world.close()
        finally:
            self.world.hub.arrived = None
            if self._own_hub:
                self.world.hub.close()
