"""Operator times on one rank of one card: curves and lattices in ns, read from a grid and scaled to the card.

Rules, the same for every card:
- *linear*: time / roofline interpolated in (log n, log k) between measured shapes at each measured token count, then
  time linear in tokens;
- *attention*: a chunk alone over (tokens, cached context), decodes alone over (batch, context), and a batch of both
  is their sum times a measured mixing ratio (flash-attention 2 runs decodes badly beside a chunk; 3 does not, nor
  does an engine that launches the two one after the other);
- *derived cards*: what exceeds the launch floor scales with the rooflines of both cards, so memory time scales with
  bandwidth and compute time with FLOP/s;
- what a card was not measured for comes from a named sibling by the same scaling (`SIBLING`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.cost.grids import Array, Grid, load_grid
from common.cost.interpolate import Lattice, far, head_weights, longer_chunks, nearest_heads, never_less, shape_weights
from common.cost.roofline import LAUNCH_NS, Roof
from common.cost.specs import HardwareSpec

SIBLING = {"elem": "rtxpro6000", "samp": "rtxpro6000", "mix": "rtx4090", "ar": "l40s", "sr": "a100_sxm"}
QUERY_TILE = 64  # query rows that one thread block of flash-attention 2 covers


@dataclass(frozen=True, slots=True)
class Mixing:
    """Ratio of a mixed batch's attention to the sum of its parts, over (chunk, cached, batch, context)."""

    axes: tuple[Array, Array, Array, Array]
    ratio: Array


