"""Decode iterations captured once per shape and replayed: no launch and no Python between kernels.

A graph covers one whole iteration of decodes on one instance: embedding, all layers, LM head and greedy argmax, for a
bucket of batch sizes. It reads static buffers (ids, positions, slots, the attention plan), refilled before each
replay. Padding rows compute on token 0, see no key and write to slot -1, which is skipped. Everything else runs
eagerly: prefills, mixed batches, pipelines, remote attention, sampling with temperature, tables of scattered cells.

A graph holds addresses. It is thrown away when the instance, its KV range or any of its layers is not where it was
(drop, restore, resize, stop). `Capture` is what differs between devices: on a CPU the body is run again over the same
buffers, which proves the buffers and not the capture. The CUDA side has never run on a GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.engine.instance import EngineInstance
from common.engine.sampler import greedy
from common.engine.work import Batch
from common.kernels.cache import write_kv
from common.kernels.plan import Rows
from common.kernels.static import StaticPlan, can_be_static, static_key, static_plan
from common.types import Layers

if TYPE_CHECKING:
    from common.engine.runner import Item, Runner

BUCKETS = (1, 2, 4, *range(8, 257, 8))
"""Batch sizes that are captured; larger batches run eagerly."""
WARM_UPS = 2

Body = Callable[[], None]


class Capture(Protocol):
    """Makes a replay of a body that reads and writes tensors that stay where they are."""

    def __call__(self, body: Body) -> Body:
        """Run the body at least once, and return what repeats it."""
        ...


class Rerun:
    """A replay that is the body itself: any device, nothing gained."""

    def __call__(self, body: Body) -> Body:
        """See `Capture`."""
        body()
        return body


class CudaCapture:
    """A CUDA graph per body, all in one memory pool (only one of them runs at a time). Never run on a GPU yet.

    A pool is gone with the last graph in it, and torch refuses to capture into it again: then the next graph opens
    another. So it is when an only instance has lost all of its graphs to a drop."""

    def __init__(self) -> None:
        self._living: WeakSet[Any] = WeakSet()

    def __call__(self, body: Body) -> Body:
        """See `Capture`. Warm-up on a side stream, so that lazy initialisation and compilation are not captured."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        pool = next((other.pool() for other in self._living), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            body()
        self._living.add(graph)
        return graph.replay


@dataclass
class Graph:
    """One captured shape: its inputs, outputs and replay. Only the first n rows of the outputs are meant."""

    plan: StaticPlan
    inputs_3R: Tensor
    """int64: token ids, positions, slots of the band's first layer (-1: none)."""
    image_3R: Tensor
    """Its image on the host, pinned on CUDA."""
    logits_RV: Tensor
    tokens_R: Tensor
    replay: Body

    def fill(self, ids: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64], rows: Rows) -> None:
        """Put an iteration into the buffers. The caller has waited for the last replay."""
        image = self.image_3R.numpy()
        image[:2], image[2] = 0, -1
        for line, values in zip(image, (ids, positions, slots)):
            line[: len(values)] = values
        self.inputs_3R.copy_(self.image_3R, non_blocking=True)
        self.plan.fill(rows)


@dataclass
class InstanceGraphs:
    """Graphs of one instance, and where it was when they were captured."""

    engine: EngineInstance
    where: tuple[int, ...]
    graphs: dict[tuple[int, int], Graph] = field(default_factory=dict)  # (rows, key of the plan)


@dataclass
class GraphCounts:
    """What the graphs have done."""

    captures: int = 0
    replays: int = 0
    thrown_away: int = 0
    capture_s: float = 0.0


