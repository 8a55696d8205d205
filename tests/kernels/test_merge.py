"""Merging: the parts' union is the whole, however the keys are cut, in whatever order, however far apart the logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ContractError
from common.kernels import oracle
from common.kernels.merge import _merge_any, _merge_distinct, merge, merge_into
from common.kernels.plan import Rows
from common.kernels.reference import TorchBackend
from tests.kernels.case import make_rows, make_tensors
from tests.kernels.test_reference import plain_attention

INF = float("inf")


def empty(tokens, heads=2, size=8, dtype=torch.float32):
    return torch.zeros(tokens, heads, size, dtype=dtype), torch.full((tokens, heads), -INF, dtype=dtype)


def part(tokens, seed, heads=2, size=8, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    lse = torch.randn(tokens, heads, generator=generator) + shift
    return torch.randn(tokens, heads, size, generator=generator), lse


def attend(rows, q, kv, block):
    backend = TorchBackend(block)
    return backend.run(backend.plan(rows, "cpu"), q, kv, 0, q.shape[-1] ** -0.5)


def cut_rows(rows, block, cuts):
    """The same queries over spans [cuts[i], cuts[i + 1]) of blocks, of every row: rows in order of the cuts."""
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        length = np.clip(rows.kv_len - start * block, 0, (stop - start) * block).astype(np.int32)
        shifted = (rows.kv_start + start * block).astype(np.int32)
        pieces.append(rows._replace(kv_start=shifted, kv_len=length, tables=rows.tables[:, start:stop]))
    joined = [np.concatenate(fields) for fields in zip(*(piece[:5] for piece in pieces))]
    width = max(piece.tables.shape[1] for piece in pieces)
    tables = [np.pad(p.tables, ((0, 0), (0, width - p.tables.shape[1])), constant_values=-1) for p in pieces]
    return Rows(*joined, np.concatenate(tables))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 1, 4, 7]), st.integers(0, 40)), min_size=1, max_size=4),
       st.lists(st.integers(0, 12), max_size=5), st.sampled_from([1.0, 300.0]), st.integers(0, 1 << 20))  # fmt: skip
def test_a_partition_of_the_keys_merges_to_the_whole(queries, cuts, spread, seed):
    rng, block = np.random.default_rng(seed), 4
    rows, cells = make_rows(rng, [(n, pos, 0, pos + n) for n, pos in queries], block)
    q, kv = make_tensors(rng, rows, cells, block, 4, 2, 64, spread=spread)
    whole_o, whole_lse = attend(rows, q, kv, block)
    parts = cut_rows(rows, block, [0, *sorted(cuts), rows.tables.shape[1] + 12])
    o, lse = attend(parts, q, kv, block)
    order = torch.from_numpy(rng.permutation(len(o)))
    total_o, total_lse = empty(len(q), 4, 64)
    merge_into(total_o, total_lse, (torch.arange(len(o)) % len(q))[order], o[order], lse[order])
    torch.testing.assert_close(total_o, whole_o, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total_lse, whole_lse, rtol=1e-5, atol=1e-4)
    listed = merge([(o[i : i + len(q)], lse[i : i + len(q)]) for i in range(0, len(o), len(q))])
    torch.testing.assert_close(listed[0], whole_o, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(listed[1], whole_lse, rtol=1e-5, atol=1e-4)


def test_the_logits_of_the_partition_really_lie_far_apart():
    """The law above is only worth something if some shard maxima differ by more than 50."""
    rng = np.random.default_rng(0)
    rows, cells = make_rows(rng, [(1, 31, 0, 32)], 4)
    q, kv = make_tensors(rng, rows, cells, 4, 4, 2, 64, spread=300.0)
    _, lse = attend(cut_rows(rows, 4, list(range(9))), q, kv, 4)
    assert (lse.amax(0) - lse.amin(0)).min() > 50


def test_a_quarter_million_keys_in_uneven_shards():
    rng, block, total = np.random.default_rng(4), 64, 1 << 18
    num_blocks = total // block
    rows, cells = make_rows(rng, [(1, total - 1, 0, total)], block)
    kv = torch.randn(cells, 2, block, 1, 16)
    q = torch.randn(1, 2, 16) * 4
    whole_o, whole_lse = attend(rows, q.double(), kv.double(), block)
    cuts = [0, *sorted(rng.choice(np.arange(1, num_blocks), 40, replace=False).tolist()), num_blocks]
    o, lse = attend(cut_rows(rows, block, cuts), q, kv, block)
    total_o, total_lse = empty(1, 2, 16)
    for i in rng.permutation(len(o)).tolist():
        merge_into(total_o, total_lse, torch.tensor([0]), o[i : i + 1], lse[i : i + 1])
    torch.testing.assert_close(total_o.double(), whole_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total_lse.double(), whole_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_shards_in_half_precision_err_at_most_twice_as_much_as_plain_torch(spread):
    rng, block, total = np.random.default_rng(5), 16, 4096
    rows, cells = make_rows(rng, [(1, total - 1, 0, total)] * 4, block)
    q, kv = make_tensors(rng, rows, cells, block, 4, 2, 64, dtype=torch.float16, spread=spread)
    true_o, _ = oracle.attend(rows, q, kv, 0, 0.125)
    cuts = [0, *sorted(rng.choice(np.arange(1, total // block), 9, replace=False).tolist()), total // block]
    o, lse = TorchBackend(block).run(TorchBackend(block).plan(cut_rows(rows, block, cuts), "cpu"), q, kv, 0, 0.125)
    ours, _ = merge([(o[i : i + 4], lse[i : i + 4]) for i in range(0, len(o), 4)])
    plain = torch.cat([plain_attention(rows, row, q, kv, 0.125) for row in range(4)])
    assert ours.dtype == torch.float16
    assert (ours.double() - true_o).abs().max() <= 2 * (plain.double() - true_o).abs().max()


def test_minus_infinity_changes_no_bit():
    o, lse = part(3, 0)
    o_before, lse_before = o.clone(), lse.clone()
    nothing = torch.full((2, 2, 8), float("nan")), torch.full((2, 2), -INF)
    merge_into(o, lse, torch.tensor([2, 0]), *nothing)
    assert torch.equal(o, o_before) and torch.equal(lse, lse_before)
    nan = torch.full((3, 2, 8), float("nan")), torch.full((3, 2), -INF)
    for parts in ([(o, lse), nan], [nan, (o, lse)], [nan, nan, (o, lse), nan]):
        merged = merge(parts)
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)


def test_tokens_without_a_part_change_no_bit():
    o, lse = part(4, 0)
    before = o.clone(), lse.clone()
    merge_into(o, lse, torch.tensor([1]), *part(1, 1))
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(o[kept], before[0][kept]) and torch.equal(lse[kept], before[1][kept])
    assert not torch.equal(o[1], before[0][1])


def test_both_empty_stays_empty_without_nan():
    o, lse = empty(2)
    merge_into(o, lse, torch.tensor([0, 1, 1]), *empty(3))
    assert (o == 0).all() and (lse == -INF).all()
    o, lse = merge([empty(2), empty(2)])
    assert (o == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("gap", [0.0, 60.0, 1e4])
def test_far_apart_parts(gap):
    a, b = part(3, 0), part(3, 1, shift=-gap)
    lse = torch.logaddexp(a[1].double(), b[1].double())
    o = a[0] * torch.exp(a[1] - lse)[..., None] + b[0] * torch.exp(b[1] - lse)[..., None]
    for first, second in ((a, b), (b, a)):
        merged_o, merged_lse = first[0].clone(), first[1].clone()
        merge_into(merged_o, merged_lse, torch.arange(3), *second)
        torch.testing.assert_close(merged_o.double(), o.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged_lse.double(), lse, rtol=1e-5, atol=1e-6)


def test_one_token_may_have_several_parts_in_one_call():
    parts = [part(1, seed) for seed in range(3)]
    o, lse = empty(2)
    merge_into(o, lse, torch.tensor([1, 1, 1], dtype=torch.int32), *(torch.cat(x) for x in zip(*parts)))
    expected = merge(parts)
    torch.testing.assert_close(o[1:], expected[0])
    torch.testing.assert_close(lse[1:], expected[1])
    assert (o[0] == 0).all() and (lse[0] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    o, lse = part(3, 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine_o, mine_lse = o.to(dtype, copy=True), lse.to(wide, copy=True)
    merge_into(mine_o, mine_lse, torch.arange(3), o.to(dtype), lse.to(wide))
    assert mine_o.dtype == dtype and mine_lse.dtype == wide
    torch.testing.assert_close(mine_o, o.to(dtype))
    torch.testing.assert_close(mine_lse, lse.to(wide) + np.log(2))


def test_the_two_ways_agree():
    o, lse = part(6, 0)
    lse[1] = lse[4] = -INF
    o[1] = o[4] = 0
    more_o, more_lse = part(3, 1, shift=3.0)
    more_lse[2] = -INF
    results = []
    for way in (_merge_distinct, _merge_any):
        mine = o.clone(), lse.clone()
        way(*mine, torch.tensor([5, 1, 4]), more_o, more_lse)
        results.append(mine)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_nothing_to_merge():
    with pytest.raises(ContractError):
        merge([])
    with pytest.raises(ContractError):
        merge([(torch.zeros(2, 2, 8), torch.zeros(2, 3))])
    o, lse = part(2, 0)
    merge_into(o, lse, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 8), torch.zeros(0, 2))
    assert torch.equal(o, part(2, 0)[0])
