"""KV of running requests goes where the layers are now (section 4.2): by layer band, request by request, in pieces.

Each request needs, at every stage, the bands of its KV that the stage's instance does not hold yet. Its own copies
leave together; once all have arrived, the bands that no stage reads any more are freed, and the request goes on in the
pipeline. Room at the goal is taken at submission, so at most `exchange_batch` requests per source are on their way.
"""

from __future__ import annotations

from collections import deque

from common.sched.laneset import LaneSet
from common.types import Command, CopyDone, CopySpan, FreeSpan, Layers, Stage, Status
from systems.kunserve.core import Core
from systems.kunserve.group import Group, Parked
from systems.kunserve.lookahead import Chunk
from systems.kunserve.slices import overlap, without
from systems.kunserve.state import Happening, State

Band = tuple[int, int, Layers]  # from, to, layers


def bands(old: tuple[Stage, ...], new: tuple[Stage, ...]) -> list[Band]:
    """What has to move between two routes: each layer once, from its old instance to its new one."""
    found = []
    for goal in new:
        for home in old:
            common = overlap(goal.layers, home.layers)
            if common is not None and home.instance != goal.instance:
                found.append((home.instance, goal.instance, common))
    return found


class Moving:
    """A request on its way. `left`: copies not yet answered; `arrived`: bands that are there."""

    def __init__(self, parked: Parked, moves: list[Band]) -> None:
        self.parked = parked
        self.left = len(moves)
        self.arrived: list[Band] = []


class Exchange:
    """One group's exchange, from the drop until everyone's KV is in place."""

    def __init__(self, core: Core, group: Group, goal: LaneSet) -> None:
        self.core = core
        self.group = group
        self.goal = goal
        self.left: dict[int, deque[Parked]] = {}
        self.moving: dict[int, Moving] = {}
        self._under_way: dict[int, int] = {}
        for parked in group.parked:
            self.left.setdefault(parked.route[0].instance, deque()).append(parked)
        group.parked = []

    def pump(self, out: list[Command]) -> None:
        """Send what there is room for; those who would run wait while the exchange lacks room."""
        if self.group.state is not State.EXCHANGING:
            return
        blocked = False
        for source, queue in self.left.items():
            while queue and self._under_way.get(source, 0) < self.core.options.exchange_batch:
                if not self._fits(queue[0]):
                    blocked = True
                    break
                self._launch(source, queue.popleft(), out)
        self.goal.close(blocked)
        if blocked and not self.moving and not any(lane.busy for lane in self.goal.lanes):
            queue = next(queue for queue in self.left.values() if queue)
            parked = queue.pop()  # nothing else would ever make room
            self.core.free_held(parked.seq, parked.route, out)
            self.goal.waiting.append(parked.seq)
            self.pump(out)
            return
        if not self.moving and not any(self.left.values()):
            self.goal.close(False)
            self.group.exchange = None
            self.group.parts = ()
            self.group.happen(Happening.EXCHANGED, self.core.now_ns)
            self.core.mark(out, self.group, "exchanged")

    def _fits(self, parked: Parked) -> bool:
        need: dict[int, int] = {}
        blocks = -(-parked.seq.computed // self.core.engine.block_size)
        for _, goal, layers in bands(parked.route, self.group.route):
            need[goal] = need.get(goal, 0) + blocks * (layers[1] - layers[0])
        return all(cells <= self.core.ledger.free[goal] for goal, cells in need.items())

    def _launch(self, source: int, parked: Parked, out: list[Command]) -> None:
        moves = bands(parked.route, self.group.route)
        seq = parked.seq
        blocks = -(-seq.computed // self.core.engine.block_size)
        moving = Moving(parked, moves)
        if not moves:
            self._arrived(moving, out)
            return
        self.moving[seq.request_id] = moving
        self._under_way[source] = self._under_way.get(source, 0) + 1
        for band in moves:
            src, dst, layers = band
            self.core.ledger.take_cells(dst, blocks * (layers[1] - layers[0]))

            def then(event: CopyDone, out: list[Command], band: Band = band) -> None:
                self._answer(moving, band, event, out)

            self.core.ask(self.group, out, CopySpan, seq.request_id, src, dst, layers, (0, seq.computed),
                          piece_bytes=self._piece(src, dst), then=then)  # fmt: skip

    def _piece(self, src: int, dst: int) -> int | None:
        """About one stage's time on the link, so that an activation never waits longer than that."""
        core = self.core
        if core.options.exchange != "coordinated":
            return None
        if core.options.piece_bytes is not None:
            return core.options.piece_bytes
        infos, extra = core.cluster.instances, core.cluster.extra
        medium = "nvlink" if infos[src].node == infos[dst].node else "nic"
        bandwidth = extra.get(f"{medium}_bandwidth")
        if bandwidth is None or "cost_beta" not in extra:
            return infos[src].cell_bytes * core.num_layers
        stage_ns = core.costs.batch([Chunk(0, 0, core.engine.max_num_batched_tokens)]) / len(self.group.route)
        return max(1, int(bandwidth * stage_ns / 1e9))

    def _answer(self, moving: Moving, band: Band, event: CopyDone, out: list[Command]) -> None:
        if self.group.state is not State.EXCHANGING:
            return  # a member died meanwhile: all of this is given up
        seq = moving.parked.seq
        if event.status is Status.OK:
            moving.arrived.append(band)
        else:
            blocks = -(-seq.computed // self.core.engine.block_size)
            self.core.ledger.take_cells(band[1], -blocks * (band[2][1] - band[2][0]))
        moving.left -= 1
        if moving.left:
            return
        del self.moving[seq.request_id]
        self._under_way[moving.parked.route[0].instance] -= 1
        self._arrived(moving, out)
        self.pump(out)

    def _arrived(self, moving: Moving, out: list[Command]) -> None:
        core, seq, route = self.core, moving.parked.seq, moving.parked.route
        blocks = -(-seq.computed // core.engine.block_size)
        if len(moving.arrived) < len(bands(route, self.group.route)):
            for _, goal, layers in moving.arrived:
                out.append(FreeSpan(goal, seq.request_id, layers))
                core.ledger.take_cells(goal, -blocks * (layers[1] - layers[0]))
            core.free_held(seq, route, out)
            self.goal.waiting.appendleft(seq)
            return
        keeps = {stage.instance: stage.layers for stage in self.group.route}
        for instance, layers in route:
            for part in without(layers, keeps[instance]):
                out.append(FreeSpan(instance, seq.request_id, part))
                core.ledger.take_cells(instance, -blocks * (part[1] - part[0]))
        self.goal.join(seq, out)

    def call_off(self, out: list[Command]) -> list[Parked]:
        """A member died: copies under way and what has arrived of them are freed; sources still have everything."""
        for request_id, moving in self.moving.items():
            for _, goal, layers in bands(moving.parked.route, self.group.route):
                if goal in self.core.ledger.free:
                    out.append(FreeSpan(goal, request_id, layers))
        return self.waiting()

    def waiting(self) -> list[Parked]:
        """Everyone who has not arrived."""
        rest = [parked for queue in self.left.values() for parked in queue]
        return rest + [moving.parked for moving in self.moving.values()]
