"""Iterations that were composed while the device computed those before them: works, rows, tables and slots, all but the
token ids. So the host's part of a decode iteration is off the critical path where a device computes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from common.engine.cells import RequestCells
from common.engine.runner import Item
from common.engine.work import Batch, Work
from common.executors.certain import next_is_certain
from common.executors.simlane import SimLane

if TYPE_CHECKING:
    from common.executors.local import LocalExecutor


class Prepared(NamedTuple):
    """An iteration whose turn has not come. `iteration`: the lane's when it has; `cells`: those of its requests, and
    how often they had moved when the tables were made."""

    item: Item
    command_id: int | None
    iteration: int
    cells: list[tuple[int, RequestCells, int]]


class PreparedItems:
    """At most one of each lane."""

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self.used = 0
        self._known: dict[int, Prepared] = {}  # by lane

    def prepare(self, lane: SimLane) -> None:
        """Compose a lane's next iteration, if it is certain by now what it will be."""
        if not next_is_certain(lane):
            return
        executor, stage, after = self.executor, lane.stages[0], lane.iteration + 1
        works = [Work(request_id, member.offset + after, 1, True, executor.spans(lane, request_id, member.entry.shared))
                 for request_id, member in lane.members.items()]  # fmt: skip
        item = Item(Batch.of(works), [])
        executor.world.plan(item, stage.instance, stage.layers)
        held = executor.books.store(stage.instance).requests
        cells = [(request_id, held[request_id], held[request_id].version) for request_id in lane.members]
        self._known[lane.id] = Prepared(item, lane.command_id, after, cells)

    def take(self, lane: SimLane) -> Item | None:
        """The lane's next iteration, with its ids, if it was prepared and still is what it was."""
        known = self._known.pop(lane.id, None)
        if known is None or (known.command_id, known.iteration) != (lane.command_id, lane.iteration) or lane.chunks:
            return None
        held = self.executor.books.store(lane.stages[0].instance).requests
        for request_id, cells, version in known.cells:
            if held.get(request_id) is not cells or cells.version != version:
                return None
        known.item.ids = [self.executor.known(work.request_id)[work.first] for work in known.item.batch.works]
        self.used += 1
        return known.item
