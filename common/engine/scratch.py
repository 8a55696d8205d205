"""Room for what a layer needs in between. On a CPU it is kept, as its pages would be faulted in anew each time."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Buffers by name. What is in one lasts until its name is asked for again: one object per thread.

    CUDA: new tensors (torch keeps their memory, and graphs capture their addresses)."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._kept: dict[str, torch.Tensor] = {}

    def room(self, name: str, *shape: int) -> torch.Tensor:
        """A contiguous tensor of this shape, contents undefined."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        numel = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < numel:
            with torch.inference_mode(False):  # they may be written outside it, too
                kept = self._kept[name] = torch.empty(numel, dtype=self._dtype)
        return kept[:numel].view(shape)
