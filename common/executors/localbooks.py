"""From the books to the cells: what the simulator's counts say each request holds becomes ids, and names become blocks.

The simulator is the one bookkeeper: claims are read off its lanes and held rectangles, never kept twice. Whatever
changed since the last look is `dirty`; `settle` makes cells follow before anything runs or moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.engine.cells import CellStore, Mask
from common.errors import ContractError
from common.executors.memory import Held, overlap
from common.executors.simlane import SimLane
from common.executors.simloss import Losses
from common.executors.simmembers import Members
from common.executors.simstate import SimState
from common.kv.content import concat
from common.kv.hash_index import block_hashes
from common.types import Content, Entry, FreeSpan, RunStep, Span, Tier

if TYPE_CHECKING:
    from common.executors.local import LocalExecutor


class LocalState(SimState):
    """The simulator's, which also tells whose held KV has changed."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.dirty: dict[int, None] = {}  # requests, in order

    def hold(self, request_id: int, held: Held) -> None:
        super().hold(request_id, held)
        self.dirty[request_id] = None

    def drop_held(self, request_id: int, held: Held) -> None:
        super().drop_held(request_id, held)
        self.dirty[request_id] = None


class LocalMembers(Members):
    """The simulator's, which also tells who comes and goes, and what of it stays cached."""

    executor: LocalExecutor
    state: LocalState

    def take_out(self, lane: SimLane, command: RunStep) -> None:
        for index, request_id in enumerate(command.remove):
            retain = command.retain[index] if command.retain else 0
            for stage in lane.stages:
                self.executor.books.retain(stage.instance, request_id, (0, self.stored(lane, request_id)), retain)
        super().take_out(lane, command)

    def join(self, lane: SimLane, entry: Entry) -> None:
        self.executor.books.joins(lane, entry)
        super().join(lane, entry)
        self.executor.books.joined(lane, entry)
        self.state.dirty[entry.request_id] = None

    def release(self, lane: SimLane, entry: Entry, charged: int, keep_tokens: int) -> None:
        super().release(lane, entry, charged, keep_tokens)
        self.executor.books.left(lane, entry.request_id)
        self.state.dirty[entry.request_id] = None


class LocalLosses(Losses):
    """The simulator's; cells that an iteration cut short had taken for its tokens go back."""

    executor: LocalExecutor

    def halt(self, lane: SimLane) -> None:
        super().halt(lane)
        for request_id in lane.members:
            self.executor.local_state.dirty[request_id] = None


