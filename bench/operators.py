"""The engine's operators, one by one, on one device: what a hardware profile is made of.

Every operator runs as the engine runs it, in the engine's type, over as much memory as a model really goes through
(weights and KV: all layers), of weights about `REACH` bytes at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from bench.timing import Call, Timer, copies_for
from common.cost.shapes import element_widths, linear_shapes
from common.cost.specs import ModelSpec
from common.engine.head import Head
from common.engine.layout import LayerLayout, LayerWeights
from common.engine.model import Decoder
from common.engine.rope import rotate
from common.engine.spec import DecoderSpec
from common.kernels.cache import write_kv
from common.kernels.plan import Rows
from common.kernels.select import choose

REACH = 256 << 20
BLOCK_SIZE = 16
WEIGHTS = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
Point = tuple[str, Callable[[], float]]


@dataclass(frozen=True)
class Lattice:
    """Which shapes are measured."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]  # of the LM head and the sampler
    chunks: tuple[int, ...]
    cached: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    most_kv: int  # tokens of KV over a batch


SMALL = Lattice(
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32, 64), (2, 16, 64, 256, 1024),
    (0, 64, 256, 1024, 3072), (1, 2, 4, 8, 16, 32, 64), (16, 64, 256, 1024, 4096), 1 << 15,
)  # fmt: skip
LARGE = Lattice(
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32, 64, 128, 256),
    (2, 16, 64, 256, 1024, 2048, 8192), (0, 256, 1024, 4096, 16384), (1, 2, 4, 8, 16, 32, 64, 128, 256),
    (16, 64, 256, 1024, 4096, 16384, 65536), 1 << 18,
)  # fmt: skip
TOY = Lattice((1, 8, 64), (1, 8), (2, 32), (0, 64), (1, 8), (16, 128), 1 << 12)
LATTICES = {"toy": TOY, "small": SMALL, "large": LARGE}


