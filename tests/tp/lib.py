"""Models and a run for instances of any TP."""

from __future__ import annotations

from tests.dist.stories import Story

PLAIN = Story("vllm", 2, ("workload=poisson", "workload.length_scale=0.25", "workload.rate=40",
                          "workload.num_requests=8", "engine.kv_blocks=60"))  # fmt: skip
MODELS = {  # family and GQA ratio
    "llama, 1": ("model=tiny_llama", "model.num_heads=4", "model.num_kv_heads=4"),
    "llama, 8": ("model=tiny_llama", "model.num_heads=8", "model.num_kv_heads=1", "model.head_dim=8"),
    "qwen2, 4": ("model=tiny_qwen2", "model.num_heads=8", "model.num_kv_heads=2", "model.head_dim=8"),
    "qwen3, 4": ("model=tiny_qwen3", "model.num_heads=8", "model.num_kv_heads=2"),
    "qwen3, 2": ("model=tiny_qwen3",),
}