class DecodeGraphs:
    """All graphs of a runner. `max_len`: tokens of the longest request."""

    def __init__(self, runner: Runner, capture: Capture, max_len: int, buckets: tuple[int, ...] = BUCKETS) -> None:
        self._runner = runner
        self._capture = capture
        self._max_blocks = -(-max_len // runner.block_size)
        self._buckets = buckets
        self._known: dict[int, InstanceGraphs] = {}
        self.counts = GraphCounts()

    def eligible(self, batch: Batch, home: int, layers: Layers) -> bool:
        """Whole decodes on one instance whose sampled token is the likeliest."""
        runner = self._runner
        if layers != (0, runner.decoder.spec.num_layers) or runner.sampling.temperature or not batch.works:
            return False
        if len(batch.works) > self._buckets[-1] or not can_be_static(runner.backend):
            return False
        return all(
            work.num == 1 and work.sample and len(work.spans) == 1 and work.spans[0].instance == home
            and work.first < self._max_blocks * runner.block_size
            for work in batch.works
        )  # fmt: skip

    def run(self, item: Item, home: int) -> tuple[Tensor, Tensor, float] | None:
        """(logits [n, vocab], tokens [n]) of an eligible iteration, valid until the next, and the seconds that went
        into capturing; None if its tables are not uniform. Does not wait for the device."""
        runner, layers = self._runner, (0, self._runner.decoder.spec.num_layers)
        engine, ids = runner.instances[home], item.ids
        [place] = runner.plans(item, home, layers)
        rows = place.passes[0].rows
        if rows.tables.ndim != 2:
            return None
        begin, captures = runner.clock(), self.counts.captures
        graph = self._graph(engine, home, rows)
        spent = runner.clock() - begin if self.counts.captures > captures else 0.0
        self.counts.capture_s += spent
        graph.fill(np.array(ids, np.int64), item.batch.first, place.writes[0].slots, rows)
        graph.replay()
        self.counts.replays += 1
        return graph.logits_RV[: len(ids)], graph.tokens_R[: len(ids)], spent

    def _graph(self, engine: EngineInstance, home: int, rows: Rows) -> Graph:
        runner = self._runner
        known = self._at(engine, home)
        size = self._buckets[bisect_left(self._buckets, len(rows.q_len))]
        key = static_key(runner.backend, rows, size, runner.decoder.spec.num_kv_heads, runner.device)
        graph = known.graphs.get((size, key))
        if graph is None:
            graph = known.graphs[size, key] = self._make(engine, size, key)
            self.counts.captures += 1
        return graph

    def _at(self, engine: EngineInstance, home: int) -> InstanceGraphs:
        """The instance's graphs, none that points where something was."""
        for index in [index for index in self._known if index not in self._runner.instances]:
            self._forget(index)
        where = whereabouts(engine)
        known = self._known.get(home)
        if known is not None and (known.engine is not engine or known.where != where):
            self._forget(home)
            known = None
        if known is None:
            known = self._known[home] = InstanceGraphs(engine, where)
        return known

    def _forget(self, index: int) -> None:
        self.counts.thrown_away += len(self._known.pop(index).graphs)

    def _make(self, engine: EngineInstance, size: int, key: int) -> Graph:
        """Capture one shape; the buffers are all padding, so nothing is written to KV."""
        runner, device = self._runner, self._runner.device
        plan = static_plan(runner.backend, key, size, self._max_blocks, device)
        image = torch.zeros(3, size, dtype=torch.int64, pin_memory=device.type == "cuda")
        image[2] = -1
        vocab = runner.decoder.spec.vocab_size
        logits = torch.empty(size, vocab, dtype=runner.decoder.dtype, device=device)
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        graph = Graph(plan, image.to(device), image, logits, tokens, lambda: None)
        graph.replay = self._capture(lambda: self._body(engine, graph))
        return graph

    def _body(self, engine: EngineInstance, graph: Graph) -> None:
        """One iteration over the buffers of a graph."""
        runner, block = self._runner, self._runner.block_size
        decoder, (ids, positions, slots) = runner.decoder, graph.inputs_3R
        kv, scale = engine.kv, decoder.spec.scale
        x, rotation = decoder.embed(ids, runner.embedding), decoder.rotation(positions)
        for layer in range(decoder.spec.num_layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                write_kv(kv, k, v, torch.where(slots < 0, slots, slots + layer * block))
                return graph.plan.run(q, kv, layer, scale)

            x = decoder.layer(engine.layer(layer), x, rotation, attend)
        graph.logits_RV.copy_(decoder.logits(x, runner.norm, runner.head))
        graph.tokens_R.copy_(greedy(graph.logits_RV))


def whereabouts(engine: EngineInstance) -> tuple[int, ...]:
    """What a graph of an instance rests on: how often pages were remapped (that the same addresses over new pages may
    be replayed is not known), KV and its cells, and every layer (ContractError if one is gone)."""
    layers = [engine.layer(index).qkv.data_ptr() for index in range(engine.info.num_layers)]
    remaps = len(engine.remaps.drops) + len(engine.remaps.restores)
    return (remaps, engine.kv.data_ptr(), len(engine.kv), *layers)


def make_graphs(runner: Runner, wanted: str, max_len: int) -> DecodeGraphs | None:
    """`auto`: on CUDA with Triton's kernels; `on`: everywhere (on a CPU bodies are run again); `off`: never."""
    cuda = runner.device.type == "cuda"
    if wanted == "off" or not can_be_static(runner.backend) or (wanted == "auto" and not cuda):
        return None
    return DecodeGraphs(runner, CudaCapture() if cuda else Rerun(), max_len)