class Operators:
    """One model's operators on one device."""

    def __init__(self, model: ModelSpec, spec: DecoderSpec, device: torch.device, timer: Timer) -> None:
        self.model, self.spec, self.device, self.timer = model, spec, device, timer
        self.decoder = Decoder(spec, device, spec.dtype)
        self.backend = choose(device, spec.dtype, BLOCK_SIZE)
        self._reach = min(model.num_params * spec.dtype.itemsize, REACH)
        self._kv: torch.Tensor | None = None
        self._slabs: list[LayerWeights] = []

    def _layers(self) -> list[LayerWeights]:
        """Layers as the engine lays them out: as many as the model has, or as `REACH` holds, or four."""
        layout = LayerLayout(self.spec, self.spec.dtype)
        num = min(self.spec.num_layers, max(4, REACH // layout.num_bytes))
        while len(self._slabs) < num:
            weights = layout.views(torch.empty(layout.num_bytes, dtype=torch.uint8, device=self.device))
            for name in layout.shapes:
                getattr(weights, name).normal_(std=self.spec.hidden_size**-0.5)
            self._slabs.append(weights)
        return self._slabs

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.spec.dtype)

    # ------------------------------------------------------------ dense

    def linears(self, tokens: tuple[int, ...]) -> Iterator[tuple[str, int, Callable[[], float]]]:
        """(layer, tokens, measure) of the linear layers."""
        for name, (n, k) in linear_shapes(self.model, 1).items():
            if name != "lm_head":
                yield from ((name, m, partial(self._linear, name, m, n, k)) for m in tokens)

    def _linear(self, name: str, m: int, n: int, k: int) -> float:
        weights: list[torch.Tensor] = [getattr(layer, WEIGHTS[name]) for layer in self._layers()]
        x, out, products = self._randn(m, k), self._randn(m, n), self.decoder.products
        if name in ("o_proj", "down_proj"):  # the engine adds these to the residual; here they cancel out
            return self.timer.median_ns([partial(products.add, out, y, w) for y in (x, -x) for w in weights])
        return self.timer.median_ns([partial(products.times, x, w, name) for w in weights])

    def elements(self, tokens: tuple[int, ...]) -> Iterator[tuple[str, int, Callable[[], float]]]:
        """(layer, tokens, measure) of norms, rotary embedding, activation and token embedding."""
        for name in element_widths(self.model, 1):
            if name != "qk_norm" or self.spec.qk_norm:
                yield from ((name, m, partial(self._element_ns, name, m)) for m in tokens)

    def _element_ns(self, name: str, m: int) -> float:
        return self.timer.median_ns([self._element(name, m)])

    def _element(self, name: str, m: int) -> Call:
        spec, decoder = self.spec, self.decoder
        if name == "embedding":
            table, ids = self._randn(spec.vocab_size, spec.hidden_size), torch.arange(m) % spec.vocab_size
            at = ids.to(self.device)
            return lambda: decoder.embed(at, table)
        if name == "rotary_emb":
            heads = self._randn(m, spec.num_heads + spec.num_kv_heads, spec.head_dim)
            rotation = decoder.rotation((torch.arange(m) % spec.max_position).to(self.device))
            return lambda: rotate(heads, rotation)
        if name == "act_fn":
            both, inner = self._randn(m, 2 * spec.intermediate_size), spec.intermediate_size
            return lambda: F.silu(both[:, :inner]).mul_(both[:, inner:])
        if name == "qk_norm":
            heads = self._randn(m, spec.num_heads + spec.num_kv_heads, spec.head_dim)
            return partial(decoder.norm, heads, self._randn(spec.head_dim))
        x, weight = self._randn(m, spec.hidden_size), self._randn(spec.hidden_size)
        return lambda: decoder.norm(x, weight)

    def head(self, rows: tuple[int, ...]) -> Iterator[tuple[str, int, Callable[[], float]]]:
        """(layer, rows, measure) of the LM head and of greedy sampling."""
        yield from (("lm_head", n, partial(self._head, n)) for n in rows)
        yield from (("sampler", n, partial(self._sampler, n)) for n in rows)

    def _head(self, n: int) -> float:
        size = self.spec.vocab_size * self.spec.hidden_size * self.spec.dtype.itemsize
        heads = [Head(self._randn(self.spec.vocab_size, self.spec.hidden_size))
                 for _ in range(copies_for(size, self._reach, 4))]  # fmt: skip
        x = self._randn(n, self.spec.hidden_size)
        return self.timer.median_ns([partial(head, x) for head in heads])

    def _sampler(self, n: int) -> float:
        logits = self._randn(n, self.spec.vocab_size)
        return self.timer.median_ns([lambda: logits.argmax(dim=-1)])

    # ------------------------------------------------------------ attention

    def attentions(self, lattice: Lattice) -> Iterator[tuple[tuple[int, int, int, int], Callable[[], float]]]:
        """((chunk, cached, decodes, context), measure): chunks alone and decodes alone."""
        longest = self.spec.max_position
        for chunk in lattice.chunks:
            for cached in lattice.cached:
                if chunk + cached <= longest:
                    yield (chunk, cached, 0, 0), partial(self.attention_ns, 1, chunk, cached)
        for batch in lattice.batches:
            for context in lattice.contexts:
                if context <= longest and (batch == 1 or batch * context <= lattice.most_kv):
                    yield (0, 0, batch, context), partial(self.attention_ns, batch, 1, context - 1)

    def attention_ns(self, batch: int, new: int, cached: int) -> float:
        """Writing KV and attending, one layer, of `batch` rows of `new` tokens behind `cached` ones."""
        blocks, layers = -(-(new + cached) // BLOCK_SIZE), self.spec.num_layers
        numbers = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        order = np.random.default_rng(0).permutation(numbers.size).astype(np.int32)
        tables = order[numbers] * layers
        kv = self._cells(batch * blocks * layers)
        num = np.full(batch, new, np.int32)
        rows = Rows(np.arange(batch, dtype=np.int32) * new, num, np.full(batch, cached, np.int32),
                    np.zeros(batch, np.int32), np.full(batch, new + cached, np.int32), tables)  # fmt: skip
        position = cached + np.arange(new)
        slots = tables[:, position // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        at = torch.from_numpy(slots.ravel()).to(self.device)
        plan = self.backend.plan(rows, self.device)
        spec, tokens = self.spec, batch * new
        q, k, v = (self._randn(tokens, heads, spec.head_dim) for heads in
                   (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))  # fmt: skip

        def one(layer: int) -> None:
            write_kv(kv, k, v, at + layer * BLOCK_SIZE)
            self.backend.run(plan, q, kv, layer, spec.scale)

        return self.timer.median_ns([partial(one, layer) for layer in range(layers)])

    def _cells(self, num: int) -> torch.Tensor:
        """At least `num` cells of random KV, kept between measurements."""
        if self._kv is None or len(self._kv) < num:
            self._kv = None
            self._kv = self._randn(num, 2, BLOCK_SIZE, self.spec.num_kv_heads, self.spec.head_dim)
        return self._kv
