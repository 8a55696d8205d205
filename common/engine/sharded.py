"""Instances of several tensor-parallel ranks in one process: the ranks take turns, half layer by half layer.

The arithmetic is that of ranks in processes of their own, sums in the same order; so `runtime=local` is the exact test
bed of `runtime=dist`, bit by bit. Under the measured clock ranks count as if side by side; a reduction takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.arena import Remap
from common.engine.instance import InstanceBooks, InstanceBytes, Moves, put_blocks
from common.engine.model import Decoder
from common.engine.relayout import cut_tokens, plan, put_tokens
from common.engine.rope import Rotation
from common.engine.runner import Item, Place, Runner, StageTimes
from common.engine.shard import ShardedSource, ordered_sum, rank_info, rank_spec
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, ParameterSource
from common.errors import ContractError
from common.types import InstanceInfo, Layers, Tier


def joined(remaps: Sequence[Remap]) -> Remap:
    """What the ranks of one instance did side by side."""
    return Remap(sum(one.num_pages for one in remaps), sum(one.num_bytes for one in remaps),
                 max(one.elapsed_ns for one in remaps))  # fmt: skip


def same_cells(counts: Sequence[int]) -> int:
    """The cells of an instance, of which each rank has its part."""
    assert len(set(counts)) == 1, f"ranks of one instance have {counts} cells"
    return counts[0]


class ShardedInstance(InstanceBooks):
    """One set of books; `shards`: the bytes of each rank."""

    def __init__(
        self, info: InstanceInfo, spec: DecoderSpec, device: torch.device, block_size: int,
        sources: Sequence[ParameterSource], poison: bool,
    ) -> None:  # fmt: skip
        """`spec`, `sources`: of a rank, and of each."""
        self.info, self.poisoned = info, poison
        own = rank_info(info, len(sources))
        self.shards = tuple(InstanceBytes(own, spec, spec.dtype, device, block_size, source, poison)
                            for source in sources)  # fmt: skip
        self.open_books()

    @property
    def kv(self) -> Tensor:
        """The first rank's cells."""
        return self.shards[0].kv

    def cells(self, tier: Tier, highest: int = -1) -> Tensor:
        """The first rank's cells of a tier; all ranks have room up to `highest`."""
        first, *_ = [shard.cells(tier, highest) for shard in self.shards]
        return first

    def poison(self, tier: Tier, cells: NDArray[np.int64]) -> None:
        for shard in self.shards:
            shard.poison(tier, cells)

    def drop_pages(self, layers: Layers) -> tuple[Remap, int]:
        done = [shard.drop_pages(layers) for shard in self.shards]
        return joined([remap for remap, _ in done]), same_cells([num for _, num in done])

    def widen(self, num_cells: int) -> None:
        for shard in self.shards:
            shard.widen(num_cells)

    def compact(self, num_cells: int, moves: Moves, free: NDArray[np.int64]) -> None:
        for shard in self.shards:
            shard.compact(num_cells, moves, free)

    def move_cells(self, source: Tier, cells: NDArray[np.int64], goal: Tier, others: NDArray[np.int64]) -> None:
        for shard in self.shards:
            shard.move_cells(source, cells, goal, others)

    def load(self, layers: list[int], peer: Any) -> None:
        """Bring layers back, from a peer of the same TP or from the parameter source."""
        for index in layers:
            remaps = []
            for rank, shard in enumerate(self.shards):
                remap, slab = shard.restore(index)
                remaps.append(remap)
                if peer is None:
                    shard.source.layer_into(index, slab)
                else:
                    slab.copy_(peer.shards[rank].slab(index))
            self.remaps.restores.append(joined(remaps))

    def close(self) -> None:
        """Give everything back."""
        for shard in self.shards:
            shard.close()


def unlike(one: int, other: int) -> ContractError:
    """What only instances of one TP can do for each other."""
    return ContractError(f"instances {one} and {other} differ in TP: KV is exchanged between them, but neither "
                         "parameters nor remote attention (cluster.tp)")  # fmt: skip


def shards_of(engine: Any) -> tuple[InstanceBytes, ...]:
    """The bytes of each of its ranks."""
    return engine.shards if isinstance(engine, ShardedInstance) else (engine,)


def num_ranks(engine: Any) -> int:
    """The TP of an instance."""
    return len(shards_of(engine))


