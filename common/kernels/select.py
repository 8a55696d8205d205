"""Which attention backend serves: chosen once, with a reason that can be printed."""

from __future__ import annotations

import importlib.util

import torch

from common.errors import ConfigError
from common.kernels.plan import Backend

NAMES = ("torch", "triton", "flash")


def choose(device: torch.device | str, dtype: torch.dtype, block_size: int, forced: str | None = None) -> Backend:
    """The backend for KV of this type on this device; its `reason` is one line.

    `forced` takes the named one, or raises ConfigError saying why it cannot be used here. By itself it chooses
    Triton on CUDA and torch elsewhere (flash-attn cannot serve every row, so it has to be asked for).
    """
    if forced is not None and forced not in NAMES:
        raise ConfigError(f"attention backend {forced!r} is unknown; choose one of {', '.join(NAMES)}")
    device = torch.device(device)
    if forced is not None:
        obstacle = _obstacle(forced, device, dtype)
        if obstacle:
            raise ConfigError(f"attention backend {forced}: {obstacle}; choose another of {', '.join(NAMES)}")
        return _make(forced, block_size, f"{forced}: asked for")
    obstacle = _obstacle("triton", device, dtype)
    if device.type == "cuda" and not obstacle:
        return _make("triton", block_size, f"triton: {_type_name(dtype)} on {device}")
    why = f"{obstacle}, so triton cannot serve" if device.type == "cuda" else f"the reference serves on {device}"
    return _make("torch", block_size, f"torch: {why}")


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot serve here, or nothing."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it has no {_type_name(dtype)}"
        if device.type != "cuda" and not _interpreted():
            return f"it needs CUDA, not {device} (or TRITON_INTERPRET=1, for tests)"
    if name == "flash":
        if device.type != "cuda":
            return f"it needs CUDA, not {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it has no {_type_name(dtype)}"
    return ""


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _make(name: str, block_size: int, reason: str) -> Backend:
    if name == "triton":
        from common.kernels.triton_paged import TritonBackend

        return TritonBackend(block_size, reason)
    if name == "flash":
        from common.kernels.flash import FlashBackend

        return FlashBackend(block_size, reason)
    from common.kernels.reference import TorchBackend

    return TorchBackend(block_size, reason)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
