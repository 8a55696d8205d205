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
from common.engine.relayout import plan as plan_heads
from common.engine.runner import Item, LayerTimes, Remote, StageTimes
from common.engine.sampler import SamplingParams
from common.engine.shard import rank_info, rank_spec
from common.engine.sharded import joined, same_cells, unlike
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource
from common.engine.work import Batch, PlacePlan, plan_band
from common.engine.world import EngineWorld
from common.errors import ContractError
from common.types import InstanceInfo, Layers, Tier

NOTHING = Remap(0, 0, 0)
Place = tuple[int, Tier, NDArray[np.int32]]  # instance, tier, cells


class RemoteInstance(InstanceBooks):
    """The books of an instance whose bytes are a worker's, or those of several: one for each of its ranks."""

    def __init__(self, hub: Hub, info: InstanceInfo, poison: bool) -> None:
        self.hub, self.info, self.poisoned = hub, info, poison
        self.ranks = hub.teams[info.instance]
        self._tell(say.Start())
        self.num_cells = info.kv_cells
        self.open_books()

    def _tell(self, order: Any) -> int:
        """To all ranks."""
        return self.hub.post(*((rank, order) for rank in self.ranks))

    def poison(self, tier: Tier, cells: NDArray[np.int64]) -> None:
        self._tell(say.Poison(tier, cells))

    def drop_pages(self, layers: Layers) -> tuple[Remap, int]:
        number = self._tell(say.DropPages(layers))
        try:
            done = [self.hub.answer(rank, number) for rank in self.ranks]
        except Gone:  # its loss is about to be told; until then the books go on
            gained = (layers[1] - layers[0]) * self.info.layer_param_bytes // self.info.cell_bytes
            return NOTHING, self.stores[Tier.HBM].range.num_cells + gained
        return joined([remap for remap, _ in done]), same_cells([num for _, num in done])

    def widen(self, num_cells: int) -> None:
        self._tell(say.Widen(num_cells))

    def compact(self, num_cells: int, moves: Moves, free: NDArray[np.int64]) -> None:
        self._tell(say.Compact(num_cells, moves, free))

    def move_cells(self, source: Tier, cells: NDArray[np.int64], goal: Tier, others: NDArray[np.int64]) -> None:
        self._tell(say.MoveCells(source, cells, goal, others))

    def close(self) -> None:
        """The workers give the bytes back, and tell what they have sent and received (nothing if they are gone)."""
        number = self._tell(say.Stop())
        for rank in self.ranks:
            with suppress(Gone):
                self.hub.beats[rank] = self.hub.answer(rank, number)


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
        ranks = hub.teams[home]
        hop = item.previous if item.previous not in (None, home) else None
        # The hop has a number of its own at its sender only: both ends are told in one go.
        orders, sources = ([], [None] * len(ranks)) if hop is None else self._hop(item.lane, hub.teams[hop], ranks)
        ids = [] if layers[0] else item.ids
        orders += [(rank, say.RunStage(item.lane, item.batch, ids, layers, bands, source))
                   for rank, source in zip(ranks, sources)]  # fmt: skip
        for creditor in sorted({plan.instance for _, plans in bands for plan in plans[1:]}):
            if len(hub.teams[creditor]) != len(ranks):
                raise unlike(home, creditor)
            own = tuple((band, (plan,)) for band, plans in bands for plan in plans if plan.instance == creditor)
            orders += [(there, say.Attend(rank, item.batch.num_tokens, own))
                       for rank, there in zip(ranks, hub.teams[creditor])]  # fmt: skip
        number = hub.post(*orders)
        item.pending += [(rank, number) for rank in reversed(ranks)]  # the first, which samples, is the last
        item.previous = home
        traffic: Counter[str] = Counter()
        row = world.spec.hidden_size * world.spec.dtype.itemsize
        if hop is not None:
            traffic["hidden"] = item.batch.num_tokens * row * len(ranks)
        traffic["reduce"] = 2 * self._rows(item.batch, layers) * row * len(ranks) * (len(ranks) - 1)
        for band, plans in bands:
            remote = [world.traffic(plan, item.batch.num_tokens) for plan in plans[1:]]
            times.layers += [LayerTimes(0.0, list(remote)) for _ in range(*band)] if remote else []
            traffic["attention"] += (band[1] - band[0]) * sum(part.out_bytes + part.back_bytes for part in remote)
        item.traffic += traffic
        world.ordered += traffic
        return times

    def proceed(self, item: RemoteItem, home: int) -> None:
        """Order a lane's decode iteration after the one that its only worker was given last."""
        (rank,) = self.world.hub.teams[home]
        item.pending.append((rank, self.world.hub.post((rank, say.Continue(item.lane)))))
        item.previous = home

    @staticmethod
    def _hop(lane: int, here: Sequence[int], there: Sequence[int]) -> tuple[list[tuple[int, Any]], list[int | None]]:
        """Orders for hidden states to go from one stage's ranks, which all have them, to the next one's; and from whom
        each of these has them."""
        sources = [here[position % len(here)] for position in range(len(there))]
        sends = [(rank, say.SendHidden(lane, tuple(to for to, source in zip(there, sources) if source == rank)))
                 for rank in here]  # fmt: skip
        return list(sends), list(sources)

    def _rows(self, batch: Batch, layers: Layers) -> int:
        """Rows of a stage's reductions, over its layers, of which each has two: in the last layer the sampled ones."""
        last = self.world.spec.num_layers
        if layers[1] < last:
            return (layers[1] - layers[0]) * batch.num_tokens
        return (layers[1] - layers[0] - 1) * batch.num_tokens + len(batch.sampled_rows())

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
                item.sampled, lost = self.world.hub.answer(rank, sequence)  # of the last stage, at last
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
            hub.post(*((rank, say.Forget(item.lane)) for rank in hub.teams[item.previous]))


