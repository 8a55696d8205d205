"""All instances of a cluster, each in a worker of its own: what `runtime=dist` runs on.

Ids of cells stay here (`InstanceBooks`); workers are told numbers. A worker that is gone swallows its orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.comm import messages as say
from common.comm.hub import Gone, Hub
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

    def close(self) -> Counter[str]:
        """The worker gives the bytes back; what it has sent to peers so far, by kind (nothing if it is gone)."""
        try:
            return Counter(self.hub.ask(self.rank, say.Stop()))
        except Gone:
            return Counter()


class RemoteItem(Item):
    """An iteration whose stages workers run. `pending`: (rank, order) of each, unanswered."""

    __slots__ = ("lane", "pending", "previous")

    def __init__(self, batch: Batch, ids: list[int], lane: int) -> None:
        super().__init__(batch, ids)
        self.lane = lane
        self.pending: list[tuple[int, int]] = []
        self.previous: int | None = None  # instance of the stage before


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
        for band, plans in bands:
            remote = [world.traffic(plan, item.batch.num_tokens) for plan in plans[1:]]
            times.layers += [LayerTimes(0.0, list(remote)) for _ in range(*band)] if remote else []
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
        for rank, sequence in item.pending:
            try:
                item.sampled, whole = self.world.hub.answer(rank, sequence)
            except Gone:
                whole = False
            valid = valid and whole
        item.pending.clear()
        return valid


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
        self.sent: Counter[str] = Counter()
        self.runner: Any = RemoteRunner(self)
        self.device = torch.device(devices[0] if devices else "cpu")
        asked = []
        for index, info in enumerate(infos):
            setup = say.Setup(info, spec, block_size, devices[index] if devices else "cpu", attention,
                              sampling or SamplingParams(), poison, weights, seed)  # fmt: skip
            asked.append((rank_of(info.instance), hub.post((rank_of(info.instance), setup))))
        facts = [hub.answer(*question) for question in asked if hub.alive(question[0])]
        self.attention = facts[0]["attention"] if facts else "none"

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
            self.sent += engine.close()

    def move(
        self, src: tuple[int, Tier, NDArray[np.int32]], dst: tuple[int, Tier, NDArray[np.int32]],
        tokens: tuple[int, int], first_block: int,
    ) -> bool:  # fmt: skip
        """Copy tokens between (instance, tier, cells); False if an instance is gone meanwhile."""
        here, there = rank_of(src[0]), rank_of(dst[0])
        if here == there:
            self.hub.post((here, say.PutBlocks(*src[1:], *dst[1:], tokens, first_block)))
            return True
        take = say.TakeCells(here, *dst[1:], tokens, first_block)
        try:
            sequence = self.hub.post((here, say.SendCells(there, *src[1:])), (there, take))
            return bool(self.hub.answer(there, sequence))
        except Gone:
            return False

    def load(self, index: int, layers: list[int], source: int | None) -> None:
        """Bring layers back to an instance, from a peer or from its own parameter source."""
        rank, peer = rank_of(index), None if source is None else rank_of(source)
        orders: list[tuple[int, Any]] = [] if peer is None else [(peer, say.SendLayers(rank, tuple(layers)))]
        try:
            remaps = self.hub.answer(rank, self.hub.post(*orders, (rank, say.Load(tuple(layers), peer))))
            self.instances[index].remaps.restores += remaps
        except Gone:
            return

    def describe(self) -> dict[str, str]:
        """Device, type and kernels, as the first worker chose them."""
        return {"device": f"{self.device}, a worker each", "dtype": str(self.spec.dtype).removeprefix("torch."),
                "attention": self.attention, "graphs": "off", "torch": torch.__version__}  # fmt: skip
