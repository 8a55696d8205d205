"""Where each committed grid comes from: folders of measured tables, the card's peaks, and the licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """Where one card's grid comes from. `kernel`: flash-attention generation, which decides how batches mix;
    `fa2-apart`: the second, chunks and decodes launched one after the other (2024).
    `dense`: measured at every batch size and at hundreds of message sizes, so that whole rows which are slower than
    the next are the kernel's choice and not a disturbed point: they are read as measured."""

    name: str
    folders: tuple[str, ...]
    peak_flops: float
    mem_bandwidth: float
    link_bandwidth: float
    num_sm: int
    kernel: str
    licence: str
    network: str = ""  # folder of another tool with send/recv between two GPUs of one node
    dense: bool = False
    dtype_bytes: int = 2


AIC = "ai-dynamo/aiconfigurator, measured vLLM kernels, Apache-2.0"
SIM = "casys-kaist/LLMServingSim, operators inside vLLM 0.19, MIT"
VIDUR = "microsoft/vidur, operators measured in 2024 (sarathi-serve's layers, flash-attention 2, NCCL), MIT"
DGX = "profiles/vidur/network/a100_dgx"  # microsoft/vidur, MIT
SOURCES = (
    Source("a100_sxm", ("profiles/a100_sxm",), 312e12, 2039e9, 300e9, 108, "fa2", AIC, network=DGX),
    Source(
        "a100_2024",
        ("profiles/vidur/compute/a100", DGX),
        312e12,
        2039e9,
        300e9,
        108,
        "fa2-apart",
        VIDUR,
        dense=True,
    ),
    Source("h100_sxm", ("profiles/h100_sxm",), 989e12, 3350e9, 450e9, 132, "fa3", AIC),
    Source("l40s", ("profiles/l40s",), 362.05e12, 864e9, 32e9, 142, "fa2", AIC),
    Source("rtx4090", ("profiles/vllm_0.19/RTX4090",), 181e12, 1008e9, 16e9, 128, "fa2", SIM),
    Source("rtxpro6000", ("profiles/vllm_0.19/RTXPRO6000",), 503.8e12, 1792e9, 64e9, 188, "fa2", SIM),
)
