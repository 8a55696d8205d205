"""Runs iterations: stages follow the route, attention follows the placement. Knows instances, never systems.

Per layer the home instance projects q, k, v; every instance that a placement names stores the new KV that is its
own, attends over what it has, and returns `(o, lse)`; home merges. A kernel is only ever given one instance's cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.engine.cells import CellStore
from common.engine.graphs import make_graphs
from common.engine.head import Head
from common.engine.instance import EngineInstance
from common.engine.model import Attend, Decoder
from common.engine.rope import Rotation
from common.engine.sampler import Draw, SamplingParams, sample
from common.engine.weights import ParameterSource
from common.engine.work import Batch, PlacePlan, Work, plan_band, to_device
from common.errors import ContractError
from common.kernels.cache import write_kv
from common.kernels.merge import merge_into
from common.kernels.plan import Backend
from common.types import Layers, Span, Tier

NOBODY = -1
"""A request that there is not."""
WARM_TOKENS = 3
"""Of its prompt and its one decode."""


class Remote(NamedTuple):
    """What one creditor did in one layer: bytes of queries and new KV out, of partial results back, and seconds."""

    instance: int
    out_bytes: int
    back_bytes: int
    seconds: float
    host_bytes: int = 0  # KV that crosses the instance's PCIe


@dataclass(slots=True)
class LayerTimes:
    """Where one layer's attention time went, when any of it was remote."""

    local_s: float
    remote: list[Remote]


@dataclass(slots=True)
class StageTimes:
    """Wall seconds of one stage of one iteration, all parts one after the other, and its layers with remote work."""

    seconds: float = 0.0
    layers: list[LayerTimes] = field(default_factory=list)


class Item:
    """One iteration of a lane, from its first stage to its last."""

    __slots__ = ("batch", "drawn", "hidden", "ids", "meanwhile", "plans", "sampled")

    def __init__(self, batch: Batch, ids: list[int]) -> None:
        self.batch = batch
        self.ids = ids
        self.plans: dict[Layers, list[PlacePlan]] = {}  # by band, where they were made before
        self.meanwhile: Callable[[], None] | None = None  # what the host may do while the device computes this
        self.drawn: tuple[Tensor, Tensor] | None = None  # logits and tokens on the device: the last stage is launched
        self.hidden: Tensor | None = None
        self.sampled: list[tuple[int, int]] = []  # (request, token), once the last stage has run


class Place(NamedTuple):
    """One instance's part in a band of layers, on the device: (tokens, slots) to write, (plan, queries) to attend.
    `kv`: the cells of its tier; `host_tokens`: keys read from host memory in each layer, -1 where it is not that."""

    engine: EngineInstance
    kv: Tensor
    host_tokens: int
    writes: list[tuple[Tensor | None, Tensor]]
    passes: list[tuple[Any, Tensor | None]]


def _sent(
    place: Place, q: Tensor, k: Tensor, num_new: int, theirs: list[tuple[Tensor | None, Tensor, Tensor]], seconds: float
) -> Remote:
    """What a creditor's part of a layer would send: each query and each merged partial once, new K and V."""
    queries = {int(one) for index, part, _ in theirs
               for one in (range(len(part)) if index is None else index.tolist())}  # fmt: skip
    one_query = q[0].numel() * q.element_size()
    new_bytes = num_new * 2 * k[0].numel() * k.element_size()
    back = len(queries) * (one_query + 4 * q.shape[1])
    host_bytes = (place.host_tokens + num_new) * 2 * k[0].numel() * k.element_size() if place.host_tokens >= 0 else 0
    return Remote(place.engine.info.instance, len(queries) * one_query + new_bytes, back, seconds, host_bytes)


