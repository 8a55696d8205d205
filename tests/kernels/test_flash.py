"""The adapter against a stand-in for flash-attn that follows its documented conventions."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from common.errors import ConfigError, ContractError
from common.kernels.flash import FlashBackend
from common.kernels.reference import TorchBackend
from tests.kernels.case import make_rows, make_tensors

BLOCK = 256


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
           return_attn_probs, block_table):  # fmt: skip
    """Paged varlen attention: bottom-right causal; lse is [heads, queries], +inf where nothing is seen."""
    assert return_attn_probs and block_table.dtype == torch.int32 and k.shape[1] % 256 == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    o, lse = torch.full_like(q, 7.0), torch.full((q.shape[1], len(q)), float("inf"))
    for row in range(len(cu_seqlens_q) - 1):
        start, stop = cu_seqlens_q[row : row + 2].tolist()
        length = int(cu_seqlens_k[row + 1] - cu_seqlens_k[row])
        assert 0 < stop - start <= max_seqlen_q and length <= max_seqlen_k
        group = q.shape[1] // k.shape[2]
        keys, values = (x[block_table[row].long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in (k, v))
        for i in range(start, stop):
            seen = length - (stop - 1 - i) if causal else length
            if seen > 0:
                logits = torch.einsum("hd,shd->hs", q[i].float(), keys[:seen].float()) * softmax_scale
                lse[:, i] = logits.logsumexp(-1)
                o[i] = torch.einsum("hs,shd->hd", logits.softmax(-1), values[:seen].float())
    return o, lse, None


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)


ROWS = [(1, 299, 0, 300), (1, 3, 256, 5), (4, 20, 0, 24), (4, 20, 0, 40), (3, 300, 0, 300), (5, 254, 256, 3),
        (1, 9, 0, 0), (2, 5, 256, 9), (1, 7, 0, 20)]  # fmt: skip


@pytest.mark.parametrize("banded", [False, True])
def test_rows_that_flash_can_express(fake, banded):
    rng = np.random.default_rng(0)
    rows, cells = make_rows(rng, ROWS, BLOCK, layers=2 if banded else None, num_layers=2)
    q, kv = make_tensors(rng, rows, cells, BLOCK, 4, 2, 64, num_layers=2, dtype=torch.bfloat16)
    results = []
    for backend in (FlashBackend(BLOCK), TorchBackend(BLOCK)):
        results.append(backend.run(backend.plan(rows, "cpu"), q, kv, 1, 0.125))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-3)


def test_a_span_that_ends_among_the_queries_is_refused(fake):
    rows, _ = make_rows(np.random.default_rng(0), [(1, 5, 0, 6), (4, 2, 0, 4)], BLOCK)
    with pytest.raises(ContractError, match="row 1 ends among its queries"):
        FlashBackend(BLOCK).plan(rows, "cpu")


def test_block_sizes_are_refused_in_one_line(fake):
    with pytest.raises(ConfigError, match="divisible by 256, not 16") as caught:
        FlashBackend(16)
    assert "\n" not in str(caught.value)


def test_an_absent_package_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        FlashBackend(BLOCK)
    assert "\n" not in str(caught.value)