class Operators:
    """Operator times of `hardware`, from its grid."""

    def __init__(self, hardware: HardwareSpec, grid: Grid | None = None) -> None:
        self.hardware = hardware
        self.grid = grid or load_grid(hardware.grid)
        self.roof = Roof.of(hardware.peak_flops, hardware.mem_bandwidth, hardware.dtype_bytes)

    def _grid(self, table: str) -> Grid:
        return self.grid if self.grid.has(table) else load_grid(SIBLING[table])

    def _source_roof(self, grid: Grid) -> Roof:
        return Roof.of(grid.meta["peak_flops"], grid.meta["mem_bandwidth"], grid.meta.get("dtype_bytes", 2))

    # -- linear layers

    def linear(self, n: int, k: int, tokens: Array) -> Array:
        """One (tokens, k) x (k, n) product."""
        grid = self.grid
        m, shapes = grid.knots("gemm_m"), grid.knots("gemm_nk")
        source = self._source_roof(grid)
        rows, weights = shape_weights(shapes, n, k)
        times = grid.times("gemm", rows)
        floor = LAUNCH_NS
        logs = np.log(times / (source.linear(m[None, :], shapes[rows, :1], shapes[rows, 1:]) + floor))
        measured = np.exp(weights @ logs) * (source.linear(m, n, k) + floor)
        knots = self._rescale(measured, source.linear(m, n, k), self.roof.linear(m, n, k), floor)
        inside = np.interp(tokens, m, knots)
        beyond = knots[-1] * tokens / m[-1]
        curve: Array = np.maximum(np.where(tokens > m[-1], beyond, inside), self.roof.linear(tokens, n, k))
        return curve

    @staticmethod
    def _rescale(time_ns: Array, source: Array, target: Array, floor: float) -> Array:
        """Scale what exceeds `floor` by the ratio of the rooflines (identical rooflines change nothing)."""
        return _above(time_ns, floor, target / np.maximum(source, 1e-9))

    # -- elementwise operators, sampler, all-reduce

    def elementwise(self, name: str, width: int, tokens: Array) -> Array:
        """A norm, activation, rotary or gather of `width` elements per token; bandwidth scales what exceeds launch."""
        grid = self._grid("elem")
        names, widths = grid.arrays["elem_name"], grid.knots("elem_width")
        rows = np.flatnonzero(names == name)
        if not len(rows):
            grid = load_grid(SIBLING["elem"])
            names, widths = grid.arrays["elem_name"], grid.knots("elem_width")
            rows = np.flatnonzero(names == name)
        row = rows[np.argmin(np.abs(np.log(widths[rows] / width)))]
        axis, times = grid.knots("elem_axis"), grid.times("elem", row)
        scaled = tokens * (width / widths[row])
        inside = np.interp(scaled, axis, times)
        curve = np.where(scaled > axis[-1], times[-1] * scaled / axis[-1], inside)
        return self._bandwidth_scaled(curve, grid, float(times.min()))

    def sampler(self, vocab: int, rows: Array) -> Array:
        """Sampling of `rows` sequences over `vocab` logits."""
        grid = self._grid("samp")
        widths = grid.knots("samp_width")
        row = int(np.argmin(np.abs(np.log(widths / vocab))))
        axis, times = grid.knots("samp_axis"), grid.times("samp", row)
        scaled = rows * (vocab / widths[row])
        curve = np.where(scaled > axis[-1], times[-1] * scaled / axis[-1], np.interp(scaled, axis, times))
        return self._bandwidth_scaled(curve, grid, float(times.min()))

    def _bandwidth_scaled(self, curve: Array, grid: Grid, floor: float) -> Array:
        """What exceeds the launch floor scales with bandwidth, the floor itself with the cards' attention floors:
        it is a number of cycles, and data-centre cards clock lower."""
        ratio = grid.meta["mem_bandwidth"] / self.hardware.mem_bandwidth
        return _above(curve, floor, ratio) + floor * (attention_floor(self.grid) / attention_floor(grid) - 1.0)

    def all_reduce(self, gpus: int, num_bytes: Array) -> Array:
        """All-reduce over `gpus` of one node; the bandwidth part scales with the link."""
        if gpus < 2:
            return np.zeros_like(num_bytes)
        grid = self._grid("ar")
        counts, size = grid.knots("ar_gpus"), grid.knots("ar_bytes")
        measured = grid.times("ar")
        logs = np.log(measured if grid.meta.get("dense") else never_less(measured, 1))
        row = np.array([np.interp(math.log(gpus), np.log(counts), logs[:, i]) for i in range(len(size))])
        times = np.exp(row)
        inside = np.interp(num_bytes, size, times)
        curve = np.where(num_bytes > size[-1], times[-1] * num_bytes / size[-1], inside)
        ratio = grid.meta["link_bandwidth"] / self.hardware.nvlink_bandwidth
        return _above(curve, float(times.min()), ratio)

    def send_recv(self, num_bytes: Array) -> Array:
        """Point-to-point copy to another GPU of the node; the bandwidth part scales with the link."""
        grid = self._grid("sr")
        size, times = grid.knots("sr_bytes"), grid.times("sr")
        inside = np.interp(num_bytes, size, times)
        curve = np.where(num_bytes > size[-1], times[-1] * num_bytes / size[-1], inside)
        ratio = grid.meta["link_bandwidth"] / self.hardware.nvlink_bandwidth
        return _above(curve, float(times.min()), ratio)

    # -- attention

    def _from_heads(
        self,
        table: str,
        heads: int,
        kv_heads: int,
        target: Array,
        work_of: Callable[[int, int, int], Array],
        first: bool = False,
    ) -> Array:
        """A table of times at (heads, kv_heads): the measured configurations around it, each scaled to its work, as
        their weighted geometric mean. `first`: only the first batch size."""
        prefix = table.split("_")[0]
        configurations, sizes = self.grid.arrays[f"{prefix}_heads"], head_sizes(self.grid, prefix)
        rows, weights = head_weights(configurations, heads, kv_heads)
        times = self.grid.times(table)
        scaled = []
        for row in rows:
            one = times[row][0] if first else times[row]
            h, kv = configurations[row].tolist()
            scaled.append(self._rescale(one, work_of(h, kv, sizes[row]), target, float(one.min())))
        return _geometric(scaled, weights)

    def prefill(self, heads: int, kv_heads: int, head_dim: int) -> Lattice:
        """A chunk of x tokens behind y cached ones, alone in its batch."""
        in_engine = self.grid.has("mix_pre")
        lattice = (
            self._engine_prefill(heads, kv_heads, head_dim)
            if in_engine
            else self._kernel_prefill(heads, kv_heads, head_dim)
        )
        x, y = lattice.x, lattice.y
        roof = self.roof.prefill(x[:, None], pairs_of(x[:, None], y[None, :]), heads, kv_heads, head_dim)
        return far(Lattice(x, y, np.maximum(lattice.time_ns, roof)))

    def _engine_prefill(self, heads: int, kv_heads: int, head_dim: int) -> Lattice:
        grid, source = self.grid, self._source_roof(self.grid)
        row, (h, _) = nearest_heads(grid.arrays["mix_heads"], heads, kv_heads)
        size = head_sizes(grid, "mix")[row]
        x, y = grid.knots("mix_chunk"), grid.knots("mix_cached")
        times = grid.times("mix_pre", row)
        pairs = pairs_of(x[:, None], y[None, :])
        scaled = self._rescale(
            times,
            _query_work(source, grid, x[:, None], pairs, h, size),
            _query_work(self.roof, grid, x[:, None], pairs, heads, head_dim),
            float(times.min()),
        )
        return longer_chunks(Lattice(x, y, scaled))

    def _kernel_prefill(self, heads: int, kv_heads: int, head_dim: int) -> Lattice:
        """Prompts without a cache are measured; a cached context adds its pairs at the rate of the longest prompt."""
        grid, source = self.grid, self._source_roof(self.grid)
        x = grid.knots("pre_length")
        own = x * (x + 1) / 2
        target = _query_work(self.roof, grid, x, own, heads, head_dim)
        alone = self._from_heads(
            "pre", heads, kv_heads, target, lambda h, _, size: _query_work(source, grid, x, own, h, size), first=True
        )
        rate = alone[-1] / own[-1]  # ns per query-key pair when the card is full
        rows = x
        if grid.meta["kernel"].startswith("fa2"):  # without split KV, few query tiles leave multiprocessors idle
            rows = np.maximum(x, QUERY_TILE * grid.meta["num_sm"] / heads)
        y = np.array([0.0, 16384.0])
        cached = rate * rows[:, None] * y[None, :]
        bytes_ns = 4.0 * kv_heads * head_dim * y / self.roof.bytes_per_ns
        return Lattice(x, y, alone[:, None] + np.maximum(cached, bytes_ns[None, :]))

    def several(self, heads: int, kv_heads: int, head_dim: int) -> Lattice | None:
        """x prompts of y tokens each, nothing cached; None where only single chunks were measured."""
        grid, source = self.grid, self._source_roof(self.grid)
        if not grid.has("pre"):
            return None
        x, y = grid.knots("pre_batch"), grid.knots("pre_length")
        tokens = x[:, None] * y[None, :]
        pairs = tokens * (y[None, :] + 1) / 2
        target = _query_work(self.roof, grid, tokens, pairs, heads, head_dim)
        scaled = self._from_heads(
            "pre", heads, kv_heads, target, lambda h, _, size: _query_work(source, grid, tokens, pairs, h, size)
        )
        roof = self.roof.prefill(tokens, pairs, heads, kv_heads, head_dim)
        return Lattice(x, y, np.maximum(never_less(scaled, 0), roof))  # in length kernels do change

    def decode(self, heads: int, kv_heads: int, head_dim: int) -> Lattice:
        """x decodes of y tokens of context each, alone in their batch."""
        grid, source = self.grid, self._source_roof(self.grid)
        prefix = "mix" if grid.has("mix_dec") else "dec"
        x, y = grid.knots(f"{prefix}_batch"), grid.knots(f"{prefix}_context")
        target = self.roof.decode(x[:, None], y[None, :], heads, kv_heads, head_dim)
        times = grid.times(f"{prefix}_dec" if prefix == "mix" else prefix)
        configurations, sizes = grid.arrays[f"{prefix}_heads"], head_sizes(grid, prefix)
        rows, weights = head_weights(configurations, heads, kv_heads)
        parts = []
        for row in rows:
            h, kv = configurations[row].tolist()
            batch = x * (kv_heads / kv)  # kernels launch per request and KV head: as many thread blocks as measured
            same = _at_batch(x, times[row], batch)
            work = source.decode(batch[:, None], y[None, :], h, kv, sizes[row])
            parts.append(self._rescale(same, work, target, float(times[row].min())))
        scaled = _geometric(parts, weights)
        growing = (1,) if grid.meta.get("dense") else (0, 1)  # 2024's kernel splits KV by the batch it sees
        scaled = np.maximum(never_less(scaled, *growing), target)
        x = np.append(x, 4 * x[-1])
        whole = far(Lattice(x, y, np.vstack([scaled, 4 * scaled[-1:]])))
        roof = self.roof.decode(x[:, None], whole.y[None, :], heads, kv_heads, head_dim)  # also where it is continued
        return Lattice(x, whole.y, np.maximum(whole.time_ns, roof))

    def mixing(self, heads: int, kv_heads: int, head_dim: int = 128) -> Mixing | None:
        """How chunk and decodes disturb each other in one kernel; None where the kernel (3rd generation) adds them
        or where they are kernels of their own.

        What decodes add to a chunk is measured per query head: beside a chunk each of them reads its KV by itself,
        whatever the group size, so it scales with heads and with bandwidth, not with KV heads.
        """
        if self.grid.meta["kernel"] != "fa2":
            return None
        grid = self._grid("mix")
        row, (h, _) = nearest_heads(grid.arrays["mix_heads"], heads, kv_heads)
        axes = (
            grid.knots("mix_chunk"),
            grid.knots("mix_cached"),
            grid.knots("mix_batch"),
            grid.knots("mix_context"),
        )
        busy = grid.meta["num_sm"]
        share = np.maximum(axes[2] * heads, busy) / np.maximum(axes[2] * h, busy)
        scale = share[:, None] * (grid.meta["mem_bandwidth"] / self.hardware.mem_bandwidth)
        added = grid.times("mix", row) - grid.times("mix_pre", row)[:, :, None, None]
        chunk = self.prefill(heads, kv_heads, head_dim).at(axes[0], axes[1])[:, :, None, None]
        decode = self.decode(heads, kv_heads, head_dim).at(axes[2], axes[3])[None, None]
        return Mixing(axes, (chunk + np.where(added > 0, added * scale, added)) / (chunk + decode))


