"""Where the tensors of one decoder layer lie in its slab: one contiguous byte range, moved and dropped as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.engine.spec import DecoderSpec

ALIGN = 64  # bytes; a cache line, and enough for vector loads and for any copy engine
_ALIASING = (
    4096  # bytes; fp32 rows of a multiple of it fall into few cache sets: a CPU's matmul takes 1.3 times as long
)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Views of one slab. Linear weights are [in, out], so that a batch multiplies from the left, row by row."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [hidden, q + 2 kv]
    o: torch.Tensor  # [q, hidden]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [hidden, 2 intermediate]
    down: torch.Tensor  # [intermediate, hidden]
    qkv_bias: torch.Tensor | None = None  # [q + 2 kv]
    q_norm: torch.Tensor | None = None  # [head size]
    k_norm: torch.Tensor | None = None  # [head size]


class LayerLayout:
    """Fixed byte offsets of every tensor of a layer; the same for all layers of a model."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or spec.dtype
        self.shapes = _shapes(spec)
        self.offsets: dict[str, int] = {}
        self.num_bytes = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.num_bytes
            size = math.prod(shape[:-1]) * self._pitch(shape) * self.dtype.itemsize
            self.num_bytes += -(-size // ALIGN) * ALIGN

    def views(self, slab: torch.Tensor) -> LayerWeights:
        """The layer's tensors inside `slab`, uint8 [at least num_bytes] on any device; nothing is copied."""
        assert slab.dtype == torch.uint8 and slab.dim() == 1 and slab.numel() >= self.num_bytes
        assert slab.data_ptr() % self.dtype.itemsize == 0
        return LayerWeights(**{name: self._view(slab, name) for name in self.shapes})

    def _view(self, slab: torch.Tensor, name: str) -> torch.Tensor:
        shape, offset = self.shapes[name], self.offsets[name]
        pitch = self._pitch(shape)
        size = math.prod(shape[:-1]) * pitch * self.dtype.itemsize
        flat = slab[offset : offset + size].view(self.dtype)
        return flat.view(*shape[:-1], pitch)[..., : shape[-1]]

    def _pitch(self, shape: tuple[int, ...]) -> int:
        """Elements from one row to the next: one cache line more than a row where fp32 rows would alias."""
        aliases = len(shape) == 2 and self.dtype == torch.float32 and shape[-1] * 4 % _ALIASING == 0
        return shape[-1] + (ALIGN // 4 if aliases else 0)


def _shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor, in the order of their offsets: that of use."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"input_norm": (hidden,), "qkv": (hidden, spec.qkv_size)}
    if spec.qkv_bias:
        shapes["qkv_bias"] = (spec.qkv_size,)
    if spec.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (spec.head_dim,)
    shapes["o"] = (spec.q_size, hidden)
    shapes["post_norm"] = (hidden,)
    shapes["gate_up"] = (hidden, 2 * inner)
    shapes["down"] = (inner, hidden)
    return shapes