class Runner:
    """Owns the decoder and the replicated tables (embedding, head, final norm: read-only, shared by all instances)."""

    def __init__(
        self,
        decoder: Decoder,
        source: ParameterSource,
        backend: Backend,
        instances: Mapping[int, EngineInstance],
        block_size: int,
        sampling: SamplingParams | None = None,
        check_finite: bool = False,
        graphs: str = "off",
        max_len: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.instances = instances
        self.block_size = block_size
        self.sampling = sampling or SamplingParams()
        self.check_finite = check_finite
        self.clock: Callable[[], float] = time.perf_counter  # seconds; benchmarks may count CPU time instead
        device = decoder.device
        self.embedding = source.embedding().to(device)
        self.head = Head(self.embedding if decoder.spec.tied else source.head().to(device))
        self.norm = source.final_norm().to(device)
        self.overlaps = device.type == "cuda"  # does the device compute while the host goes on?
        self.graphs = make_graphs(self, graphs, max_len or decoder.spec.max_position)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.decoder.device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run_stage(self, item: Item, home: int, layers: Layers) -> StageTimes:
        """Run a stage's layers; the last stage also samples. Blocks until the device is done."""
        times = StageTimes()
        self._wait()
        begin = self.clock()
        with torch.inference_mode():
            captured = self._replay(item, home, layers)
            if captured is None:
                self._run_eagerly(item, home, layers, times)
            if item.meanwhile is not None and self.overlaps:
                item.meanwhile()
            if item.drawn is not None:
                self._sampled(item, *item.drawn)
        self._wait()
        times.seconds = self.clock() - begin - (captured or 0.0)
        return times

    def warm_up(self, home: int) -> None:
        """A prompt and a decode that nobody asked for, on an instance with free cells: what is compiled or opened at
        its first use (Triton's kernels, libraries) is no time of an iteration. Leaves nothing behind."""
        layers, store = (0, self.decoder.spec.num_layers), self.instances[home].stores[Tier.HBM]
        spans = (Span(home, layers, 0, None),)
        blocks = -(-WARM_TOKENS // self.block_size)
        if store.range.free_cells < blocks * layers[1]:
            return
        for block in range(blocks):
            store.append(NOBODY, *layers, block)
        graphs, self.graphs = self.graphs, None
        try:
            for first, num in ((0, WARM_TOKENS - 1), (WARM_TOKENS - 1, 1)):
                self.run_stage(Item(Batch.of([Work(NOBODY, first, num, True, spans)]), [0] * num), home, layers)
        finally:
            self.graphs = graphs
            store.claim(NOBODY, np.zeros((layers[1], 0), bool))

    def _replay(self, item: Item, home: int, layers: Layers) -> float | None:
        """Run an iteration by a graph; the seconds that went into capturing it. None: run it eagerly."""
        if self.graphs is None or not self.graphs.eligible(item.batch, home, layers):
            return None
        done = self.graphs.run(item, home)
        if done is None:
            return None
        logits, tokens, seconds = done
        item.drawn = logits, tokens
        return seconds

    def _run_eagerly(self, item: Item, home: int, layers: Layers, times: StageTimes) -> None:
        if layers[0] == 0:
            ids = torch.tensor(item.ids, dtype=torch.int64, device=self.device)
            item.hidden = self.decoder.embed(ids, self.embedding)
        assert item.hidden is not None, "a later stage ran before the first"
        rotation = self.decoder.rotation(to_device(item.batch.positions(), self.device))
        last = self.decoder.spec.num_layers - 1
        for band in item.batch.bands(layers):
            places = self._prepare(item, home, band)
            for layer in range(*band):
                rows = self._sampled_rows(item) if layer == last else None
                item.hidden = self._layer(home, layer, item.hidden, rotation, places, layer - band[0], times, rows)
        if layers[1] > last:
            self._sample(item)

    def _layer(
        self, home: int, layer: int, x: Tensor, rotation: Rotation, places: list[Place], at: int, times: StageTimes,
        rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One layer, the `at`-th of its band, over `x`."""
        return self.decoder.layer(
            self.instances[home].layer(layer), x, rotation, self._attend(places, at, times), rows)  # fmt: skip

    # ------------------------------------------------------------ attention

    def plans(self, item: Item, home: int, band: Layers) -> list[PlacePlan]:
        """Who writes and attends what in a band of layers; made once."""

        def store(instance: int, tier: Tier) -> CellStore:
            return self.instances[instance].stores[tier]

        if band not in item.plans:
            item.plans[band] = plan_band(item.batch, home, band, self.block_size, store)
        return item.plans[band]

    def _prepare(self, item: Item, home: int, band: Layers) -> list[Place]:
        return [self._on_device(plan, band[1] - band[0] - 1) for plan in self.plans(item, home, band)]

    def _on_device(self, plan: PlacePlan, num_layers: int = 0) -> Place:
        device = self.device
        writes = [(to_device(write.tokens, device), to_device(write.slots, device)) for write in plan.writes]
        passes = [(self.backend.plan(part.rows, device), to_device(part.queries, device)) for part in plan.passes]
        engine = self.instances[plan.instance]
        if plan.tier is Tier.HBM:
            return Place(engine, engine.kv, -1, writes, passes)
        if device.type != "cpu":
            raise ContractError(f"instance {plan.instance}: attention over KV in host memory is built for a CPU only")
        cells = [int(part.rows.tables.max()) for part in plan.passes]
        keys = sum(int(part.rows.kv_len.sum()) for part in plan.passes)
        return Place(engine, engine.cells(plan.tier, max(cells) + num_layers), keys, writes, passes)

    def _write(self, place: Place, k: Tensor, v: Tensor, layer: int) -> int:
        """Store the new KV that belongs to a place; returns how many tokens."""
        num = 0
        for tokens, slots in place.writes:
            at = slots[layer] if slots.ndim == 2 else slots + layer * self.block_size
            keys, values = (k, v) if tokens is None else (k[tokens], v[tokens])
            write_kv(place.kv, keys, values, at)
            num += len(at)
        return num

    def _partials(self, place: Place, q: Tensor, layer: int) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """(queries, o, lse) of each of a place's passes."""
        scale = self.decoder.spec.scale
        return [(queries, *self.backend.run(plan, q, place.kv, layer, scale)) for plan, queries in place.passes]

    def _merged(self, parts: list[tuple[Tensor | None, Tensor, Tensor]]) -> Tensor:
        """One output from home's first pass, which has every query, and the others."""
        (_, o, lse), *others = parts
        for queries, part, part_lse in others:
            index = torch.arange(len(part), device=self.device) if queries is None else queries
            merge_into(o, lse, index, part, part_lse)
        return o

    def _attend(self, places: list[Place], layer: int, times: StageTimes) -> Attend:
        home, *creditors = places

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(home, k, v, layer)
            return self._merged(self._partials(home, q, layer))

        def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._wait()
            start = self.clock()
            self._write(home, k, v, layer)
            parts = self._partials(home, q, layer)
            self._wait()
            report = LayerTimes(self.clock() - start, [])
            for place in creditors:
                start = self.clock()
                num_new = self._write(place, k, v, layer)
                theirs = self._partials(place, q, layer)
                self._wait()
                seconds = self.clock() - start
                report.remote.append(_sent(place, q, k, num_new, theirs, seconds))
                parts += theirs
            times.layers.append(report)
            return self._merged(parts)

        return together if creditors else alone

    # ------------------------------------------------------------ tokens

    def _sampled_rows(self, item: Item) -> Tensor | None:
        """Rows that give a token; None: all of them, in order."""
        rows = item.batch.sampled_rows()
        return None if len(rows) == item.batch.num_tokens else to_device(rows, self.device)

    def _sample(self, item: Item) -> None:
        works = [work for work in item.batch.works if work.sample]
        assert item.hidden is not None
        if not works:
            return
        if self.sampling.temperature == 0.0:
            logits, tokens = self.decoder.likeliest(item.hidden, self.norm, self.head)
        else:
            logits = self.decoder.logits(item.hidden, self.norm, self.head)
            draws = [Draw(self.sampling, work.request_id, work.first + work.num) for work in works]
            tokens = sample(logits, draws)
        item.drawn = logits, tokens

    def _sampled(self, item: Item, logits: Tensor, tokens: Tensor) -> None:
        """Tokens of the works that sample, row by row; ContractError on NaN where that is looked for."""
        works = [work for work in item.batch.works if work.sample]
        if self.check_finite and not bool(torch.isfinite(logits).all()):
            bad = works[int(torch.argmin(torch.isfinite(logits).all(dim=1).int()))]
            raise ContractError(f"request {bad.request_id}: NaN at position {bad.first + bad.num - 1}: KV was read "
                                "that nobody had written, or that was freed (or a parameter is no number)")  # fmt: skip
        item.sampled = list(zip([work.request_id for work in works], np.asarray(tokens.cpu()).tolist()))
