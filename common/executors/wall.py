"""`runtime=dist` by the wall clock: nothing is modelled that workers really do. An iteration ends when its worker says
so, a copy or a load when its last byte is there, an arrival or a timer when its time has come.

The books are those of `runtime=local`, as is their order: events of one look at the workers are delivered in the order
in which they came. Only control messages between agents and the start-up of instances keep their modelled times."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop
from typing import Any

from common.comm.world import RemoteItem
from common.engine.runner import StageTimes
from common.errors import Stalled
from common.executors.ahead import RunAhead
from common.executors.dist import DistExecutor, DistLosses
from common.executors.network import Flow
from common.executors.sim import SimInstance
from common.executors.simlane import SimLane
from common.executors.simlinks import Links
from common.executors.simstate import ARRIVAL, BEFORE_LANES, DONE, TIMER
from common.executors.source import NEVER
from common.types import CopySpan, Event, Interrupt, LoadLayers, StepDone

LOOK_S = 0.25  # at least so often workers are looked after
Key = tuple[int, int]  # (rank, number of its order)


class WallLinks(Links):
    """Links that take no time: what really has to cross them says when it is there."""

    def hop_ns(self, src: int, dst: int, tokens: int) -> int:
        return 0

    def send(self, flow: Flow, latency_ns: int) -> None:
        self.state.push(self.state.now, DONE, BEFORE_LANES, self._through, flow)

    def stop(self, flow: Flow) -> None:
        flow.done = lambda now: None

    @staticmethod
    def _through(flow: Flow, _: int) -> Event | None:
        flow.done(0)
        return None


class WallLosses(DistLosses):
    """As by the modelled clock; nor for the iteration that was to follow."""

    executor: WallExecutor

    def halt(self, lane: SimLane) -> None:
        self.executor.ahead.recall(lane)
        self.executor.forget_stages(lane)
        super().halt(lane)


class WallExecutor(DistExecutor):
    """See the module docstring. `async_scheduling`: as in `common.executors.ahead`."""

    losses_type = WallLosses

    def __init__(self, *args: Any, async_scheduling: bool = True, **options: Any) -> None:
        super().__init__(*args, measured=True, **options)
        self.moves.links = self.moves.params.links = WallLinks(self.state)
        self.world.hub.arrived = self._note
        self._zero: int | None = None  # monotonic time at the first poll
        self._stages: dict[Key, tuple[SimLane, int]] = {}  # stages that run: lane, its sequence number
        self._others: dict[Key, Callable[[Key], None]] = {}  # copies and loads on their way: what to do when there
        self._copying: dict[int, Key] = {}  # command -> its order
        self._loading: dict[int, Key] = {}  # the same of loads
        self._came: deque[Key] = deque()
        self.ahead = RunAhead(self, async_scheduling)

    # ------------------------------------------------------------ clock

    def _tick(self) -> int:
        """Now; never before an earlier event."""
        assert self._zero is not None
        self.state.now = max(self.state.now, time.monotonic_ns() - self._zero)
        return self.state.now

    def poll(self) -> tuple[int, Event] | None:
        """The next event; waits for it."""
        if self._zero is None:
            self._zero = time.monotonic_ns()
        while True:
            if self.state.ready:
                event: Event | None = self.state.ready.popleft()
            elif self._over():
                break
            else:
                event = self._step()
            self.books.settle()
            if event is not None:
                return self.state.now, event
        if self.live:
            raise Stalled(f"{self.live} requests live but nothing is going on (first: {self._some_live()})")
        self._close()
        return None

    def _over(self) -> bool:
        if self.client.next_ns != NEVER or self._stages or self._others:
            return False
        return not self.state.heap if self.live else not self._work_pending()

    def _step(self) -> Event | None:
        """Look at the workers; then do the one thing that is due first, or wait for a moment."""
        hub, heap = self.world.hub, self.state.heap
        hub.drain()
        self._tell_losses()
        if self._came:
            return self._finished(self._came.popleft())
        now = self._tick()
        head = heap[0][0] if heap else NEVER
        if min(head, self.client.next_ns) > now:
            wait_s = min((min(head, self.client.next_ns) - now) * 1e-9, LOOK_S)
            hub.drain(wait_s)
            return None
        if heap and (head < self.client.next_ns or (head == self.client.next_ns and heap[0][1] < ARRIVAL)):
            return self._due(heappop(heap))
        event = self._arrive(self.client.next_ns)
        self.state.now = self._last_work = max(now, self.state.now)
        return event

    def _due(self, item: Any) -> Event | None:
        _, event_class, tie, sequence, handler, argument = item
        if event_class == TIMER:
            self._check_stall(self.state.now)
        self.state.event_class, self.state.event_tie = event_class, tie
        event: Event | None = handler(argument, sequence)
        if event is not None and event_class <= DONE:
            self._last_work = self.state.now
        return event

    # ------------------------------------------------------------ what workers say

    def _note(self, rank: int, number: int) -> None:
        if (rank, number) in self._stages or (rank, number) in self._others:
            self._came.append((rank, number))

    def _tell_losses(self) -> bool:
        told = super()._tell_losses()
        if told:  # answers of the dead will not come
            alive = self.world.hub.alive
            self._came.extend(key for key in self._others if not alive(key[0]) and key not in self._came)
            self._stages = {key: value for key, value in self._stages.items() if alive(key[0])}
        return told

    def forget_stages(self, lane: SimLane) -> None:
        """Nobody waits for a lane's iteration any more; workers that are still there may answer it yet."""
        self._stages = {key: value for key, value in self._stages.items() if value[0] is not lane}

    def _finished(self, key: Key) -> Event | None:
        """A stage, a copy or a load."""
        now = self._tick()
        self.state.event_class, self.state.event_tie = DONE, BEFORE_LANES
        other = self._others.pop(key, None)
        if other is not None:
            other(key)
            return None
        lane, sequence = self._stages.pop(key, (None, -1))
        if lane is None or sequence != lane.due:
            return None  # cut short by a loss
        self.state.event_tie = lane.id
        lane.durations[lane.stage] = now - lane.item_start
        event = self._item_end(lane, sequence)
        if event is not None:
            self._last_work = now
        return event

    # ------------------------------------------------------------ orders

    def _serve(self, instance: SimInstance, lane: SimLane, now: int) -> None:
        """As in local; when it ends its worker says."""
        self.books.settle()
        known = self.ahead.take(lane) if lane.stage == 0 else None
        if known is not None:
            self._items[lane.id] = known
            self._flying.add(lane.id)
            times = StageTimes()
        else:
            times = self._order(lane)
        self._account(lane, instance.id, times)
        instance.serving = lane
        lane.item_start = now
        self.state.sequence = lane.due = self.state.sequence + 1
        item = self._items[lane.id]
        assert isinstance(item, RemoteItem)
        key = item.pending[-1]
        self._stages[key] = (lane, lane.due)
        if self.world.hub.ready(*key) and self.world.hub.alive(key[0]):  # it has been answered already
            self._came.append(key)
        self.ahead.order(lane)
        if lane.followers:
            self.moves.item_started(lane, now, 0)

    def _order(self, lane: SimLane) -> StageTimes:
        """Have a worker run a lane's stage."""
        if lane.stage == 0:
            self._items[lane.id] = self._compose(lane)
        stage, item = lane.stages[lane.stage], self._items[lane.id]
        assert isinstance(item, RemoteItem)
        times: StageTimes = self.world.runner.run_stage(item, stage.instance, stage.layers)
        return times

    def _interrupt(self, command: Interrupt) -> None:
        super()._interrupt(command)
        lane = self.lanes.get(command.lane)
        if lane is not None and lane.stop:
            self.ahead.recall(lane)

    def _step_done(self, lane: SimLane) -> StepDone:
        self.ahead.recall(lane)
        return super()._step_done(lane)

    def report(self) -> dict[str, Any]:
        """As by the modelled clock; and iterations ordered ahead, and those that came to be."""
        return {**super().report(), "iterations_ahead": {"ordered": self.ahead.ordered, "used": self.ahead.used}}

    def boundary_ns(self, instance: int) -> int:
        """Workers do one thing after the other: what is ordered now comes after the iteration that runs."""
        return self.state.now

    def _first(self, instance: int) -> int:
        """The rank that speaks for an instance; others are waited for when it has spoken."""
        return self.world.hub.teams[instance][0]

    def copied(self, command: CopySpan) -> bool | None:
        """Tell both ends; the destination will say when it is there."""
        here, there, tokens, first = self._ends(command)
        if command.src == command.dst:
            return self.world.move(here, there, tokens, first)
        size = self.world.copy_bytes(there, tokens)
        key = self._first(command.dst), self.world.begin_move(here, there, tokens, first)

        def ended(key: Key) -> None:
            self._copying.pop(command.command_id, None)
            ok = self.world.end_move(command.src, command.dst, key[1], size)
            self.moves.landed(command.command_id, ok)

        self._others[key] = ended
        self._copying[command.command_id] = key
        return None

    def copy_stopped(self, command: CopySpan) -> None:
        """Its cells may be another's soon: what still comes must not be put there."""
        self._stopped(self._copying, command.command_id, command.dst)

    def _stopped(self, under_way: dict[int, Key], command_id: int, instance: int) -> None:
        """Tell an instance's worker that nobody wants any more what is on its way there for a command."""
        key = under_way.pop(command_id, None)
        if key is not None and self._others.pop(key, None) is not None:
            self.world.abandon(instance, key[1])

    def layers_loaded(self, command: LoadLayers, missing: Sequence[int], loaded: Callable[[], None]) -> None:
        """Tell both ends; the destination will say when they are there."""
        number = self.world.begin_load(command.instance, list(missing), command.source)

        def ended(key: Key) -> None:
            self._loading.pop(command.command_id, None)
            if self.world.end_load(command.instance, len(missing), command.source, key[1]):
                loaded()

        key = self._first(command.instance), number
        self._others[key] = ended
        self._loading[command.command_id] = key

    def load_goes_on(self, command: LoadLayers) -> bool:
        """A worker that has been told of it takes from its own parameter source what its peer has not sent."""
        return command.command_id in self._loading and self._alive(command.instance)

    def load_stopped(self, command: LoadLayers) -> None:
        """As `copy_stopped`."""
        self._stopped(self._loading, command.command_id, command.instance)
