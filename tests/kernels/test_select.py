"""The choice of a backend, and its reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from common.errors import ConfigError
from common.kernels.select import choose

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("device, dtype, forced, name", [
    ("cpu", torch.float32, None, "torch"), ("cpu", torch.bfloat16, "torch", "torch"),
    ("cuda", torch.float64, None, "torch"), ("cuda:1", torch.float16, "torch", "torch"),
    pytest.param("cuda", torch.bfloat16, None, "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton")),
])  # fmt: skip
def test_choices(device, dtype, forced, name):
    backend = choose(device, dtype, 16, forced)
    assert backend.name == name
    assert backend.reason.startswith(f"{name}: ") and "\n" not in backend.reason


@pytest.mark.parametrize("device, dtype, forced, message", [
    ("cpu", torch.float32, "flashinfer", "'flashinfer' is unknown"), ("cpu", torch.float16, "flash", "needs CUDA"),
    ("cuda", torch.float32, "flash", "no float32"), ("cuda", torch.float16, "flash", "divisible by 256"),
    ("cpu", torch.float32, "triton", "needs CUDA|not installed"),
    ("cuda", torch.float64, "triton", "no float64|not installed"),
])  # fmt: skip
def test_what_cannot_serve_is_told_in_one_line(device, dtype, forced, message):
    with pytest.raises(ConfigError, match=message) as caught:
        choose(device, dtype, 16, forced)
    assert "\n" not in str(caught.value)


def test_without_triton_the_reference_serves(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest))
    assert "not installed" in choose("cuda", torch.float16, 16).reason
