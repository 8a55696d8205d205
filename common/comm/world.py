"""All instances of a cluster, each in a worker of its own: what `runtime=dist` runs on.

Ids of cells stay here (`InstanceBooks`); workers are told numbers. A worker that is gone swallows its orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.comm import messages as say
from common.comm.hub import Gone, Hub
from common.comm.peers import KINDS
from common.comm.stage import moved_tokens
from common.engine.arena import Remap
from common.engine.cells import CellStore
from common.engine.instance import InstanceBooks, Moves
from common.engine.runner import Item, LayerTimes, Remote, StageTimes
from common.engine.sampler import SamplingParams
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource
from common.engine.work import Batch, PlacePlan, plan_band
from common.engine.world import EngineWorld
from common.errors import ContractError
from common.types import InstanceInfo, Layers, Tier

NOTHING = Remap(0, 0, 0)
Place = tuple[int, Tier, NDArray[np.int32]]  # instance, tier, cells


def rank_of(instance: int) -> int:
    """Worker of an instance; rank 0 is the policy."""
    return instance + 1


class RemoteInstance(InstanceBooks):
    """The books of an instance whose bytes are a worker's."""

    def __init__(self, hub: Hub, info: InstanceInfo, poison: bool) -> None:
        self.hub, self.info, self.poisoned = hub, info, poison
        self.rank = rank_of(info.instance)
        self.hub.post((self.rank, say.Start()))
        self.num_cells = info.kv_cells
        self.open_books()

    def poison(self, tier: Tier, cells: NDArray[np.int64]) -> None:
        self.hub.post((self.rank, say.Poison(tier, cells)))

    def drop_pages(self, layers: Layers) -> tuple[Remap, int]:
        try:
            remap, num_cells = self.hub.ask(self.rank, say.DropPages(layers))
        except Gone:  # its loss is about to be told; until then the books go on
            gained = (layers[1] - layers[0]) * self.info.layer_param_bytes // self.info.cell_bytes
            return NOTHING, self.stores[Tier.HBM].range.num_cells + gained
        return remap, num_cells

    def widen(self, num_cells: int) -> None:
        self.hub.post((self.rank, say.Widen(num_cells)))

    def compact(self, num_cells: int, moves: Moves, free: NDArray[np.int64]) -> None:
        self.hub.post((self.rank, say.Compact(num_cells, moves, free)))

    def move_cells(self, source: Tier, cells: NDArray[np.int64], goal: Tier, others: NDArray[np.int64]) -> None:
        self.hub.post((self.rank, say.MoveCells(source, cells, goal, others)))

    def close(self) -> None:
        """The worker gives the bytes back, and tells what it has sent and received (nothing if it is gone)."""
        try:
            self.hub.beats[self.rank] = self.hub.ask(self.rank, say.Stop())
        except Gone:
            return


class RemoteItem(Item):
    """An iteration whose stages workers run. `pending`: (rank, order) of each, unanswered."""

    __slots__ = ("lane", "pending", "previous", "traffic")

    def __init__(self, batch: Batch, ids: list[int], lane: int) -> None:
        super().__init__(batch, ids)
        self.lane = lane
        self.pending: list[tuple[int, int]] = []
        self.previous: int | None = None  # instance of the stage before
        self.traffic: Counter[str] = Counter()  # bytes that its stages have workers send each other, by kind


