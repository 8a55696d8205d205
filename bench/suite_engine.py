"""Sections `arena` (layers into KV and back) and `engine` (decode by graphs and eagerly, against the roofline)."""

from __future__ import annotations

from typing import Any

import torch

from bench.arena import case as arena_case
from bench.iterations import Engine, Shape
from bench.suite import Context, Section
from common.engine.graphs import DecodeGraphs
from common.engine.layout import LayerLayout
from common.engine.spec import DecoderSpec

HEADROOM = 0.85


def arena(context: Context) -> Section:
    """As `bench.arena`, fewer cases; that memory moves (and on CUDA that none is freed) is checked."""
    section, times, memory = Section(), [], []
    for layers, mib, dropped in context.sizes.arena:
        time_row, memory_row = arena_case(layers, mib, dropped, 3, context.device)
        times.append(time_row)
        memory.append(memory_row)
        new_cells = memory_row["KV cells after"] - memory_row["KV cells before"]
        section.check(
            new_cells == dropped * mib * 16, f"arena {layers} x {mib} MiB: {new_cells} new cells after a drop"
        )
        if context.cuda:
            moved = abs(memory_row["dropped (MiB)"] - memory_row["before (MiB)"])
            section.check(moved <= 2, f"arena {layers} x {mib} MiB: memory in use changed by {moved:.0f} MiB")
    section.tables["Arena: time of remaps"], section.tables["Arena: memory held"] = times, memory
    return section


class DeviceSource:
    """Random parameters drawn where they go: seconds for 8 billion, and of no other use."""

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self.spec, self.layout = spec, LayerLayout(spec, spec.dtype)
        self._device = device

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Weights around 0 with the usual spread, norms of 1."""
        weights = self.layout.views(slab[: self.layout.num_bytes])
        for name in self.layout.shapes:
            value: torch.Tensor = getattr(weights, name)
            value.fill_(1.0) if "norm" in name else value.normal_(std=self.spec.hidden_size**-0.5)

    def _table(self) -> torch.Tensor:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return torch.empty(shape, dtype=self.spec.dtype, device=self._device).normal_(std=self.spec.hidden_size**-0.5)

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._table()

    def head(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._table()

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return torch.ones(self.spec.hidden_size, dtype=self.spec.dtype, device=self._device)


def llama(name: str, layers: int, hidden: int, inner: int, heads: tuple[int, int, int], vocab: int,
          dtype: torch.dtype) -> DecoderSpec:  # fmt: skip
    """A decoder of the Llama family."""
    return DecoderSpec(name, "llama", layers, hidden, inner, *heads, vocab, max_position=8192, dtype=dtype)


def fitting(context: Context) -> DecoderSpec:
    """The shape of Llama-3.1-8B where it fits, of Llama-3.2-1B where not; 23M parameters on a CPU."""
    if not context.cuda:
        return llama("23M", 6, 384, 1024, (6, 6, 64), 32000, torch.float32)
    whole = llama("Llama-3.1-8B", 32, 4096, 14336, (32, 8, 128), 128256, torch.bfloat16)
    need = num_bytes(whole) + kv_bytes(whole, max(context.sizes.batches), context.sizes.context)
    if need <= HEADROOM * torch.cuda.mem_get_info(context.device)[0]:
        return whole
    return llama("Llama-3.2-1B", 16, 2048, 8192, (32, 8, 64), 128256, torch.bfloat16)


def num_bytes(spec: DecoderSpec) -> int:
    """Parameters."""
    table = spec.vocab_size * spec.hidden_size * spec.dtype.itemsize
    return spec.num_layers * LayerLayout(spec, spec.dtype).num_bytes + 2 * table


def kv_bytes(spec: DecoderSpec, batch: int, context: int) -> int:
    """KV of a batch."""
    return 2 * batch * context * spec.num_layers * spec.kv_size * spec.dtype.itemsize


def roofline_s(context: Context, spec: DecoderSpec, batch: int, length: int) -> float:
    """Seconds of one decode iteration that no engine beats: each layer and the head once, all KV once, or the FLOPs."""
    bandwidth, rate = context.ceilings()
    weights = num_bytes(spec) - spec.vocab_size * spec.hidden_size * spec.dtype.itemsize  # one row of the embedding
    flops = 2 * batch * weights / spec.dtype.itemsize + 4 * batch * length * spec.num_layers * spec.q_size
    return max((weights + kv_bytes(spec, batch, length)) / bandwidth, flops / rate)


def engine(context: Context) -> Section:
    """Decode iterations, graphs and eager: same tokens, seconds, tokens per second, share of the roofline."""
    section, spec, length = Section(), fitting(context), context.sizes.context
    shapes = [Shape(0, 0, 0, batch, length) for batch in context.sizes.batches]
    world = Engine(spec, context.device, max(shape.kv_blocks for shape in shapes) + 8, "on", length + 64,
                   DeviceSource(spec, context.device))  # fmt: skip
    try:
        rows = [row for shape in shapes for row in both(section, context, world, shape)]
    finally:
        world.close()
    section.tables[f"Decode iterations of {spec.name}, random weights, {length} tokens of context"] = rows
    section.notes.append(f"Engine: {spec.name}, {num_bytes(spec) / 2**30:.1f} GiB of parameters in {spec.dtype}.")
    return section


def both(section: Section, context: Context, world: Engine, shape: Shape) -> list[dict[str, Any]]:
    """Rows of one batch size: by graphs, then eagerly over the same KV."""
    runner, rows, said = world.world.runner, [], []
    graphs: DecodeGraphs | None = runner.graphs
    floor = roofline_s(context, world.spec, shape.decodes, shape.context)
    for name, used in (("graphs" if context.cuda else "static buffers", graphs), ("eager", None)):
        runner.graphs = used
        seconds = world.seconds(shape, 15, 2.0 if context.cuda else 0.5)
        item = world.item(shape)
        runner.run_stage(item, 0, (0, world.spec.num_layers))
        said.append([token for _, token in item.sampled])
        rows.append({"batch": shape.decodes, "decode": name, "ms": seconds * 1e3, "tokens/s": shape.decodes / seconds,
                     "roofline (ms)": floor * 1e3, "of roofline": floor / seconds})  # fmt: skip
    runner.graphs = graphs
    equal = sum(a == b for a, b in zip(*said))
    if equal < len(said[0]):
        section.notes.append(f"batch {shape.decodes}: {equal} of {len(said[0])} tokens are the same by graphs and "
                             "eagerly (random weights: near ties are common in half precision)")  # fmt: skip
    section.check(equal >= 0.9 * len(said[0]), f"graphs: {equal} of {len(said[0])} tokens as by the eager path")
    if graphs is not None:
        section.check(graphs.counts.replays > 0, "graphs: nothing was replayed")
    return rows
