"""Shapes of a model's operators on one tensor-parallel rank, under the names vLLM gives its layers."""

from __future__ import annotations

from common.cost.specs import ModelSpec


def linear_shapes(model: ModelSpec, tp: int) -> dict[str, tuple[int, int]]:
    """(n, k) of each linear layer on one rank, by vLLM's name."""
    kv = max(1, model.num_kv_heads // tp) * model.head_dim
    q = model.q_size // tp
    mlp = model.intermediate_size // tp
    hidden = model.hidden_size
    return {
        "qkv_proj": (q + 2 * kv, hidden),
        "o_proj": (hidden, q),
        "gate_up_proj": (2 * mlp, hidden),
        "down_proj": (hidden, mlp),
        "lm_head": (-(-model.vocab_size // tp), hidden),
    }


def element_widths(model: ModelSpec, tp: int) -> dict[str, int]:
    """Elements per token of each elementwise operator on one rank, by vLLM's name."""
    qk = model.q_size // tp + max(1, model.num_kv_heads // tp) * model.head_dim
    return {
        "layernorm": model.hidden_size,
        "final_layernorm": model.hidden_size,
        "embedding": model.hidden_size,
        "act_fn": model.intermediate_size // tp,
        "rotary_emb": qk,
        "qk_norm": qk,
    }
