"""KV on the move in the simulator: copies between instances and tiers, and swaps.

A copy is double-booked from its submission until the policy frees the source: the destination's blocks are reserved at
once and stay unreadable until the last byte is there. Whatever is freed under a copy cancels it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import ContractError
from common.executors.memory import Held, overlap
from common.executors.network import Flow
from common.executors.simlane import SimLane, Target
from common.executors.simlinks import Links
from common.executors.simparams import Params
from common.executors.simstate import BEFORE_LANES, DONE, SimState
from common.types import CopyDone, CopySpan, Event, Layers, RequestStatus, Stage, Status, SwapDone, SwapSpan, Tier

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

PACE_IDLE_NS = 1_000_000  # an idle source lane has no iterations: a paced copy then moves a piece this often
LIVE = int(RequestStatus.LIVE)


class Copy:
    """A copy on its way. `left`: tokens not yet promised to the link; `pieces`: those promised and not yet across;
    `called_ns`: when its calls so far are made."""

    __slots__ = ("called_ns", "command", "dst_held", "flows", "lane", "left", "pieces", "sent_bytes", "start_ns")

    def __init__(self, command: CopySpan, dst_held: Held, now_ns: int) -> None:
        self.command = command
        self.dst_held = dst_held
        self.left = command.tokens[1] - command.tokens[0]
        self.pieces = 0
        self.flows: list[Flow] = []
        self.sent_bytes = 0
        self.start_ns = now_ns
        self.called_ns = -(1 << 62)
        self.lane: SimLane | None = None


class Swap(NamedTuple):
    """A swap on its way, and how to undo what it has booked."""

    command: SwapSpan
    flow: Flow
    undo: Callable[[], None]


class Moves:
    """Owns the links and everything in flight."""

    def __init__(self, state: SimState, executor: SimExecutor) -> None:
        self.state = state
        self.executor = executor
        self.links = Links(state)
        self.params = Params(state, executor, self.links)
        self.copies: dict[int, Copy] = {}
        self.swaps: dict[int, Swap] = {}
        self.after: dict[int, list[Copy]] = {}  # step -> copies that start at its end

    def commands(self) -> dict[type, Any]:
        """Command type -> handler."""
        return {CopySpan: self._copy, SwapSpan: self._swap, **self.params.commands()}

    def hop_ns(self, src: int, dst: int, tokens: int) -> int:
        """Activations between stages."""
        return self.links.hop_ns(src, dst, tokens)

    def _bytes(self, tokens: int, layers: int, instance: int) -> int:
        return tokens * layers * self.state.cluster.instances[instance].cell_bytes // self.state.block_size

    # ------------------------------------------------------------ copies

    def _copy(self, command: CopySpan) -> None:
        state, request_id = self.state, command.request_id
        (start, end), (low, high) = command.tokens, command.layers
        if start >= end or low >= high:
            raise ContractError(f"copy {command.command_id}: nothing to copy in {command.tokens} x {command.layers}")
        self.executor.members.check_model(request_id, command.dst)
        held = Held(command.dst, command.dst_tier, command.layers, start, end, ready=False)
        lane = self._running(command.after) if command.after is not None else None
        self.executor.settle(command.dst)
        if not (state.up[command.src] and state.up[command.dst] and state.fits(request_id, held)):
            state.ready.append(CopyDone(command.command_id, Status.FAILED, 0))
            return
        if lane is None and not self._at_source(command):
            if state.record.requests.status[request_id] == LIVE:
                raise ContractError(f"copy {command.command_id}: tokens {command.tokens}, layers {command.layers} of "
                                    f"request {request_id} are not on instance {command.src}")  # fmt: skip
            state.ready.append(CopyDone(command.command_id, Status.CANCELLED, 0))  # it ended: the copy came too late
            return
        if any(_touches(other, command.dst, command.dst_tier, command.layers, command.tokens)
               for other in state.held.get(request_id, ())):  # fmt: skip
            raise ContractError(f"copy {command.command_id}: instance {command.dst} has some of {command.tokens}")
        follows = self._followed(command, lane) if lane is not None and command.by_layer else None
        state.hold(request_id, held)
        copy = self.copies[command.command_id] = Copy(command, held, state.now)
        if lane is None or command.after is None:
            self._launch(copy)
        elif follows is not None:
            self._follow(copy, lane, *follows)
        else:
            self.after.setdefault(command.after, []).append(copy)

    def _running(self, command_id: int) -> SimLane | None:
        for lane in self.executor.lanes.values():
            if lane.command_id == command_id:
                return lane
        return None

    def _at_source(self, command: CopySpan) -> bool:
        """Is the KV there: held, in a lane, or (what the request's content names) cached?"""
        state, request_id, tokens, layers = self.state, command.request_id, command.tokens, command.layers
        missing = (tokens[1] - tokens[0]) * (layers[1] - layers[0])
        missing -= state.area(request_id, command.src, command.src_tier, layers, tokens)
        if missing > 0 and command.src_tier is Tier.HBM:
            missing -= self.executor.control.area_in_lanes(request_id, command.src, layers, tokens)
        memory = state.memory[command.src]
        cached = memory.cached if command.src_tier is Tier.HBM else memory.host_cached
        return missing <= cached * state.block_size

    def _launch(self, copy: Copy) -> None:
        command = copy.command
        if command.pace is None:
            self._send(copy, copy.left, 0, command.num_calls)
            return
        lanes = [lane for lane in self.executor.lanes.values()
                 if any(stage.instance == command.src for stage in lane.stages)]  # fmt: skip
        home = [lane for lane in lanes if command.request_id in lane.members]
        copy.lane = next(iter(home or lanes), None)
        if copy.lane is not None:
            copy.lane.paced.append(copy)
            self.executor.cut_all(command.src)
        self._pace_idle(copy, 0)

    def _pace_idle(self, copy: Copy, _: int) -> Event | None:
        """While its lane stands still, a paced copy goes on by the clock."""
        if copy.command.command_id in self.copies and copy.left:
            if copy.lane is None or copy.lane.command_id is None:
                self._piece(copy)
            self.state.push(self.state.now + PACE_IDLE_NS, DONE, BEFORE_LANES, self._pace_idle, copy)
        return None

    def _piece(self, copy: Copy) -> None:
        if copy.left and copy.pieces < 2:  # bounded in flight
            self._send(copy, min(copy.command.pace or copy.left, copy.left), 0, 1)

    def _send(self, copy: Copy, tokens: int, not_before: int, calls: int) -> None:
        copy.left -= tokens
        copy.pieces += 1
        self._put(copy, tokens, not_before, calls)

    def _put(self, copy: Copy, tokens: int, not_before: int, calls: int) -> None:
        """Give a promised piece to the links."""
        command, cluster = copy.command, self.state.cluster
        # of the destination: where KV heads are fewer than its ranks, each that holds one gets it
        num_bytes = self._bytes(tokens, command.layers[1] - command.layers[0], command.dst)
        copy.sent_bytes += num_bytes
        ports = cluster.ports(command.src, command.dst)
        latency = cluster.pcie.latency_ns if command.src == command.dst else (
            cluster.link(command.src, command.dst).latency_ns)  # fmt: skip
        if command.src != command.dst:
            tiers = ((command.src, command.src_tier), (command.dst, command.dst_tier))
            ports += tuple(("pcie", instance) for instance, tier in tiers if tier is Tier.DRAM)
        flow = Flow(ports, num_bytes, command.priority, not_before, lambda now: None, command.piece_bytes)
        flow.done = lambda now: self._sent(copy, flow)
        copy.flows.append(flow)
        self.links.send(flow, latency + max(0, calls - 1) * cluster.call_ns)

    def _sent(self, copy: Copy, flow: Flow) -> None:
        copy.flows.remove(flow)
        copy.pieces -= 1
        if copy.left or copy.pieces:
            return
        there = self.executor.copied(copy.command)
        if there is not None:
            self._landed(copy, there)

    def landed(self, command_id: int, there: bool) -> None:
        """What `copied` could not tell: a copy's bytes are there, or will never be."""
        if command_id in self.copies:
            self._landed(self.copies[command_id], there)

    def _landed(self, copy: Copy, there: bool) -> None:
        if not there:
            self._end_copy(copy, Status.FAILED)
            return
        command, state = copy.command, self.state
        del self.copies[command.command_id]
        self._detach(copy)
        copy.dst_held.ready = True
        self._merge(copy)
        state.moved(copy.start_ns, command.src, command.dst, copy.sent_bytes, command.request_id, "copy")
        lanes = self.executor.lanes_of(command.src, command.dst)
        state.ready.append(CopyDone(command.command_id, Status.OK, copy.sent_bytes, lanes))

    def _merge(self, copy: Copy) -> None:
        """Pieces copied in stages become one rectangle again."""
        state, new, request_id = self.state, copy.dst_held, copy.command.request_id
        for old in list(state.held.get(request_id, ())):
            if (old is not new and old.ready and old.end == new.start
                    and (old.instance, old.tier, old.layers) == (new.instance, new.tier, new.layers)):  # fmt: skip
                state.drop_held(request_id, old)
                state.drop_held(request_id, new)
                state.hold(request_id, Held(new.instance, new.tier, new.layers, old.start, new.end))
                return

    def _detach(self, copy: Copy) -> None:
        if copy.lane is not None:
            copy.lane.paced = [other for other in copy.lane.paced if other is not copy]
            copy.lane.followers = [other for other in copy.lane.followers if other is not copy]

    def _end_copy(self, copy: Copy, status: Status) -> None:
        """Stop a copy: nothing of it stays at the destination."""
        command = copy.command
        del self.copies[command.command_id]
        self.executor.copy_stopped(command)
        for flow in copy.flows:
            self.links.stop(flow)
        self._detach(copy)
        if command.after in self.after:
            waiting = [other for other in self.after.pop(command.after) if other is not copy]
            if waiting:
                self.after[command.after] = waiting
        self.state.drop_held(command.request_id, copy.dst_held)
        self.state.ready.append(CopyDone(command.command_id, status, 0))

    # ------------------------------------------------------------ copies beside steps

    def _followed(self, command: CopySpan, lane: SimLane) -> tuple[Target, int]:
        """The prefill in a lane that a by-layer copy follows, and at which stage."""
        target = next((t for t in lane.targets if t.entry.request_id == command.request_id), None)
        stage = next((index for index, stage in enumerate(lane.stages) if _holds(stage, command)), None)
        if target is None or stage is None or command.tokens[1] > target.target:
            raise ContractError(f"copy {command.command_id}: request {command.request_id} has no prefill of tokens "
                                f"{command.tokens}, layers {command.layers} on instance {command.src}")  # fmt: skip
        return target, stage

    def _follow(self, copy: Copy, lane: SimLane, target: Target, stage: int) -> None:
        """Layer by layer behind a request's prefill: what is computed goes at once, the rest as it is made."""
        command = copy.command
        copy.lane = lane
        lane.followers.append(copy)
        computed = target.computed
        if lane.stage > stage:  # this iteration has passed the copy's stage already
            computed += self._chunk_of(lane, command.request_id)
        done = min(computed, command.tokens[1]) - command.tokens[0]
        if done > 0:
            calls = _share(command, done)
            copy.called_ns = self.state.now + (calls - 1) * self.state.cluster.call_ns
            self._send(copy, done, 0, calls)
        if lane.stage == stage and lane.feet[stage].serving is lane:
            self._behind_item(copy, lane, lane.item_start, lane.durations[stage])

    def item_started(self, lane: SimLane, now: int, duration: int) -> None:
        """An item of a lane with followers runs from `now` on."""
        for copy in lane.followers:
            if _holds(lane.stages[lane.stage], copy.command):
                self._behind_item(copy, lane, now, duration)

    def _behind_item(self, copy: Copy, lane: SimLane, start: int, duration: int) -> None:
        """A chunk's KV leaves from the end of its first layer on; it is not across before the last layer's own bytes
        have followed that layer's end and all calls. Calls are made in turn, a layer's when it is computed."""
        command, cluster = copy.command, self.state.cluster
        tokens = 0
        for chunk, target in zip(lane.chunks, lane.targets):
            if target.entry.request_id == command.request_id:
                tokens = min(target.computed + chunk, command.tokens[1]) - max(target.computed, command.tokens[0])
        if tokens <= 0:
            return
        stage = lane.stages[lane.stage].layers
        in_all, layers = stage[1] - stage[0], command.layers[1] - command.layers[0]
        first = start + duration * (command.layers[0] - stage[0] + 1) // in_all
        last = start + duration * (command.layers[1] - stage[0]) // in_all
        link, calls = cluster.link(command.src, command.dst), _share(command, tokens)
        a_layer = max(1, calls // layers)
        free = max(first, copy.called_ns + cluster.call_ns)
        copy.called_ns = max(last + (a_layer - 1) * cluster.call_ns, free + (calls - 1) * cluster.call_ns)
        wire_ns = link.latency_ns + int(self._bytes(tokens, 1, command.src) * 1e9 / link.bandwidth)
        copy.left -= tokens
        copy.pieces += 1
        piece = (copy, tokens, copy.called_ns + wire_ns, a_layer)
        self.state.push(max(first, self.state.now), DONE, BEFORE_LANES, self._layer_out, piece)

    def _layer_out(self, piece: tuple[Copy, int, int, int], _: int) -> Event | None:
        copy, tokens, not_before, calls = piece
        if copy.command.command_id in self.copies:
            self._put(copy, tokens, not_before, calls)
        return None

    @staticmethod
    def _chunk_of(lane: SimLane, request_id: int) -> int:
        return next((chunk for chunk, target in zip(lane.chunks, lane.targets)
                     if target.entry.request_id == request_id), 0)  # fmt: skip

    def iterated(self, lane: SimLane) -> None:
        """An iteration of the source's lane is over: paced copies may move their next tokens."""
        for copy in list(lane.paced):
            self._piece(copy)

    def step_ended(self, lane: SimLane, command_id: int | None) -> None:
        """Start what waited for the step. By-layer copies go on behind the prefill in the lane's next step."""
        for copy in self.after.pop(command_id, ()) if command_id is not None else ():
            if self._at_source(copy.command):
                self._launch(copy)
            else:  # the step was cut short of what was to be copied
                self._end_copy(copy, Status.FAILED)
        lane.followers = [copy for copy in lane.followers if copy.left]

    def unfollow(self, lane: SimLane, request_id: int) -> None:
        """A request left its lane with its target unreached: by-layer copies of it cannot end."""
        for copy in [copy for copy in lane.followers if copy.command.request_id == request_id and copy.left]:
            self._end_copy(copy, Status.FAILED)

    # ------------------------------------------------------------ swaps

    def _swap(self, command: SwapSpan) -> None:
        state = self.state
        if not state.up[command.instance]:
            state.ready.append(SwapDone(command.command_id, Status.FAILED, 0))
            return
        self.executor.settle(command.instance)
        booked = self._book_cached(command) if command.content is not None else self._book_held(command)
        if booked is None:
            state.ready.append(SwapDone(command.command_id, Status.FAILED, 0))
            return
        finish, undo = booked
        instance, start = command.instance, state.now
        layers, tokens = command.layers[1] - command.layers[0], command.tokens[1] - command.tokens[0]
        num_bytes = self._bytes(tokens, layers, instance)

        def done(_: int) -> None:
            del self.swaps[command.command_id]
            self.executor.swap_ends(command, Status.OK)
            finish()
            state.moved(start, instance, instance, num_bytes, command.request_id, "swap")
            state.ready.append(SwapDone(command.command_id, Status.OK, num_bytes, self.executor.lanes_of(instance)))

        flow = Flow((("pcie", instance),), num_bytes, 0, 0, done)
        self.swaps[command.command_id] = Swap(command, flow, undo)
        self.executor.swap_begins(command)
        self.links.send(flow, state.cluster.pcie.latency_ns)

    def _book_held(self, command: SwapSpan) -> tuple[Callable[[], None], Callable[[], None]] | None:
        """Both tiers are booked until the swap is done. None: no room at the goal."""
        state, request_id, layers, tokens = self.state, command.request_id, command.layers, command.tokens
        source, goal = (Tier.HBM, Tier.DRAM) if command.out else (Tier.DRAM, Tier.HBM)
        new = Held(command.instance, goal, layers, *tokens, ready=False)
        area = state.area(request_id, command.instance, source, layers, tokens)
        if area != (tokens[1] - tokens[0]) * (layers[1] - layers[0]):
            raise ContractError(f"swap {command.command_id}: tokens {tokens}, layers {layers} of request {request_id} "
                                f"are not parked in {source.value} of instance {command.instance}")  # fmt: skip
        if not state.fits(request_id, new):
            return None
        state.carve(request_id, command.instance, source, layers, tokens)
        old = Held(command.instance, source, layers, *tokens, ready=False)  # nobody may join with it meanwhile
        state.hold(request_id, old)
        state.hold(request_id, new)

        def finish() -> None:
            state.drop_held(request_id, old)
            new.ready = True

        def undo() -> None:
            state.drop_held(request_id, new)
            old.ready = True

        return finish, undo

    def _book_cached(self, command: SwapSpan) -> tuple[Callable[[], None], Callable[[], None]] | None:
        """As `_book_held`, for cached blocks that the content names."""
        state, memory = self.state, self.state.memory[command.instance]
        start, end = command.tokens
        blocks = -(-end // state.block_size) - start // state.block_size
        cells = blocks * (command.layers[1] - command.layers[0])
        have, room = (memory.cached, memory.host_room()) if command.out else (memory.host_cached, memory.room())
        if have < cells:
            raise ContractError(f"swap {command.command_id}: {cells} cells of {have} cached ones")
        if room < cells:
            return None
        if command.out:
            memory.cached -= cells
            memory.host_used += cells
        else:
            memory.host_cached -= cells
            memory.take(cells)

        def settle(to_host: bool) -> None:
            if to_host:
                memory.host_cached += cells
                memory.give(cells)
            else:
                memory.cached += cells
                memory.host_used -= cells

        return (lambda: settle(command.out)), (lambda: settle(not command.out))

    def _end_swap(self, swap: Swap, status: Status) -> None:
        del self.swaps[swap.command.command_id]
        self.links.stop(swap.flow)
        self.executor.swap_ends(swap.command, status)
        swap.undo()
        self.state.ready.append(SwapDone(swap.command.command_id, status, 0))

    # ------------------------------------------------------------ ends

    def cancel(self, request_id: int) -> None:
        """The request ended or lost its KV: what moves it is cancelled."""
        for copy in [copy for copy in self.copies.values() if copy.command.request_id == request_id]:
            self._end_copy(copy, Status.CANCELLED)
        for swap in [swap for swap in self.swaps.values() if swap.command.request_id == request_id]:
            if swap.command.content is None:
                self._end_swap(swap, Status.CANCELLED)

    def freed(self, request_id: int, instance: int, tier: Tier, layers: Layers, tokens: tuple[int, int]) -> None:
        """A rectangle is about to be freed: copies from it or into it, and swaps of it, are cancelled."""
        for copy in [copy for copy in self.copies.values() if copy.command.request_id == request_id]:
            command = copy.command
            source = Held(command.src, command.src_tier, command.layers, *command.tokens)
            if any(_touches(held, instance, tier, layers, tokens) for held in (source, copy.dst_held)):
                self._end_copy(copy, Status.CANCELLED)
        for swap in [swap for swap in self.swaps.values() if swap.command.request_id == request_id]:
            move = swap.command
            held = Held(move.instance, tier, move.layers, *move.tokens)
            if move.content is None and _touches(held, instance, tier, layers, tokens):
                self._end_swap(swap, Status.CANCELLED)

    def lose(self, instance: int) -> None:
        """Everything that concerned a dead instance fails."""
        for copy in [copy for copy in self.copies.values() if instance in (copy.command.src, copy.command.dst)]:
            self._end_copy(copy, Status.FAILED)
        for swap in [swap for swap in self.swaps.values() if swap.command.instance == instance]:
            self._end_swap(swap, Status.FAILED)
        self.params.lose(instance)


def _holds(stage: Stage, command: CopySpan) -> bool:
    """Does a stage compute all layers of a copy at its source?"""
    return stage.instance == command.src and overlap(stage.layers, command.layers) == command.layers


def _share(command: CopySpan, tokens: int) -> int:
    """Calls of a piece of a copy."""
    return max(1, command.num_calls * tokens // (command.tokens[1] - command.tokens[0]))


def _touches(held: Held, instance: int, tier: Tier, layers: Layers, tokens: tuple[int, int]) -> bool:
    """Does a rectangle on this instance and tier overlap one that is held?"""
    return (held.instance == instance and held.tier is tier and overlap(held.layers, layers) is not None
            and held.start < tokens[1] and tokens[0] < held.end)  # fmt: skip
