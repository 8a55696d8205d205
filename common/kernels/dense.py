"""Attention of dense tensors, with its log-sum-exp: torch's flash kernel on a CPU, two matmuls elsewhere."""

from __future__ import annotations

import torch


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    causal: bool = False, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o [X, H, T, D], lse [X, H, T]) of q [X, H, T, D] over k and v [X, G, S, D], S > 0; H a multiple of G.

    causal: query i sees keys 0..i. mask [X, 1, 1, S]: added to the logits. Each query must see a key.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    return dense_by_matmul(q, k, v, scale, causal, mask)


def dense_by_matmul(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    causal: bool = False, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`dense` on any device, with all the logits in memory."""
    num, heads, tokens, size = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(num, kv_heads, heads // kv_heads * tokens, size)
    logits = torch.matmul(q * scale, k.transpose(2, 3))
    if mask is not None:
        logits += mask
    if causal:
        later = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu_(1)
        logits.view(num, heads, tokens, keys).masked_fill_(later, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    o = torch.matmul(logits.sub_(lse[..., None]).exp_(), v)
    return o.view(num, heads, tokens, size), lse.view(num, heads, tokens)
