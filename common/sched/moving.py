"""Live migration of one request, as a table of states; `Mover` drives any number of them over migrating lanes.

    RESERVING -> COPYING -> (more grew meanwhile) RESERVING ... -> PARKING -> TAIL -> done
    RESERVING -> REMOVING (-> outgrew it: RESERVING) -> done          (as tokens: computed anew at the destination)

While full blocks are copied the request decodes on at the source; the last piece goes once it is parked at a boundary
(its stall begins there). The destination reserves before anything is copied and the source frees after the last
acknowledgement. As tokens, the destination promises the blocks of all that the request knows before the source removes
it. Whatever fails before that leaves the request at the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from common.sched.lane import Seq
from common.sched.migrating import MigratingLane
from common.types import Command, CopyDone, CopySpan, FreeSpan, Interrupt, Status

MAX_STAGES = 3  # as Llumnix: then the rest goes in the last piece, however long; as tokens: attempts to reserve
TAIL_TOKENS = 256  # 16 blocks of 16: below this the last piece begins
Mode = Literal["kv", "tokens"]


class State(Enum):
    """Where a migration stands."""

    RESERVING = "reserving"
    COPYING = "copying"
    PARKING = "parking"
    TAIL_RESERVING = "tail_reserving"
    TAIL = "tail"
    REMOVING = "removing"


@dataclass
class Migration:
    """One request on its way."""

    request_id: int
    src: MigratingLane
    dst: MigratingLane
    mode: Mode
    state: State
    done: int = 0  # tokens copied
    goal: int = 0  # tokens that the copy in flight brings it to
    stages: int = 0
    parked: Seq | None = None
    parked_ns: int = 0


@dataclass
class MoveStats:
    """What migrations have cost."""

    started: int = 0
    kv_done: int = 0
    token_done: int = 0
    aborted: int = 0
    kv_bytes: int = 0
    recomputed_tokens: int = 0  # of migrations as tokens
    preempted: int = 0  # for want of blocks: no migration, but the same price
    preempted_tokens: int = 0
    # by request, one entry per finished migration; as tokens it ends when the policy hears of it, up to an epoch late
    stalls_ns: dict[int, list[int]] = field(default_factory=dict)
    left_ns: list[tuple[int, int]] = field(default_factory=list)  # (request, when its stall began), the same migrations


class Mover:
    """All migrations under way."""

    def __init__(
        self,
        num_layers: int,
        at: dict[int, int],
        next_id: Callable[[], int],
        submit: Callable[[Seq, int, list[Command]], None],
    ) -> None:
        self.num_layers = num_layers
        self.at = at  # request -> instance, the owner's
        self.next_id = next_id
        self.submit = submit  # a request without KV goes to a lane's instance
        self.by_request: dict[int, Migration] = {}
        self.stats = MoveStats()
        self._freed: dict[int, MigratingLane] = {}  # lanes that got blocks back between boundaries
        self._copies: dict[int, Migration] = {}
        self._wishes: dict[int, list[Migration]] = {}  # destination lane -> reservations wanted at its next boundary
        self._stalled: dict[int, tuple[int, Mode]] = {}  # request -> when it left its source and stood still, how

    def in_flight(self, seqs: Mapping[int, Seq]) -> dict[int, int]:
        """Tokens whose KV is still to be copied out of or into instances."""
        busy: dict[int, int] = {}
        for move in self.by_request.values():
            if move.mode == "tokens":
                continue
            left = max(0, move.src.stored(seqs[move.request_id]) - move.done)
            for lane in (move.src, move.dst):
                busy[lane.instance] = busy.get(lane.instance, 0) + left
        return busy

    # ------------------------------------------------------------ beginnings

    def start(self, seq: Seq, src: MigratingLane, dst: MigratingLane, mode: Mode, now: int, out: list[Command]) -> None:
        """Begin to move a decoding request."""
        move = self.by_request[seq.request_id] = Migration(seq.request_id, src, dst, mode, State.RESERVING)
        self.stats.started += 1
        self._reserve(move, now, out)

    def _reserve(self, move: Migration, now: int, out: list[Command]) -> None:
        self._wishes.setdefault(move.dst.lane, []).append(move)
        self.touch(move.dst, now, out)

    def touch(self, lane: MigratingLane, now: int, out: list[Command]) -> None:
        """Something is to happen at a lane's next boundary: that is now, if it is idle."""
        if not lane.busy:
            self.boundary(lane, now, out)
        elif not lane.stopping:
            lane.stopping = True
            out.append(Interrupt(lane.lane))

    # ------------------------------------------------------------ boundaries

    def boundary(self, lane: MigratingLane, now: int, out: list[Command]) -> None:
        """Grant reservations, let requests leave and join, and batch."""
        for move in self._wishes.pop(lane.lane, ()):
            if self.by_request.get(move.request_id) is move:
                self._grant(move, now, out)
        if not lane.busy:
            lane.schedule(out)
        self.settle(lane, now, out)

    def settle(self, lane: MigratingLane, now: int, out: list[Command]) -> None:
        """After a lane's `schedule`: who was preempted moves no more; who left goes on."""
        preempted, lane.preempted = lane.preempted, []
        left, lane.left = lane.left, []
        kept, lane.kept = lane.kept, []
        joined, lane.joined = lane.joined, []
        for request_id in joined:
            self._goes_on(request_id, now)
        if preempted:
            self._count(preempted, lane)
        for request_id in preempted:
            self._give_up(request_id, out)
        for request_id in kept:
            if (move := self.by_request.get(request_id)) is not None:
                move.state = State.RESERVING
                self._reserve(move, now, out)
        for seq in left:
            move = self.by_request[seq.request_id]
            move.parked_ns = now
            if move.mode == "tokens":
                del self.by_request[seq.request_id]
                self._stalled[seq.request_id] = now, "tokens"
                self.stats.recomputed_tokens += seq.known
                self.submit(seq, move.dst.instance, out)
            else:
                move.parked = seq
                move.state = State.TAIL_RESERVING
                self._reserve(move, now, out)

    def _grant(self, move: Migration, now: int, out: list[Command]) -> None:
        """At a boundary of the destination."""
        if move.mode == "tokens":
            self._promise(move, now, out)
            return
        lane, size = move.dst, move.dst.config.block_size
        if move.parked is not None:
            goal, move.state = move.parked.computed, State.TAIL
        else:
            seq = move.src.running.get(move.request_id)
            if seq is None or not seq.decoding:
                self.drop(move.request_id, out)
                return
            goal, move.state = move.src.stored(seq) // size * size, State.COPYING
        if goal <= move.done:  # nothing is left to copy
            self._advance(move, now, out)
            return
        if not lane.reserve(move.request_id, -(-goal // size) - move.done // size):
            self.abort(move, now, out)
            return
        move.goal = goal
        move.stages += 1
        command_id = self.next_id()
        self._copies[command_id] = move
        out.append(CopySpan(command_id, move.request_id, move.src.instance, lane.instance, (0, self.num_layers),
                            (move.done, goal)))  # fmt: skip

    def _promise(self, move: Migration, now: int, out: list[Command]) -> None:
        """At a boundary of the destination: blocks for all that the request knows, and one that it may grow by until
        its source is at a boundary. Then it leaves, unless it has outgrown them."""
        seq, lane = move.src.running.get(move.request_id), move.dst
        if seq is None or not seq.decoding:
            self.drop(move.request_id, out)
            return
        need = -(-(move.src.stored(seq) + 1) // lane.config.block_size)
        blocks = max(need, min(need + 1, lane.num_blocks))
        if move.stages == MAX_STAGES or not lane.promise(move.request_id, blocks):
            self.abort(move, now, out)
            return
        move.stages += 1
        move.state = State.REMOVING
        move.src.leaving[move.request_id] = blocks
        self.touch(move.src, now, out)

    def copied(self, event: CopyDone, now: int, out: list[Command]) -> None:
        """A piece has arrived, or not."""
        move = self._copies.pop(event.command_id)
        if self.by_request.get(move.request_id) is not move:
            return  # given up meanwhile
        if event.status is not Status.OK:
            self.abort(move, now, out)
            return
        self.stats.kv_bytes += event.num_bytes
        move.done = move.goal
        for lane, iterations in event.lanes:
            if lane == move.src.lane:
                move.src.seen = max(move.src.seen, iterations)
        self._advance(move, now, out)
        if move.parked is not None:
            self.touch(move.dst, now, out)

    def _advance(self, move: Migration, now: int, out: list[Command]) -> None:
        """What next, with `done` tokens across."""
        if move.parked is not None:
            self._arrived(move, now, out)
            return
        seq = move.src.running.get(move.request_id)
        if seq is None or not seq.decoding:
            self.drop(move.request_id, out)
        elif move.stages < MAX_STAGES and move.src.stored(seq) - move.done > TAIL_TOKENS:
            move.state = State.RESERVING
            self._reserve(move, now, out)
        else:
            move.state = State.PARKING
            move.src.leaving[move.request_id] = None
            self.touch(move.src, now, out)

    def _arrived(self, move: Migration, now: int, out: list[Command]) -> None:
        """All is there: the source frees, and the request decodes on from the destination's next boundary."""
        seq = move.parked
        assert seq is not None
        del self.by_request[move.request_id]
        out.append(FreeSpan(move.src.instance, move.request_id))
        move.src.release(move.request_id)
        move.dst.joining.append(seq)
        self.at[move.request_id] = move.dst.instance
        self.stats.kv_done += 1
        self._stalled[move.request_id] = move.parked_ns, "kv"
        self.touch(move.src, now, out)

    def prefilled(self, request_id: int, now: int) -> None:
        """A prompt is computed: if it had moved (as tokens, or as KV that is lost since), its stall ends."""
        if request_id in self._stalled:
            self.stats.token_done += self._stalled[request_id][1] == "tokens"
            self._goes_on(request_id, now)

    def _count(self, preempted: list[int], lane: MigratingLane) -> None:
        """They wait where they were, and compute anew all that they know."""
        known = {seq.request_id: seq.known for seq in lane.waiting}
        self.stats.preempted += len(preempted)
        self.stats.preempted_tokens += sum(known[request_id] for request_id in preempted)

    def _goes_on(self, request_id: int, now: int) -> None:
        stalled = self._stalled.pop(request_id, None)
        if stalled is not None:
            since = stalled[0]
            self.stats.stalls_ns.setdefault(request_id, []).append(now - since)
            self.stats.left_ns.append((request_id, since))

    # ------------------------------------------------------------ ends

    def abort(self, move: Migration, now: int, out: list[Command]) -> None:
        """Not possible now: the destination forgets what it has of it; a parked request goes on at the source."""
        self.drop(move.request_id, out)
        if move.parked is not None:
            move.src.joining.append(move.parked)
            self.touch(move.src, now, out)

    def drop(self, request_id: int, out: list[Command], dst_alive: bool = True) -> None:
        """A request that was on its way is not any more (it finished, was preempted, or its source died)."""
        self._stalled.pop(request_id, None)
        self._give_up(request_id, out, dst_alive)

    def _give_up(self, request_id: int, out: list[Command], dst_alive: bool = True) -> None:
        """The migration ends here; if it had arrived and stands still, it still does."""
        move = self.by_request.pop(request_id, None)
        if move is None:
            return
        self.stats.aborted += 1
        lane = move.dst
        move.src.leaving.pop(request_id, None)
        if dst_alive and move.mode == "kv" and request_id in lane.reserved:
            out.append(FreeSpan(lane.instance, request_id))
            lane.release(request_id)
            self._freed[lane.lane] = lane
        elif dst_alive and request_id in lane.promised:
            lane.retract(request_id)
            self._freed[lane.lane] = lane

    def wake(self, now: int, out: list[Command]) -> None:
        """At the end of each event: whoever waits at an idle lane for blocks that a dropped move gave back, starts."""
        freed, self._freed = self._freed, {}
        for lane in freed.values():
            if not lane.busy and (lane.waiting or lane.joining):
                self.boundary(lane, now, out)

    def lost(self, lane: MigratingLane, now: int, out: list[Command]) -> list[Seq]:
        """A lane's instance died. Returns the requests that were parked there: they have no KV any more."""
        orphans = []
        self._wishes.pop(lane.lane, None)
        self._freed.pop(lane.lane, None)
        for move in [move for move in self.by_request.values() if lane in (move.src, move.dst)]:
            self.drop(move.request_id, out, dst_alive=move.dst is not lane)
            if move.parked is None:
                continue
            if move.src is lane:
                move.parked.computed = 0
                orphans.append(move.parked)
            else:
                move.src.joining.append(move.parked)
                self.touch(move.src, now, out)
        return orphans
