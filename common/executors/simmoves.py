"""Bytes on the move in the simulator: copies, swaps, parameter drops and loads, compaction, pipeline hops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.errors import ContractError
from common.executors.memory import Held, overlap
from common.executors.network import Flow
from common.executors.simlane import SimLane
from common.executors.simstate import BEFORE_LANES, DONE, SimState
from common.types import (
    CopyDone,
    CopySpan,
    DropLayers,
    Event,
    LayersDropped,
    LayersLoaded,
    LoadLayers,
    ShrinkDone,
    ShrinkKV,
    Status,
    SwapDone,
    SwapSpan,
    Tier,
)

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

PACE_IDLE_NS = 1_000_000  # an idle source lane has no iterations: a paced copy then moves a piece this often


class Copy:
    """A copy on its way. `left`: tokens not yet given to the link."""

    __slots__ = ("command", "dst_held", "flows", "lane", "left", "sent_bytes", "start_ns")

    def __init__(self, command: CopySpan, dst_held: Held, now_ns: int) -> None:
        self.command = command
        self.dst_held = dst_held
        self.left = command.tokens[1] - command.tokens[0]
        self.flows: list[Flow] = []
        self.sent_bytes = 0
        self.start_ns = now_ns
        self.lane: SimLane | None = None


class Moves:
    """Owns the network and everything in flight."""

    def __init__(self, state: SimState, executor: SimExecutor) -> None:
        self.state = state
        self.executor = executor
        self.network = state.cluster.network()
        self._wake = -1
        self.copies: dict[int, Copy] = {}
        self._after: dict[int, list[Copy]] = {}
        self._pending: dict[int, tuple[Any, Flow | None]] = {}  # swaps and loads by command id

    def commands(self) -> dict[type, Any]:
        """Command type -> handler."""
        return {
            CopySpan: self._copy,
            SwapSpan: self._swap,
            DropLayers: self._drop,
            LoadLayers: self._load,
            ShrinkKV: self._shrink,
        }

    # ------------------------------------------------------------ links

    def hop_ns(self, src: int, dst: int, tokens: int) -> int:
        """Activations between stages. They are no flow: beside a copy they wait half a piece, or run at half rate."""
        cluster = self.state.cluster
        delay = cluster.hop_ns(src, dst, tokens)
        ports = set(cluster.ports(src, dst))
        beside = [copy for copy in self.copies.values() if any(ports & set(flow.ports) for flow in copy.flows)]
        if beside:
            spec = cluster.link(src, dst)
            pieces = [copy.command.piece_bytes for copy in beside]
            if all(piece is not None for piece in pieces):
                delay += int(max(piece or 0 for piece in pieces) / 2 * 1e9 / spec.bandwidth)
            else:
                delay += delay - spec.latency_ns
        return delay

    def _flow(self, flow: Flow, latency_ns: int) -> None:
        """Put a flow on the network after its latency."""
        self.state.push(self.state.now + latency_ns, DONE, BEFORE_LANES, self._flow_starts, flow)

    def _flow_starts(self, flow: Flow, _: int) -> Event | None:
        self.network.start(self.state.now, flow)
        self._plan_wake()
        return None

    def _plan_wake(self) -> None:
        next_ns = self.network.next_ns()
        if next_ns is not None:
            self._wake = self.state.push(max(next_ns, self.state.now), DONE, BEFORE_LANES, self._woken, None)

    def _woken(self, _: None, sequence: int) -> Event | None:
        if sequence != self._wake:
            return None
        for flow in self.network.advance(self.state.now):
            flow.done(self.state.now)
        self._plan_wake()
        return None

    def _answer(self, event: Event) -> None:
        self.state.ready.append(event)

    def _moved(self, start_ns: int, src: int, dst: int, num_bytes: int, request_id: int, kind: str) -> None:
        moves = self.state.record.moves
        moves.start_ns.append(start_ns)
        moves.end_ns.append(self.state.now)
        moves.src.append(src)
        moves.dst.append(dst)
        moves.num_bytes.append(num_bytes)
        moves.request_id.append(request_id)
        moves.kind.append(kind)

    # ------------------------------------------------------------ copies

    def _token_bytes(self, layers: int) -> float:
        info = self.state.cluster.instances[0]
        return info.cell_bytes * layers / self.state.block_size

    def _copy(self, command: CopySpan) -> None:
        state = self.state
        held = Held(command.dst, command.dst_tier, command.layers, *command.tokens, ready=False)
        cells = held.cells(state.block_size)
        memory = state.memory[command.dst]
        if command.dst_tier is Tier.HBM:
            fits = memory.room() >= cells
        else:
            fits = memory.info.host_cells - memory.host_used >= cells
        if not (fits and state.up[command.src] and state.up[command.dst]) or command.tokens[0] >= command.tokens[1]:
            self._answer(CopyDone(command.command_id, Status.FAILED, 0))
            return
        state.hold(command.request_id, held)
        copy = self.copies[command.command_id] = Copy(command, held, state.now)
        lane = self._running(command.after) if command.after is not None else None
        if lane is not None and command.by_layer:
            copy.lane = lane
            lane.followers.append(copy)
        elif lane is not None and command.after is not None:
            self._after.setdefault(command.after, []).append(copy)
        else:
            self._launch(copy)

    def _running(self, command_id: int) -> SimLane | None:
        for lane in self.executor.lanes.values():
            if lane.command_id == command_id:
                return lane
        return None

    def _launch(self, copy: Copy) -> None:
        command = copy.command
        if command.pace is None:
            self._send(copy, copy.left, 0, command.num_calls)
            return
        lanes = [lane for lane in self.executor.lanes.values()
                 if any(stage.instance == command.src for stage in lane.stages)]
        home = [lane for lane in lanes if command.request_id in lane.members]
        copy.lane = (home or lanes or [None])[0]  # type: ignore[list-item]
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
        if copy.left and len(copy.flows) < 2:  # bounded in flight
            self._send(copy, min(copy.command.pace or copy.left, copy.left), 0, 1)

    def _send(self, copy: Copy, tokens: int, not_before: int, calls: int) -> None:
        command, cluster = copy.command, self.state.cluster
        copy.left -= tokens
        num_bytes = int(tokens * self._token_bytes(command.layers[1] - command.layers[0]))
        copy.sent_bytes += num_bytes
        same = command.src == command.dst
        spec = cluster.pcie if same or Tier.DRAM in (command.dst_tier, command.src_tier) else None
        ports = cluster.ports(command.src, command.dst)
        if spec is None:
            spec = cluster.link(command.src, command.dst)
        elif not same:
            ports = (*ports, ("pcie", command.dst if command.dst_tier is Tier.DRAM else command.src))
        flow = Flow(ports, num_bytes, command.priority, not_before, lambda now: None)
        flow.done = lambda now: self._sent(copy, flow)
        copy.flows.append(flow)
        self._flow(flow, spec.latency_ns + max(0, calls - 1) * cluster.call_ns)

    def _sent(self, copy: Copy, flow: Flow) -> None:
        copy.flows.remove(flow)
        if copy.left or copy.flows or copy.command.command_id not in self.copies:
            return
        command = copy.command
        del self.copies[command.command_id]
        self._detach(copy)
        copy.dst_held.ready = True
        self._merge(copy)
        self._moved(copy.start_ns, command.src, command.dst, copy.sent_bytes, command.request_id, "copy")
        self._answer(CopyDone(command.command_id, Status.OK, copy.sent_bytes,
                              self.executor.lanes_of(command.src, command.dst)))  # fmt: skip

    def _merge(self, copy: Copy) -> None:
        """Adjacent pieces copied in stages become one rectangle, so a shared last block is charged once."""
        state, new = self.state, copy.dst_held
        for old in list(state.held.get(copy.command.request_id, ())):
            if (old is not new and old.ready and old.end == new.start
                    and (old.instance, old.tier, old.layers) == (new.instance, new.tier, new.layers)):
                state.drop_held(copy.command.request_id, old)
                state.drop_held(copy.command.request_id, new)
                state.hold(copy.command.request_id, Held(new.instance, new.tier, new.layers, old.start, new.end))
                return

    def _detach(self, copy: Copy) -> None:
        if copy.lane is not None:
            if copy in copy.lane.paced:
                copy.lane.paced.remove(copy)
            if copy in copy.lane.followers:
                copy.lane.followers.remove(copy)

    def _end_copy(self, copy: Copy, status: Status) -> None:
        del self.copies[copy.command.command_id]
        for flow in copy.flows:
            flow.done = _ignore
            self.network.stop(self.state.now, flow)
        self._plan_wake()
        self._detach(copy)
        for waiting in self._after.values():
            if copy in waiting:
                waiting.remove(copy)
        request_id = copy.command.request_id
        if copy.dst_held in self.state.held.get(request_id, ()):
            self.state.drop_held(request_id, copy.dst_held)
        self._answer(CopyDone(copy.command.command_id, status, 0))

    def cancel(self, request_id: int) -> None:
        """The request ended or lost its KV: its copies are cancelled."""
        for copy in [copy for copy in self.copies.values() if copy.command.request_id == request_id]:
            self._end_copy(copy, Status.CANCELLED)
        for command, _ in list(self._pending.values()):
            if isinstance(command, SwapSpan) and command.request_id == request_id:
                self._fail_pending(command, Status.CANCELLED)

    # ------------------------------------------------------------ copies beside steps

    @property
    def waits_for_steps(self) -> bool:
        """Does any copy wait for the end of a step?"""
        return bool(self._after)

    def step_ended(self, lane: SimLane, command_id: int | None) -> None:
        """Start what waited for the step; a by-layer copy whose step ended early sends the rest now."""
        if command_id in self._after:
            for copy in self._after.pop(command_id):
                self._launch(copy)
        for copy in list(lane.followers):
            lane.followers.remove(copy)
            copy.lane = None
            if copy.left:
                self._send(copy, copy.left, 0, 1)

    def item_started(self, lane: SimLane, now: int, duration: int) -> None:
        """A chunk's KV leaves layer by layer while its iteration runs: from the first layer's end, and not complete
        before the last layer's own bytes have crossed."""
        stage = lane.stages[lane.stage]
        for copy in lane.followers:
            command = copy.command
            band = overlap(stage.layers, command.layers)
            chunk = self._chunk_of(lane, command.request_id)
            if stage.instance != command.src or band is None or band != command.layers or not chunk:
                continue
            layers = band[1] - band[0]
            tokens = min(chunk, copy.left)
            link = self.state.cluster.link(command.src, command.dst)
            last = int(tokens * self._token_bytes(1) * 1e9 / link.bandwidth)
            piece = (copy, tokens, now + duration + last, max(1, command.num_calls // layers))
            if tokens:
                self.state.push(now + duration // layers, DONE, BEFORE_LANES, self._layer_out, piece)

    def _layer_out(self, piece: tuple[Copy, int, int, int], _: int) -> Event | None:
        copy, tokens, not_before, calls = piece
        if copy.command.command_id in self.copies and copy.left >= tokens:
            self._send(copy, tokens, not_before, calls)
        return None

    @staticmethod
    def _chunk_of(lane: SimLane, request_id: int) -> int:
        for chunk, target in zip(lane.chunks, lane.targets):
            if target.entry.request_id == request_id:
                return chunk
        return 0

    def iterated(self, lane: SimLane) -> None:
        """An iteration of the source's lane is over: paced copies may move their next tokens."""
        for copy in list(lane.paced):
            self._piece(copy)

    # ------------------------------------------------------------ swaps

    def _swap(self, command: SwapSpan) -> None:
        state, memory = self.state, self.state.memory[command.instance]
        source, goal = (Tier.HBM, Tier.DRAM) if command.out else (Tier.DRAM, Tier.HBM)
        layers = command.layers[1] - command.layers[0]
        held = Held(command.instance, goal, command.layers, *command.tokens, ready=False)
        room = memory.info.host_cells - memory.host_used if command.out else memory.room()
        area = state.area(command.request_id, command.instance, source, command.layers, command.tokens)
        if room < held.cells(state.block_size) or area != layers * (command.tokens[1] - command.tokens[0]):
            self._answer(SwapDone(command.command_id, Status.FAILED, 0))
            return
        state.hold(command.request_id, held)
        num_bytes = int((command.tokens[1] - command.tokens[0]) * self._token_bytes(layers))
        start = state.now

        def done(_: int) -> None:
            del self._pending[command.command_id]
            state.carve(command.request_id, command.instance, source, command.layers, command.tokens)
            held.ready = True
            self._moved(start, command.instance, command.instance, num_bytes, command.request_id, "swap")
            self._answer(SwapDone(command.command_id, Status.OK, num_bytes, self.executor.lanes_of(command.instance)))

        flow = Flow((("pcie", command.instance),), num_bytes, 0, 0, done)
        self._pending[command.command_id] = (command, flow)
        self._flow(flow, state.cluster.pcie.latency_ns)

    # ------------------------------------------------------------ parameters

    def _drop(self, command: DropLayers) -> None:
        state = self.state
        memory = state.memory[command.instance]
        if not state.up[command.instance]:
            self._answer(LayersDropped(command.command_id, Status.FAILED, 0))
            return
        if not memory.has(command.layers):
            raise ContractError(f"instance {command.instance}: layers {command.layers} dropped but not resident")
        for lane in self.executor.lanes.values():
            here = [s for s in lane.stages if s.instance == command.instance and overlap(s.layers, command.layers)]
            if here and (lane.command_id is not None or lane.members or lane.targets):
                raise ContractError(f"layers {command.layers} dropped while lane {lane.id} runs on them")
        memory.resident[command.layers[0] : command.layers[1]] = [False] * (command.layers[1] - command.layers[0])
        self._pending[command.command_id] = (command, None)
        state.push(state.now + state.cluster.remap_ns, DONE, BEFORE_LANES, self._dropped, command)

    def _dropped(self, command: DropLayers, _: int) -> Event | None:
        if command.command_id not in self._pending:
            return None
        del self._pending[command.command_id]
        memory = self.state.memory[command.instance]
        memory.capacity = memory.full_capacity()
        return LayersDropped(command.command_id, Status.OK, memory.capacity, self.executor.lanes_of(command.instance))

    def _load(self, command: LoadLayers) -> None:
        state = self.state
        memory = state.memory[command.instance]
        low, high = command.layers
        missing = [layer for layer in range(low, high) if not memory.resident[layer]]
        num_bytes = len(missing) * memory.info.layer_param_bytes
        after = memory.info.kv_cells + (
            (memory.resident.count(False) - len(missing)) * memory.info.layer_param_bytes // memory.info.cell_bytes
        )
        source = command.source
        peer_ok = source is None or (state.up[source] and state.memory[source].has(command.layers))
        if not (state.up[command.instance] and peer_ok and memory.capacity <= after):
            self._answer(LayersLoaded(command.command_id, Status.FAILED, memory.capacity))
            return
        start = state.now

        def done(_: int) -> None:
            del self._pending[command.command_id]
            memory.resident[low:high] = [True] * (high - low)
            memory.capacity = memory.full_capacity()
            src = command.instance if source is None else source
            self._moved(start, src, command.instance, num_bytes, -1, "load")
            lanes = self.executor.lanes_of(command.instance)
            self._answer(LayersLoaded(command.command_id, Status.OK, memory.capacity, lanes))

        src = command.instance if source is None else source
        spec = state.cluster.pcie if source is None else state.cluster.link(src, command.instance)
        flow = Flow(state.cluster.ports(src, command.instance), num_bytes, command.priority, 0, done)
        self._pending[command.command_id] = (command, flow)
        self._flow(flow, spec.latency_ns + state.cluster.remap_ns)

    def _shrink(self, command: ShrinkKV) -> None:
        state = self.state
        memory = state.memory[command.instance]
        if not state.up[command.instance] or memory.used > command.num_cells:
            self._answer(ShrinkDone(command.command_id, Status.FAILED))
            return
        tail = max(0, memory.capacity - command.num_cells)
        moved = min(memory.used, tail)  # at worst everything in the tail moves once
        memory.capacity = min(memory.capacity, command.num_cells)
        delay = int(2 * moved * memory.info.cell_bytes * 1e9 / state.cluster.compact_bandwidth)
        self._pending[command.command_id] = (command, None)
        state.push(state.now + delay, DONE, BEFORE_LANES, self._shrunk, (command, moved))

    def _shrunk(self, argument: tuple[ShrinkKV, int], _: int) -> Event | None:
        command, moved = argument
        if command.command_id not in self._pending:
            return None
        del self._pending[command.command_id]
        return ShrinkDone(command.command_id, Status.OK, moved, self.executor.lanes_of(command.instance))

    # ------------------------------------------------------------ losses

    def _fail_pending(self, command: Any, status: Status) -> None:
        _, flow = self._pending.pop(command.command_id)
        if flow is not None:
            flow.done = _ignore
            self.network.stop(self.state.now, flow)
            self._plan_wake()
        if isinstance(command, SwapSpan):
            goal = Tier.DRAM if command.out else Tier.HBM
            for held in list(self.state.held.get(command.request_id, ())):
                if not held.ready and held.instance == command.instance and held.tier is goal:
                    self.state.drop_held(command.request_id, held)
            self._answer(SwapDone(command.command_id, status, 0))
        elif isinstance(command, DropLayers):
            self._answer(LayersDropped(command.command_id, status, 0))
        elif isinstance(command, LoadLayers):
            self._answer(LayersLoaded(command.command_id, status, 0))
        else:
            self._answer(ShrinkDone(command.command_id, status))

    def lose(self, instance: int) -> None:
        """Everything that concerned a dead instance fails."""
        for copy in [c for c in self.copies.values() if instance in (c.command.src, c.command.dst)]:
            self._end_copy(copy, Status.FAILED)
        for command, _ in list(self._pending.values()):
            if instance in (command.instance, getattr(command, "source", None)):
                self._fail_pending(command, Status.FAILED)


def _ignore(_: int) -> None:
    """A flow whose owner is gone."""
