"""Where parameters come from: random draws, a Hugging Face folder, or slabs kept in host memory. A source fills one
slab at a time, so a layer can be loaded, dropped and restored alone, and a model never lies in memory twice."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from common.engine.layout import LayerLayout, LayerWeights
from common.engine.spec import DecoderSpec

_TABLES = -1  # the "layer" of embedding, head and final norm in a random source
_QK_GAIN = 1.5  # standard deviation of random queries and keys: scores are peaked, so that attention matters


class ParameterSource(Protocol):
    """A model's parameters. Tensors are fresh or read-only: the caller moves them, never writes them."""

    spec: DecoderSpec
    layout: LayerLayout

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Fill `slab` (uint8 [layout.num_bytes or more], any device) with layer `index`."""

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden] in the layout's dtype, in host memory."""

    def head(self) -> torch.Tensor:
        """[vocab, hidden]; the embedding itself where they are tied."""

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""


class Staging:
    """Fills a slab through host memory where it lies elsewhere: one copy to the device per layer."""

    def __init__(self, layout: LayerLayout) -> None:
        self._layout = layout
        self._host: torch.Tensor | None = None

    def host_slab(self, slab: torch.Tensor) -> torch.Tensor:
        """Where to write: `slab` itself in host memory, else the staging slab."""
        if slab.device.type == "cpu":
            return slab
        if self._host is None:
            self._host = torch.zeros(self._layout.num_bytes, dtype=torch.uint8)
        return self._host

    def finish(self, slab: torch.Tensor) -> None:
        """Copies what was staged; returns when the staging slab may be rewritten."""
        if slab.device.type != "cpu" and self._host is not None:
            slab[: self._layout.num_bytes].copy_(self._host)


class RandomSource:
    """Seeded random weights, layer by layer: a layer's values depend on (seed, index) and nothing else.

    Scales keep hidden states near 1 over any depth and spread the logits; norms lie around 1 and biases around 0, far
    enough off for a swapped or forgotten one to show."""

    def __init__(self, spec: DecoderSpec, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        self.spec = spec
        self.layout = LayerLayout(spec, dtype)
        self.seed = seed
        self._staging = Staging(self.layout)

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Fill `slab` with layer `index`."""
        assert 0 <= index < self.spec.num_layers
        weights = self.layout.views(self._staging.host_slab(slab))
        self._fill(weights, index)
        self._staging.finish(slab)

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._table("embedding")

    def head(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._table("embedding" if self.spec.tied else "head")

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return _normal((self.spec.hidden_size,), 0.1, 1.0, self._generator(_TABLES, "norm")).to(self.layout.dtype)

    def _table(self, name: str) -> torch.Tensor:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        std = 2 * self.spec.hidden_size**-0.5
        return _normal(shape, std, 0.0, self._generator(_TABLES, name)).to(self.layout.dtype)

    def _generator(self, index: int, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{index}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _fill(self, weights: LayerWeights, index: int) -> None:
        spec, rng = self.spec, self._generator(index, "layer")
        narrow = (2 * spec.num_layers) ** -0.5  # both halves of every layer add about 1 / (2 layers) of variance
        qk = spec.q_size + spec.kv_size
        _draw(weights.input_norm, 0.1, 1.0, rng)
        _draw(weights.qkv[:, :qk], _QK_GAIN * spec.hidden_size**-0.5, 0.0, rng)
        _draw(weights.qkv[:, qk:], spec.hidden_size**-0.5, 0.0, rng)
        _draw(weights.o, narrow * spec.q_size**-0.5, 0.0, rng)
        _draw(weights.post_norm, 0.1, 1.0, rng)
        _draw(weights.gate_up, spec.hidden_size**-0.5, 0.0, rng)
        _draw(weights.down, 2 * narrow * spec.intermediate_size**-0.5, 0.0, rng)
        if weights.qkv_bias is not None:
            _draw(weights.qkv_bias, 0.3, 0.0, rng)
        for norm in (weights.q_norm, weights.k_norm):
            if norm is not None:
                _draw(norm, 0.1 * _QK_GAIN, _QK_GAIN, rng)


class MemorySource:
    """All of another source, read once and kept in host memory: what restores dropped layers come from."""

    def __init__(self, source: ParameterSource, pin: bool = False) -> None:
        self.spec = source.spec
        self.layout = source.layout
        shape = (self.spec.num_layers, self.layout.num_bytes)
        self._slabs = torch.zeros(shape, dtype=torch.uint8, pin_memory=pin)
        for index in range(self.spec.num_layers):
            source.layer_into(index, self._slabs[index])
        self._embedding = source.embedding()
        self._head = self._embedding if self.spec.tied else source.head()
        self._norm = source.final_norm()

    def slab(self, index: int) -> torch.Tensor:
        """Layer `index` itself, uint8 [num_bytes]; not to be written."""
        return self._slabs[index]

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Copy layer `index` into `slab`; asynchronous to the host if the slabs are pinned."""
        slab[: self.layout.num_bytes].copy_(self._slabs[index], non_blocking=self._slabs.is_pinned())

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._embedding

    def head(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._head

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._norm


def _normal(shape: torch.Size | tuple[int, ...], std: float, mean: float, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=rng).mul_(std).add_(mean)


def _draw(out: torch.Tensor, std: float, mean: float, rng: torch.Generator) -> None:
    """Drawn in fp32 whatever the dtype of `out`, so that a model is the same but for rounding."""
    out.copy_(_normal(out.shape, std, mean, rng))
