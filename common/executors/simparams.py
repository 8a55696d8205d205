"""Parameters that come and go in the simulator, and the KV range that grows and shrinks with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.errors import ContractError
from common.executors.memory import overlap
from common.executors.network import Flow
from common.executors.simlinks import Links
from common.executors.simstate import BEFORE_LANES, DONE, SimState
from common.types import DropLayers, Event, LayersDropped, LayersLoaded, LoadLayers, ShrinkDone, ShrinkKV, Status

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

ParamCommand = DropLayers | LoadLayers | ShrinkKV


class Params:
    """Drops, loads and shrinks under way, by command id."""

    def __init__(self, state: SimState, executor: SimExecutor, links: Links) -> None:
        self.state = state
        self.executor = executor
        self.links = links
        self._pending: dict[int, tuple[ParamCommand, Flow | None]] = {}

    def commands(self) -> dict[type, Any]:
        """Command type -> handler."""
        return {DropLayers: self._drop, LoadLayers: self._load, ShrinkKV: self._shrink}

    def reads(self, instance: int, layers: tuple[int, int] | None = None) -> bool:
        """Does a load in flight read (these) parameters of an instance?"""
        return any(
            isinstance(command, LoadLayers) and command.source == instance
            and (layers is None or overlap(command.layers, layers) is not None)
            for command, _ in self._pending.values()
        )  # fmt: skip

    def _at_boundary(self, command: ParamCommand, delay_ns: int, handler: Any, argument: Any) -> None:
        """Remapping starts when the iteration that the instance is in has ended, and takes `delay_ns`."""
        self._pending[command.command_id] = (command, None)
        start = self.executor.boundary_ns(command.instance)
        self.state.push(start + delay_ns, DONE, BEFORE_LANES, handler, argument)

    # ------------------------------------------------------------ drop

    def _drop(self, command: DropLayers) -> None:
        state, instance, layers = self.state, command.instance, command.layers
        if not state.up[instance]:
            state.ready.append(LayersDropped(command.command_id, Status.FAILED, 0))
            return
        memory = state.memory[instance]
        if not memory.has(layers):
            raise ContractError(f"instance {instance}: layers {layers} dropped but not resident")
        if self.reads(instance, layers):
            raise ContractError(f"instance {instance}: layers {layers} dropped while a peer loads from them")
        for lane in list(self.executor.instances[instance].lanes.values()):
            if any(stage.instance == instance and overlap(stage.layers, layers) for stage in lane.stages):
                if lane.command_id is not None or lane.members or lane.targets:
                    raise ContractError(f"layers {layers} dropped while lane {lane.id} runs on them")
                for foot in lane.feet:
                    foot.lanes.pop(lane.id, None)
                lane.stages, lane.feet = (), []  # it needs a new route
        memory.resident[layers[0] : layers[1]] = [False] * (layers[1] - layers[0])
        self._at_boundary(command, state.cluster.remap_ns, self._dropped, (command, state.now))

    def _dropped(self, argument: tuple[DropLayers, int], _: int) -> Event | None:
        command, started = argument
        if self._pending.pop(command.command_id, None) is None:
            return None
        memory = self.state.memory[command.instance]
        memory.capacity = memory.full_capacity()
        self.executor.layers_dropped(command)
        self._note("drop", started, command.instance, command.layers[1] - command.layers[0])
        return LayersDropped(command.command_id, Status.OK, memory.capacity, self.executor.lanes_of(command.instance))

    # ------------------------------------------------------------ load

    def _load(self, command: LoadLayers) -> None:
        state, instance, source = self.state, command.instance, command.source
        memory = state.memory[instance]
        low, high = command.layers
        missing = {layer for layer in range(low, high) if not memory.resident[layer]}
        if missing & memory.loading:
            raise ContractError(f"instance {instance}: layers {command.layers} loaded twice")
        peer_ok = source is None or (state.up[source] and state.memory[source].has(command.layers))
        if not (state.up[instance] and peer_ok and memory.capacity <= memory.full_capacity(len(missing))):
            state.ready.append(LayersLoaded(command.command_id, Status.FAILED, memory.capacity))
            return
        memory.loading |= missing
        src, start = instance if source is None else source, state.now
        num_bytes = len(missing) * memory.info.layer_param_bytes

        def loaded() -> None:
            if self._pending.pop(command.command_id, None) is None:
                return  # an end of it was lost
            memory.loading -= missing
            for layer in missing:
                memory.resident[layer] = True
            state.moved(start, src, instance, num_bytes, -1, "load")
            self._note("load", start, instance, len(missing))
            lanes = self.executor.lanes_of(instance)
            state.ready.append(LayersLoaded(command.command_id, Status.OK, memory.capacity, lanes))

        def done(_: int) -> None:
            self.executor.layers_loaded(command, sorted(missing), loaded)

        spec = state.cluster.pcie if source is None else state.cluster.link(src, instance)
        ports = state.cluster.ports(src, instance)
        flow = Flow(ports, num_bytes, command.priority, 0, done, command.piece_bytes)
        self._pending[command.command_id] = (command, flow)
        self.links.send(flow, spec.latency_ns + state.cluster.remap_ns)

    # ------------------------------------------------------------ shrink

    def _shrink(self, command: ShrinkKV) -> None:
        state = self.state
        memory = state.memory[command.instance]
        self.executor.settle(command.instance)
        if not state.up[command.instance] or memory.used > command.num_cells:
            state.ready.append(ShrinkDone(command.command_id, Status.FAILED))
            return
        tail = max(0, memory.capacity - command.num_cells)
        moved = min(memory.used, tail)  # at worst everything in the tail moves once
        memory.capacity = min(command.num_cells, memory.full_capacity())
        self.executor.kv_resized(command.instance)
        delay = int(2 * moved * memory.info.cell_bytes * 1e9 / state.cluster.compact_bandwidth)
        self._at_boundary(command, delay, self._shrunk, (command, moved, state.now))

    def _shrunk(self, argument: tuple[ShrinkKV, int, int], _: int) -> Event | None:
        command, moved, started = argument
        if self._pending.pop(command.command_id, None) is None:
            return None
        self._note("shrink", started, command.instance, 0)
        return ShrinkDone(command.command_id, Status.OK, moved, self.executor.lanes_of(command.instance))

    def _note(self, kind: str, started: int, instance: int, layers: int) -> None:
        """Record a change of parameters or of the KV range that is done now."""
        rows, memory = self.state.record.remaps, self.state.memory[instance]
        rows.start_ns.append(started)
        rows.end_ns.append(self.state.now)
        rows.instance.append(instance)
        rows.layers.append(layers)
        rows.kv_cells.append(memory.capacity)
        rows.spare_bytes.append(memory.spare_bytes())
        rows.spare_cells.append(memory.spare_cells())
        rows.kind.append(kind)

    # ------------------------------------------------------------ losses

    def lose(self, instance: int) -> None:
        """What concerned a dead instance fails; a load from it leaves the layers missing."""
        for command, flow in list(self._pending.values()):
            if instance not in (command.instance, getattr(command, "source", None)):
                continue
            if isinstance(command, LoadLayers):
                if instance != command.instance and self.executor.load_goes_on(command):
                    self._pending[command.command_id] = (command._replace(source=None), flow)
                    continue
                self.executor.load_stopped(command)
            del self._pending[command.command_id]
            if flow is not None:
                self.links.stop(flow)
            memory = self.state.memory[command.instance]
            if isinstance(command, LoadLayers):
                memory.loading -= set(range(*command.layers))
                event: Event = LayersLoaded(command.command_id, Status.FAILED, memory.capacity)
            elif isinstance(command, DropLayers):
                event = LayersDropped(command.command_id, Status.FAILED, 0)
            else:
                event = ShrinkDone(command.command_id, Status.FAILED)
            self.state.ready.append(event)