class RemoteRunner:
    """Plans stages here, and has workers run them; does not wait."""

    graphs = None

    def __init__(self, world: RemoteWorld) -> None:
        self.world = world

    def run_stage(self, item: RemoteItem, home: int, layers: Layers) -> StageTimes:
        """Give the orders of a stage. No times: nobody has run it yet."""
        world, hub, times = self.world, self.world.hub, StageTimes()
        bands = tuple((band, tuple(self._plan(item.batch, home, band))) for band in item.batch.bands(layers))
        hop = item.previous if item.previous not in (None, home) else None
        if hop is not None:
            hops = (rank_of(hop), say.SendHidden(item.lane, rank_of(home)))
        stage = say.RunStage(item.lane, item.batch, [] if layers[0] else item.ids, layers, bands,
                             None if hop is None else rank_of(hop))  # fmt: skip
        orders: list[tuple[int, Any]] = [] if hop is None else [hops]
        # The hop has a number of its own at its sender only: both ends are told in one go.
        orders.append((rank_of(home), stage))
        for creditor in sorted({plan.instance for _, plans in bands for plan in plans[1:]}):
            own = tuple((band, (plan,)) for band, plans in bands for plan in plans if plan.instance == creditor)
            orders.append((rank_of(creditor), say.Attend(rank_of(home), item.batch.num_tokens, own)))
        item.pending.append((rank_of(home), hub.post(*orders)))
        item.previous = home
        traffic: Counter[str] = Counter()
        if hop is not None:
            traffic["hidden"] = item.batch.num_tokens * world.spec.hidden_size * world.spec.dtype.itemsize
        for band, plans in bands:
            remote = [world.traffic(plan, item.batch.num_tokens) for plan in plans[1:]]
            times.layers += [LayerTimes(0.0, list(remote)) for _ in range(*band)] if remote else []
            traffic["attention"] += (band[1] - band[0]) * sum(part.out_bytes + part.back_bytes for part in remote)
        item.traffic += traffic
        world.ordered += traffic
        return times

    def _plan(self, batch: Batch, home: int, band: Layers) -> list[PlacePlan]:
        instances = self.world.instances

        def cells(instance: int, tier: Tier) -> CellStore:
            if tier is not Tier.HBM:
                raise ContractError(f"instance {instance}: runtime=dist does not attend to KV in host memory")
            store: CellStore = instances[instance].stores[tier]
            return store

        return plan_band(batch, home, band, self.world.block_size, cells)

    def finish(self, item: RemoteItem) -> bool:
        """Wait for all stages of an iteration; False if a worker was lost on the way, and it has no result."""
        valid = True
        while item.pending:
            rank, sequence = item.pending.pop(0)
            try:
                item.sampled, lost = self.world.hub.answer(rank, sequence)
                self.world.unreachable(rank, *lost)
                valid = valid and not lost
            except Gone:
                valid = False
        if valid:
            self.world.acknowledged += item.traffic
        return valid

    def drop(self, item: RemoteItem) -> None:
        """Nobody will ask for its results."""
        hub = self.world.hub
        for rank, sequence in item.pending:
            hub.forget(rank, sequence)
        if item.previous is not None:
            hub.post((rank_of(item.previous), say.Forget(item.lane)))


