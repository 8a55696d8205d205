"""What all parts of the policy share: the ledger, who owns which lane, what is under way, and where requests go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from common.sched.lane import EngineConfig, Seq
from common.sched.laneset import LaneSet
from common.sched.ledger import CellLedger
from common.sched.shared import SharedLane
from common.sched.spread import SpreadTable
from common.types import Abort, ClusterInfo, Command, Event, FreeSpan, Layers, Mark, Stage
from systems.kunserve.feeder import LookaheadFeeder
from systems.kunserve.group import Group
from systems.kunserve.lookahead import Costs
from systems.kunserve.options import Options
from systems.kunserve.slices import without
from systems.kunserve.state import State

OWN_IDS = 1 << 62  # command ids that no lane uses
Answer = Callable[[Any, list[Command]], None]


class Core:
    """See the module docstring."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, options: Options) -> None:
        self.cluster = cluster
        self.engine = engine
        self.options = options
        self.min_tokens = min(options.min_tokens, engine.max_num_batched_tokens)
        self.costs = Costs.of(cluster.extra)
        self.num_layers = cluster.instances[0].num_layers
        self.ledger = CellLedger()
        self.spread = SpreadTable(self.ledger, engine.block_size)
        self.now_ns = 0
        self.groups: dict[int, Group] = {}
        self.group_of: dict[int, Group] = {}  # by instance
        self.lanes: dict[int, tuple[Group, LaneSet, SharedLane]] = {}
        self.missing: dict[int, list[Layers]] = {}  # layers that an instance does not hold
        self.lending: dict[int, int] = {}  # instance -> loads that read its parameters
        self.orphans: list[Seq] = []  # arrived, or were lost, while nobody could take them
        self.later: list[tuple[int, Callable[[list[Command]], None]]] = []  # (not before, what), done by the next poll
        self._pending: dict[int, tuple[Group, Answer]] = {}
        self._next_id = OWN_IDS
        self._next_lane = len(cluster.instances)
        self._next_group = len(cluster.instances)
        self._picks = 0
        self._starts: dict[int, int] = {}

    # ------------------------------------------------------------ commands

    def ask(self, group: Group, out: list[Command], kind: Any, *args: Any, then: Answer, **more: Any) -> int:
        """Emit a command that is answered; `then` gets the event, if the group is still there to hear it."""
        self._next_id += 1
        out.append(kind(self._next_id, *args, **more))
        self._pending[self._next_id] = (group, then)
        group.awaited.add(self._next_id)
        return self._next_id

    def timer_id(self) -> int:
        """An id for a command whose answer nobody waits for."""
        self._next_id += 1
        return self._next_id

    def answered(self, command_id: int, event: Event, out: list[Command]) -> Group | None:
        """Deliver an answer; the group that waited for it, or None."""
        if command_id not in self._pending:
            return None
        group, then = self._pending.pop(command_id)
        group.awaited.discard(command_id)
        then(event, out)
        return group

    def mark(self, out: list[Command], group: Group, kind: str, text: str = "") -> None:
        """A line in the timeline."""
        members = "+".join(str(stage.instance) for stage in group.route)
        out.append(Mark(group.route[0].instance, kind, f"{members} {text}".strip()))

    def do_later(self, out: list[Command]) -> None:
        """What is due by now."""
        due = [act for at_ns, act in self.later if at_ns <= self.now_ns]
        self.later = [item for item in self.later if item[0] > self.now_ns]
        for act in due:
            act(out)

    # ------------------------------------------------------------ lanes

    def new_group(self, route: tuple[Stage, ...], state: State, ident: int | None = None) -> Group:
        """A group and its members' entry in the books."""
        if ident is None:
            ident = self._next_group
            self._next_group += 1
        group = self.groups[ident] = Group(ident, route, state, self.now_ns)
        for stage in route:
            self.group_of[stage.instance] = group
        return group

    def lane_set(self, group: Group, stages: tuple[Stage, ...], lane_id: int | None = None) -> LaneSet:
        """As many lanes as stages, on one queue. A whole instance's lane owns all memory there; others share."""
        waiting: deque[Seq] = deque()
        pipeline = len(stages) > 1
        feeder = None
        if pipeline and self.options.lookahead != "token_count":
            lanes = len(stages) if self.options.lookahead == "on" else None
            feeder = LookaheadFeeder(waiting, self.costs, self.min_tokens, self.engine.block_size, lanes)
        greedy = not pipeline and group.state is State.SERVING
        found = LaneSet(stages, [], waiting, feeder)
        for _ in stages:
            if lane_id is None:
                lane_id, self._next_lane = self._next_lane, self._next_lane + 1
            lane = SharedLane(lane_id, stages, self.engine, self.ledger, greedy, waiting, feeder, self.spread)
            lane.short_steps = not greedy  # who shares memory takes and gives at every boundary: leaps cannot matter
            self.lanes[lane_id] = (group, found, lane)
            found.lanes.append(lane)
            lane_id = None
        return found

    def serve_alone(self, instance: int, cells: int, out: list[Command]) -> None:
        """An instance that came up, empty and whole, serves on its own."""
        self.ledger.open(instance, cells)
        self.missing[instance] = []
        first = instance not in self._starts
        self._starts[instance] = self._starts.get(instance, 0) + 1
        ident = instance if first else None
        group = self.new_group((Stage(instance, (0, self.num_layers)),), State.SERVING, ident)
        group.sets = [self.lane_set(group, group.route, ident)]
        self.flush(out)

    def cells_with(self, group: Group, instance: int) -> int:
        """Cells of a KV range once the member has the layers that it wants."""
        want = group.wants.get(instance, (0, self.num_layers))
        return self._cells(instance, [part for gap in self.missing[instance] for part in without(gap, want)])

    def cells_without(self, instance: int) -> int:
        """Cells of a KV range that has the pages of all layers that are missing."""
        return self._cells(instance, self.missing[instance])

    def _cells(self, instance: int, missing: list[Layers]) -> int:
        info = self.cluster.instances[instance]
        return info.kv_cells + sum(high - low for low, high in missing) * info.layer_param_bytes // info.cell_bytes

    def settle(self, group: Group, out: list[Command]) -> None:
        """Free memory may have appeared: whoever idles beside a queue looks again; who can never go on gives way."""
        sets = group.all_sets()
        for found in sets:
            found.wake(out)
        if group.awaited or group.exchange is not None or group.stopping:
            return
        while not any(lane.busy for found in sets for lane in found.lanes) and self._unstick(sets, out):
            for found in sets:
                found.wake(out)

    def _unstick(self, sets: list[LaneSet], out: list[Command]) -> bool:
        """Nothing runs anywhere in a group and nobody fits: the last who holds KV beside the lanes makes room; in a
        pipeline where nobody does, the queue's head has outgrown it. False: nobody is stuck."""
        for found in sets:
            holders = [seq for seq in found.waiting if seq.computed]
            if holders:
                self.free_held(holders[-1], found.stages, out)
            for lane in () if holders else found.lanes:
                if lane.joining:
                    seq = lane.joining.pop()
                    self.free_held(seq, found.stages, out)
                    found.waiting.appendleft(seq)
                    holders = [seq]
                    break
            if holders:
                if found.feeder is not None:
                    found.feeder.stop()
                return True
        for found in sets:
            if found.waiting and len(found.lanes) > 1:
                seq = found.waiting.popleft()
                blocks = found.lanes[0].num_blocks
                out.append(Abort(seq.request_id, f"output outgrew the KV cache of {blocks} blocks"))
                return True
        return False

    def free_held(self, seq: Seq, route: tuple[Stage, ...], out: list[Command]) -> None:
        """Give up a request's KV outside lanes, along a route and in pieces: it will be computed anew."""
        where = dict.fromkeys([stage.instance for stage in route])
        where.update(dict.fromkeys(sorted(self.spread.instances(seq.request_id))))
        for instance in where:
            if instance in self.ledger.free:
                out.append(FreeSpan(instance, seq.request_id))
        blocks = -(-seq.computed // self.engine.block_size) - self.spread.drop(seq.request_id)
        self.ledger.take(route, -blocks)
        seq.computed = seq.shared = 0

    # ------------------------------------------------------------ routing

    def route(self, seq: Seq, out: list[Command]) -> None:
        """To the set of lanes with the fewest outstanding requests per instance; ties to the longest not chosen."""
        best: LaneSet | None = None
        least: tuple[float, int] | None = None
        for group in self.groups.values():
            for found in group.sets:
                key = (found.outstanding() / len(found.stages), found.chosen)
                if least is None or key < least:
                    best, least = found, key
        if best is None:
            self._hold(seq, out)
            return
        self._picks += 1
        best.chosen = self._picks
        best.take(seq, out)

    def _hold(self, seq: Seq, out: list[Command]) -> None:
        """Nobody admits now: a group that is about to, or whoever comes up, will."""
        for group in self.groups.values():
            if group.state in (State.PARKING, State.DROPPING):
                group.queue.append(seq)
                return
        self.orphans.append(seq)

    def flush(self, out: list[Command]) -> None:
        """Route what nobody could take."""
        orphans, self.orphans = self.orphans, []
        for seq in orphans:
            self.route(seq, out)