def _geometric(times: list[Array], weights: Array) -> Array:
    """The weighted geometric mean."""
    if len(times) == 1:
        return times[0]
    mean: Array = np.exp(weights @ np.log(times).reshape(len(times), -1)).reshape(times[0].shape)
    return mean


def _at_batch(x: Array, times: Array, batch: Array) -> Array:
    """Rows of a table over batch sizes `x` at others: linear, in proportion beyond the last, held below the first."""
    inside = np.array([np.interp(batch, x, column) for column in times.T]).T
    beyond = times[-1][None, :] * (batch / x[-1])[:, None]
    rows: Array = np.where(batch[:, None] > x[-1], beyond, inside)
    return rows


def attention_floor(grid: Grid) -> float:
    """The shortest decode attention of a card, ns."""
    return float(grid.times("mix_dec" if grid.has("mix_dec") else "dec").min())


def head_sizes(grid: Grid, prefix: str) -> list[int]:
    """Head size of each measured head configuration; 128 where a grid does not say."""
    sizes = grid.arrays.get(f"{prefix}_size")
    return [128] * len(grid.arrays[f"{prefix}_heads"]) if sizes is None else sizes.tolist()


def _above(time_ns: Array, floor: float, ratio: Array | float) -> Array:
    """Scale the part of a time above the launch floor."""
    scaled: Array = np.minimum(time_ns, floor) + np.maximum(time_ns - floor, 0.0) * ratio
    return scaled


def _query_work(roof: Roof, grid: Grid, tokens: Array, pairs: Array, heads: int, head_dim: int) -> Array:
    """What prefill time follows from one head count to another: work per query head, but no less than one tile of
    queries on every multiprocessor (flash-attention 2 does not split KV beside queries)."""
    busy: Array | float = heads
    if grid.meta["kernel"].startswith("fa2"):
        busy = np.maximum(heads, QUERY_TILE * grid.meta["num_sm"] / tokens)
    work: Array = roof.prefill_work(tokens, pairs, busy, busy, head_dim)
    return work


def pairs_of(tokens: Array, cached: Array) -> Array:
    """Query-key pairs of a causal chunk."""
    return tokens * cached + tokens * (tokens + 1) / 2
