"""Sampling: the right distribution, and draws that no batching can change."""

from __future__ import annotations

import pytest
import torch

from common.engine.sampler import Draw, SamplingParams, greedy, sample, uniform
from common.errors import ConfigError

torch.set_num_threads(1)
LOGITS = torch.randn(40, 333, generator=torch.Generator().manual_seed(0)) * 3
KINDS = [
    SamplingParams(), SamplingParams(1.0), SamplingParams(0.7, top_k=5), SamplingParams(1.3, top_p=0.8),
    SamplingParams(0.9, top_k=50, top_p=0.9, seed=7),
]  # fmt: skip
DRAWS = [Draw(KINDS[row % len(KINDS)], request=row, position=100 + row) for row in range(40)]


def test_a_row_does_not_depend_on_its_batch():
    together = sample(LOGITS, DRAWS)
    alone = torch.cat([sample(LOGITS[row : row + 1], DRAWS[row : row + 1]) for row in range(40)])
    assert torch.equal(together, alone)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(LOGITS[order], [DRAWS[row] for row in order]), together[order])


def test_seed_request_and_position_each_change_the_draw():
    base = uniform(0, 1, 2)
    assert len({base, uniform(1, 1, 2), uniform(0, 2, 2), uniform(0, 1, 3), uniform(1, 0, 2), uniform(0, 2, 1)}) == 6
    draws = torch.tensor([uniform(5, request, position) for request in range(100) for position in range(100)])
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.histc(draws, 10, 0, 1).sub(1000).abs().max() < 150


@pytest.mark.parametrize("params", KINDS[1:], ids=str)
def test_frequencies_are_those_of_the_kept_distribution(params):
    logits, count = LOGITS[:1, :12], 6000
    drawn = sample(logits.expand(count, -1), [Draw(params, request, 0) for request in range(count)])
    probs = (logits[0].double() / params.temperature).softmax(-1)
    ordered, index = probs.sort(descending=True)
    keep = torch.arange(12) < (params.top_k or 12)
    ordered = ordered * keep / (ordered * keep).sum()
    ordered = ordered * (ordered.cumsum(0) - ordered < params.top_p)
    expected = torch.zeros(12, dtype=torch.float64).scatter(0, index, ordered / ordered.sum())
    seen = torch.bincount(drawn, minlength=12) / count
    assert (seen - expected).abs().max() < 0.02
    assert (seen[expected == 0] == 0).all()


@pytest.mark.parametrize("vocab", [64, 1023, 1024, 1280, 1300])
def test_greedy_is_the_first_greatest(vocab):
    logits = torch.randint(0, 200, (300, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    logits[0, -1] = logits[1, 0] = 500.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert greedy(logits).tolist() == expected
    assert greedy(torch.full((2, vocab), float("-inf"))).tolist() == [0, 0]


def test_the_likeliest_token_is_always_kept():
    for params in (SamplingParams(5.0, top_k=1), SamplingParams(5.0, top_p=1e-9)):
        draws = [Draw(params, row, 0) for row in range(40)]
        assert torch.equal(sample(LOGITS, draws), greedy(LOGITS))


def test_half_precision_and_masked_logits():
    logits = torch.full((1, 50), float("-inf"), dtype=torch.bfloat16)
    logits[0, [3, 30]] = 1.0
    drawn = {sample(logits, [Draw(SamplingParams(1.0), row, 0)]).item() for row in range(50)}
    assert drawn == {3, 30}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_values_that_mean_nothing_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)
