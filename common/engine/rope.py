"""Rotary position embedding: tables over positions, and the rotation of head halves (the GPT-NeoX pairing)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from common.engine.spec import DecoderSpec, RopeSpec


class Rotation(NamedTuple):
    """Cosines and sines of a batch, shared by all layers of an iteration: [T, 1, D/2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


def frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, fp32 [D/2]; the arithmetic of transformers, step by step."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    freq: torch.Tensor = 1.0 / (rope.theta**steps)
    if rope.scaling == "linear":
        return freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(freq, rope)
    return freq


def _llama3(freq: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / freq
    scaled = torch.where(wavelength > longest, freq / rope.factor, freq)
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


class RopeTable:
    """Cosines and sines of every position up to the context window, in the model's dtype: 2 x [P, D/2]."""

    def __init__(self, spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> None:
        positions = torch.arange(spec.max_position, dtype=torch.float32)
        angles = positions[:, None] * frequencies(spec.rope, spec.head_dim)
        self.cos = angles.cos().to(device, dtype)
        self.sin = angles.sin().to(device, dtype)

    def at(self, positions_T: torch.Tensor) -> Rotation:
        """The rotation of tokens at these positions (int32 or int64 [T], below max_position)."""
        return Rotation(self.cos[positions_T].unsqueeze(1), self.sin[positions_T].unsqueeze(1))


def rotate(x_THD: torch.Tensor, rotation: Rotation, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rotated heads in `out`, or a new contiguous tensor; `x_THD` may be a strided view of the fused projection."""
    half = x_THD.shape[-1] // 2
    low, high = x_THD[..., :half], x_THD[..., half:]
    if out is None:
        out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    torch.mul(low, rotation.cos, out=out[..., :half]).addcmul_(high, rotation.sin, value=-1)
    torch.mul(high, rotation.cos, out=out[..., half:]).addcmul_(low, rotation.sin)
    return out