class RemoteWorld(EngineWorld):
    """As `EngineWorld`, over a hub's workers, each of which makes its own parameters (by seed, or from a folder)."""

    def __init__(
        self, hub: Hub, infos: Sequence[InstanceInfo], spec: DecoderSpec, block_size: int, *,
        devices: Sequence[str] = (), attention: str | None = None, sampling: SamplingParams | None = None,
        seed: int = 0, poison: bool = False, weights: str | None = None, source: ParameterSource | None = None,
    ) -> None:  # fmt: skip
        """`devices`: of each worker, as it names it. `source` is for tests that compare: unused here."""
        assert len(infos) <= len(hub.teams), f"{len(infos)} instances on workers for {len(hub.teams)}"
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
        self.tps = tuple(info.tp for info in infos)
        assert all(len(team) == tp for team, tp in zip(hub.teams, self.tps)), f"{self.tps} ranks on {hub.teams}"
        asked = []
        for index, info in enumerate(infos):
            rank_spec(spec, self.tps[index])
            own = rank_info(info, self.tps[index])
            for rank in hub.teams[index]:
                setup = say.Setup(own, spec, block_size, devices[rank - 1] if devices else "cpu", attention,
                                  sampling or SamplingParams(), poison, weights, seed, hub.teams)  # fmt: skip
                asked.append((rank, hub.post((rank, setup))))
        self._setups = dict(asked)
        self.attention = "none"
        for question in asked:
            with suppress(Gone):  # it will be a lost instance
                self.attention = hub.answer(*question)["attention"]

    def traffic(self, plan: PlacePlan, num_tokens: int) -> Remote:
        """Bytes of a creditor's part of a layer, of all its ranks: the messages' contents."""
        queries, writes = moved_tokens(plan, num_tokens)
        spec, size, tp = self.spec, self.spec.dtype.itemsize, self.tps[plan.instance]
        query = spec.num_heads * spec.head_dim * size
        kv_heads = tp * rank_spec(spec, tp).num_kv_heads
        out = len(queries) * query + len(writes) * 2 * kv_heads * spec.head_dim * size
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
        """Stages that workers ran, workers' CPU seconds since their first, and those of the clock that they took."""
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
        if src[0] == dst[0]:
            put = say.PutBlocks(*src[1:], *dst[1:], tokens, first_block)
            self.hub.post(*((rank, put) for rank in self.hub.teams[src[0]]))
            return True
        sequence = self.begin_move(src, dst, tokens, first_block)
        return self.end_move(src[0], dst[0], sequence, self.copy_bytes(dst, tokens))

    def copy_bytes(self, dst: Place, tokens: tuple[int, int]) -> int:
        """Bytes of tokens in as many layers as there are rows of cells, for all ranks of a destination."""
        spec, tp = self.spec, self.tps[dst[0]]
        heads = tp * rank_spec(spec, tp).num_kv_heads
        return len(dst[2]) * (tokens[1] - tokens[0]) * 2 * heads * spec.head_dim * spec.dtype.itemsize

    def begin_move(self, src: Place, dst: Place, tokens: tuple[int, int], first_block: int) -> int:
        """Tell both ends of a copy between instances; the number under which the destination answers."""
        here, there = self.hub.teams[src[0]], self.hub.teams[dst[0]]
        self.ordered["copies"] += self.copy_bytes(dst, tokens)
        slices = plan_heads(len(here), len(there), self.spec.num_kv_heads)
        orders: list[tuple[int, Any]] = []
        # In the order of destinations at each source, of sources at each destination: nobody waits in a circle.
        for position, rank in enumerate(here):
            to = tuple((there[one.dest], one.low, one.high) for one in slices if one.source == position)
            if to:
                orders.append((rank, say.SendCells(to, *src[1:], tokens, first_block)))
        for position, rank in enumerate(there):
            sources = tuple((here[one.source], one.num) for one in slices if one.dest == position)
            orders.append((rank, say.TakeCells(sources, *dst[1:], tokens, first_block)))
        return self.hub.post(*orders)

    def end_move(self, src: int, dst: int, sequence: int, num_bytes: int) -> bool:
        """Is it there, with all ranks? Waits for their answers."""
        there = True
        for rank in self.hub.teams[dst]:
            try:
                lost = self.hub.answer(rank, sequence)
            except Gone:
                there = False
                continue
            if lost is not None:
                self.unreachable(rank, lost)
                there = False
        self.acknowledged["copies"] += num_bytes if there else 0
        return there

    def abandon(self, instance: int, number: int) -> None:
        """Nobody wants any more what a copy of this number brings to an instance."""
        ranks = self.hub.teams[instance]
        self.hub.post(*((rank, say.CancelTake(number)) for rank in ranks))
        for rank in ranks:
            self.hub.forget(rank, number)

    def load(self, index: int, layers: list[int], source: int | None) -> None:
        """Bring layers back to an instance, from a peer or from its own parameter source."""
        self.end_load(index, len(layers), source, self.begin_load(index, layers, source))

    def begin_load(self, index: int, layers: list[int], source: int | None) -> int:
        """Tell both ends; the number under which the instance's worker answers."""
        ranks = self.hub.teams[index]
        if source is None:
            return self.hub.post(*((rank, say.Load(tuple(layers), None)) for rank in ranks))
        peers = self.hub.teams[source]
        if len(peers) != len(ranks):
            raise unlike(source, index)
        self.ordered["copies"] += len(layers) * self.infos[index].layer_param_bytes
        sends = [(peer, say.SendLayers(rank, tuple(layers))) for peer, rank in zip(peers, ranks)]
        return self.hub.post(*sends, *((rank, say.Load(tuple(layers), peer)) for peer, rank in zip(peers, ranks)))

    def end_load(self, index: int, num_layers: int, source: int | None, sequence: int) -> bool:
        """Wait until they are there; False if the instance is gone meanwhile."""
        done = []
        for rank in self.hub.teams[index]:
            try:
                remaps, lost = self.hub.answer(rank, sequence)
            except Gone:
                return False  # and with one rank all of them
            if lost is not None:
                self.unreachable(rank, lost)
            elif source is not None:
                self.acknowledged["copies"] += num_layers * self.infos[index].layer_param_bytes // self.tps[index]
            done.append(remaps)
        if index in self.instances:
            self.instances[index].remaps.restores += [joined(layer) for layer in zip(*done)]
        return True

    def describe(self) -> dict[str, str]:
        """Device, type and kernels, as the first worker chose them."""
        return {"device": f"{self.device}, a worker each", "dtype": str(self.spec.dtype).removeprefix("torch."),
                "attention": self.attention, "graphs": "off", "torch": torch.__version__}  # fmt: skip