class RemoteWorld(EngineWorld):
    """As `EngineWorld`, over a hub's workers, each of which makes its own parameters (by seed, or from a folder)."""

    def __init__(
        self, hub: Hub, infos: Sequence[InstanceInfo], spec: DecoderSpec, block_size: int, *,
        devices: Sequence[str] = (), attention: str | None = None, sampling: SamplingParams | None = None,
        seed: int = 0, poison: bool = False, weights: str | None = None, source: ParameterSource | None = None,
    ) -> None:  # fmt: skip
        """`devices`: of each instance, as its worker names it. `source` is for tests that compare: unused here."""
        assert len(infos) <= hub.num_workers, f"{len(infos)} instances on {hub.num_workers} workers"
        self.hub, self.infos, self.spec, self.block_size = hub, infos, spec, block_size
        self.seed, self.poison = seed, poison
        if source is not None:
            self.source = source
        self.instances: dict[int, Any] = {}
        self._gone = []
        self.ordered: Counter[str] = Counter()  # bytes that workers were told to send, by kind,
        self.acknowledged: Counter[str] = Counter()  # and those whose receivers have said that they are there
        self.runner: Any = RemoteRunner(self)
        self.device = torch.device(devices[0] if devices else "cpu")
        hub.beats.clear()
        asked = []
        for index, info in enumerate(infos):
            setup = say.Setup(info, spec, block_size, devices[index] if devices else "cpu", attention,
                              sampling or SamplingParams(), poison, weights, seed)  # fmt: skip
            asked.append((rank_of(info.instance), hub.post((rank_of(info.instance), setup))))
        self._setups = dict(asked)
        self.attention = "none"
        for question in asked:
            with suppress(Gone):  # it will be a lost instance
                self.attention = hub.answer(*question)["attention"]

    def traffic(self, plan: PlacePlan, num_tokens: int) -> Remote:
        """Bytes of a creditor's part of a layer: the messages' contents."""
        queries, writes = moved_tokens(plan, num_tokens)
        spec, size = self.spec, self.spec.dtype.itemsize
        query = spec.num_heads * spec.head_dim * size
        out = len(queries) * query + len(writes) * 2 * spec.num_kv_heads * spec.head_dim * size
        rows = sum(int(part.rows.q_len.sum()) for part in plan.passes)
        return Remote(plan.instance, out, rows * (query + 4 * spec.num_heads), 0.0)

    def start(self, index: int) -> None:
        """An instance with all its parameters and an empty KV range."""
        assert index not in self.instances, f"instance {index} is there already"
        self.instances[index] = RemoteInstance(self.hub, self.infos[index], self.poison)

    def stop(self, index: int) -> None:
        """An instance goes with all its bytes; its worker stays, if it is there."""
        engine = self.instances.pop(index, None)
        if engine is not None:
            self._gone.append(engine.remaps)
            engine.close()

    def settle(self) -> None:
        """Workers finish what attention they still do for others before their next order."""
        self.hub.post(*((rank, say.Settle()) for rank in self._setups if self.hub.alive(rank)))

    def unreachable(self, rank: int, *peers: int) -> None:
        """A worker says that it cannot reach these. One that still seems to be there has lost its connection: it is
        given up, as whatever needs the two of them would fail again."""
        if peers and self.hub.alive(*peers):
            self.hub.drain(1.0)  # most likely it died a moment ago
        for peer in peers:
            if self.hub.alive(peer):
                self.hub.lose(peer, f"worker {rank} cannot reach it")

    def stages(self) -> tuple[int, float, float]:
        """Stages that workers ran, and the seconds of CPU and of the clock that these took."""
        beats = [beat for rank, beat in self.hub.beats.items() if beat.setup == self._setups.get(rank)]
        return (sum(beat.stages for beat in beats), sum(beat.cpu_s for beat in beats),
                sum(beat.wall_s for beat in beats))  # fmt: skip

    def wire(self) -> tuple[Counter[str], Counter[str]]:
        """Bytes sent and received by kind, as the workers counted them. Of one that died: what it said last, or what
        the others have had from it if that is more."""
        sent, received = Counter[str](), Counter[str]()
        heard = Counter[tuple[str, int]]()  # (kind, source)
        beats = {rank: beat for rank, beat in self.hub.beats.items() if beat.setup == self._setups.get(rank)}
        for beat in beats.values():
            heard.update(beat.received)
        for (kind, _), num in heard.items():
            received[kind] += num
        for rank in self._setups:
            own = beats[rank].sent if rank in beats else {}
            for kind in KINDS:
                sent[kind] += max(own.get(kind, 0), heard[kind, rank])
        return sent, received

    def move(self, src: Place, dst: Place, tokens: tuple[int, int], first_block: int) -> bool:
        """Copy tokens between (instance, tier, cells); False if an instance is gone meanwhile."""
        here, there = rank_of(src[0]), rank_of(dst[0])
        if here == there:
            self.hub.post((here, say.PutBlocks(*src[1:], *dst[1:], tokens, first_block)))
            return True
        sequence = self.begin_move(src, dst, tokens, first_block)
        return self.end_move(here, there, sequence, self.copy_bytes(src[2], tokens))

    def copy_bytes(self, cells: NDArray[np.int32], tokens: tuple[int, int]) -> int:
        """Bytes of tokens in as many layers as there are rows of cells."""
        spec = self.spec
        return len(cells) * (tokens[1] - tokens[0]) * 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize

    def begin_move(self, src: Place, dst: Place, tokens: tuple[int, int], first_block: int) -> int:
        """Tell both ends of a copy between instances; the number under which the destination answers."""
        here, there = rank_of(src[0]), rank_of(dst[0])
        self.ordered["copies"] += self.copy_bytes(src[2], tokens)
        send = say.SendCells(there, *src[1:], tokens, first_block)
        return self.hub.post((here, send), (there, say.TakeCells(here, *dst[1:], tokens, first_block)))

    def end_move(self, here: int, there: int, sequence: int, num_bytes: int) -> bool:
        """Is it there? Waits for the answer. The two are ranks."""
        try:
            lost = self.hub.answer(there, sequence)
        except Gone:
            return False
        if lost is not None:
            self.unreachable(there, here)
            return False
        self.acknowledged["copies"] += num_bytes
        return True

    def abandon(self, rank: int, number: int) -> None:
        """Nobody wants any more what a copy of this number brings to a worker."""
        self.hub.post((rank, say.CancelTake(number)))
        self.hub.forget(rank, number)

    def load(self, index: int, layers: list[int], source: int | None) -> None:
        """Bring layers back to an instance, from a peer or from its own parameter source."""
        self.end_load(index, len(layers), source, self.begin_load(index, layers, source))

    def begin_load(self, index: int, layers: list[int], source: int | None) -> int:
        """Tell both ends; the number under which the instance's worker answers."""
        rank, peer = rank_of(index), None if source is None else rank_of(source)
        orders: list[tuple[int, Any]] = [] if peer is None else [(peer, say.SendLayers(rank, tuple(layers)))]
        if peer is not None:
            self.ordered["copies"] += len(layers) * self.infos[index].layer_param_bytes
        return self.hub.post(*orders, (rank, say.Load(tuple(layers), peer)))

    def end_load(self, index: int, num_layers: int, source: int | None, sequence: int) -> bool:
        """Wait until they are there; False if the instance is gone meanwhile."""
        try:
            remaps, lost = self.hub.answer(rank_of(index), sequence)
        except Gone:
            return False
        if lost is not None:
            self.unreachable(rank_of(index), lost)
        elif source is not None:
            self.acknowledged["copies"] += num_layers * self.infos[index].layer_param_bytes
        if index in self.instances:
            self.instances[index].remaps.restores += remaps
        return True

    def describe(self) -> dict[str, str]:
        """Device, type and kernels, as the first worker chose them."""
        return {"device": f"{self.device}, a worker each", "dtype": str(self.spec.dtype).removeprefix("torch."),
                "attention": self.attention, "graphs": "off", "torch": torch.__version__}  # fmt: skip