def exchange(
    src: Any, src_tier: Tier, src_cells: NDArray[np.int32], dst: Any, dst_tier: Tier, dst_cells: NDArray[np.int32],
    tokens: tuple[int, int], first_block: int, kv_heads: int,
) -> None:  # fmt: skip
    """Copy tokens between instances of any TP: each rank of `dst` gets the heads that it holds."""
    sources, goals = shards_of(src), shards_of(dst)
    if len(sources) == len(goals):
        for here, there in zip(sources, goals):
            source, goal = here.cells(src_tier, int(src_cells.max())), there.cells(dst_tier, int(dst_cells.max()))
            put_blocks(source, src_cells, goal, dst_cells, tokens, first_block, goal.shape[2])
        return
    cut = [cut_tokens(shard.cells(src_tier, int(src_cells.max())), src_cells, tokens, first_block)
           for shard in sources]  # fmt: skip
    slices = plan(len(sources), len(goals), kv_heads)
    for dest, shard in enumerate(goals):
        parts = [cut[one.source][..., one.low : one.high, :] for one in slices if one.dest == dest]
        goal = shard.cells(dst_tier, int(dst_cells.max()))
        put_tokens(torch.cat(parts, dim=3), goal, dst_cells, tokens, first_block)


class ShardSources:
    """Parameters of every rank of every TP that a world has, each read once."""

    def __init__(self, source: ParameterSource) -> None:
        self._whole = source
        self._made: dict[int, tuple[ParameterSource, ...]] = {}

    def of(self, tp: int) -> tuple[ParameterSource, ...]:
        """One per rank."""
        if tp not in self._made:
            self._made[tp] = tuple(MemorySource(ShardedSource(self._whole, tp, rank)) for rank in range(tp))
        return self._made[tp]


class TurnRunner(Runner):
    """A runner whose instances may have several ranks."""

    def __init__(self, decoder: Decoder, *args: Any, **options: Any) -> None:
        self._ranks: dict[int, Decoder] = {}  # by TP
        self._spare_s = 0.0
        super().__init__(decoder, *args, **options)

    def run_stage(self, item: Item, home: int, layers: Layers) -> StageTimes:
        """As `Runner`; ranks count as if side by side."""
        self._spare_s = 0.0
        times = super().run_stage(item, home, layers)
        times.seconds -= self._spare_s
        return times

    def _replay(self, item: Item, home: int, layers: Layers) -> float | None:
        sharded = isinstance(self.instances[home], ShardedInstance)
        return None if sharded else super()._replay(item, home, layers)

    def _decoder_of(self, tp: int) -> Decoder:
        if tp not in self._ranks:
            whole = self.decoder
            self._ranks[tp] = Decoder(rank_spec(whole.spec, tp), whole.device, whole.dtype)
        return self._ranks[tp]

    def _layer(
        self, home: int, layer: int, x: Tensor, rotation: Rotation, places: list[Place], at: int, times: StageTimes,
        rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        engine: Any = self.instances[home]
        num = num_ranks(engine)
        unequal = next((place.engine for place in places if num_ranks(place.engine) != num), None)
        if unequal is not None:
            raise unlike(home, unequal.info.instance)
        if num == 1:
            return super()._layer(home, layer, x, rotation, places, at, times, rows)
        decoder = self._decoder_of(num)

        def heads(rank: int) -> Tensor:
            own = [self._of_rank(place, rank, at) for place in places]
            attend = self._attend(own, at, times)
            return decoder.attention_part(engine.shards[rank].layer(layer), x, rotation, attend, rows)

        part = self._in_turn(heads, num)
        hidden = (x if rows is None else x.index_select(0, rows)).add_(part)
        return hidden.add_(self._in_turn(lambda rank: decoder.mlp_part(engine.shards[rank].layer(layer), hidden), num))

    @staticmethod
    def _of_rank(place: Place, rank: int, at: int) -> Place:
        shard = shards_of(place.engine)[rank]
        if place.host_tokens < 0:
            return place._replace(kv=shard.kv)
        return place._replace(kv=shard.cells(Tier.DRAM, -1))

    def _in_turn(self, work: Callable[[int], Tensor], num: int) -> Tensor:
        """The sum over ranks. What the others than the slowest took is no time that passes."""
        parts, spent = [], []
        for rank in range(num):
            self._wait()
            begin = self.clock()
            parts.append(work(rank))
            self._wait()
            spent.append(self.clock() - begin)
        self._spare_s += sum(spent) - max(spent)
        return ordered_sum(parts)
