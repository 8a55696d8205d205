"""Whole iterations of the engine, host work and all, on one instance with requests of given lengths."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from common.engine.instance import cell_bytes
from common.engine.layout import LayerLayout
from common.engine.runner import Item
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource, RandomSource
from common.engine.work import Batch, Work
from common.engine.world import EngineWorld
from common.types import InstanceInfo, Span, Tier

BLOCK_SIZE = 16


class Shape(NamedTuple):
    """`chunks` prompts of `new` tokens behind `cached` ones, beside `decodes` of `context` tokens."""

    chunks: int
    new: int
    cached: int
    decodes: int
    context: int

    @property
    def kv_blocks(self) -> int:
        """Blocks of KV that it takes."""
        return self.chunks * -(-(self.new + self.cached) // BLOCK_SIZE) + self.decodes * -(-self.context // BLOCK_SIZE)


SHAPES = tuple(
    [Shape(0, 0, 0, batch, context) for batch, context in ((1, 64), (1, 512), (4, 256), (8, 128), (16, 256), (32, 128),
                                                           (48, 256), (64, 64))]
    + [Shape(1, 32, 0, 0, 0), Shape(1, 256, 0, 0, 0), Shape(4, 64, 0, 0, 0), Shape(1, 64, 256, 8, 128),
       Shape(1, 128, 0, 32, 128)]
)  # fmt: skip


class Engine:
    """One instance with room for the largest of some shapes; random parameters and KV."""

    def __init__(
        self, spec: DecoderSpec, device: torch.device, kv_blocks: int, graphs: str = "auto", max_len: int = 4096,
        source: ParameterSource | None = None,
    ) -> None:  # fmt: skip
        cell, layer = cell_bytes(spec, BLOCK_SIZE, spec.dtype), LayerLayout(spec, spec.dtype).num_bytes
        info = InstanceInfo(0, spec.num_layers, kv_blocks * spec.num_layers, cell, layer)
        source = source or RandomSource(spec)
        self.spec = replace(spec)
        self.world = EngineWorld(
            (info,),
            spec,
            source,
            BLOCK_SIZE,
            device=str(device),
            graphs=graphs,
            max_len=min(max_len, spec.max_position),
        )
        if device.type == "cpu":
            self.world.runner.clock = time.thread_time  # as `bench.timing` counts
        self.world.start(0)
        self.world.instances[0].kv.normal_()

    def item(self, shape: Shape) -> Item:
        """An iteration of this shape; its cells replace those of the one before."""
        store, layers = self.world.instances[0].stores[Tier.HBM], self.spec.num_layers
        store.clear()
        spans = (Span(0, (0, layers), 0, None),)
        works = [Work(index, shape.context - 1, 1, True, spans) for index in range(shape.decodes)]
        works += [Work(shape.decodes + index, shape.cached, shape.new, True, spans) for index in range(shape.chunks)]
        for work in works:
            for block in range(-(-(work.first + work.num) // BLOCK_SIZE)):
                store.append(work.request_id, 0, layers, block)
        batch = Batch.of(works)
        return Item(batch, [(17 * index) % self.spec.vocab_size for index in range(batch.num_tokens)])

    def nanoseconds(self, shape: Shape, repeats: int) -> float:
        """Median ns of an iteration."""
        return self.seconds(shape, repeats) * 1e9

    def seconds(self, shape: Shape, repeats: int = 7, budget_s: float = 1.0) -> float:
        """Median seconds of an iteration, planned anew each time."""
        item, times = self.item(shape), list[float]()
        layers = (0, self.spec.num_layers)
        while len(times) < 2 + repeats and (len(times) < 5 or sum(times[2:]) < budget_s):
            item.plans.clear()  # an item keeps them
            times.append(self.world.runner.run_stage(item, 0, layers).seconds)
        return float(median(times[2:]))

    def close(self) -> None:
        """Give the memory back."""
        self.world.close()
