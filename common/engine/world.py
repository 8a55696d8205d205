"""All instances of a cluster on one device: what `runtime=local` runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.instance import EngineInstance, RemapLog, move_blocks
from common.engine.model import Decoder
from common.engine.runner import Item, Runner, StageTimes
from common.engine.sampler import SamplingParams
from common.engine.shard import rank_spec
from common.engine.sharded import ShardedInstance, ShardSources, TurnRunner, exchange, unlike
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource
from common.kernels.select import choose
from common.types import InstanceInfo, Layers, Tier


class EngineWorld:
    """Owns the instances and the one runner. `poison`: free cells hold NaN, and a NaN in logits is an error."""

    def __init__(
        self,
        infos: Sequence[InstanceInfo],
        spec: DecoderSpec,
        source: ParameterSource,
        block_size: int,
        *,
        device: str = "cpu",
        attention: str | None = None,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        poison: bool = False,
        graphs: str = "off",
        max_len: int | None = None,
    ) -> None:
        self.infos = infos
        self.spec = spec
        self.source = source
        self.block_size = block_size
        self.device = torch.device(device)
        self.seed = seed
        self.poison = poison
        self.tps = tuple(info.tp for info in infos)
        self._shards = ShardSources(source)
        self.instances: dict[int, Any] = {}  # EngineInstance or ShardedInstance
        self._warm: set[int] = set()  # TPs whose kernels have run
        self._gone: list[RemapLog] = []  # of instances that were stopped or lost
        decoder = Decoder(spec, self.device, spec.dtype)
        self.backend = choose(self.device, spec.dtype, block_size, attention)
        kind = TurnRunner if max(self.tps) > 1 else Runner
        self.runner = kind(decoder, source, self.backend, self.instances, block_size, sampling, poison, graphs, max_len)

    def start(self, index: int) -> None:
        """An instance with all its parameters and an empty KV range."""
        assert index not in self.instances, f"instance {index} is there already"
        info, tp = self.infos[index], self.tps[index]
        if tp > 1:
            self.instances[index] = ShardedInstance(info, rank_spec(self.spec, tp), self.device, self.block_size,
                                                    self._shards.of(tp), self.poison)  # fmt: skip
        else:
            self.instances[index] = EngineInstance(
                info, self.spec, self.spec.dtype, self.device, self.block_size, self.source, self.poison
            )
        if self.device.type == "cuda" and tp not in self._warm:
            self._warm.add(tp)
            self.runner.warm_up(index)

    def stop(self, index: int) -> None:
        """An instance goes with all its bytes."""
        engine = self.instances.pop(index, None)
        if engine is not None:
            self._gone.append(engine.remaps)
            engine.close()

    def world_of(self, model: int) -> EngineWorld:
        """That of a model: there is one."""
        return self

    def run_stage(self, item: Item, instance: int, layers: Layers) -> StageTimes:
        """One iteration of a batch at one stage."""
        return self.runner.run_stage(item, instance, layers)

    def plan(self, item: Item, instance: int, layers: Layers) -> None:
        """Make the plans of a stage before its turn."""
        for band in item.batch.bands(layers):
            self.runner.plans(item, instance, band)

    def move(
        self, src: tuple[int, Tier, NDArray[np.int32]], dst: tuple[int, Tier, NDArray[np.int32]],
        tokens: tuple[int, int], first_block: int,
    ) -> bool:  # fmt: skip
        """Copy tokens between (instance, tier, cells `[layers, blocks]`); False if an instance is gone meanwhile."""
        here, there = self.instances[src[0]], self.instances[dst[0]]
        if self.tps[src[0]] == self.tps[dst[0]] == 1:
            move_blocks(here, *src[1:], there, *dst[1:], tokens, first_block, self.block_size)
        else:
            exchange(here, *src[1:], there, *dst[1:], tokens, first_block, self.spec.num_kv_heads)
        return True

    def load(self, index: int, layers: list[int], source: int | None) -> None:
        """Bring layers back to an instance, from a peer of its TP or from the parameter source."""
        if source is not None and self.tps[source] != self.tps[index]:
            raise unlike(source, index)
        self.instances[index].load(layers, None if source is None else self.instances[source])

    def describe(self) -> dict[str, str]:
        """Device, type and kernels, as chosen once."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {"device": f"{self.device} ({name})", "dtype": str(self.spec.dtype).removeprefix("torch."),
                "attention": self.backend.reason, "products": self.runner.decoder.products.name,
                "graphs": self._graphs(), "torch": torch.__version__}  # fmt: skip

    def _graphs(self) -> str:
        graphs = self.runner.graphs
        if graphs is None:
            return "off"
        counts = graphs.counts
        return (f"{counts.replays} replays of {counts.captures} graphs, {counts.thrown_away} thrown away, "
                f"{counts.capture_s:.2f} s of capturing")  # fmt: skip

    def remaps(self) -> dict[str, int]:
        """What changing parameters into KV and back has really done, over all instances that there have been."""
        total: Counter[str] = Counter()
        for log in [*self._gone, *(engine.remaps for engine in self.instances.values())]:
            for kind, remaps in (("drop", log.drops), ("restore", log.restores)):
                total[f"{kind}s"] += len(remaps)
                total[f"{kind}_pages"] += sum(remap.num_pages for remap in remaps)
                total[f"{kind}_bytes"] += sum(remap.num_bytes for remap in remaps)
                total[f"{kind}_ns"] += sum(remap.elapsed_ns for remap in remaps)
            total["compacted_cells"] += log.compacted_cells
        return dict(total)

    def close(self) -> None:
        """Give all memory back."""
        for index in list(self.instances):
            self.stop(index)
