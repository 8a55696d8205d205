"""The reference against the definition: any spans, any heads, NaN wherever it must not look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ContractError
from common.kernels import oracle
from common.kernels.dense import dense, dense_by_matmul
from common.kernels.plan import Rows
from common.kernels.reference import TorchBackend, cut_buckets
from tests.kernels.case import make_rows, make_tensors

HEADS = [(4, 4), (4, 2), (4, 1), (8, 1)]  # without a gather: the first two, in fp32
EDGES = [  # q_len, q_pos, kv_start, kv_len
    (1, 0, 0, 1), (1, 9, 0, 10), (1, 9, 0, 0), (1, 3, 8, 4), (1, 20, 8, 4), (1, 5, 0, 12), (5, 0, 0, 5),
    (5, 7, 0, 12), (5, 7, 8, 4), (6, 2, 4, 9), (4, 20, 4, 6), (3, 0, 8, 3), (7, 3, 0, 6), (2, 3, 4, 1), (5, 7, 0, 0),
]  # fmt: skip


def compare(rows, q, kv, block, layer=0, tolerance=2e-5):
    scale = q.shape[-1] ** -0.5
    backend = TorchBackend(block)
    o, lse = backend.run(backend.plan(rows, "cpu"), q, kv, layer, scale)
    true_o, true_lse = oracle.attend(rows, q, kv, layer, scale)
    assert o.dtype == q.dtype and lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(o.double(), true_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), true_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_every_place_of_a_span(heads, kv_heads, dtype, tolerance):
    rng = np.random.default_rng(0)
    rows, cells = make_rows(rng, EDGES, 4)
    q, kv = make_tensors(rng, rows, cells, 4, heads, kv_heads, 64, dtype=dtype)
    compare(rows, q, kv, 4, tolerance=tolerance)


SPANS = st.tuples(st.sampled_from([1, 1, 1, 2, 3, 9]), st.integers(0, 30), st.integers(0, 6), st.integers(0, 23))


@settings(max_examples=60, deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=9), st.sampled_from([1, 4, 5]), st.sampled_from(HEADS),
       st.sampled_from([64, 128, 16]), st.booleans(), st.integers(0, 1 << 20))  # fmt: skip
def test_random_rows(spans, block, heads, size, banded, seed):
    rng = np.random.default_rng(seed)
    spec = [(n, pos, start * block, length) for n, pos, start, length in spans]
    rows, cells = make_rows(rng, spec, block, layers=2 if banded else None, num_layers=2)
    q, kv = make_tensors(rng, rows, cells, block, *heads, size, num_layers=2)
    compare(rows, q, kv, block, layer=int(rng.integers(2)))


def test_queries_may_be_read_in_any_order_and_twice():
    rng = np.random.default_rng(1)
    rows, cells = make_rows(rng, [(3, 4, 0, 7), (1, 9, 0, 10), (3, 4, 0, 5), (1, 9, 4, 2)], 4)
    rows = rows._replace(q_start=np.array([2, 0, 2, 6], np.int32))
    q, kv = make_tensors(rng, rows, cells, 4, 4, 2, 64)
    compare(rows, q, kv, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_twice_as_wrong_as_plain_torch(dtype):
    rng = np.random.default_rng(2)
    rows, cells = make_rows(rng, [(1, 99, 0, 100), (20, 30, 0, 50)], 16)
    q, kv = make_tensors(rng, rows, cells, 16, 4, 2, 64, dtype=dtype)
    backend = TorchBackend(16)
    o, _ = backend.run(backend.plan(rows, "cpu"), q, kv, 0, 0.125)
    true_o, _ = oracle.attend(rows, q, kv, 0, 0.125)
    plain = torch.cat([plain_attention(rows, row, q, kv, 0.125) for row in range(2)])
    assert (o.double() - true_o).abs().max() <= 2 * (plain.double() - true_o).abs().max() + 1e-5


def plain_attention(rows, row, q, kv, scale):
    """One row in the inputs' own precision throughout."""
    count, length = int(rows.q_len[row]), int(rows.kv_len[row])
    keys = kv[rows.tables[row][: -(-length // kv.shape[2])].tolist()]
    k, v = (keys[:, half].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // kv.shape[3], 1) for half in (0, 1))
    queries = q[int(rows.q_start[row]) :][:count]
    logits = torch.einsum("thd,shd->hts", queries, k) * scale
    seen = torch.arange(length) <= int(rows.q_pos[row]) + torch.arange(count)[:, None]
    p = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", p, v)


@pytest.mark.parametrize("causal", [False, True])
def test_the_two_dense_calls_agree(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 64), torch.randn(2, 2, 9, 64), torch.randn(2, 2, 9, 64)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., 6:] = float("-inf")
    for chosen in (None, mask):
        if causal and chosen is not None:
            continue
        for ours, theirs in zip(dense(q, k, v, 0.2, causal, chosen), dense_by_matmul(q, k, v, 0.2, causal, chosen)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_buckets_hold_each_row_once_and_bound_the_padding():
    rng = np.random.default_rng(3)
    blocks = rng.integers(1, 60, 200)
    rows = np.flatnonzero(rng.random(200) < 0.8)
    buckets = cut_buckets(rows, blocks, 192)
    assert sorted(np.concatenate(buckets).tolist()) == rows.tolist()
    for members in buckets:
        widest = blocks[members].max()
        padding = widest * len(members) - blocks[members].sum()
        assert 0 <= padding <= max(24, widest * len(members) // 8)
        assert len(members) == 1 or widest * len(members) <= 192
        assert (np.diff(members) > 0).all()
    assert cut_buckets(rows[:0], blocks, 192) == []


def test_no_rows():
    rows, cells = make_rows(np.random.default_rng(0), [], 4)
    backend = TorchBackend(4)
    o, lse = backend.run(backend.plan(rows, "cpu"), torch.zeros(0, 4, 64), torch.zeros(cells, 2, 4, 2, 64), 0, 1.0)
    assert o.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.parametrize("change, message", [
    ({"q_len": np.array([1, 2], np.int32)}, "unequal"), ({"kv_start": np.array([2], np.int32)}, "inside a block"),
    ({"kv_len": np.array([9], np.int32)}, "more keys"), ({"q_pos": np.array([-1], np.int32)}, "negative"),
    ({"tables": np.array([[-1, 0]], np.int32)}, "no cell"), ({"tables": np.array([0], np.int32)}, "tables must be"),
    ({"q_pos": np.array([1])}, "int32"),
])  # fmt: skip
def test_impossible_rows_are_refused(change, message):
    one = np.ones(1, np.int32)
    rows = Rows(0 * one, one, 7 * one, 0 * one, 8 * one, np.array([[0, 1]], np.int32))
    TorchBackend(4).plan(rows, "cpu")
    with pytest.raises(ContractError, match=message):
        TorchBackend(4).plan(rows._replace(**change), "cpu")


def test_tensors_that_do_not_belong_are_refused():
    rows, cells = make_rows(np.random.default_rng(0), [(1, 0, 0, 1)], 4)
    backend = TorchBackend(4)
    plan = backend.plan(rows, "cpu")
    for q, kv in ((torch.zeros(1, 3, 64), torch.zeros(cells, 2, 4, 2, 64)),
                  (torch.zeros(1, 4, 64), torch.zeros(cells, 2, 8, 2, 64))):  # fmt: skip
        with pytest.raises(ContractError):
            backend.run(plan, q, kv, 0, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([(5, 0, 0, 5), (5, 8, 0, 13), (5, 6, 8, 3), (1, 4, 0, 5)]), min_size=2, max_size=40),
       st.booleans(), st.integers(0, 1 << 20))  # fmt: skip
def test_rows_of_one_shape_go_together(spec, banded, seed):
    rng = np.random.default_rng(seed)
    rows, cells = make_rows(rng, spec, 4, layers=2 if banded else None, num_layers=2)
    q, kv = make_tensors(rng, rows, cells, 4, 4, 2, 16, num_layers=2)
    plan = TorchBackend(4).plan(rows, "cpu")
    assert len(plan.prefill) == len({one for one in spec if one[0] > 1})
    compare(rows, q, kv, 4, layer=1)
