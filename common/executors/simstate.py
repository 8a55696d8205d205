"""What the parts of the simulator share: the clock and its queue, memories, and KV held outside lanes."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

from common.errors import ContractError
from common.executors.cluster import ClusterModel
from common.executors.memory import Held, InstanceMemory, overlap, subtract, union_cells
from common.record import RunRecord
from common.types import Event, Layers, Tier

# Classes of events at one instant, in this order.
LOST, UP, DONE, MESSAGE, ARRIVAL, TIMER = range(6)
# Within DONE: whatever moves bytes comes before the boundaries of lanes, which come by lane id.
BEFORE_LANES = -1

Handler = Callable[[Any, int], Event | None]
QueueItem = tuple[int, int, int, int, Handler, Any]


class SimState:
    """Clock, queue (time, class, tie, sequence), memories and held KV."""

    def __init__(self, cluster: ClusterModel, record: RunRecord) -> None:
        self.cluster = cluster
        self.record = record
        self.now = 0
        self.event_class = UP  # of the event being delivered, and its tie: who comes first at one instant
        self.event_tie = BEFORE_LANES
        self.heap: list[QueueItem] = []
        self.ready: deque[Event] = deque()  # events owed at this very instant
        self.sequence = 0
        self.memory = [InstanceMemory(info) for info in cluster.instances]
        self.up = [info.running for info in cluster.instances]
        self.held: dict[int, list[Held]] = {}
        self.block_size = cluster.block_size

    def push(self, time_ns: int, event_class: int, tie: int, handler: Handler, argument: Any) -> int:
        """Queue `handler(argument, sequence)` and return the sequence number."""
        self.sequence = sequence = self.sequence + 1
        heapq.heappush(self.heap, (time_ns, event_class, tie, sequence, handler, argument))
        return sequence

    def moved(self, start_ns: int, src: int, dst: int, num_bytes: int, request_id: int, kind: str) -> None:
        """Record bytes that have crossed a link by now."""
        moves = self.record.moves
        moves.start_ns.append(start_ns)
        moves.end_ns.append(self.now)
        moves.src.append(src)
        moves.dst.append(dst)
        moves.num_bytes.append(num_bytes)
        moves.request_id.append(request_id)
        moves.kind.append(kind)

    def check_empty(self) -> None:
        """The law at the end of a run, when no request lives: all blocks are free but for cached ones."""
        for memory in self.memory:
            left, host = memory.used - memory.cached, memory.host_used - memory.host_cached
            if left or host:
                kept = sorted(request for request, held in self.held.items()
                              if any(one.instance == memory.info.instance for one in held))[:3]  # fmt: skip
                raise ContractError(
                    f"instance {memory.info.instance}: the run is over and {left} KV cells (and {host} in DRAM) are "
                    f"not free, " + (f"held under requests {kept}" if kept else "of no request: blocks have leaked")
                )

    # ------------------------------------------------------------ held KV

    def cells_for(self, request_id: int, held: Held) -> int:
        """Cells that a further rectangle of a request needs; a block it shares with a held one is there already."""
        beside = [other for other in self.held.get(request_id, ())
                  if other.instance == held.instance and other.tier is held.tier and other is not held]  # fmt: skip
        if not beside:
            return held.cells(self.block_size)
        return union_cells([*beside, held], self.block_size) - union_cells(beside, self.block_size)

    def fits(self, request_id: int, held: Held) -> bool:
        """Is there room for a rectangle?"""
        memory = self.memory[held.instance]
        room = memory.room() if held.tier is Tier.HBM else memory.host_room()
        return self.cells_for(request_id, held) <= room

    def hold(self, request_id: int, held: Held) -> None:
        """Charge and record a rectangle outside any lane."""
        cells = self.cells_for(request_id, held)
        memory = self.memory[held.instance]
        if held.tier is Tier.HBM:
            memory.take(cells)
        else:
            memory.host_used += cells
            if memory.host_used > memory.info.host_cells:
                raise ContractError(f"instance {held.instance}: host tier overbooked")
        self.held.setdefault(request_id, []).append(held)

    def drop_held(self, request_id: int, held: Held) -> None:
        """Free one whole rectangle."""
        cells = self.cells_for(request_id, held)
        self.held[request_id].remove(held)
        if not self.held[request_id]:
            del self.held[request_id]
        memory = self.memory[held.instance]
        if held.tier is Tier.HBM:
            memory.give(cells)
        else:
            memory.host_used -= cells

    def free_all(self, request_id: int) -> None:
        """Free everything that a request holds outside lanes, on every instance."""
        for held in list(self.held.get(request_id, ())):
            self.drop_held(request_id, held)

    def carve(self, request_id: int, instance: int, tier: Tier, layers: Layers, tokens: tuple[int, int]) -> int:
        """Free the part of a request's ready held KV inside a rectangle; returns token-layers freed."""
        area = 0
        for held in list(self.held.get(request_id, ())):
            if held.instance != instance or held.tier is not tier or not held.ready:
                continue
            rest = subtract(held, layers, tokens)
            if rest == [held]:
                continue
            area += _area(held) - sum(_area(part) for part in rest)
            self.drop_held(request_id, held)
            for part in rest:
                self.hold(request_id, part)
        return area

    def area(self, request_id: int, instance: int, tier: Tier, layers: Layers, tokens: tuple[int, int]) -> int:
        """Token-layers of ready held KV of a request inside a rectangle on an instance."""
        total = 0
        for held in self.held.get(request_id, ()):
            if held.instance == instance and held.tier is tier and held.ready:
                band = overlap(held.layers, layers)
                if band:
                    total += max(0, min(held.end, tokens[1]) - max(held.start, tokens[0])) * (band[1] - band[0])
        return total


def _area(held: Held) -> int:
    return (held.end - held.start) * (held.layers[1] - held.layers[0])
