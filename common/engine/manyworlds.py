"""Several models on one device: a world for each, and every instance in the world of its model."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.engine.instance import EngineInstance
from common.engine.runner import Item, StageTimes
from common.engine.world import EngineWorld
from common.types import Layers, Tier


class ManyWorlds:
    """What `LocalExecutor` asks of a world, handed to that of the instance's model."""

    def __init__(self, worlds: Sequence[EngineWorld], models: Sequence[int]) -> None:
        self.worlds = tuple(worlds)
        self.models = tuple(models)  # by instance
        self.instances: Mapping[int, EngineInstance] = ChainMap(*(world.instances for world in worlds))

    def world_of(self, model: int) -> EngineWorld:
        """That of a model."""
        return self.worlds[model]

    def _at(self, instance: int) -> EngineWorld:
        return self.worlds[self.models[instance]]

    def start(self, index: int) -> None:
        """An instance with all of its model's parameters."""
        self._at(index).start(index)

    def stop(self, index: int) -> None:
        """An instance goes with all its bytes."""
        self._at(index).stop(index)

    def run_stage(self, item: Item, instance: int, layers: Layers) -> StageTimes:
        """One iteration of a batch."""
        return self._at(instance).run_stage(item, instance, layers)

    def plan(self, item: Item, instance: int, layers: Layers) -> None:
        """Make the plans of a stage before its turn."""
        self._at(instance).plan(item, instance, layers)

    def move(
        self, src: tuple[int, Tier, NDArray[np.int32]], dst: tuple[int, Tier, NDArray[np.int32]],
        tokens: tuple[int, int], first_block: int,
    ) -> bool:  # fmt: skip
        """Copy KV between two instances of one model."""
        assert self.models[src[0]] == self.models[dst[0]], "KV goes to another model"
        return self._at(src[0]).move(src, dst, tokens, first_block)

    def load(self, index: int, layers: list[int], source: int | None) -> None:
        """Bring layers back to an instance."""
        self._at(index).load(index, layers, source)

    def describe(self) -> dict[str, str]:
        """As the first world; they differ in their weights."""
        return self.worlds[0].describe() | {"models": ", ".join(world.spec.name for world in self.worlds)}

    def remaps(self) -> dict[str, int]:
        """Over all worlds."""
        total: Counter[str] = Counter()
        for world in self.worlds:
            total.update(world.remaps())
        return dict(total)

    def close(self) -> None:
        """Give all memory back."""
        for world in self.worlds:
            world.close()
