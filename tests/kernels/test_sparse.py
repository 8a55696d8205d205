"""Decodes without a gather: equal to the gathered way and to the definition, whatever lies around their keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels import oracle, sparse
from common.kernels.reference import TorchBackend
from tests.kernels.case import make_rows, make_tensors


def run(rows, q, kv, block, layer=0):
    backend = TorchBackend(block)
    return backend.run(backend.plan(rows, "cpu"), q, kv, layer, q.shape[-1] ** -0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 3)), min_size=1, max_size=12), st.sampled_from([1, 4, 16]),
       st.sampled_from([(2, 2), (4, 2), (6, 6)]), st.sampled_from([16, 64]), st.booleans(), st.sampled_from([8, 1024]),
       st.integers(0, 1 << 20))  # fmt: skip
def test_both_ways_agree(spans, block, heads, size, banded, chunk, seed):
    rng = np.random.default_rng(seed)
    spec = [(1, start * block + length, start * block, length) for length, start in spans]
    rows, cells = make_rows(rng, spec, block, layers=2 if banded else None, num_layers=2)
    q, kv = make_tensors(rng, rows, cells, block, *heads, size, num_layers=2)
    layer = int(rng.integers(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "CHUNK", chunk)
        assert sparse.serves(q, kv)
        o, lse = run(rows, q, kv, block, layer)
        patch.setattr(sparse, "QUERY_HEADS", 0)
        assert not sparse.serves(q, kv)
        other_o, other_lse = run(rows, q, kv, block, layer)
    torch.testing.assert_close(o, other_o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=1e-5)


def test_a_long_row_beside_short_ones_is_as_exact_as_the_gathered_way(monkeypatch):
    rng = np.random.default_rng(0)
    rows, cells = make_rows(rng, [(1, 40_000, 0, 40_001), (1, 6, 0, 7), (1, 3_000, 0, 3_001)], 16)
    q, kv = make_tensors(rng, rows, cells, 16, 2, 2, 32)
    kv[:, 1] = kv[:, 1].abs() + 1  # sums that grow
    true_o, true_lse = oracle.attend(rows, q, kv, 0, 32**-0.5)
    errors = []
    for query_heads in (sparse.QUERY_HEADS, 0):
        monkeypatch.setattr(sparse, "QUERY_HEADS", query_heads)
        o, lse = run(rows, q, kv, 16)
        errors.append(float((o - true_o).abs().max()))
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    assert errors[0] <= 2 * errors[1] + 1e-6


def test_a_key_that_a_row_does_not_see_cannot_reach_it():
    """The test of the tests: NaN in a cell that is read does show, one key behind what is read does not."""
    rng = np.random.default_rng(1)
    rows, cells = make_rows(rng, [(1, 5, 0, 6), (1, 9, 0, 10)], 4)
    q, kv = make_tensors(rng, rows, cells, 4, 2, 2, 16)
    want, _ = run(rows, q, kv, 4)
    last = int(rows.tables[0, 1])
    kv[last, :, 2:] = float("nan")
    assert torch.equal(run(rows, q, kv, 4)[0], want) and not want.isnan().any()
    kv[last, 1, 1] = float("nan")
    o, _ = run(rows, q, kv, 4)
    assert o[0].isnan().all() and not o[1].isnan().any()


@pytest.mark.parametrize("change", ["half", "double", "many query heads"])
def test_who_is_not_served_here(change):
    q, kv = torch.zeros(1, 4, 8), torch.zeros(2, 2, 4, 2, 8)
    assert sparse.serves(q, kv)
    if change == "many query heads":
        assert not sparse.serves(torch.zeros(1, 2 * sparse.QUERY_HEADS + 2, 8), torch.zeros(2, 2, 4, 1, 8))
    else:
        assert not sparse.serves(getattr(q, change)(), getattr(kv, change)())
