"""Other implementations of attention that may be importable, each as calls over the same case.

All but FlashInfer get their keys contiguous and in order, which a paged cache would have to be copied into: their
times leave that copy out, in their favour. A rival that cannot be had raises; its reason is what is reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.suite import BLOCK_SIZE, Paged
from bench.timing import Call

Rival = Callable[[Paged, float], list[Call]]


def _batched(case: Paged) -> torch.Tensor:
    """Queries [R, H, T, D]."""
    new = int(case.rows.q_len[0])
    return case.q.view(-1, new, *case.q.shape[1:]).transpose(1, 2).contiguous()


def _bias(case: Paged) -> torch.Tensor | None:
    """[T, S] additive mask where queries stand behind cached keys; None where all keys are seen."""
    new, keys = int(case.rows.q_len[0]), int(case.rows.kv_len[0])
    if new == 1:
        return None
    later = torch.ones(new, keys, dtype=torch.bool, device=case.q.device).triu_(keys - new + 1)
    return torch.zeros(new, keys, dtype=case.q.dtype, device=case.q.device).masked_fill_(later, float("-inf"))


def sdpa(case: Paged, scale: float) -> list[Call]:
    """torch's scaled_dot_product_attention."""
    q, bias, new = _batched(case), _bias(case), int(case.rows.q_len[0])
    causal = new > 1 and new == int(case.rows.kv_len[0])
    options: dict[str, Any] = {"scale": scale, "enable_gqa": True, "is_causal": causal}
    if bias is not None and not causal:
        options["attn_mask"] = bias
    return [partial(F.scaled_dot_product_attention, q, k, v, **options) for k, v in case.dense]


def _packed(case: Paged) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, G, D] of each copy, and running sums of queries and keys."""
    halves = [(k.transpose(1, 2).flatten(0, 1).contiguous(), v.transpose(1, 2).flatten(0, 1).contiguous())
              for k, v in case.dense]  # fmt: skip
    count = torch.arange(len(case.rows.q_len) + 1, dtype=torch.int32, device=case.q.device)
    return halves, count * int(case.rows.q_len[0]), count * int(case.rows.kv_len[0])


def varlen(case: Paged, scale: float) -> list[Call]:
    """torch's varlen_attn; its options differ between releases."""
    from torch.nn.attention.varlen import varlen_attn

    if case.q.device.type != "cuda":
        raise NotImplementedError("varlen_attn needs CUDA")
    known = inspect.signature(varlen_attn).parameters
    halves, cu_q, cu_k = _packed(case)
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if int(case.rows.q_len[0]) > 1:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        group = case.q.shape[1] // halves[0][0].shape[1]
        halves = [(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in halves]
    longest = int(case.rows.q_len[0]), int(case.rows.kv_len[0])
    return [partial(varlen_attn, case.q, k, v, cu_q, cu_k, *longest, **options) for k, v in halves]


_compiled: set[bool] = set()  # kinds of shapes (several queries, or one) that flex_attention was compiled for


def flex(case: Paged, scale: float) -> list[Call]:
    """torch's flex_attention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.q.device.type != "cuda":
        raise NotImplementedError("flex_attention is compiled for CUDA only here")
    new, keys = int(case.rows.q_len[0]), int(case.rows.kv_len[0])
    if (new > 1) in _compiled:
        raise NotImplementedError("compiled for the first shape of its kind only, for time")
    _compiled.add(new > 1)
    mask = None
    if new > 1:
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + (keys - new), None, None, new, keys, device=str(case.q.device)
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    q = _batched(case)
    return [partial(compiled, q, k, v, block_mask=mask, scale=scale, enable_gqa=True) for k, v in case.dense]


def flash_attn(case: Paged, scale: float) -> list[Call]:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    halves, cu_q, cu_k = _packed(case)
    longest = int(case.rows.q_len[0]), int(case.rows.kv_len[0])
    return [partial(flash_attn_varlen_func, case.q, k, v, cu_q, cu_k, *longest, softmax_scale=scale, causal=True)
            for k, v in halves]  # fmt: skip


def flashinfer(case: Paged, scale: float) -> list[Call]:
    """FlashInfer over the same pages."""
    import flashinfer as library  # type: ignore[import-not-found]

    device, (batch, blocks) = case.q.device, case.rows.tables.shape
    count = torch.arange(batch + 1, dtype=torch.int32, device=device)
    last = torch.full((batch,), (int(case.rows.kv_len[0]) - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=device)
    pages, new = torch.from_numpy(case.rows.tables.ravel()).to(device), int(case.rows.q_len[0])
    kind = library.BatchDecodeWithPagedKVCacheWrapper if new == 1 else library.BatchPrefillWithPagedKVCacheWrapper
    wrapper = kind(torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD")
    heads = case.q.shape[1], *case.kvs[0].shape[3:], BLOCK_SIZE
    options = {"q_data_type": case.q.dtype, "kv_data_type": case.q.dtype, "sm_scale": scale}
    if new == 1:
        wrapper.plan(count * blocks, pages, last, *heads, **options)
    else:
        wrapper.plan(count * new, count * blocks, pages, last, *heads, causal=True, **options)
    return [partial(wrapper.run, case.q, kv) for kv in case.kvs]


def transformers(case: Paged, scale: float) -> list[Call]:
    """The function that transformers' models call by default (its sdpa integration)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # type: ignore[import-untyped]

    module = torch.nn.Module()
    module.num_key_value_groups = case.q.shape[1] // case.kvs[0].shape[3]  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    bias = _bias(case)
    mask = None if bias is None else bias[None, None]
    q = _batched(case)
    return [partial(sdpa_attention_forward, module, q, k, v, mask, scaling=scale) for k, v in case.dense]


RIVALS: dict[str, Rival] = {
    "torch SDPA": sdpa, "torch varlen_attn": varlen, "torch flex_attention": flex, "flash-attn": flash_attn,
    "FlashInfer": flashinfer, "transformers (sdpa)": transformers,
}  # fmt: skip


def as_rows(out: object, case: Paged, name: str) -> torch.Tensor:
    """A rival's output as [T, H, D], to be compared."""
    o = out[0] if isinstance(out, tuple) else out
    assert isinstance(o, torch.Tensor)
    if name in ("torch SDPA", "torch flex_attention"):
        o = o.transpose(1, 2)
    return o.reshape(case.q.shape)