class LocalBooks:
    """See the module docstring."""

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self.state: LocalState = executor.local_state
        self.lanes: dict[int, list[SimLane]] = {}  # request -> lanes that it is in (two: one behind the other)
        self.caching: set[int] = set()  # requests whose blocks are named as they fill
        self._names: dict[int, list[bytes]] = {}

    def store(self, instance: int, tier: Tier = Tier.HBM) -> CellStore:
        """The cells of one tier of a live instance."""
        return self.executor.world.instances[instance].stores[tier]

    # ------------------------------------------------------------ claims

    def settle(self) -> None:
        """Make cells follow the books."""
        dirty = self.state.dirty
        if not dirty:
            return
        claims = []
        for request_id in dirty:
            places = {(held.instance, held.tier) for held in self.state.held.get(request_id, ())}
            running = {(stage.instance, Tier.HBM) for lane in self.lanes.get(request_id, ()) for stage in lane.stages}
            places |= running
            for instance, engine in self.executor.world.instances.items():
                for tier, store in engine.stores.items():
                    if request_id in store.requests or (instance, tier) in places:
                        reads = (instance, tier) in running  # in a lane, it may own nothing yet and read what it shares
                        claims.append((store, request_id, self._wanted(request_id, instance, tier), reads))
        dirty.clear()
        for store, request_id, wanted, reads in claims:  # first what goes, then what comes
            have = store.of(request_id).run >= 0
            keep = np.zeros_like(have)
            width = min(have.shape[1], wanted.shape[1])
            keep[:, :width] = have[:, :width] & wanted[:, :width]
            if wanted.any() and (have & ~keep).any():
                store.claim(request_id, keep | False, reads=True)  # what comes is claimed below
            elif not wanted.any():
                store.claim(request_id, wanted, reads)
        for store, request_id, wanted, _ in claims:
            if wanted.any():
                store.claim(request_id, wanted)

    def _wanted(self, request_id: int, instance: int, tier: Tier) -> Mask:
        """Which (layer, block) cells the books count for a request at a place."""
        parts: list[tuple[int, int, int, int]] = []  # layers low, high, blocks low, high
        size = self.state.block_size
        for held in self.state.held.get(request_id, ()):
            if held.instance == instance and held.tier is tier:
                parts.append((*held.layers, held.start // size, -(-held.end // size)))
        if tier is Tier.HBM:
            for lane in self.lanes.get(request_id, ()):
                parts += self._of_lane(lane, request_id, instance)
        width = max((part[3] for part in parts), default=0)
        wanted = np.zeros((self.executor.cluster.instances[instance].num_layers, width), bool)
        for low, high, first, last in parts:
            wanted[low:high, first:last] = True
        return wanted

    def _of_lane(self, lane: SimLane, request_id: int, instance: int) -> list[tuple[int, int, int, int]]:
        """What a lane owns of a request at an instance; the token of an iteration under way counts, elsewhere too."""
        size = self.state.block_size
        member = lane.members.get(request_id)
        growing = -1  # position of that token
        if member is not None:
            entry, charged = member.entry, member.offset + lane.iteration
            if self.executor.in_flight(lane):
                growing, charged = charged, charged + 1
        else:
            target = next(target for target in lane.targets if target.entry.request_id == request_id)
            entry, charged = target.entry, target.target
        placement = lane.spread.get(request_id) or tuple(
            Span(stage.instance, stage.layers, entry.shared, None) for stage in lane.stages)  # fmt: skip
        found = []
        for stage in lane.stages:
            for span in placement:
                band = overlap(span.layers, stage.layers)
                end = charged if span.token_end is None else min(span.token_end, charged)
                elsewhere = span.instance != instance or span.tier is not Tier.HBM  # host memory: as the books hold it
                if elsewhere or band is None or end <= span.token_start:
                    continue
                if stage.instance == instance:
                    found.append((*band, span.token_start // size, -(-end // size)))
                elif growing == end - 1:  # what is held there does not know of it yet
                    found.append((*band, growing // size, growing // size + 1))
        return found

    # ------------------------------------------------------------ who is where

    def joined(self, lane: SimLane, entry: Entry) -> None:
        """A request is in a lane."""
        self.lanes.setdefault(entry.request_id, []).append(lane)
        if entry.cache:
            self.caching.add(entry.request_id)

    def left(self, lane: SimLane, request_id: int) -> None:
        """A request is out of a lane."""
        lanes = self.lanes.get(request_id, [])
        if lane in lanes:
            lanes.remove(lane)
        if not lanes:
            self.lanes.pop(request_id, None)

    def joins(self, lane: SimLane, entry: Entry) -> None:
        """Before a join: pin and read what it shares; make room where the step may take over cached blocks."""
        self.settle()
        size = self.state.block_size
        shared = entry.shared // size if entry.behind is None else 0
        for stage in lane.stages:
            store = self.store(stage.instance)
            cells = store.of(entry.request_id)
            if shared > len(cells.lease):
                digests = self.names(entry.request_id, shared)[len(cells.lease) :]
                for digest in digests:
                    if store.named.get(digest) is None:
                        raise ContractError(f"request {entry.request_id}: shared tokens up to {entry.shared} are not "
                                            f"all cached on instance {stage.instance}")  # fmt: skip
                store.named.acquire(digests)
                for index, digest in enumerate(digests, len(cells.lease)):
                    store.read(entry.request_id, index, digest)
                cells.lease += digests
            charged = entry.computed if entry.decode else entry.target
            need = (-(-charged // size) - entry.shared // size) * (stage.layers[1] - stage.layers[0])
            have = int((cells.run >= 0).sum())
            self.make_room(stage.instance, need - have, lane)

    def make_room(self, instance: int, cells: int, lane: SimLane) -> None:
        """Evict cached blocks, as far as the step allows it, so that `cells` are free."""
        store = self.store(instance)
        short = cells - store.range.free_cells
        if short > 0 and lane.reclaim:
            layers = next(s.layers[1] - s.layers[0] for s in lane.stages if s.instance == instance)
            store.evict(min(-(-short // layers), lane.reclaim, store.named.num_idle))

    def evict_named(self, store: CellStore, command: FreeSpan) -> None:
        """Evict exactly the blocks that a content names; somebody who reads them forbids it."""
        assert command.content is not None
        size = self.state.block_size
        start, end = command.tokens or (0, 1 << 60)
        names = [digest for digest, _ in block_hashes(command.content, size)][start // size : end // size]
        if len(names) != command.cached_blocks or any(store.named.get(digest) is None for digest in names):
            raise ContractError(f"instance {command.instance}: {command.cached_blocks} blocks are to be evicted by "
                                f"name, not all of tokens {command.tokens} are cached")  # fmt: skip
        for digest in reversed(names):
            store.free_named(store.named.remove(digest))

    # ------------------------------------------------------------ names

    def names(self, request_id: int, num_blocks: int) -> list[bytes]:
        """Digests of a request's first full blocks."""
        known = self._names.get(request_id, [])
        if len(known) < num_blocks:
            size = self.state.block_size
            known = [digest for digest, _ in block_hashes(self.text(request_id), size)]
            self._names[request_id] = known
        assert len(known) >= num_blocks, f"request {request_id} has no {num_blocks} full blocks of known tokens"
        return known[:num_blocks]

    def text(self, request_id: int) -> Content:
        """Content of all known tokens of a request."""
        prompt = self.executor.prompt_content(request_id)
        said = self.executor.num_known(request_id) - self.executor.members.prompt[request_id]
        return concat(prompt, ((f"gen:{request_id}", 0, said),)) if said > 0 else prompt

    def prefilled(self, lane: SimLane, request_id: int, tokens: int) -> None:
        """A caching request has reached its target: its full blocks have names from now on."""
        for stage in lane.stages:
            self._extend(self.store(stage.instance), request_id, tokens // self.state.block_size, owned=True)

    def _extend(self, store: CellStore, request_id: int, num_blocks: int, owned: bool) -> int:
        """Pin a request's path up to `num_blocks`, naming what has no name yet; returns how many are new."""
        cells, new = store.of(request_id), 0
        digests = self.names(request_id, max(num_blocks, len(cells.lease)))
        for block in range(len(cells.lease), num_blocks):
            if store.named.get(digests[block]) is None:
                if not (cells.run[:, block] >= 0).any():
                    raise ContractError(f"request {request_id}: block {block} is retained behind a gap in the cache")
                store.name(request_id, block, digests[block], owned)
                new += 1
            store.named.acquire(digests[block : block + 1])
            cells.lease.append(digests[block])
        return new

    def retain(self, instance: int, request_id: int, tokens: tuple[int, int], retain: int) -> None:
        """A request's KV is about to be freed: its named blocks, and no others, pass to the cache."""
        store = self.store(instance)
        cells = store.requests.get(request_id)
        if cells is None or not (retain or request_id in self.caching):
            return
        size = self.state.block_size
        last = min(tokens[1], self._reach(cells.run.shape[1] * size, request_id)) // size
        self._extend(store, request_id, last, owned=True)
        mine = [(block, digest) for block, digest in enumerate(cells.lease)
                if (named := store.named.get(digest)) is not None and named.owner == request_id
                and tokens[0] // size <= block < last]  # fmt: skip
        for block, digest in mine:
            store.disown(request_id, block, digest)
        if len(mine) != retain:
            raise ContractError(f"request {request_id}: {retain} blocks are to be retained on instance {instance}, but "
                                f"{len(mine)} full ones are its own and not cached already")  # fmt: skip
        store.named.release(cells.lease)
        cells.lease = []
        self.caching.discard(request_id)

    def _reach(self, limit: int, request_id: int) -> int:
        return min(limit, self.executor.num_known(request_id))

    # ------------------------------------------------------------ law

    def check(self, instance: int) -> None:
        """Ids agree with the ledger: cells held = cells counted, plus what iterations under way grow by."""
        memory = self.state.memory[instance]
        coming = {tier: self._swapping_in(instance, tier) for tier in Tier}
        counted = memory.used + sum(self._growing(lane, instance) for lane in self.executor.lanes.values())
        used = self.store(instance).used + coming[Tier.HBM]
        if used != counted:
            raise ContractError(f"instance {instance}: {used} cells are held, the ledger counts {counted}")
        host = self.store(instance, Tier.DRAM).used + coming[Tier.DRAM]
        if host != memory.host_used:
            raise ContractError(f"instance {instance}: {host} host cells are held, {memory.host_used} are counted")

    def _growing(self, lane: SimLane, instance: int) -> int:
        """Cells at an instance that a lane's iteration under way has taken, and that are counted at its boundary."""
        cells = 0
        for request_id, member in lane.members.items() if self.executor.in_flight(lane) else ():
            position = member.offset + lane.iteration
            if position % self.state.block_size == 0:
                for span in self.executor.spans(lane, request_id, member.entry.shared):
                    open_here = span.token_end is None or position < span.token_end
                    here = span.instance == instance and span.tier is Tier.HBM
                    if here and span.token_start <= position and open_here:
                        cells += span.layers[1] - span.layers[0]
        return cells

    def _swapping_in(self, instance: int, tier: Tier) -> int:
        """Cells booked for cached blocks on their way into a tier; they get their ids when the data is there."""
        cells = 0
        for swap in self.executor.moves.swaps.values():
            command = swap.command
            if command.content is not None and command.instance == instance and command.out == (tier is Tier.DRAM):
                blocks = command.tokens[1] // self.state.block_size - command.tokens[0] // self.state.block_size
                cells += blocks * (command.layers[1] - command.layers[0])
        return cells
