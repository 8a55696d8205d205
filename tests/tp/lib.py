"""Runs with instances of any TP, and the judge of their tokens."""

from __future__ import annotations

from typing import Any

from common.types import RequestStatus
from tests.dist.stories import Story
from tests.engine.worlds import dense_logits

TIE = 3e-5  # of logits that spread over ten: fp32 sums in another order; a token may be either of two so close

PLAIN = Story("vllm", 2, ("workload=poisson", "workload.length_scale=0.25", "workload.rate=40",
                          "workload.num_requests=8", "engine.kv_blocks=60"))  # fmt: skip
MODELS = {  # family and GQA ratio
    "llama, 1": ("model=tiny_llama", "model.num_heads=4", "model.num_kv_heads=4"),
    "llama, 8": ("model=tiny_llama", "model.num_heads=8", "model.num_kv_heads=1", "model.head_dim=8"),
    "qwen2, 4": ("model=tiny_qwen2", "model.num_heads=8", "model.num_kv_heads=2", "model.head_dim=8"),
    "qwen3, 4": ("model=tiny_qwen3", "model.num_heads=8", "model.num_kv_heads=2"),
    "qwen3, 2": ("model=tiny_qwen3",),
}


def check_undisturbed(executor: Any, source: Any = None) -> int:
    """Every reply is that of the whole model, dense, or differs in a tie; returns how many tokens were compared."""
    spec, compared = executor.world.spec, 0
    for request_id, ids in executor.tokens.items():
        if executor.record.requests.status[request_id] != RequestStatus.FINISHED:
            continue
        length, output = executor.members.prompt[request_id], executor.members.output[request_id]
        assert len(ids) == length + output
        logits = dense_logits(spec, source or executor.world.source, ids[:-1])[length - 1 :]
        short = logits.amax(1) - logits.gather(1, logits.new_tensor(ids[length:]).long()[:, None])[:, 0]
        assert float(short.max()) < TIE, f"request {request_id} says something else than an undisturbed run"
        compared += output
    return compared
