"""`runtime=local`: the simulator's queue with real work. Every instance of the cluster has real parameters and real KV
on this process's one device, each in an arena of its own; the clock stays virtual.

One work item runs at a time, in virtual order, never past an undelivered event. An iteration computes when it is
served; its tokens count at its boundary. A copy's bytes move when its virtual time is over. So early reads, early
frees and looks at a neighbour's memory change tokens, and are caught. `clock=measured`: an item takes as long as it
really took (remote attention: as if side by side, over modelled links). `clock=modelled`: as long as the cost model
says, which is the simulator's time to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from common.engine.manyworlds import ManyWorlds
from common.engine.runner import Item, StageTimes
from common.engine.tokens import GENERATED, TokenSource
from common.engine.work import Batch, Work
from common.engine.world import EngineWorld
from common.errors import ContractError
from common.executors.localbooks import LocalBooks, LocalLosses, LocalMembers, LocalState
from common.executors.prepared import PreparedItems
from common.executors.sim import SimExecutor, SimInstance
from common.executors.simlane import SimLane
from common.executors.simremote import fetch_ns
from common.executors.source import WorkloadLike
from common.kv.hash_index import block_hashes
from common.record import RunRecord
from common.types import (
    Command,
    Content,
    CopySpan,
    DropLayers,
    Event,
    FreeSpan,
    LoadLayers,
    Placement,
    RequestStatus,
    RunStep,
    Span,
    Stage,
    Status,
    StepDone,
    SwapSpan,
    Tier,
)


@dataclass(slots=True)
class Traffic:
    """What remote attention sent: per iteration and creditor one message a layer each way."""

    iterations: int = 0
    messages: int = 0
    out_bytes: int = 0
    back_bytes: int = 0
    per_iteration: list[tuple[int, int, int]] = field(default_factory=list)  # (creditor, bytes out, bytes back)


@lru_cache(maxsize=256)
def _at_home(stages: tuple[Stage, ...]) -> Placement:
    """All KV where the route is."""
    return tuple([Span(stage.instance, stage.layers, 0, None) for stage in stages])


class LocalExecutor(SimExecutor):
    """See the module docstring. `world` holds the instances; its owner closes it."""

    state_type = LocalState
    members_type = LocalMembers
    losses_type = LocalLosses
    members: LocalMembers

    def __init__(
        self,
        cluster: Any,
        workload: WorkloadLike,
        record: RunRecord,
        *,
        world: EngineWorld | ManyWorlds,
        measured: bool = False,
        oracle: bool = False,
        faults: tuple[tuple[int, int], ...] = (),
        message_faults: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(cluster, workload, record, oracle=oracle, faults=faults,
                         message_faults=message_faults, **options)  # fmt: skip
        assert isinstance(self.state, LocalState)
        self.local_state: LocalState = self.state
        self.world = world
        self.measured = measured
        self.books = LocalBooks(self)
        self.traffic = Traffic()
        models = range(max(1, len(cluster.pools)))
        self._sources = [TokenSource(world.world_of(model).spec.vocab_size, world.world_of(model).seed)
                         for model in models]  # fmt: skip
        self.tokens: dict[int, list[int]] = {}  # request -> all known ids
        self._items: dict[int, Item] = {}  # lane -> its iteration under way
        self._flying: set[int] = set()  # lanes whose iteration under way decodes
        self.prepared = PreparedItems(self)
        self._handlers: dict[type, Callable[[Any], None]] = {FreeSpan: self._before_free}
        for index, up in enumerate(self.state.up):
            if up:
                world.start(index)

    # ------------------------------------------------------------ tokens

    def prompt_content(self, request_id: int) -> Content:
        """What a request's prompt is made of."""
        content = self._workload.content
        if content is None:
            return ((f"p:{request_id}", 0, self.members.prompt[request_id]),)
        return content[request_id]

    def known(self, request_id: int) -> list[int]:
        """All known ids of a request: prompt and reply so far."""
        ids = self.tokens.get(request_id)
        if ids is None:
            ids = self._source(request_id).expand(self.prompt_content(request_id), self._told)
            length = self.members.prompt[request_id]
            if len(ids) != length:
                raise ContractError(f"request {request_id}: content of {len(ids)} tokens for a prompt of {length}")
            self.tokens[request_id] = ids
        return ids

    def _source(self, request_id: int) -> TokenSource:
        """In the words of its model."""
        return self._sources[self.members.model_of(request_id)]

    def num_known(self, request_id: int) -> int:
        """How many they are."""
        return len(self.known(request_id))

    def reply(self, request_id: int) -> list[int]:
        """What a request has generated so far."""
        return self.known(request_id)[self.members.prompt[request_id] :]

    def _told(self, request_id: int) -> list[int]:
        """A reply as prompts name it. Of a request that was refused or given up the client goes on as if it had been
        answered in full: what was never generated is made up."""
        ids = self.reply(request_id)
        if self.record.requests.status[request_id] != RequestStatus.REJECTED:
            return ids
        rest = self.members.output[request_id] - len(ids)
        made_up: list[int] = self._source(request_id).piece(f"{GENERATED}{request_id}", len(ids), rest).tolist()
        return ids + made_up

    # ------------------------------------------------------------ contract

    def submit(self, command: Command) -> None:
        """As the simulator's; then cells follow the books."""
        handler = self._handlers.get(type(command))
        if handler is not None:
            handler(command)
        super().submit(command)
        self.books.settle()

    def poll(self) -> tuple[int, Event] | None:
        """As the simulator's."""
        item = super().poll()
        self.books.settle()
        return item

    def _before_free(self, command: FreeSpan) -> None:
        if not self.state.up[command.instance]:
            return
        if command.request_id is None:
            store = self.books.store(command.instance, command.tier)
            if command.content is None:
                store.evict(command.cached_blocks)
            else:
                self.books.evict_named(store, command)
            return
        tokens = command.tokens or (0, 1 << 60)
        ends = [held.end for held in self.state.held.get(command.request_id, ())
                if held.instance == command.instance and held.tier is command.tier and held.ready]  # fmt: skip
        if ends and command.tier is Tier.HBM:
            tokens = (tokens[0], min(tokens[1], max(ends)))
            self.books.retain(command.instance, command.request_id, tokens, command.retain)

    def outputs(self) -> dict[int, list[int]]:
        """Generated token ids of every request that has any."""
        return {request_id: self.reply(request_id) for request_id in sorted(self.tokens)}

    def report(self) -> dict[str, Any]:
        """Device, kernels, and what remapping and remote attention really did."""
        return {
            **self.world.describe(),
            "clock": "measured" if self.measured else "modelled",
            "remaps": self.world.remaps(),
            "remote_attention": {
                "iterations": self.traffic.iterations,
                "messages": self.traffic.messages,
                "out_bytes": self.traffic.out_bytes,
                "back_bytes": self.traffic.back_bytes,
            },
        }

    def close(self) -> None:
        """Give the arenas back."""
        self.world.close()

    # ------------------------------------------------------------ iterations

    def in_flight(self, lane: SimLane) -> int:
        """1 while an iteration under way will append a token to each decoding request of the lane."""
        return int(lane.id in self._flying and lane.due != -1 and lane.command_id is not None)

    def _leap(self, lane: SimLane) -> None:
        """Real work goes iteration by iteration, without asking the policy in between."""
        lane.item_iterations = 1
        self._price(lane)

    def _price(self, lane: SimLane) -> None:
        if self.measured:
            lane.durations, lane.slowed = [0] * len(lane.stages), ()  # known once each stage has run
        else:
            super()._price(lane)

    def _serve(self, instance: SimInstance, lane: SimLane, now: int) -> None:
        self.books.settle()
        if lane.stage == 0:
            self._items[lane.id] = self._compose(lane)
        stage = lane.stages[lane.stage]
        item = self._items[lane.id]
        item.meanwhile = partial(self.prepared.prepare, lane)
        times = self.world.run_stage(item, stage.instance, stage.layers)
        duration = self._account(lane, stage.instance, times)
        if self.measured:
            lane.durations[lane.stage] = duration
        super()._serve(instance, lane, now)

    def _boundary(self, lane: SimLane, now: int) -> Event | None:
        self._flying.discard(lane.id)
        for request_id, token in self._items.pop(lane.id).sampled:
            self.known(request_id).append(token)
        return super()._boundary(lane, now)

    def _step_done(self, lane: SimLane) -> StepDone:
        caching = [(target, at) for target, at in lane.prefilled if target in self.books.caching]
        for request_id, _ in caching:
            if request_id in lane.members:
                entry = lane.members[request_id].entry
                self.books.settle()
                self.books.prefilled(lane, request_id, entry.target)
        event = super()._step_done(lane)
        self.books.settle()
        for stage in lane.stages:
            if self.state.up[stage.instance]:
                self.books.check(stage.instance)
        return event

    def _compose(self, lane: SimLane) -> Item:
        """The lane's next iteration: a token of every decoding request, then chunks of prompts."""
        known = self.prepared.take(lane)
        if known is not None:
            self._flying.add(lane.id)
            return known
        works: list[Work] = []
        if lane.runs_decodes and lane.members:
            self._grow(lane)
            self._flying.add(lane.id)
            for request_id, member in lane.members.items():
                position = member.offset + lane.iteration
                works.append(Work(request_id, position, 1, True, self.spans(lane, request_id, member.entry.shared)))
        else:
            self._flying.discard(lane.id)
        for chunk, target in zip(lane.chunks, lane.targets):
            if chunk:
                entry = target.entry
                last = entry.sample and target.computed + chunk == target.target
                shared = entry.shared if entry.behind is None else 0
                spans = self.spans(lane, entry.request_id, shared)
                works.append(Work(entry.request_id, target.computed, chunk, last, spans))
        ids: list[int] = []
        for work in works:
            ids += self.known(work.request_id)[work.first : work.first + work.num]
        batch = Batch.of(works)
        assert len(ids) == batch.num_tokens, "a token is computed that nobody knows"
        return Item(batch, ids)

    def spans(self, lane: SimLane, request_id: int, shared: int) -> Placement:
        """Where a request's KV is, from token 0 on."""
        placement = lane.spread.get(request_id)
        if placement is None:
            return _at_home(lane.stages)
        if not shared:
            return placement
        return (*(Span(stage.instance, stage.layers, 0, shared) for stage in lane.stages), *placement)

    def _grow(self, lane: SimLane) -> None:
        """Cells for the tokens that this iteration appends, where their positions fall."""
        size, clock = self.state.block_size, lane.iteration
        for request_id, member in lane.members.items():
            position = member.offset + clock
            if position % size:
                continue
            for span in self.spans(lane, request_id, member.entry.shared):
                if span.token_start <= position and (span.token_end is None or position < span.token_end):
                    low, high = span.layers
                    store = self.books.store(span.instance, span.tier)
                    if span.tier is Tier.HBM and any(stage.instance == span.instance for stage in lane.stages):
                        self.books.make_room(span.instance, high - low, lane)
                    store.append(request_id, low, high, position // size)

    # ------------------------------------------------------------ time

    def _account(self, lane: SimLane, home: int, times: StageTimes) -> int:
        """Nanoseconds of a stage: what ran here, with each layer's remote parts beside the local one. Creditors are
        slowed by the share of the time that they gave."""
        seconds, links = times.seconds, self.moves.links
        busy: dict[int, float] = {}
        sums: dict[int, list[int]] = {}
        for layer in times.layers:
            slowest = 0.0
            for part in layer.remote:
                wire = fetch_ns(self.cluster, part.host_bytes)
                if part.instance == home:  # its own host memory: nothing is sent, and its GPU computes it as well
                    slowest = max(slowest, wire * 1e-9)
                    continue
                wire += links.message_ns(home, part.instance, part.out_bytes)
                wire += links.message_ns(part.instance, home, part.back_bytes)
                slowest = max(slowest, part.seconds + wire * 1e-9)
                seconds -= part.seconds
                busy[part.instance] = busy.get(part.instance, 0.0) + part.seconds
                total = sums.setdefault(part.instance, [0, 0])
                total[0] += part.out_bytes
                total[1] += part.back_bytes
                self.traffic.messages += 2
            seconds += max(0.0, slowest - (layer.local_s if self.cluster.overlap else 0.0))
        for creditor, (out, back) in sums.items():
            self.traffic.out_bytes += out
            self.traffic.back_bytes += back
            self.traffic.per_iteration.append((creditor, out, back))
        if times.layers:
            self.traffic.iterations += 1
        load = self.instances[home].remote_load
        duration = max(1, int(seconds * 1e9 * (1.0 + sum(load.values()))))
        if self.measured and load:
            lane.slowed += ((home, duration - int(seconds * 1e9)),)
        if self.measured and lane.spread:
            self.control.load_creditors(lane, {index: spent * 1e9 / duration for index, spent in busy.items()})
        return duration

    # ------------------------------------------------------------ bytes

    def copied(self, command: CopySpan) -> bool | None:
        """Move a copy's bytes."""
        return self.world.move(*self._ends(command))

    def _ends(self, command: CopySpan) -> tuple[Any, Any, tuple[int, int], int]:
        """Of a copy: (instance, tier, cells) at both ends, tokens, and the first of their blocks."""
        dst = self.world.instances[command.dst]
        size = self.state.block_size
        first, last = command.tokens[0] // size, -(-command.tokens[1] // size)
        source = self._source_cells(command, first, last)
        low, high = command.layers
        goal = dst.stores[command.dst_tier].of(command.request_id).table[low:high, first:last]
        here, there = (command.src, command.src_tier, source), (command.dst, command.dst_tier, goal)
        return here, there, command.tokens, first

    def _source_cells(self, command: CopySpan, first: int, last: int) -> Any:
        """Cells of a copy's source: the request's own or read ones, else cached blocks of its content."""
        low, high = command.layers
        store = self.world.instances[command.src].stores[command.src_tier]
        own = store.requests.get(command.request_id)
        if own is not None and own.table.shape[1] >= last and (own.table[low:high, first:last] >= 0).all():
            return own.table[low:high, first:last]
        found = np.full((high - low, last - first), -1, np.int32)
        full = self.num_known(command.request_id) // self.state.block_size
        names = self.books.names(command.request_id, min(last, full))
        for block in range(first, last):
            if own is not None and block < own.table.shape[1] and (own.table[low:high, block] >= 0).all():
                found[:, block - first] = own.table[low:high, block]
            elif block < len(names) and (named := store.named.get(names[block])) is not None:
                found[:, block - first] = named.cells[low:high]
        if (found < 0).any():
            raise ContractError(f"copy {command.command_id}: not all of tokens {command.tokens} of request "
                                f"{command.request_id} are on instance {command.src} any more")  # fmt: skip
        return found

    def swap_begins(self, command: SwapSpan) -> None:
        """Cached blocks on their way may not be evicted."""
        if command.content is not None:
            store = self.books.store(command.instance, Tier.HBM if command.out else Tier.DRAM)
            store.named.acquire(self._named_span(command, store))

    def swap_ends(self, command: SwapSpan, status: Status) -> None:
        """Move a swap's bytes; cached blocks change their tier, name and all."""
        if not self.state.up[command.instance]:
            return
        engine = self.world.instances[command.instance]
        source, goal = (Tier.HBM, Tier.DRAM) if command.out else (Tier.DRAM, Tier.HBM)
        size, (low, high) = self.state.block_size, command.layers
        first, last = command.tokens[0] // size, -(-command.tokens[1] // size)
        if command.content is not None:
            self._end_named_swap(command, status, source, goal)
        elif status is Status.OK:
            tables = {tier: engine.stores[tier].of(command.request_id).table[low:high, first:last] for tier in Tier}
            here, there = ((command.instance, tier, tables[tier]) for tier in (source, goal))
            self.world.move(here, there, command.tokens, first)

    def _named_span(self, command: SwapSpan, store: Any) -> list[bytes]:
        size = self.state.block_size
        assert command.content is not None
        names = [digest for digest, _ in block_hashes(command.content, size)]
        digests = names[command.tokens[0] // size : command.tokens[1] // size]
        if any(store.named.get(digest) is None for digest in digests):
            raise ContractError(f"swap {command.command_id}: instance {command.instance} has not cached all of it")
        return digests

    def _end_named_swap(self, command: SwapSpan, status: Status, source: Tier, goal: Tier) -> None:
        engine = self.world.instances[command.instance]
        digests = self._named_span(command, engine.stores[source])
        engine.stores[source].named.release(digests)
        if status is Status.OK:
            engine.move_named(digests, source, goal)

    def layers_dropped(self, command: DropLayers) -> None:
        """Pages change hands."""
        self.world.instances[command.instance].drop(command.layers)

    def layers_loaded(self, command: LoadLayers, missing: Sequence[int], loaded: Callable[[], None]) -> None:
        """Parameters arrive."""
        self.world.load(command.instance, list(missing), command.source)
        loaded()

    def kv_resized(self, instance: int) -> None:
        """Compact, or take back."""
        self.books.settle()
        self.world.instances[instance].resize(self.state.memory[instance].capacity)

    def came_up(self, instance: int) -> None:
        """Parameters are loaded and an empty KV range is there."""
        self.world.start(instance)

    def died(self, instance: int) -> None:
        """All bytes are gone."""
        self.world.stop(instance)
        self.books.settle()

    def _run_step(self, command: RunStep) -> None:
        for request_id, _ in command.place:
            self.local_state.dirty[request_id] = None
        super()._run_step(command)
