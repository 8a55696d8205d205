"""A worker is told a lane's next decode iteration before it has answered the present one, so that orders, answers and
books are off its critical path (what vLLM calls asynchronous scheduling).

Only what cannot turn out otherwise is ordered (`next_is_certain`), and no book changes by it. The worker needs to be
told no more than "go on". An interrupt recalls the order; if the worker has begun it all
the same, its result is dropped: it wrote what the next step would write there, to cells that are the request's own,
and in the order of its mailbox, so before anything that was ordered since."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from common.comm.messages import Recall
from common.comm.world import RemoteItem
from common.engine.work import Batch
from common.executors.certain import next_is_certain
from common.executors.simlane import SimLane

if TYPE_CHECKING:
    from common.executors.wall import WallExecutor


class Ahead(NamedTuple):
    """An iteration that a worker knows of and whose turn has not come. `iteration`: the lane's when it has."""

    item: RemoteItem
    command_id: int
    iteration: int


class RunAhead:
    """See the module docstring. At most one iteration of each lane."""

    def __init__(self, executor: WallExecutor, wanted: bool) -> None:
        self.executor, self.wanted = executor, wanted
        self.known: dict[int, Ahead] = {}  # by lane
        self.ordered = self.used = 0

    def take(self, lane: SimLane) -> RemoteItem | None:
        """The lane's next iteration if its worker knows of it; its turn has come."""
        ahead = self.known.get(lane.id)
        if ahead is None:
            return None
        if (ahead.command_id, ahead.iteration) != (lane.command_id, lane.iteration) or lane.chunks:
            self.recall(lane)
            return None
        del self.known[lane.id]
        self.used += 1
        return ahead.item

    def order(self, lane: SimLane) -> None:
        """Tell the worker what comes after the iteration that it was just given, if that is certain. Several ranks
        would have to agree on what they skip: an instance of one only."""
        one_rank = self.executor.cluster.instances[lane.feet[0].id].tp == 1
        if not self.wanted or not one_rank or not next_is_certain(lane):
            return
        item = RemoteItem(Batch.of(()), [], lane.id)  # the worker knows what is in it
        self.executor.world.runner.proceed(item, lane.stages[0].instance)
        assert lane.command_id is not None
        self.known[lane.id] = Ahead(item, lane.command_id, lane.iteration + 1)
        self.ordered += 1

    def recall(self, lane: SimLane) -> None:
        """It does not come to that."""
        ahead = self.known.pop(lane.id, None)
        if ahead is None:
            return
        hub = self.executor.world.hub
        for rank, number in ahead.item.pending:
            hub.post((rank, Recall(number)))
            hub.forget(rank, number)
