"""Ranks of an instance: together they are the whole model, alone each has its share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.engine.head import Head
from common.engine.model import Decoder
from common.engine.relayout import plan
from common.engine.shard import ShardedSource, kv_heads_of, ordered_sum, rank_spec
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, RandomSource
from common.errors import ConfigError
from tests.engine.worlds import _dense, dense_logits

HEADS = [(8, 8), (8, 2), (8, 1), (4, 2)]  # GQA ratios 1, 4, 8, and one whose KV heads are fewer than the ranks
FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True, "tied": True}, "qwen3": {"qk_norm": True}}


def decoder(family: str, heads: tuple[int, int]) -> DecoderSpec:
    return DecoderSpec(family, family, 3, 64, 48, *heads, 16, 256, max_position=1024, **FAMILIES[family])


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_sum_is_the_whole_model(family: str, heads: tuple[int, int], tp: int) -> None:
    """Logits within rounding: fp32 sums in another order. The residual is added once."""
    spec = decoder(family, heads)
    source = MemorySource(RandomSource(spec, 3))
    ids = torch.randint(0, spec.vocab_size, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    own, sources = rank_spec(spec, tp), [MemorySource(ShardedSource(source, tp, rank)) for rank in range(tp)]
    runner, past = Decoder(own, "cpu"), [[None] * spec.num_layers for _ in range(tp)]
    with torch.inference_mode():
        x, rotation = runner.embed(torch.tensor(ids), source.embedding()), runner.rotation(torch.arange(len(ids)))
        for layer in range(spec.num_layers):
            weights = [one.layout.views(one.slab(layer)) for one in sources]
            parts = [runner.attention_part(weights[rank], x, rotation, _dense(own, past[rank], layer))
                     for rank in range(tp)]  # fmt: skip
            x += ordered_sum(parts)
            x += ordered_sum([runner.mlp_part(weights[rank], x) for rank in range(tp)])
        logits = runner.logits(x, source.final_norm(), Head(source.head()))
    want = dense_logits(spec, source, ids)
    assert float((logits - want).abs().max()) < 3e-5 * float(want.abs().max())
    assert torch.equal(logits.argmax(1), want.argmax(1))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_each_rank_holds_its_share(heads: tuple[int, int], tp: int) -> None:
    """Bytes: all that is cut adds up to the whole; replicated are norms, and KV heads where they are too few."""
    spec = decoder("qwen2", heads)
    whole = MemorySource(RandomSource(spec, 0))
    views = whole.layout.views(whole.slab(1))
    parts = []
    for rank in range(tp):
        one = MemorySource(ShardedSource(whole, tp, rank))
        parts.append(one.layout.views(one.slab(1)))
    assert torch.equal(torch.cat([part.o for part in parts]), views.o)
    assert torch.equal(torch.cat([part.down for part in parts]), views.down)
    for half in (0, 1):
        joined = torch.cat([part.gate_up.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(joined, views.gate_up.chunk(2, dim=1)[half])
    queries = rank_spec(spec, tp).q_size
    assert torch.equal(torch.cat([part.qkv[:, :queries] for part in parts], dim=1), views.qkv[:, : spec.q_size])
    keys = views.qkv[:, spec.q_size : spec.q_size + spec.kv_size].reshape(spec.hidden_size, spec.num_kv_heads, -1)
    group = spec.num_heads // spec.num_kv_heads
    for rank, part in enumerate(parts):
        low, high = kv_heads_of(spec.num_kv_heads, tp, rank)
        got = part.qkv[:, queries : queries + rank_spec(spec, tp).kv_size]
        assert torch.equal(got.reshape(spec.hidden_size, high - low, -1), keys[:, low:high])
        reads = {head // group for head in range(rank * spec.num_heads // tp, (rank + 1) * spec.num_heads // tp)}
        assert reads == set(range(low, high)), "a rank's queries read other KV heads than it holds"


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tp_to", [1, 2, 4, 8])
@pytest.mark.parametrize("tp_from", [1, 2, 4, 8])
def test_a_relayout_gives_each_rank_its_heads_once(tp_from: int, tp_to: int, kv_heads: int) -> None:
    slices = plan(tp_from, tp_to, kv_heads)
    for dest in range(tp_to):
        got = [kv_heads_of(kv_heads, tp_from, one.source)[0] + head
               for one in slices if one.dest == dest for head in range(one.low, one.high)]  # fmt: skip
        assert got == list(range(*kv_heads_of(kv_heads, tp_to, dest)))
    held = kv_heads_of(kv_heads, tp_from, 0)
    assert all(0 <= one.low < one.high <= held[1] - held[0] for one in slices)
    assert sum(one.num for one in slices) == tp_to * max(1, kv_heads // tp_to)
    if tp_from == tp_to:
        assert all(one.source == one.dest for one in slices), "bytes leave a rank that has its twin over there"


def test_heads_that_do_not_divide_are_refused() -> None:
    spec = decoder("llama", (8, 2))
    for tp in (3, 16):
        with pytest.raises(ConfigError, match=rf"do not divide over tp={tp}"):
            rank_spec(spec, tp)
    with pytest.raises(ConfigError, match="do not divide over tp=4"):
        rank_spec(replace(spec, intermediate_size=50), 4)
