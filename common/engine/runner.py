"""Runs iterations: stages follow the route, attention follows the placement. Knows instances, never systems.

Per layer the home instance projects q, k, v; every instance that a placement names stores the new KV that is its
own, attends over what it has, and returns `(o, lse)`; home merges. A kernel is only ever given one instance's cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.engine.instance import EngineInstance
from common.engine.model import Decoder
from common.engine.sampler import Draw, SamplingParams, greedy, sample
from common.engine.weights import ParameterSource
from common.engine.work import Batch, PlacePlan, plan_band, to_device
from common.errors import ContractError
from common.kernels.cache import write_kv
from common.kernels.merge import merge_into
from common.kernels.plan import Backend
from common.types import Layers, Tier


class Remote(NamedTuple):
    """What one creditor did in one layer: bytes of queries and new KV out, of partial results back, and seconds."""

    instance: int
    out_bytes: int
    back_bytes: int
    seconds: float


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

    __slots__ = ("batch", "hidden", "ids", "rotation", "sampled")

    def __init__(self, batch: Batch, ids: list[int]) -> None:
        self.batch = batch
        self.ids = ids
        self.hidden: Tensor | None = None
        self.rotation = None
        self.sampled: list[tuple[int, int]] = []  # (request, token), once the last stage has run


@dataclass(slots=True)
class Prepared:
    """A band's plan on the device: home first."""

    layers: Layers
    places: list[tuple[EngineInstance, list[tuple[Tensor | None, Tensor]], list[tuple[object, Tensor | None]]]]


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
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.instances = instances
        self.block_size = block_size
        self.sampling = sampling or SamplingParams()
        self.check_finite = check_finite
        device = decoder.device
        self._embedding = source.embedding().to(device)
        self._head = source.head().to(device)
        self._norm = source.final_norm().to(device)
        self.num_graphs = 0

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
        begin = time.perf_counter()
        with torch.inference_mode():
            if layers[0] == 0:
                ids = torch.tensor(item.ids, dtype=torch.int64, device=self.device)
                item.hidden = self.decoder.embed(ids, self._embedding)
            assert item.hidden is not None, "a later stage ran before the first"
            positions = to_device(item.batch.positions(), self.device)
            assert positions is not None
            rotation = self.decoder.rotation(positions)
            for band in item.batch.bands(layers):
                prepared = self._prepare(item.batch, home, band)
                for layer in range(*band):
                    attend = self._attend(prepared, layer - band[0], times)
                    weights = self.instances[home].layer(layer)
                    item.hidden = self.decoder.layer(weights, item.hidden, rotation, attend)
            if layers[1] == self.decoder.spec.num_layers:
                self._sample(item)
        self._wait()
        times.seconds = time.perf_counter() - begin
        return times

    # ------------------------------------------------------------ attention

    def _prepare(self, batch: Batch, home: int, band: Layers) -> Prepared:
        def store(instance: int):  # type: ignore[no-untyped-def]
            return self.instances[instance].stores[Tier.HBM]

        plans = plan_band(batch, home, band, self.block_size, store)
        return Prepared(band, [self._on_device(plan) for plan in plans])

    def _on_device(self, plan: PlacePlan):  # type: ignore[no-untyped-def]
        device = self.device
        writes = [(to_device(write.index, device), to_device(write.slots, device)) for write in plan.writes]
        passes = [(self.backend.plan(part.rows, device), to_device(part.index, device)) for part in plan.passes]
        return self.instances[plan.instance], writes, passes

    def _attend(self, prepared: Prepared, layer: int, times: StageTimes) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        home, *creditors = prepared.places
        scale = self.decoder.spec.scale

        def write(place, k: Tensor, v: Tensor) -> int:  # type: ignore[no-untyped-def]
            instance, writes, _ = place
            num = 0
            for index, slots in writes:
                at = slots[layer] if slots.ndim == 2 else slots + layer * self.block_size
                write_kv(instance.kv, k if index is None else k[index], v if index is None else v[index], at)
                num += len(at)
            return num

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write(home, k, v)
            instance, _, passes = home
            o, lse = self.backend.run(passes[0][0], q, instance.kv, layer, scale)
            for plan, index in passes[1:]:
                merge_into(o, lse, index, *self.backend.run(plan, q, instance.kv, layer, scale))
            return o

        def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._wait()
            start = time.perf_counter()
            write(home, k, v)
            instance, _, passes = home
            o, lse = self.backend.run(passes[0][0], q, instance.kv, layer, scale)
            parts = [(index, *self.backend.run(plan, q, instance.kv, layer, scale)) for plan, index in passes[1:]]
            self._wait()
            report = LayerTimes(time.perf_counter() - start, [])
            for place in creditors:
                start = time.perf_counter()
                out = write(place, k, v) * 2 * k[0].numel() * k.element_size()
                back = 0
                sent: set[int] = set()
                for plan, index in place[2]:
                    part, part_lse = self.backend.run(plan, q, place[0].kv, layer, scale)
                    parts.append((index, part, part_lse))
                    fresh = len(part) if index is None else len(set(index.tolist()) - sent)
                    sent |= set() if index is None else set(index.tolist())
                    out += fresh * q[0].numel() * q.element_size()
                    back += fresh * (part[0].numel() * part.element_size() + part_lse[0].numel() * 4)
                self._wait()
                report.remote.append(Remote(place[0].info.instance, out, back, time.perf_counter() - start))
            for index, part, part_lse in parts:
                if index is None:
                    index = torch.arange(len(part), device=self.device)
                merge_into(o, lse, index, part, part_lse)
            times.layers.append(report)
            return o

        return together if creditors else alone

    # ------------------------------------------------------------ tokens

    def _sample(self, item: Item) -> None:
        rows = to_device(item.batch.sampled_rows(), self.device)
        works = [work for work in item.batch.works if work.sample]
        assert rows is not None and item.hidden is not None
        if not works:
            return
        logits = self.decoder.logits(item.hidden[rows], self._norm, self._head)
        if self.check_finite and not bool(torch.isfinite(logits).all()):
            bad = works[int(torch.argmin(torch.isfinite(logits).all(dim=1).int()))]
            raise ContractError(f"request {bad.request_id}: NaN at position {bad.first + bad.count - 1}: KV was read "
                                "that nobody had written, or that was freed")  # fmt: skip
        if self.sampling.temperature == 0.0:
            tokens = greedy(logits)
        else:
            draws = [Draw(self.sampling, work.request_id, work.first + work.count) for work in works]
            tokens = sample(logits, draws)
        item.sampled = list(zip([work.request_id for work in works], np.asarray(tokens.cpu()).tolist()))
